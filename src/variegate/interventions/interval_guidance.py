"""Interval guidance: classifier-free guidance only at middling noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from variegate.intervention import GuidanceIntervention
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IntervalGuidance(GuidanceIntervention):
    """Guidance inside an interval of noise levels; outside, the conditional prediction alone.

    Guidance at high noise levels picks one of a prompt's modes before anything can be seen. Where it is off, the
    unconditional prediction is replaced by the conditional one, which makes any guidance scale 1. Models that are
    distilled from guidance have none to switch off, and are not changed.

    Attributes:
        low, high: noise levels in [0, 1]; guidance acts where low < t <= high. 0 and 1 are off.
        start, stop: see `Intervention`.

    Raises:
        ValueError: if the levels are not in order.

    Reference:
        arXiv 2404.07724; its sigma in (.28, 5.42] is t = sigma / (1 + sigma) in (.22, .84].

    Example:
        >>> IntervalGuidance(high=0.7).low
        0.22
    """

    low: float = 0.22
    high: float = 0.84

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low={self.low!r} and high={self.high!r} are no noise levels in order; use 0 <= low < high <= 1."
            )

    @property
    def enabled(self) -> bool:
        """Whether some level is outside."""
        return (self.low, self.high) != (0, 1)

    def idle(self) -> str:
        """See `Intervention.idle`."""
        return f"it acts outside of low={self.low} to high={self.high}"

    def edit(self, unconditional: Tensor, conditional: Tensor, moment: Moment) -> Tensor:
        """See `GuidanceIntervention.edit`."""
        return unconditional if self.low < moment.noise <= self.high else conditional
