"""Files of pictures, anybody's: which there are in a folder, what each shows, and the texts that came with it.

Whatever is in a file that can't be read ends in one `BadPictureError` with the file's name. Nothing here trusts a
file: formats that run programs are never tried, and sizes are bounded before anything is unpacked.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, UnidentifiedImageError

from variegate.embedded import MOST_TEXT, SIGNATURE, comment_text, read_png

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
)  # fmt: skip
GROUND = "transparent parts on white"
MOST_BYTES = 1 << 29
ORIENTATION, CAMERA, EXIF, USER_COMMENT = 0x112, 0x110, 0x8769, 0x9286
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BadPictureError(ValueError):
    """A file that has a picture's name and can't be read as one."""


@dataclass(frozen=True)
class Found:
    """What is in a folder.

    Attributes:
        files: those with a picture's suffix, in order.
        left_out: how many names of each kind are not among them.
    """

    files: tuple[Path, ...]
    left_out: Mapping[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))


@dataclass(frozen=True)
class Header:
    """What a file tells before its pixels are looked at.

    Attributes:
        size: width and height as stored.
        texts: those of `TEXTS` that it has; empty where one is too long or can't be unpacked.
    """

    size: tuple[int, int]
    texts: Mapping[str, str]


class Pictures(Sequence[Image.Image]):
    """Files as a sequence of images, each read when it is asked for, so that memory holds one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...
    @overload
    def __getitem__(self, place: slice) -> Pictures: ...
    def __getitem__(self, place: int | slice) -> Image.Image | Pictures:
        return Pictures(self.files[place]) if isinstance(place, slice) else load(self.files[place])


def find(folder: str | Path) -> Found:
    """The pictures in a folder and its subfolders, by their suffixes.

    Left out and counted: hidden names, `__MACOSX`, folders with a picture's suffix, what is no file (a pipe, a
    device), other suffixes, and sheets named sheet.png. A folder that is linked to is followed once. The sheet.png
    and run.json of our own galleries are left out without a count.

    Raises:
        ValueError: if it is no folder, or has one that can't be listed.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder.")
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    other: Counter[str] = Counter()
    folders, links, seen = [Path(folder)], list[Path](), set[tuple[int, int]]()
    while folders or links:
        # What is there in person comes first: a link to it is then the second.
        place = folders.pop() if folders else links.pop(0)
        try:
            identity = place.stat()
            names = sorted(os.listdir(place))
        except OSError as error:
            raise ValueError(f"{place} can't be listed: {error.strerror}.") from error
        if (identity.st_dev, identity.st_ino) in seen:
            left_out["linked folders that are there already"] += 1
            continue
        seen.add((identity.st_dev, identity.st_ino))
        for name in names:
            path = place / name
            pictorial = path.suffix.lower() in SUFFIXES
            if name.startswith("."):
                left_out["hidden"] += 1
            elif name == "__MACOSX":
                left_out[name] += 1
            elif path.is_dir():
                if pictorial:
                    left_out["folders named like a picture"] += 1
                else:
                    (links if path.is_symlink() else folders).append(path)
            elif name in ("sheet.png", "run.json") and "run.json" in names:
                continue
            elif name == "sheet.png":
                left_out["named sheet.png"] += 1
            elif path.exists() and not path.is_file():
                left_out["special files"] += 1
            elif pictorial:
                files.append(path)
            else:
                other[path.suffix.lower()] += 1
    if other:
        kinds = [f"*{suffix}" for suffix in sorted(other)]
        more = f" and {len(kinds) - 8} more" if len(kinds) > 8 else ""
        left_out[f"of other kinds ({', '.join(kinds[:8])}{more})"] = other.total()
    return Found(tuple(sorted(files)), left_out)


def load(path: str | Path) -> Image.Image:
    """A picture as people see it: RGB, upright, the first frame, transparent parts on white.

    16-bit pictures are brought to 8 bits; so are floats in [0, 1], and whole numbers up to 255 or 65,535 in formats
    that don't say their range.

    Raises:
        BadPictureError: if it can't be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(f"{folder}/clear.png")
        ...     load(f"{folder}/clear.png").getpixel((0, 0))
        (255, 255, 255)
    """
    with _opened(path) as (image, _):
        image.load()
        code = _tag(image, ORIENTATION)
        turn = UPRIGHT.get(code) if isinstance(code, int) else None
        deep = image.mode.startswith(("I", "F"))
        shown = _eight_bits(image) if deep else image.convert("LA") if image.mode == "La" else image
        if shown.has_transparency_data:
            ground = Image.new("RGBA", shown.size, "white")
            shown = Image.alpha_composite(ground, shown.convert("RGBA"))
        shown = shown.convert("RGB")
        return shown if turn is None else shown.transpose(turn)


def inspect(path: str | Path) -> Header:
    """Size and texts of a picture, without its pixels.

    Raises:
        BadPictureError: if that much can't be read.
    """
    with _opened(path) as (image, texts):
        if image.format != "PNG":
            comment = _tag(image, USER_COMMENT)
            if isinstance(comment, bytes):
                texts["parameters"] = comment_text(comment)
            elif isinstance(comment, str):
                texts["parameters"] = comment
            graph = _tag(image, CAMERA)
            if isinstance(graph, str) and graph.startswith("prompt:"):  # so ComfyUI saves WebP
                texts["prompt"] = graph.removeprefix("prompt:")
        bounded = {key: text if len(text) <= MOST_TEXT else "" for key, text in texts.items()}
        return Header(image.size, bounded)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Image.Image, dict[str, str]]]:
    """A file's image, and the texts of a PNG; whatever goes wrong until the end is the file's fault."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadPictureError(f"{path} can't be read as a picture: it is no file.")
            if found.st_size > MOST_BYTES:
                raise BadPictureError(f"{path} has {found.st_size} bytes; a picture has at most {MOST_BYTES}.")
            data = file.read()
        texts: dict[str, str] = {}
        if data.startswith(SIGNATURE):
            data, texts = read_png(memoryview(data))
        Image.init()
        # Never EPS, for which Pillow runs a program.
        with Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            yield image, texts
    except BadPictureError:
        raise
    except UnidentifiedImageError as error:
        raise BadPictureError(f"{path} can't be read as a picture: it is none of {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise whatever comes to them on bytes that were made to mislead
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
        raise BadPictureError(f"{path} can't be read as a picture: {reason}.") from error


def _tag(image: Image.Image, tag: int) -> object:
    """A value of the picture's EXIF; None also where that is broken, which is no reason to do without the picture."""
    try:
        exif = image.getexif()
        return exif.get_ifd(EXIF).get(tag) if tag == USER_COMMENT else exif.get(tag)
    except Exception:  # as in `_opened`
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of integers or floats, scaled from black to white."""
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = 65535.0
    elif lowest >= 0 and highest <= 1 and values.dtype.kind == "f":
        white = 1.0
    elif lowest >= 0 and highest <= 65535 and whole:
        white = 255.0 if highest <= 255 else 65535.0
    else:
        raise ValueError(
            f"its values go from {lowest:g} to {highest:g}, and it does not say what is white; "
            "use floats in [0, 1], or whole numbers up to 255 or 65535"
        )
    grey = Image.fromarray(np.rint(values.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
