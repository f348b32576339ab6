"""Hostile picture files: whatever is in them, they are scored or refused in one sentence that names them.

New ones: VARIEGATE_FUZZ_SEED=7 VARIEGATE_FUZZ_COUNT=5000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from variegate.cli import app
from variegate.pictures import FORMATS, BadPictureError, inspect, load
from variegate.scoring import score

SEED = int(os.environ.get("VARIEGATE_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("VARIEGATE_FUZZ_COUNT", "300"))
SECONDS = 5  # for one file, on a slow machine
SUFFIX = {"JPEG": "jpg", "TIFF": "tif"}
MODES = {
    "PNG": ("RGB", "RGBA", "LA", "P", "1", "I;16"), "TIFF": ("RGB", "RGBA", "F", "I;16", "CMYK", "LAB", "1"),
    "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "P"), "GIF": ("P", "L"),
    "AVIF": ("RGB", "RGBA"), "PPM": ("RGB", "L", "I", "1"),
}  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TEXT = (
    "",
    "a cat",
    "\0",
    "\x1b[2J",
    "\ud7ff\U0010ffff",
    "a cat\nNegative prompt: no\nSteps: 1",
    "{",
    "null",
    "[]",
    "{}",
)


def pictures(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of picture files, each broken in its own way or in none; the same for the same seed."""
    for place in range(count):
        chance = random.Random(f"{seed} {place}")
        form = chance.choice(FORMATS)
        data = _mutated(chance, _saved(chance, form))
        suffix = (
            SUFFIX.get(form, form.lower()) if chance.random() < 0.8 else chance.choice(("png", "jpg", "gif", "tif"))
        )
        yield f"{place}.{suffix}", data


def _saved(chance: random.Random, form: str) -> bytes:
    """A small picture with texts, as Pillow saves it."""
    mode = chance.choice(MODES[form])
    size = chance.choice(((1, 1), (3, 5), (17, 16)))
    values = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "F":
        image = Image.fromarray(values[..., 0] * np.float32(chance.choice((1, 1 / 255, 1e38, float("nan"), -1))))
    elif mode.startswith("I"):
        image = Image.fromarray(values[..., 0].astype(np.int32 if mode == "I" else np.uint16) * chance.choice((1, 257)))
    elif mode == "LAB":
        image = Image.frombytes("LAB", size, values.tobytes())
    else:
        image = Image.fromarray(values).convert(mode)
    options = {}
    info = PngImagePlugin.PngInfo()
    for key in ("variegate", "parameters", "prompt", "x"):
        if chance.random() < 0.4:
            info.add_text(key, _text(chance, key), zip=chance.random() < 0.5)
    if form == "PNG":
        options["pnginfo"] = info
    if form in ("PNG", "GIF") and chance.random() < 0.3:
        options["transparency"] = chance.randrange(256)
    if form in ("PNG", "GIF", "WEBP") and chance.random() < 0.2:
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    if form in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF") and chance.random() < 0.4:
        exif = Image.Exif()
        exif[0x112] = chance.randrange(10)
        exif[0x110] = "prompt:" + _text(chance, "prompt").replace("\0", "")[:1000]
        comment = chance.choice((b"UNICODE\0", b"ASCII\0\0\0", b"")) + chance.randbytes(chance.randrange(9))
        if form != "TIFF":  # Pillow can't save that
            exif[0x8769] = {0x9286: comment}
        options["exif"] = exif
    file = BytesIO()
    try:
        image.save(file, form, **options)
    except (OSError, ValueError, TypeError, struct.error):  # what Pillow does not save, nobody gets
        file = BytesIO()
        image.convert("RGB").save(file, form)
    return file.getvalue()


def _text(chance: random.Random, key: str) -> str:
    """A text that may be meant as a prompt, a graph or none; deep and long ones among them."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(TEXT)
    if kind == 1 and key != "variegate":
        return chance.choice(("[", '{"a":', '{"1":{"inputs":{"text":[')) * chance.choice((10, 100_000))
    if kind == 2:
        return "".join(chr(chance.choice((0, 10, 27, 65, 255, 0x202E, 0x1F600))) for _ in range(chance.randrange(50)))
    nodes = [str(number) for number in range(chance.randrange(1, 9))]

    def value() -> object:
        link = [chance.choice((*nodes, 1, None, [])), chance.choice((0, 1, -1, "0", None))]
        return chance.choice((link, link, link, chance.choice(TEXT), None, 1e999, [], {}))

    names = ("positive", "negative", "text", "conditioning", "guider", "latent_image", "", "clip")
    graph = {
        node: {
            "class_type": chance.choice(("KSampler", "CLIPTextEncode", "Reroute", None, 3)),
            "inputs": {name: value() for name in chance.sample(names, chance.randrange(len(names)))},
        }
        for node in nodes
    }
    return json.dumps(graph if chance.random() < 0.9 else {**graph, "0": chance.choice((None, [], 3, {"inputs": 3}))})


def _mutated(chance: random.Random, data: bytes) -> bytes:
    """A file with bytes changed, cut, doubled or put in; a PNG's checksums often made right again."""
    found = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 2, 8))):
        place = chance.randrange(len(found) + 1) if chance.random() < 0.5 else min(chance.randrange(64), len(found))
        kind = chance.randrange(6)
        if kind == 0:
            found[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            order = chance.choice("<>")
            found[place : place + 4] = struct.pack(f"{order}I", chance.choice(NUMBERS))
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            del found[place : place + chance.randrange(1, 40)]
        elif kind == 4:
            found[place:place] = found[place : place + chance.randrange(1, 200)]
        else:
            found[place:place] = chance.randbytes(chance.randrange(1, 20))
    if found.startswith(b"\x89PNG\r\n\x1a\n") and chance.random() < 0.7:
        place = 8
        while place + 12 <= len(found):
            end = place + 12 + int.from_bytes(found[place : place + 4], "big")
            if end > len(found):
                break
            found[end - 4 : end] = struct.pack(">I", zlib.crc32(found[place + 4 : end - 4]))
            place = end
    return bytes(found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, data in pictures(SEED, COUNT):
        (folder / name).write_bytes(data)
    return [folder / name for name, _ in pictures(SEED, COUNT)]


def colours(images: list[Image.Image]) -> torch.Tensor:
    """Features that cost nothing."""
    return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images], dtype=torch.float32) + 1


@pytest.mark.filterwarnings("ignore")
def test_every_file_is_read_or_refused_by_its_name(files: list[Path]) -> None:
    good, refusals = [], []
    for path in files:
        before = time.perf_counter()
        try:
            assert all(isinstance(text, str) for text in inspect(path).texts.values())
            assert load(path).mode == "RGB"
            good.append(path)
        except BadPictureError as error:
            refusals.append((path, str(error)))
        assert time.perf_counter() - before < SECONDS, path.name
    assert [path for path, error in refusals if str(path) not in error or "\n" in error] == []
    assert len(files) / 10 < len(good) < len(files) * 0.9  # there are some of each


@pytest.mark.filterwarnings("ignore")
def test_what_can_be_read_is_scored(files: list[Path], tmp_path: Path) -> None:
    for at in range(0, len(files), 25):
        folder = tmp_path / str(at)
        folder.mkdir()
        Image.new("RGB", (4, 4), "red").save(folder / "red.png")
        Image.new("RGB", (4, 4), "blue").save(folder / "blue.png")
        for path in files[at : at + 25]:
            (folder / path.name).symlink_to(path)
        before = time.perf_counter()
        with warnings.catch_warnings(record=True):
            found = score([folder], extractor=colours, skip_bad=True)
        assert sum(one.images for one in found) > 2
        assert all(one.grouping is not None and one.grouping.isprintable() for one in found)
        assert time.perf_counter() - before < 25 * SECONDS


def test_the_command_ends_in_one_sentence_and_writes_nothing_else(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "red.png")
    Image.new("RGB", (4, 4), "blue").save(folder / "blue.png")
    refused = 0
    for path in files[:: max(1, len(files) // 60)]:
        (folder / path.name).symlink_to(path)
        before = time.perf_counter()
        result = CliRunner().invoke(app, ["score", str(folder), "--json", str(tmp_path / "new" / "s.json")])
        assert time.perf_counter() - before < SECONDS, path.name
        if result.exit_code == 0:
            assert [file.name for file in (tmp_path / "new").iterdir()] == ["s.json"]
            (tmp_path / "new" / "s.json").unlink()
            (tmp_path / "new").rmdir()
        else:
            assert result.exit_code == 2, (path.name, result.exception)
            error = result.stderr.splitlines()[-1]
            assert error.startswith("Error: ")
            assert path.name in error
            assert not (tmp_path / "new").exists()
            refused += 1
        (folder / path.name).unlink()
    assert refused
