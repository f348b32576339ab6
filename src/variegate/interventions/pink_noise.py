"""Pink noise: the pipeline starts from noise with more power in its large structures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from variegate.fields import Range
from variegate.intervention import NoiseIntervention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PinkNoise(NoiseIntervention):
    """Start from noise whose power falls with spatial frequency as 1 / f^exponent.

    The low frequencies of the noise decide on layout and colour, so their power is variety there. The pipeline's own
    noise is filtered, channel by channel, and given back its mean square: no random numbers are drawn, and a seed
    goes on to mean one picture. It costs nothing and works on a single image.

    Attributes:
        exponent: 0 is white, and off; 1 is pink.

    Raises:
        ValueError: if the exponent is out of its range.

    Reference:
        arXiv 2601.00090, which studies starts with other spectra. Not verified: its exponent, and what it does at
        frequency 0, which has the power of the lowest other one here.

    Example:
        >>> import torch
        >>> white = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> noise = PinkNoise().edit(white)
        >>> bool((noise.square().mean() / white.square().mean() - 1).abs() < 1e-6)
        True
        >>> bool(noise.mean((-2, -1)).std() > white.mean((-2, -1)).std())
        True
    """

    exponent: Annotated[float, Range(0, 10)] = 1.0

    @property
    def enabled(self) -> bool:
        """Whether the noise is to be anything but white."""
        return self.exponent > 0

    def edit(self, noise: Tensor) -> Tensor:
        """See `NoiseIntervention.edit`."""
        from variegate.noise import coloured

        whole = tuple(range(1, noise.ndim))
        white = noise if noise.element_size() == 8 else noise.float()
        power, pink = white.square().mean(whole, keepdim=True), coloured(white, self.exponent)
        return (pink * (power / pink.square().mean(whole, keepdim=True)).sqrt()).to(noise.dtype)
