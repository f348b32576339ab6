"""CADS: the condition is annealed from noise to itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from variegate.intervention import ConditionIntervention, Share, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CADS(ConditionIntervention):
    """Condition-annealed sampling: the early steps see the prompt through noise, the late ones as it is.

    With gamma = 1 for t <= clear, 0 for t >= blind and linear in between, t the noise level,

        y' = sqrt(gamma) y + strength sqrt(1 - gamma) n,    y'' = y' rescaled to the mean and deviation of y,

    and the denoiser is given rescaling y'' + (1 - rescaling) y', with a fresh n at every step. Each image has its own
    noise, so it works on a single one.

    Attributes:
        strength: s, the noise's scale; 0 is off.
        clear: tau_1, noise level in [0, 1] from which on downwards the condition is left alone.
        blind: tau_2, noise level in [0, 1] above which it is all noise.
        rescaling: psi in [0, 1], share of the rescaled condition.
        start, stop, branch: see `Intervention`.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2310.17347, defaults as there. *Deviation*: t is the level of flow matching, sigma / (1 + sigma)
        for other schedulers; mean and deviation are those of each embedding as a whole.

    Example:
        >>> CADS(strength=0.1).gamma(0.75)
        0.5
    """

    strength: Strength = 0.25
    clear: float = 0.6
    blind: float = 0.9
    rescaling: Share = 1.0
    branch: Literal["both", "cond", "uncond"] = "cond"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clear < self.blind <= 1:
            raise ValueError(
                f"clear={self.clear!r} and blind={self.blind!r} are no noise levels in order; "
                "use 0 <= clear < blind <= 1."
            )

    def gamma(self, noise: float) -> float:
        """Share of the condition at a noise level, before the square root."""
        return round(min(1.0, max(0.0, (self.blind - noise) / (self.blind - self.clear))), 12)

    def idle(self) -> str:
        """See `Intervention.idle`."""
        return f"it acts above clear={self.clear}"

    def edit(self, embeddings: Tensor, moment: Moment) -> Tensor:
        """See `ConditionIntervention.edit`."""
        gamma = self.gamma(moment.noise)
        if gamma == 1:
            return embeddings
        whole = tuple(range(2, embeddings.ndim))
        original = embeddings.float()
        noised = gamma**0.5 * original + self.strength * (1 - gamma) ** 0.5 * moment.randn(original)
        deviation, mean = noised.std(whole, keepdim=True), noised.mean(whole, keepdim=True)
        scale, centre = original.std(whole, keepdim=True), original.mean(whole, keepdim=True)
        rescaled = (noised - mean) / deviation.clamp_min(1e-12) * scale + centre
        mixed: Tensor = self.rescaling * rescaled + (1 - self.rescaling) * noised
        return mixed.to(embeddings.dtype)
