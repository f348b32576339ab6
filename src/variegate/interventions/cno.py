"""CNO, contrastive noise optimisation: a start from noise in which the denoiser sees different images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from variegate.fields import Range
from variegate.intervention import PreviewIntervention, Strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CNO(PreviewIntervention):
    """Before the first step, move the noise of a prompt's images until the denoiser's first predictions are apart.

    With z_i the image that the denoiser predicts from noise x_i, and a_i that from the noise as it was drawn, the
    steps go down the InfoNCE loss whose positive is the image's own anchor and whose negatives are the other images,

        L = -sum_i log(exp(cos(z_i, a_i) / temperature)
                       / (exp(cos(z_i, a_i) / temperature) + sum_{j != i} exp(cos(z_i, z_j) / temperature))),

    each by strength |x_i| / iterations in the direction of the gradient by x_i, after which x_i is given its length
    back. That costs 1 + `iterations` evaluations of the denoiser, and as many gradients through it as iterations; on
    a large model `pipe.transformer.enable_gradient_checkpointing()` keeps their memory small.

    Attributes:
        strength: length of the way in that of the noise; 0 is off.
        iterations: in how many steps it is gone.
        temperature: tau.
        start, stop, branch: see `StartIntervention`.

    Raises:
        ValueError: if a value is out of its range; at the first step, if the denoiser is not given the pipeline's
            latents as they are, the pipeline is called in inference mode, or gradients are recorded through its noise.

    Reference:
        arXiv 2510.03813, temperature as there. Not verified: the form of its loss beyond "InfoNCE on predicted
        images, with the drawn noise as anchor", its step size, its number of steps, and whether it takes the gradient
        through the denoiser, as here. *Deviation*: steps of a fixed length, which means the same for every model; the
        conditional prediction, without guidance.

    Example:
        >>> CNO(strength=0.1).temperature
        0.1
    """

    strength: Strength = 0.05
    iterations: Annotated[int, Range(1, 1_000)] = 3
    temperature: Annotated[float, Range(1e-3, 1_000)] = 0.1

    def edit(self, noise: Tensor, preview: Callable[[Tensor], Tensor]) -> Tensor:
        """See `PreviewIntervention.edit`."""
        import torch

        if torch.is_inference_mode_enabled():
            raise ValueError("CNO takes gradients, which inference mode forbids; use torch.no_grad() in its place.")
        noise = noise.detach()  # the gradient of the steps is not taken
        with torch.no_grad():
            anchors, length = preview(noise), _length(noise)
        for _ in range(self.iterations):
            with torch.enable_grad():
                moving = noise.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss(preview(moving), anchors), moving)
            noise = noise - self.strength / self.iterations * length * gradient / _length(gradient).clamp_min(1e-30)
            noise = noise * length / _length(noise)
        return noise

    def loss(self, images: Tensor, anchors: Tensor) -> Tensor:
        """L of predicted images `[S, B, ...]`, over all sets."""
        from torch.nn.functional import normalize

        z, a = normalize(images.flatten(2), dim=2), normalize(anchors.flatten(2), dim=2)
        cosines = (z @ z.mT).diagonal_scatter((z * a).sum(2), dim1=1, dim2=2)
        shares: Tensor = (cosines / self.temperature).log_softmax(2).diagonal(dim1=1, dim2=2)
        total: Tensor = -shares.sum()
        return total


def _length(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.flatten(2).norm(dim=2)
    return lengths.view(*rows.shape[:2], *[1] * (rows.ndim - 2))
