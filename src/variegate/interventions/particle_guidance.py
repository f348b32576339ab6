"""Particle guidance: the latents of one prompt repel each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from variegate.intervention import PredictionIntervention, Share, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParticleGuidance(PredictionIntervention):
    """A joint potential over the latents of one prompt, an RBF kernel of their distances.

    With the squared distances d_ij^2 of flattened latents, h_i = median_j(d_ij^2) / log n and
    w_ij = exp(-d_ij^2 / h_i), the predicted noise of image i is moved by

        eps_i <- eps_i - strength * t * sum_j 2 w_ij (x_i - x_j) / h_i.

    Attributes:
        strength: the coefficient; 0 is off.
        low: noise level in [0, 1] below which it rests.
        start, stop, branch: see `Intervention`.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2310.13102, with the kernel and median heuristic of its released code, whose default strength is 30 and
        which acts at sigma >= 1, t >= .5. *Deviation*: log n in place of log(n - 1), which is 0 for two images;
        for flow matching the step in eps becomes one in velocity with the same sign and without the factor 1 / (1 - t),
        which has no bound at the start.

    Example:
        >>> ParticleGuidance(strength=30.0).low
        0.5
    """

    strength: Strength = 30.0
    low: Share = 0.5

    def idle(self) -> str:
        """See `Intervention.idle`."""
        return f"it acts from low={self.low} upwards"

    def edit(self, prediction: Tensor, latents: Tensor, moment: Moment) -> Tensor:
        """See `PredictionIntervention.edit`."""
        if moment.noise < self.low:
            return prediction
        rows = latents.flatten(2).double()
        squares = (rows[:, :, None] - rows[:, None]).square().sum(-1)
        samples = rows.shape[1]
        others = squares[:, ~_diagonal(samples)].view(-1, samples, samples - 1)
        width = (others.median(-1).values / math.log(samples)).clamp_min(1e-12)[..., None]
        weights = 2 * (-squares / width).exp() / width
        push = weights.sum(-1, keepdim=True) * rows - weights @ rows
        moved: Tensor = prediction.double() - self.strength * moment.noise * push.view(prediction.shape)
        return moved.to(prediction.dtype)


def _diagonal(size: int) -> Tensor:
    import torch

    return torch.eye(size, dtype=torch.bool)
