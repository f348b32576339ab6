"""Seed variance: noise on half of the prompt's numbers in the first steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from variegate.intervention import ConditionIntervention, Place, Share, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SeedVariance(ConditionIntervention):
    """Uniform noise on a share of the values of the prompt's embeddings, the same in every step of the window.

    Each image has its own noise, so it works on a single one.

    Attributes:
        strength: half-width of the noise, in standard deviations of the embedding; 0 is off.
        share: of the values that get noise, in [0, 1].
        start, stop, branch: see `Intervention`.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        A practice of Z-Image and Qwen-Image users, half-widths 15 to 30 on Z-Image. *Deviation*: in units of the
        embedding's deviation, so that a value carries over between models.

    Example:
        >>> SeedVariance(strength=2.0).share
        0.5
    """

    strength: Strength = 1.0
    share: Share = 0.5
    stop: Place | None = 0.2
    branch: Literal["both", "cond", "uncond"] = "cond"

    @property
    def enabled(self) -> bool:
        """Whether there is noise at all."""
        return self.strength > 0 and self.share > 0

    def edit(self, embeddings: Tensor, moment: Moment) -> Tensor:
        """See `ConditionIntervention.edit`."""
        original = embeddings.float()
        chosen = moment.rand(original, fresh=False) < self.share
        noise = 2 * moment.rand(original, fresh=False) - 1
        width = self.strength * original.std(tuple(range(2, original.ndim)), keepdim=True)
        return (original + chosen * width * noise).to(embeddings.dtype)
