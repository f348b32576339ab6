"""Pictures as people see them, and the files among them that are none."""

from __future__ import annotations

import os
import socket
import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from variegate.pictures import FORMATS, BadPictureError, Pictures, find, inspect, load

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(path):
    """A picture's values, which are the same in all three colours."""
    red, green, blue = np.moveaxis(np.asarray(load(path)), -1, 0)
    assert (red == green).all()
    assert (red == blue).all()
    return red


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more, rows=b"\0" * 17):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND")
    )


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_look_like_eight(tmp_path, name):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert (grey(tmp_path / name) == RAMP).all()
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / name)  # the darkest
    assert grey(tmp_path / name).max() == 1


@pytest.mark.parametrize(
    "values",
    [RAMP / np.float32(255), RAMP.astype(np.float32), RAMP.astype(np.float32) * 257, RAMP.astype(np.int32)],
)
def test_floats_and_integers_whose_white_can_be_told(tmp_path, values):
    Image.fromarray(values.astype(np.float32) if values.dtype.kind == "f" else values).save(tmp_path / "a.tif")
    assert (grey(tmp_path / "a.tif") == RAMP).all()


@pytest.mark.parametrize("worst", [1.5, -0.5, np.nan, np.inf, 1e9])
def test_floats_whose_white_cannot_be_told_are_refused(tmp_path, worst):
    values = RAMP / np.float32(255)
    values[3, 3] = worst
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BadPictureError, match=r"a\.tif can't be read as a picture: its values go from .* to .* white"):
        load(tmp_path / "a.tif")


def shape(mode):
    """A black picture of which only a corner can be seen, in one of the ways to say so."""
    seen = Image.new("L", (16, 16), 0)
    seen.paste(255, (0, 0, 8, 8))
    if mode in ("LA", "RGBA"):
        picture = Image.new(mode, (16, 16), 0)
        picture.putalpha(seen)
        return picture, {}
    if mode == "P":
        picture = seen.convert("P")
        picture.putpalette([0, 0, 0] * 256)
        return picture, {"transparency": 0}
    picture = Image.fromarray(np.where(np.asarray(seen) > 0, 0, 300).astype(np.uint16)) if mode == "I;16" else None
    if picture is None:
        picture = Image.new(mode, (16, 16), "black")
        picture.paste("red" if mode == "RGB" else 9, (0, 8, 16, 16))
        picture.paste("red" if mode == "RGB" else 9, (8, 0, 16, 8))
    return picture, {"transparency": {"RGB": (255, 0, 0), "L": 9, "I;16": 300}[mode]}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "png") for mode in ("RGBA", "LA", "P", "RGB", "L", "I;16")]
    + [("RGBA", "webp"), ("RGBA", "tif"), ("P", "gif"), ("RGBA", "avif")],
)
def test_what_is_transparent_is_white(tmp_path, mode, suffix):
    picture, told = shape(mode)
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    picture.save(tmp_path / f"a.{suffix}", **told, **lossless)
    expected = np.full((16, 16), 255, np.uint8)
    expected[:8, :8] = 0
    assert (grey(tmp_path / f"a.{suffix}") == expected).all()


def test_what_is_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "a.png")  # a fifth of red
    assert load(tmp_path / "a.png").getpixel((0, 0)) == (255, 204, 204)


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_stand_upright(tmp_path, code, suffix):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # top left
    # As a camera stores it: orientation names where the first row and the first column of the file belong.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[code]  # fmt: skip
    exif = Image.Exif()
    exif[0x112] = code
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif)
    seen = grey(tmp_path / f"a.{suffix}")
    assert seen.shape == (16, 32)
    assert (abs(seen.astype(int) - upright) < 8).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\xffMM\0*\0\0\0\x08\0\0"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_reason_to_refuse(tmp_path, suffix, exif):
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{suffix}", exif=exif)
    assert load(tmp_path / f"a.{suffix}").getpixel((5, 5))[0] > 250
    assert inspect(tmp_path / f"a.{suffix}").texts == {}


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("blue", "red", "green"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, duration=100)
    assert load(tmp_path / f"a.{suffix}").getpixel((8, 8)) == pytest.approx((0, 0, 255), abs=3)


def test_all_formats_by_content_whatever_the_suffix(tmp_path):
    for form in FORMATS:
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", format=form)
        assert load(tmp_path / "a.png").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)
        assert inspect(tmp_path / "a.png").size == (16, 16)
    for form in ("EPS", "PDF", "ICO", "TGA", "PCX"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", format=form)
        with pytest.raises(BadPictureError, match=r"a\.png can't be read as a picture: it is none of PNG, JPEG,"):
            load(tmp_path / "a.png")


def test_large_texts_are_no_reason_to_refuse(tmp_path):
    bomb = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * (1 << 25)))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"a" * (1 << 25)))
    many = b"".join(chunk(b"zTXt", b"%d\0\0" % place + zlib.compress(b"a" * 900_000)) for place in range(90))
    (tmp_path / "a.png").write_bytes(png(16, 1, bomb, profile, many))
    assert load(tmp_path / "a.png").size == (16, 1)
    tracemalloc.start()
    assert inspect(tmp_path / "a.png").texts == {"prompt": ""}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def broken():
    good = png(16, 1)
    pixels = good.index(b"IDAT")
    photo = Image.effect_noise((64, 64), 90).convert("RGB")
    yield "nothing.png", b"", "it is none of PNG"
    yield "half.png", good[: len(good) // 2], "it is truncated"
    yield "no-end.png", good[:-12], "it is truncated"
    yield "checksum.png", good[: pixels + 5] + b"\xff" + good[pixels + 6 :], "a checksum is wrong"
    yield "bomb.png", png(20000, 20000, rows=b"\0" * 20001), "decompression bomb"
    yield "huge.png", png(1 << 31, 1), ""
    yield "wide.png", png((1 << 31) - 1, (1 << 31) - 1), "decompression bomb"
    yield (
        "huge.bmp",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, *[0] * 6),
        "bomb",
    )
    yield "huge.ppm", b"P6 2147483647 2147483647 255 ", "bomb"
    yield "words.pgm", b"P5 a b c", ""
    for suffix in ("jpg", "gif", "tif", "bmp", "webp", "avif", "ppm"):
        file = BytesIO()
        photo.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
        yield f"half.{suffix}", file.getvalue()[: len(file.getvalue()) // 2], ""


@pytest.mark.parametrize(
    ("name", "data", "reason"), broken(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_broken_files_are_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadPictureError, match=rf"{name} can't be read as a picture: .*{reason}.*\.$"):
        load(tmp_path / name)


def test_files_that_are_too_large_or_not_there(tmp_path):
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBP")
        file.truncate(1 << 40)
    with pytest.raises(BadPictureError, match=r"sparse\.webp has 1099511627776 bytes; a picture has at most 536870912"):
        load(tmp_path / "sparse.webp")
    with pytest.raises(BadPictureError, match=r"none\.png can't be read as a picture: No such file"):
        load(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadPictureError, match=r"pipe\.png can't be read as a picture: it is no file"):
        load(tmp_path / "pipe.png")


def test_pictures_are_read_when_they_are_asked_for(tmp_path):
    for place, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / f"{place}.png")
    pictures = Pictures([tmp_path / f"{place}.png" for place in range(4)])  # one too many
    assert len(pictures) == 4
    assert [picture.getpixel((0, 0)).index(255) for picture in pictures[:3]] == [0, 1, 2]
    assert pictures[2].getpixel((0, 0)) == (0, 0, 255)
    assert len(pictures[2:]) == 2
    with pytest.raises(BadPictureError):
        pictures[3]


def test_a_folder_is_searched_and_what_is_left_out_is_counted(tmp_path):
    folder = tmp_path / "a"
    for name in ("b/c", ".hidden", "__MACOSX", "photo.png"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.png").touch()
    names = ("1.PNG", "2.jfif", "3.tiff", "4.avif", "b/c/5.gif", "\N{CAT FACE} [x].webp")
    for name in (*names, "._1.png", "Thumbs.db", "notes.TXT", "read me", "a.eps", "sheet.png"):
        (folder / name).touch()
    for gallery in ("b", "b/c"):
        (folder / gallery / "run.json").touch()
        (folder / gallery / "sheet.png").touch()
    with open(os.fsencode(folder) + b"/\xff.png", "wb"):
        pass
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s.png"))
    (folder / "to-b").symlink_to(folder / "b")
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "6.ppm").touch()
    (folder / "7.bmp").symlink_to(folder / "1.PNG")
    found = find(folder)
    expected = {*(folder / name for name in names), folder / "b/c/x.png", folder / "7.bmp"}
    expected |= {folder / os.fsdecode(b"\xff.png"), folder / "up/elsewhere/6.ppm"}
    assert set(found.files) == expected
    assert list(found.files) == sorted(found.files)
    assert dict(found.left_out) == {
        "hidden": 2,
        "__MACOSX": 1,
        "folders named like a picture": 1,
        "special files": 2,
        "named sheet.png": 1,
        "linked folders that are there already": 2,
        "of other kinds (*, *.db, *.eps, *.txt)": 4,
    }
    assert "2 hidden, " in str(found)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        find(tmp_path / "nowhere")
