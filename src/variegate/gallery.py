"""Pictures in groups, each with the recipe to make it again; their contact sheet; their way to the disk."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from variegate.folder import RECORD, SHEET, check_free, replacing_gallery
from variegate.pictures import inspect
from variegate.recipes import parse_recipe

METADATA_KEY = "variegate"


class NoRecipeError(ValueError):
    """A picture that variegate did not make, or whose metadata is gone."""


MARGIN, GAP = 32, 10
SMALL, LARGE = 128, 256  # side of a picture on the sheet: of small models' pictures, of all others
COLUMNS = 8
INK, GREY, FRAME = "#1a1a1a", "#767676", "#e4e4e4"


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt by one method.

    Attributes:
        method: name of the method, "none" for the stock pipeline.
        parameters: all of the method's, as JSON knows them.
        images: the pictures.
        vendi: effective number of distinct pictures, in [1, N]; None for a single picture.
        distance: mean cosine distance between two of them, in [0, 2]; None for a single picture.
        seeds: of the pictures; None: `seed`, `seed + 1`, ... of the gallery.
    """

    method: str
    parameters: Mapping[str, Any]
    images: tuple[Image.Image, ...]
    vendi: float | None
    distance: float | None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt: of the stock pipeline, of the method, or, from the same seeds, of both."""

    prompt: str
    stock: Row | None
    diverse: Row | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows there are, stock first."""
        return tuple(row for row in (self.stock, self.diverse) if row is not None)


@dataclass(frozen=True)
class Gallery:
    """What `generate` made.

    Attributes:
        groups: one per prompt, in the order of the request.
        settings: what all pictures have in common (n, seed, model, steps, versions, ...), as JSON knows it.
    """

    groups: tuple[Group, ...]
    settings: Mapping[str, Any]

    def recipe(self, group: Group, row: Row, index: int) -> dict[str, Any]:
        """What it takes to make a picture again, as its file tells it: no times, paths or host names."""
        return {
            "prompt": group.prompt,
            "index": index,
            "method": row.method,
            "parameters": dict(row.parameters),
            **({"seeds": list(row.seeds)} if row.seeds else {}),
            **self.settings,
        }

    def seeds(self, row: Row) -> tuple[int, ...]:
        """The seed of each of a row's pictures."""
        first = self.settings["seed"]
        return row.seeds or tuple(range(first, first + len(row.images)))

    def sheet(self) -> Image.Image:
        """All pictures on one sheet: for each prompt the stock row, and below it the diverse one."""
        return _sheet(self)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every picture as PNG, `sheet.png` and `run.json`; all of them, or none if something fails.

        Args:
            folder: created if needed; other files in it are left alone.
            overwrite: replace a gallery that it holds, as a whole: `run.json` lists all pictures there are of it.

        Returns:
            The files: pictures prompt by prompt, then the sheet and the record of the run.

        Raises:
            ValueError: if the folder holds a gallery that is not to be replaced, or another file in the place of one.
        """
        folder = Path(folder)
        record: dict[str, Any] = {**self.settings, "groups": []}
        pictures: list[tuple[str, Group, Row, int]] = []
        for slug, group in zip(_slugs([group.prompt for group in self.groups]), self.groups, strict=True):
            rows = []
            for row in group.rows:
                suffix = "-stock" if row is group.stock else ""
                files = [f"{slug}-{seed:02d}{suffix}.png" for seed in self.seeds(row)]
                pictures += [(file, group, row, index) for index, file in enumerate(files)]
                rows.append(
                    {
                        "method": row.method,
                        "parameters": dict(row.parameters),
                        "vendi": row.vendi,
                        "distance": row.distance,
                        "seeds": list(self.seeds(row)),
                        "files": files,
                    }
                )
            record["groups"].append({"prompt": group.prompt, "rows": rows})
        text = json.dumps(record, indent=2, ensure_ascii=False)
        names = [*(file for file, *_ in pictures), SHEET, RECORD]
        with replacing_gallery(folder, names, overwrite) as temporary:
            for file, group, row, index in pictures:
                image, recipe = row.images[index], self.recipe(group, row, index)
                image.save(temporary / file, pnginfo=_metadata(recipe, self.seeds(row)[index], image))
            self.sheet().save(temporary / SHEET)
            (temporary / RECORD).write_text(text + "\n", encoding="utf-8")
        return [folder / name for name in names]


def check_writable(folder: str | Path, file: str = "") -> None:
    """Make sure that files can be saved there, without leaving anything behind.

    Args:
        folder: there is one, or it can be made.
        file: name of one that is going to be written or replaced.

    Raises:
        ValueError: if they can't.
    """
    output, path = str(Path(folder, file)), Path(folder).absolute()
    try:
        output.encode()
        existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        with tempfile.TemporaryFile(dir=existing):
            pass
        for name in (*path.relative_to(existing).parts, f".{file}.tmp"):  # a name may be too long
            with suppress(FileNotFoundError):
                os.lstat(existing / name)
    except OSError as error:
        raise ValueError(f"output={output!r} can't be written to: {existing}: {error.strerror}.") from error
    except ValueError:  # bytes that are no text, or 0
        raise ValueError(f"output={output!r} is no name for a file; use one of plain characters.") from None
    if file and os.path.lexists(path / file) and not (path / file).is_file():
        raise ValueError(f"output={output!r} is a folder, a device or a link to nothing; use the name of a file.")


def check_picture(file: str | Path) -> str:
    """Make sure that a picture can be saved as this file, and say in which format of Pillow's.

    Raises:
        ValueError: if it can't.
    """
    path = Path(file)
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise ValueError(
            f"output={str(path)!r} has no ending of a picture that can be saved; use one such as .png, .jpg or .webp."
        ) from None
    check_writable(path.parent, path.name)
    return kind


def check_output(folder: str | Path, prompts: Sequence[str] = (), *, overwrite: bool = False) -> None:
    """Make sure, before anything is made, that the gallery of these prompts can be saved there.

    Raises:
        ValueError: if it can't be written to, or as in `Gallery.save`.
    """
    check_writable(folder)
    path = Path(folder)
    if path.is_dir():
        names = "|".join(map(re.escape, _slugs(prompts)))
        picture = re.compile(rf"({names})-\d+(-stock)?\.png")
        check_free(path, lambda name: name in (RECORD, SHEET) or bool(picture.fullmatch(name)), overwrite)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a PNG's metadata, with keys and types as `recipes.RECIPE` says; nothing of it is followed here.

    Raises:
        NoRecipeError: if it has none of ours.
        ValueError: if the file is no picture, or has a recipe that is damaged or of a newer format.
    """
    text = inspect(path).texts.get(METADATA_KEY)
    recipe = None if text is None else parse_recipe(text, path)
    if recipe is None:
        raise NoRecipeError(
            f"{path} has no variegate recipe in its metadata; use a PNG as `variegate generate` wrote it."
        )
    return recipe


def _metadata(recipe: Mapping[str, Any], seed: int, image: Image.Image) -> PngInfo:
    """The recipe as JSON, and in the one-line form that picture browsers show."""
    facts = {
        "Steps": recipe["steps"],
        "CFG scale": recipe["guidance"],
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": recipe["model"],
        "Diversity": recipe["method"],
    }
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if value is not None)
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(recipe))
    info.add_text("parameters", f"{recipe['prompt']}{negative}\n{line}")
    return info


def _slugs(prompts: Sequence[str]) -> Iterator[str]:
    """A distinct stem of file names for each prompt."""
    seen: set[str] = set()
    for prompt in prompts:
        stem = re.sub(r"[\W_]+", "-", prompt.lower())[:48].strip("-") or "prompt"
        slug, count = stem, 1
        while slug in seen:
            count += 1
            slug = f"{stem}-{count}"
        seen.add(slug)
        yield slug


def _sheet(gallery: Gallery) -> Image.Image:
    side = max(max(image.size) for group in gallery.groups for row in group.rows for image in row.images)
    cell = SMALL if side <= SMALL else LARGE
    scale = cell / SMALL
    title, caption = (ImageFont.load_default(size * scale**0.5) for size in (24, 15))
    title_height, caption_height = round(44 * scale**0.5), round(28 * scale**0.5)
    pitch = cell + GAP
    columns = min(COLUMNS, gallery.settings["n"])
    lines = -(-gallery.settings["n"] // columns)

    captions = [_caption(row) for group in gallery.groups for row in group.rows]
    text_width = max(
        *(title.getlength(_title(group)) for group in gallery.groups),
        *(caption.getlength("".join(parts)) for parts in captions),
    )
    width = 2 * MARGIN + max(columns * pitch - GAP, round(text_width))
    row_height = caption_height + lines * pitch + GAP
    heights = [title_height + len(group.rows) * row_height for group in gallery.groups]
    sheet = Image.new("RGB", (width, 2 * MARGIN - 2 * GAP + sum(heights) + MARGIN * (len(heights) - 1)), "white")
    draw = ImageDraw.Draw(sheet)

    y = MARGIN
    for group, height in zip(gallery.groups, heights, strict=True):
        draw.text((MARGIN, y), _title(group), INK, title)
        top = y + title_height
        for row in group.rows:
            name, numbers = _caption(row)
            draw.text((MARGIN, top), name, INK, caption)
            draw.text((MARGIN + caption.getlength(name), top), numbers, GREY, caption)
            for index, image in enumerate(row.images):
                left = MARGIN + index % columns * pitch
                above = top + caption_height + index // columns * pitch
                ratio = cell / max(image.size)
                size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
                sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (left, above))
                draw.rectangle((left - 1, above - 1, left + size[0], above + size[1]), outline=FRAME)
            top += row_height
        y += height + MARGIN
    return sheet


def _title(group: Group) -> str:
    return textwrap.shorten(group.prompt, 80, placeholder=" ...")


def _caption(row: Row) -> tuple[str, str]:
    name = "stock pipeline" if row.method == "none" else row.method.replace("-", " ")
    if strength := row.parameters.get("strength"):
        name += f" {strength:g}"
    if row.vendi is None or row.distance is None:
        return name, ""
    return name, f"   Vendi {row.vendi:.2f} of {len(row.images)}, mean distance {row.distance:.3f}"
