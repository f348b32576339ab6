"""Diversity and distance to a reference for folders of images, ours or not."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from variegate.files import replacing
from variegate.grouping import describe, rows_of, shown, usable
from variegate.pictures import GROUND, Pictures

if TYPE_CHECKING:
    from variegate.metrics import LPIPS, Extractor

AT_ONCE = 16  # for a function of somebody's, which gets a list
MOST_EARLIER = 1 << 26  # bytes
NEIGHBOURS = 5
UNSTATED = "unstated"


@dataclass(frozen=True)
class Score:
    """What was measured of one folder; None where it was not asked for, or there are too few images.

    Attributes:
        name: the folder.
        images: how many there are.
        groups: of two and more; diversity is within each, and then averaged.
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
        grouping: what told the groups, and the names of the first.
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
    grouping: str | None = None


def score(
    folders: Sequence[str | Path],
    reference: str | Path | None = None,
    extractor: str | Extractor = "efficientnet-lite0",
    *,
    ms_ssim: bool = False,
    lpips: LPIPS | None = None,
    group_by: str | None = None,
    skip_bad: bool = False,
) -> list[Score]:
    """Measure the images of folders.

    Images are read as `pictures.load` does, and grouped as `grouping.grouped` says: by `group_by`; else by the
    recipes of images that variegate made, with a score for each method; else by the prompt that A1111 or ComfyUI
    wrote into them; else by subfolder. An image that has no other of its group counts only towards the reference.

    Args:
        folders: searched with their subfolders, for files as `pictures.find` says; given twice, one counts once.
        reference: folder of images to measure the distance to.
        extractor: images to features: a name, as for `metrics.extractor`, or a function.
        ms_ssim: also measure structural similarity; needs images of one size.
        lpips: also measure perceptual distance, by this network; needs images of one size.
        group_by: path below a folder with fields, such as `{seed}/gen_{prompt}.png`: what agrees in all of them but
            `seed`, `n` and `index` is a group.
        skip_bad: leave out images that can't be read, which are refused otherwise.

    Returns:
        One score for each folder, and for each method in it.

    Raises:
        ValueError: if a folder is missing, has no images or an unreadable one, or has no group of two; if the
            extractor is unknown; if images that must be of one size are not; if `group_by` fits no image; if an
            image has a recipe of ours that is broken.

    Warns:
        UserWarning: of everything that was left out, and of pictures that could not be grouped by what is in them.

    Example:
        >>> import tempfile
        >>> from variegate import Request, generate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = generate(Request(("an animal",), n=2, steps=4, method="none")).save(folder)
        ...     [found] = score([folder])
        >>> found.images, found.groups, found.grouping, 1 < found.vendi < 2
        (2, 1, '1 by recipe: an animal', True)
    """
    from variegate import metrics

    extract = metrics.extractor(extractor) if isinstance(extractor, str) else extractor
    notes: list[str] = []
    files = () if reference is None else tuple(usable(reference, notes, skip_bad=skip_bad))
    if len(files) == 1:
        raise ValueError(f"{reference} has one image; a reference needs at least two.")
    rows = rows_of(folders, notes, group_by, skip_bad=skip_bad)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    real, stated = None, None
    if files:
        real, stated = _features(files, extract), f"{len(files)} images {_digest(files)}"
    scores = []
    for name, members in rows.items():
        found = [_features(group.files, extract) for group in members]
        company = [rows for rows in found if len(rows) > 1]
        every = torch.cat(found)
        measures: dict[str, Any] = {} if real is None else _beside(every, real)
        prompts = [group.prompt for group in members if group.prompt is not None]
        if isinstance(extract, metrics.Clip) and len(prompts) == len(members):
            sizes = torch.tensor([len(rows) for rows in found], device=every.device)
            texts = extract.texts(prompts).repeat_interleave(sizes, dim=0)
            measures["clip_score"] = metrics.clip_score(every, texts).mean().item()
        shared = [group for group in members if len(group.files) > 1]
        if ms_ssim or lpips:
            measures |= _of_pixels(name, [group.files for group in shared], ms_ssim, lpips)
        seen_as = getattr(extract, "features", None)
        scores.append(
            Score(
                name=name,
                images=len(every),
                groups=len(company),
                features=UNSTATED if seen_as is None else f"{seen_as}, {GROUND}",
                vendi=_mean(metrics.vendi_score, company),
                pair_vendi=_mean(metrics.mean_pairwise_vendi, company),
                distance=_mean(metrics.mean_pairwise_distance, company),
                reference=stated,
                grouping=describe(shared),
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
    old = _read(Path(file))
    by_name = {one.name: one for one in old}
    found = []
    for new in scores:
        if new.name not in by_name and len(old) != 1:
            names = ", ".join(shown(name) for name in list(by_name)[:8]) + (" and others" if len(by_name) > 8 else "")
            raise ValueError(f"{file} has no score of {new.name}, but of {names or 'nothing'}.")
        then = by_name.get(new.name, old[0])
        for statement in ("features", "ms_ssim_of", "lpips_of", "reference"):
            was, now = getattr(then, statement), getattr(new, statement)
            if UNSTATED in (was, now) or (None not in (was, now) and was != now):
                raise ValueError(
                    f"{file} can't be compared: its {statement} is {shown(str(was), 200)!r}, "
                    f"and that of {new.name} {now!r}."
                )
        found.append(then)
    return found


def _read(file: Path) -> list[Score]:
    """The scores in a file, whatever is in it."""
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "None": type(None)}
    try:
        if not file.is_file() or file.stat().st_size > MOST_EARLIER:
            raise ValueError("it is no file, or too large")
        old = [Score(**facts) for facts in json.loads(file.read_text(encoding="utf-8"))]
        for found in old:
            for field in fields(found):
                value = getattr(found, field.name)
                fits = any(isinstance(value, kinds[kind]) for kind in str(field.type).split(" | "))
                if not fits or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
                    raise ValueError(f"{field.name} is {shown(repr(value))}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} has no scores; use a file that `variegate score --json` wrote.") from error
    return old


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

    sizes = sorted({image.size for paths in groups for image in Pictures(paths)})
    width, height = sizes[0]
    if len(sizes) > 1:
        raise ValueError(
            f"{name} has images of {width} x {height} and of {sizes[1][0]} x {sizes[1][1]}; "
            "MS-SSIM and LPIPS need images of one size."
        )

    def mean(measure: Callable[[Tensor], Tensor]) -> float:
        return _mean(measure, (torch.cat(to_tensors(Pictures(paths))) for paths in groups))

    found: dict[str, float | str] = {}
    if ms_ssim:
        found["ms_ssim"] = mean(mean_pairwise_ms_ssim)
        found["ms_ssim_of"] = f"{scales(height, width)} scales, {width} x {height}"
    if lpips:
        found["lpips"] = mean(lpips.mean_pairwise)
        found["lpips_of"] = f"{lpips.features}, {width} x {height}"
    return found


def _digest(paths: Sequence[Path]) -> str:
    found = sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _features(paths: Sequence[Path], extract: Extractor) -> Tensor:
    """Features `[N, D]` of files, one or a few of which are in memory at a time."""
    from variegate.metrics import Network

    images = Pictures(paths)
    if isinstance(extract, Network):
        return extract(images)
    return torch.cat([extract(list(images[at : at + AT_ONCE])) for at in range(0, len(images), AT_ONCE)])
