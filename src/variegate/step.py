"""The denoising step a call belongs to, and what an edit of conditions or predictions may know of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class SampleSet(NamedTuple):
    """Rows of a batch that are samples of one prompt in one guidance branch ("cond", "uncond" or "perturbed")."""

    branch: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """The denoising step that a denoiser call belongs to, and which of its rows belong together.

    Attributes:
        index: place of the step in its run, from 0.
        total: steps of the run; None where only a bare denoiser is known, whose run has no announced length.
        sets: the sample sets of the call; together they hold every row once. Empty, and the noise unknown, in a later
            step than the first in which nothing happens.
        noise: level in [0, 1], 1 is pure noise: the time of flow matching, sigma / (1 + sigma) for other schedulers;
            None for a bare denoiser.
        next_noise: level of the next step; 0 after the last one.
        prediction_type: what the denoiser predicts: "flow_prediction" (a velocity), "epsilon" or "v_prediction"; None
            where the scheduler does not tell.
    """

    index: int
    total: int | None
    sets: tuple[SampleSet, ...] = ()
    noise: float | None = None
    next_noise: float = 0.0
    prediction_type: str | None = None


@dataclass
class Moment:
    """What an edit of conditions or predictions may know besides its tensors.

    Attributes:
        noise: see `Step`.
        samples: place in the batch of every sample that is edited, `[S][B]`.
        seed: of the attachment.
        index: of the step.
        next_noise: see `Step`.
        prediction_type: see `Step`.
        text: an embedding of the prompt of every sample, `[S, B, C]`: the pooled one, or the mean of its tokens; None
            for edits that don't ask for it.
        memory: what the intervention keeps for later steps and calls; it lives as long as the attachment.
    """

    noise: float
    samples: Sequence[Sequence[int]]
    seed: int
    index: int
    next_noise: float = 0.0
    prediction_type: str | None = "flow_prediction"
    text: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    _draws: int = 0

    def images(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The finished images that predictions point to, as latents of the same shape."""
        alpha, _ = self._shares(self.noise)
        weight = {"flow_prediction": 1.0, "v_prediction": alpha, "epsilon": 1 / max(alpha, 1e-6)}[self._type]
        return weight * latents + self._slopes[0] * prediction

    def to_move_images(self, move: Tensor) -> Tensor:
        """What to add to a prediction so that the image it points to moves by this much."""
        return _over(move, self._slopes[0])

    def to_move_latents(self, move: Tensor) -> Tensor:
        """What to add to a prediction so that the scheduler's step ends this much elsewhere.

        Exact for schedulers of first order, such as Euler or DDIM. One that weighs several predictions, such as
        DPM-Solver or Heun, shares the move out among its next steps or takes a part of it, and a stage of a step that
        does not lower the noise moves nothing.
        """
        alpha, sigma = self._shares(self.next_noise)
        image, noise = self._slopes
        return _over(move, alpha * image + sigma * noise)

    @property
    def _type(self) -> str:
        if self.prediction_type not in ("flow_prediction", "v_prediction", "epsilon"):
            raise ValueError(
                f"prediction_type={self.prediction_type!r} of the scheduler does not tell which image a prediction "
                "points to; use a pipeline whose scheduler predicts a flow, epsilon or v."
            )
        return self.prediction_type

    def _shares(self, noise: float) -> tuple[float, float]:
        """Of image and noise in latents at a level; their squares add to 1 but in flow matching."""
        size = 1.0 if self._type == "flow_prediction" else math.hypot(1 - noise, noise)
        return (1 - noise) / size, noise / size

    @property
    def _slopes(self) -> tuple[float, float]:
        """How the image and the noise that the latents are made of change with the prediction."""
        alpha, sigma = self._shares(self.noise)
        return (-sigma / max(alpha, 1e-6), 1.0) if self._type == "epsilon" else (-sigma, alpha)

    def recall(self, like: Tensor) -> Tensor:
        """Rows `[K, D]` kept in earlier calls, oldest first; none where they are of another length than `like`."""
        kept = self.memory.get("rows")
        return like.new_empty(0, like.shape[-1]) if kept is None or kept.shape[1] != like.shape[-1] else kept.to(like)

    def keep(self, rows: Tensor, most: int) -> None:
        """Add rows `[K, D]` to the memory; the oldest beyond `most` are forgotten, and all of another length."""
        import torch

        every = torch.cat((self.recall(rows), rows.detach()))  # to later calls they are constants
        self.memory["rows"] = every[max(len(every) - most, 0) :]

    def randn(self, like: Tensor, *, fresh: bool = True) -> Tensor:
        """Normal numbers in the shape `[S, B, ...]` of a tensor: an own stream for every sample.

        Args:
            like: gives shape, dtype and device.
            fresh: another draw in every step, or the same in all of them.
        """
        return self._draw("normal_", like, fresh)

    def rand(self, like: Tensor, *, fresh: bool = True) -> Tensor:
        """Uniform numbers in [0, 1); see `randn`."""
        return self._draw("uniform_", like, fresh)

    def _draw(self, kind: str, like: Tensor, fresh: bool) -> Tensor:
        import torch

        self._draws += 1
        drawn = torch.empty(like.shape)
        for row, samples in zip(drawn, self.samples, strict=True):
            for values, sample in zip(row, samples, strict=True):
                name = f"{self.seed} {sample} {self._draws} {self.index if fresh else ''}"
                digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
                getattr(values, kind)(generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
        return drawn.to(like)


def _over(move: Tensor, slope: float) -> Tensor:
    """The move divided by the slope, or zeros where nothing moves anything."""
    return move / slope if abs(slope) > 1e-6 else 0 * move
