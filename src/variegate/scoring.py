"""Diversity and distance to a reference for folders of images, ours or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from variegate.gallery import read_recipe

if TYPE_CHECKING:
    from variegate.metrics import Extractor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AT_ONCE = 64
FEATURES = "efficientnet-lite0, 128 x 128, cosine"


@dataclass(frozen=True)
class Score:
    """What was measured of one folder.

    Attributes:
        name: the folder.
        images: how many there are.
        groups: of how many prompts; diversity is within each, and then averaged.
        vendi: effective number of distinct images of a group, mean over groups.
        distance: cosine distance of two images of a group, mean over pairs and groups.
        kid: kernel inception distance to the reference, degree 3, of unit features; None without a reference.
        features: the network, size and similarity, without which the numbers can't be compared.
    """

    name: str
    images: int
    groups: int
    vendi: float
    distance: float
    kid: float | None
    features: str = FEATURES


def score(
    folders: Sequence[str | Path], reference: str | Path | None = None, extractor: Extractor | None = None
) -> list[Score]:
    """Measure the images of folders.

    Images that variegate made are grouped by prompt and method, as they say themselves; others by subfolder. Files
    named sheet.png are left out.

    Args:
        folders: searched with their subfolders.
        reference: folder of images to measure the distance to.
        extractor: images to features; None: `metrics.efficientnet_lite0`.

    Returns:
        One score for each folder, and for each method in it.

    Raises:
        ValueError: if a folder is missing, has no images or an unreadable one, or has no group of two.

    Example:
        >>> import tempfile
        >>> from variegate import Request, generate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = generate(Request(("an animal",), n=2, steps=4, method="none")).save(folder)
        ...     [found] = score([folder])
        >>> found.images, found.groups, 1 < found.vendi < 2
        (2, 1, True)
    """
    from variegate.metrics import efficientnet_lite0, kid, mean_pairwise_distance, vendi_score

    extract = extractor or efficientnet_lite0()
    groups_of = {folder: _grouped(folder) for folder in folders}
    real = None if reference is None else _features(_images(reference), extract)
    scores = []
    for folder, methods in groups_of.items():
        for method, groups in methods.items():
            features = [_features(paths, extract) for paths in groups.values()]
            company = [rows for rows in features if len(rows) > 1]
            if not company:
                raise ValueError(f"{folder} has no two images of one prompt, so there is no diversity to measure.")
            every = torch.cat(features)
            scores.append(
                Score(
                    name=f"{folder}{f' ({method})' if method else ''}",
                    images=len(every),
                    groups=len(company),
                    vendi=fmean(vendi_score(rows).item() for rows in company),
                    distance=fmean(mean_pairwise_distance(rows).item() for rows in company),
                    kid=None if real is None else kid(every, real, scale=1).item(),
                )
            )
    return scores


def to_json(scores: Sequence[Score]) -> str:
    """The scores as JSON text."""
    return json.dumps([asdict(found) for found in scores], indent=1) + "\n"


def _grouped(folder: str | Path) -> Mapping[str, Mapping[str, list[Path]]]:
    """Method to prompt to files; "" is the method of images that don't tell theirs."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in _images(folder):
        try:
            recipe = read_recipe(path)
        except ValueError:  # not ours, or no image: that is found out when it is read
            recipe = {"method": "", "prompt": str(path.parent)}
        found.setdefault(recipe["method"], {}).setdefault(recipe["prompt"], []).append(path)
    return found


def _images(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder.")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.name != "sheet.png")
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    return found


def _features(paths: Sequence[Path], extract: Extractor) -> Tensor:
    """Features `[N, D]` of files, a few in memory at a time."""
    features = []
    for start in range(0, len(paths), AT_ONCE):
        images = []
        for path in paths[start : start + AT_ONCE]:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except OSError as error:
                raise ValueError(f"{path} can't be read as a picture: {error}.") from error
        features.append(extract(images))
    return torch.cat(features)
