"""Pictures in groups, each with the recipe to make it again; their contact sheet; their way to the disk."""

from __future__ import annotations

import json
import os
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

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

    def save(self, folder: str | Path) -> list[Path]:
        """Write every picture as PNG, `sheet.png` and `run.json`; all of them, or none if something fails.

        Args:
            folder: created if needed; files of the same names are replaced.

        Returns:
            The files: pictures prompt by prompt, then the sheet and the record of the run.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {**self.settings, "groups": []}
        names: list[str] = []
        with tempfile.TemporaryDirectory(prefix=".variegate-", dir=folder) as temporary:
            for slug, group in zip(_slugs(self.groups), self.groups, strict=True):
                rows = []
                for row in group.rows:
                    suffix = "-stock" if row is group.stock else ""
                    files = [f"{slug}-{seed:02d}{suffix}.png" for seed in self.seeds(row)]
                    for index, (file, image) in enumerate(zip(files, row.images, strict=True)):
                        recipe = self.recipe(group, row, index)
                        image.save(Path(temporary, file), pnginfo=_metadata(recipe, self.seeds(row)[index], image))
                    names += files
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
            self.sheet().save(Path(temporary, "sheet.png"))
            text = json.dumps(record, indent=2, ensure_ascii=False)
            Path(temporary, "run.json").write_text(text + "\n", encoding="utf-8")
            names += ["sheet.png", "run.json"]
            for name in names:
                os.replace(Path(temporary, name), folder / name)
        return [folder / name for name in names]


def check_writable(folder: str | Path) -> None:
    """Make sure that a gallery can be saved there, without leaving anything behind.

    Raises:
        ValueError: if it can't.
    """
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output={str(folder)!r} can't be written to: {existing}: {error.strerror}.") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a PNG's metadata, with keys and types as `recipes.RECIPE` says; nothing of it is followed here.

    Raises:
        NoRecipeError: if it has none of ours.
        ValueError: if the file is no picture, or has a recipe that is damaged or of a newer format.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} can't be read as a picture: it is no file.")  # a pipe would wait for ever
    try:
        # Those that people have pictures in. Others can hold our key, too, and opening some of them runs programs.
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")) as image:
            text = image.info.get(METADATA_KEY)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or ("unknown format" if isinstance(error, OSError) else error)
        raise ValueError(f"{path} can't be read as a picture: {reason}.") from error
    except ValueError:  # a text that is too large to be unpacked
        text = None
    recipe = parse_recipe(text, path) if isinstance(text, str) else None
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


def _slugs(groups: tuple[Group, ...]) -> Iterator[str]:
    """A distinct stem of file names for each prompt."""
    seen: set[str] = set()
    for group in groups:
        stem = re.sub(r"[\W_]+", "-", group.prompt.lower())[:48].strip("-") or "prompt"
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
