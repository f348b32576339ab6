"""DAVE: less of what all image tokens have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from variegate.fields import Range
from variegate.intervention import Place, Site, TokenIntervention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DAVE(TokenIntervention):
    """Weaken the spatial mean of the image tokens in the early steps: h <- keep mu + (h - mu).

    It works on a single image, and costs next to nothing.

    Attributes:
        keep: alpha, the share of the mean that stays; 1 is off.
        start, stop, blocks, site, branch: see `TokenIntervention`.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2606.06813.

    Example:
        >>> import torch
        >>> DAVE(keep=0.0).edit(torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)).flatten().tolist()
        [-1.0, 1.0]
    """

    keep: Annotated[float, Range(-100, 100)] = 0.8
    stop: Place | None = 0.2
    site: Site = "image"

    needs_company: ClassVar[bool] = False

    @property
    def enabled(self) -> bool:
        """Whether the mean is changed at all."""
        return self.keep != 1

    def edit(self, tokens: Tensor) -> Tensor:
        """See `TokenIntervention.edit`."""
        mean = tokens.mean(2, keepdim=True)
        return tokens + (self.keep - 1) * mean
