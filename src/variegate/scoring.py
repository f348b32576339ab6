"""Diversity and distance to a reference for folders of images, ours or not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from variegate.files import replacing
from variegate.gallery import read_recipe

if TYPE_CHECKING:
    from variegate.metrics import LPIPS, Extractor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AT_ONCE = 64
NEIGHBOURS = 5
UNSTATED = "unstated"


@dataclass(frozen=True)
class Score:
    """What was measured of one folder; None where it was not asked for, or there are too few images.

    Attributes:
        name: the folder.
        images: how many there are.
        groups: of how many prompts; diversity is within each, and then averaged.
        features: how they were made; "unstated" for a function that has no `features` to tell.
        vendi: effective number of distinct images of a group, mean over groups; at most the images of a group.
        pair_vendi: the same of two images of a group, mean over pairs and groups, in [1, 2].
        distance: cosine distance of two images of a group, mean over pairs and groups.
        clip_score: mean of `metrics.clip_score`, of CLIP features and images that tell their prompt.
        ms_ssim: structural similarity of two images of a group, mean over pairs and groups; lower is more diverse.
        ms_ssim_of: scales and size of the images.
        lpips: perceptual distance of two images of a group, mean over pairs and groups.
        lpips_of: its network and the size of the images.
        reference: number and digest of the reference images.
        kid: kernel inception distance to the reference, degree 3, of unit features.
        fid: Frechet distance to the reference, of unit features; only of more images, and more references, than D.
        precision: share of images that are near a reference image; as `metrics.prdc` with k = 5, and so are the next.
        recall: share of reference images that are near an image.
        density: how close the images lie to the reference; 1 for more of the same.
        coverage: share of reference images that have an image near.
    """

    name: str
    images: int
    groups: int
    features: str
    vendi: float
    pair_vendi: float
    distance: float
    clip_score: float | None = None
    ms_ssim: float | None = None
    ms_ssim_of: str | None = None
    lpips: float | None = None
    lpips_of: str | None = None
    reference: str | None = None
    kid: float | None = None
    fid: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None


def score(
    folders: Sequence[str | Path],
    reference: str | Path | None = None,
    extractor: str | Extractor = "efficientnet-lite0",
    *,
    ms_ssim: bool = False,
    lpips: LPIPS | None = None,
) -> list[Score]:
    """Measure the images of folders.

    Images that variegate made are grouped by prompt and method, as they say themselves; others by subfolder. Files
    named sheet.png are left out. An image that has no other of its prompt counts only towards the reference.

    Args:
        folders: searched with their subfolders.
        reference: folder of images to measure the distance to.
        extractor: images to features: a name, as for `metrics.extractor`, or a function.
        ms_ssim: also measure structural similarity; needs images of one size.
        lpips: also measure perceptual distance, by this network; needs images of one size.

    Returns:
        One score for each folder, and for each method in it.

    Raises:
        ValueError: if a folder is missing, has no images or an unreadable one, or has no group of two; if the
            extractor is unknown; or if images that must be of one size are not.

    Example:
        >>> import tempfile
        >>> from variegate import Request, generate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = generate(Request(("an animal",), n=2, steps=4, method="none")).save(folder)
        ...     [found] = score([folder])
        >>> found.images, found.groups, 1 < found.vendi < 2
        (2, 1, True)
    """
    from variegate import metrics

    extract = metrics.extractor(extractor) if isinstance(extractor, str) else extractor
    methods_of = {folder: _grouped(folder) for folder in folders}
    real, stated = None, None
    if reference is not None:
        files = _images(reference)
        if len(files) < 2:
            raise ValueError(f"{reference} has one image; a reference needs at least two.")
        real, stated = _features(files, extract), f"{len(files)} images {_digest(files)}"
    scores = []
    for folder, methods in methods_of.items():
        for method, prompts in methods.items():
            name = f"{folder}{f' ({method})' if method else ''}"
            groups = [_features(paths, extract) for paths in prompts.values()]
            company = [rows for rows in groups if len(rows) > 1]
            if not company:
                raise ValueError(f"{name} has no two images of one prompt, so there is no diversity to measure.")
            if alone := len(groups) - len(company):
                warnings.warn(
                    f"{name}: {alone} of {len(groups)} groups are a single image, without diversity.", stacklevel=2
                )
            every = torch.cat(groups)
            measures: dict[str, Any] = {} if real is None else _beside(every, real)
            if isinstance(extract, metrics.Clip) and method:
                sizes = torch.tensor([len(rows) for rows in groups], device=every.device)
                texts = extract.texts(list(prompts)).repeat_interleave(sizes, dim=0)
                measures["clip_score"] = metrics.clip_score(every, texts).mean().item()
            if ms_ssim or lpips:
                measures |= _of_pixels(name, [paths for paths in prompts.values() if len(paths) > 1], ms_ssim, lpips)
            scores.append(
                Score(
                    name=name,
                    images=len(every),
                    groups=len(company),
                    features=str(getattr(extract, "features", UNSTATED)),
                    vendi=_mean(metrics.vendi_score, company),
                    pair_vendi=_mean(metrics.mean_pairwise_vendi, company),
                    distance=_mean(metrics.mean_pairwise_distance, company),
                    reference=stated,
                    **measures,
                )
            )
    return scores


def save(scores: Sequence[Score], file: str | Path) -> None:
    """Write the scores as JSON; `earlier` reads them. The file is there whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(found) for found in scores], indent=1) + "\n", encoding="utf-8")


def earlier(scores: Sequence[Score], file: str | Path) -> list[Score]:
    """The counterpart of each score in a file of `save`: of the same name, or the only one there is.

    Raises:
        ValueError: if the file has no scores or not the right ones, or if they were made differently: with other
            features, from images of another size or beside another reference.
    """
    try:
        old = [Score(**facts) for facts in json.loads(Path(file).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} has no scores; use a file that `variegate score --json` wrote.") from error
    by_name = {one.name: one for one in old}
    found = []
    for new in scores:
        if new.name not in by_name and len(old) != 1:
            raise ValueError(f"{file} has no score of {new.name}, but of {', '.join(by_name) or 'nothing'}.")
        then = by_name.get(new.name, old[0])
        for statement in ("features", "ms_ssim_of", "lpips_of", "reference"):
            was, now = getattr(then, statement), getattr(new, statement)
            if UNSTATED in (was, now) or (None not in (was, now) and was != now):
                raise ValueError(
                    f"{file} can't be compared: its {statement} is {was!r}, and that of {new.name} {now!r}."
                )
        found.append(then)
    return found


def _mean(measure: Callable[[Tensor], Tensor], groups: Iterable[Tensor]) -> float:
    return fmean(measure(group).item() for group in groups)


def _beside(features: Tensor, real: Tensor) -> dict[str, float]:
    """The measures beside a reference for which there are enough rows."""
    from variegate import metrics

    found = {"kid": metrics.kid(features, real, scale=1).item()}
    fewest = min(len(features), len(real))
    if fewest > features.shape[1]:
        found["fid"] = metrics.fid(features, real).item()
    if fewest > NEIGHBOURS:
        shares = metrics.prdc(features, real, k=NEIGHBOURS)._asdict()
        found |= {name: share.item() for name, share in shares.items()}
    return found


def _of_pixels(
    name: str, groups: Sequence[Sequence[Path]], ms_ssim: bool, lpips: LPIPS | None
) -> dict[str, float | str]:
    """The measures of images that have to be of one size."""
    from variegate.metrics.features import to_tensors
    from variegate.metrics.ms_ssim import mean_pairwise_ms_ssim, scales

    sizes = sorted({image.size for paths in groups for image in _opened(paths)})
    width, height = sizes[0]
    if len(sizes) > 1:
        raise ValueError(
            f"{name} has images of {width} x {height} and of {sizes[1][0]} x {sizes[1][1]}; "
            "MS-SSIM and LPIPS need images of one size."
        )

    def mean(measure: Callable[[Tensor], Tensor]) -> float:
        return _mean(measure, (torch.cat(to_tensors(list(_opened(paths)))) for paths in groups))

    found: dict[str, float | str] = {}
    if ms_ssim:
        found["ms_ssim"] = mean(mean_pairwise_ms_ssim)
        found["ms_ssim_of"] = f"{scales(height, width)} scales, {width} x {height}"
    if lpips:
        found["lpips"] = mean(lpips.mean_pairwise)
        found["lpips_of"] = f"{lpips.features}, {width} x {height}"
    return found


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


def _digest(paths: Sequence[Path]) -> str:
    found = sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _opened(paths: Sequence[Path]) -> Iterator[Image.Image]:
    for path in paths:
        try:
            with Image.open(path) as image:
                yield image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} can't be read as a picture: {error}.") from error


def _features(paths: Sequence[Path], extract: Extractor) -> Tensor:
    """Features `[N, D]` of files, a few in memory at a time."""
    starts = range(0, len(paths), AT_ONCE)
    return torch.cat([extract(list(_opened(paths[start : start + AT_ONCE]))) for start in starts])
