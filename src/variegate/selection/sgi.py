"""Scalable group inference: of many seeds, those whose pictures are good and differ, found out early."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from variegate.emoji.models import check_steps
from variegate.fields import Range, check_fields, checked
from variegate.intervention import Strength
from variegate.selection import solvers
from variegate.selection.preview import arguments_of, check_scheduler, previews

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from variegate.metrics import Extractor

Quality = Callable[["Sequence[Image]", str], "Sequence[float] | Tensor"]

EXACT_UP_TO = 24  # candidates; beyond, the exact solver may take minutes


@dataclass(frozen=True, kw_only=True)
class SGI:
    """Choose among many seeds those whose pictures differ most, as the first denoising steps foresee them.

    After each step the candidates are pruned to the subset of the next size with the largest sum of quality and
    `strength` times distance over its pairs; the chosen seeds are then an ordinary run of the pipeline.

    Attributes:
        candidates: seeds to choose from, M.
        ratio: share of the candidates that is dropped after a step, in (0, 1).
        strength: weight of the distances, lambda, from 0; without a measure of quality only 0 is another, and off.
        solver: "swap", greedy choices improved by exchanges from every first candidate; "exact", integer programming
            (needs SciPy) as soon as at most 24 candidates are left.

    Raises:
        ValueError: if one is out of its range.

    Reference:
        Parmar et al., arXiv:2508.15773, and its published settings: M = 64, ratio .9 for Flux-schnell with 4 steps,
        M = 128, ratio .5 for Flux-dev with 20, K = 4, strength 1.5 (1.0 for Kontext). *Deviations*: candidates that
        are left start again from their seeds in every round, which any stock pipeline can do, in place of being
        carried on: for the settings above 94 denoiser rows against 79, and 536 against 308 (K pictures alone are 16
        and 80). x0_hat is x_t - t v, where the published code takes the latents after the step for x_t; the first
        step has the guidance of the others. After the last step K are left, whatever the ratio. The published solver
        is Gurobi, stopped after 5 seconds. Features are the extractor's, by default EfficientNet-Lite0's in place of
        DINOv2's, and quality is up to the caller.

    Example:
        >>> list(SGI(candidates=64, ratio=0.9).rounds(4, steps=4))  # after step 1, 64 become 7
        [(1, 64, 7), (2, 7, 4)]
    """

    candidates: Annotated[int, Range(1, 10_000)] = 64
    ratio: float = 0.5
    strength: Strength = 1.5
    solver: Literal["swap", "exact"] = "swap"

    needs_company: ClassVar[bool] = True  # a single picture is its seed's

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r} is out of range; use a number between 0 and 1, such as 0.5.")

    def rounds(self, n: int, steps: int) -> Iterator[tuple[int, int, int]]:
        """The prunings of a run: after which step, from how many candidates, to how many.

        Args:
            n: pictures wanted, K.
            steps: of the run.
        """
        left = self.candidates
        for step in range(1, steps + 1):
            kept = n if step == steps else max(n, math.ceil(left * (1 - self.ratio) - 1e-9))
            if kept < left:
                yield step, left, kept
            left = kept

    def steps_to_choose(self, n: int, steps: int) -> int:
        """Denoising steps of all batches, of up to n candidates, that `select` runs."""
        return sum(step * math.ceil(left / n) for step, left, _ in self.rounds(n, steps))

    def check(self, n: int) -> None:
        """Make sure that n can be chosen.

        Raises:
            ValueError: if n is no number of pictures, or there are fewer candidates.
        """
        checked("n", n, Annotated[int, Range(1)])
        if self.candidates < n:
            raise ValueError(f"candidates={self.candidates} are fewer than the n={n} pictures; use at least as many.")


class Choice(NamedTuple):
    """Seeds that `select` chose, ascending, and the objective of those that were left after each pruning."""

    seeds: tuple[int, ...]
    scores: tuple[float, ...]


def select(
    pipe: Any,
    prompt: str,
    method: SGI,
    *,
    n: int = 4,
    seed: int = 0,
    quality: Quality | None = None,
    extract: Extractor | None = None,
    progress: Callable[[int], None] | None = None,
    **call: Any,
) -> Choice:
    """Choose the seeds of n pictures among `seed`, `seed + 1`, ..., n candidates at a time.

    A picture is that of a CPU generator with its seed; which ones share its batch changes it by rounding only. Things
    attached to the pipeline act within such a batch, too.

    Args:
        pipe: a stock pipeline with an Euler scheduler.
        prompt: the prompt.
        method: how many candidates, and how they are pruned.
        n: pictures wanted.
        seed: of the first candidate.
        quality: function of N images and the prompt to N numbers, the greater the better, such as the similarity of
            CLIP embeddings; None: all are equally good.
        extract: function of images to features `[N, D]`, whose cosines tell how different the images are; None:
            `metrics.efficientnet_lite0()`.
        progress: called after each batch with the denoising steps done, of `method.steps_to_choose(...)`.
        call: further arguments of the pipeline's call, the same as for the pictures.

    Raises:
        ValueError: if a number is out of its range, there are fewer candidates than pictures, the scheduler is of
            another kind or can't run in so few steps, `quality` does not give a finite number for each image or
            `extract` finite features, or SciPy is missing for the exact solver.

    Example:
        >>> from variegate.emoji import load_pipeline
        >>> pipe = load_pipeline("emoji-base")
        >>> seeds, scores = select(pipe, "an animal", SGI(candidates=6), n=2, num_inference_steps=2)
        >>> len(seeds), len(scores)
        (2, 2)
    """
    method.check(n)
    n, seed = operator.index(n), checked("seed", seed, Annotated[int, Range(0)])
    check_scheduler(pipe)
    steps = {**arguments_of(pipe)[0], **call}.get("num_inference_steps")
    steps = checked("num_inference_steps", steps, Annotated[int, Range(1)])
    check_steps(pipe, steps)
    seeds = list(range(seed, seed + method.candidates))
    if quality is None and (method.strength == 0 or n == 1):  # nothing to choose by
        return Choice(tuple(seeds[:n]), ())
    if extract is None:
        from variegate.metrics import efficientnet_lite0

        extract = efficientnet_lite0()
    scores, done = [], 0
    for step, _, kept in method.rounds(n, steps):
        singles: list[float] = []
        features = []
        for start in range(0, len(seeds), n):
            images = previews(pipe, prompt, seeds[start : start + n], step, **call)
            features.append(extract(images))
            singles += [0.0] * len(images) if quality is None else _numbers(quality(images, prompt), len(images))
            done += step
            if progress is not None:
                progress(done)
        u, d = np.array(singles), method.strength * _distances(features)
        is_exact = method.solver == "exact" and len(seeds) <= EXACT_UP_TO
        subset = (solvers.exact if is_exact else solvers.approximate)(u, d, kept)
        scores.append(solvers.value(u, d, subset))
        seeds = [seeds[i] for i in subset]
    return Choice(tuple(seeds), tuple(scores))


def _distances(features: Sequence[Tensor]) -> solvers.Array:
    """1 - cosine of every two rows."""
    import torch

    rows = torch.nn.functional.normalize(torch.cat(list(features)).double(), dim=-1)
    if not rows.isfinite().all():
        raise ValueError("extract gave features that are not finite; every picture needs a direction.")
    distances: solvers.Array = (1 - rows @ rows.mT).fill_diagonal_(0).cpu().numpy()
    return distances


def _numbers(values: Sequence[float] | Tensor, count: int) -> list[float]:
    import torch

    numbers = torch.as_tensor(values).double()
    if numbers.shape != (count,) or not numbers.isfinite().all():
        raise ValueError(
            f"quality gave {numbers.tolist()} for {count} images; it should give one finite number for each."
        )
    found: list[float] = numbers.tolist()
    return found
