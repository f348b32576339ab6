"""DiverseFlow: the images of one prompt are coupled by a determinantal point process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from variegate.fields import Range
from variegate.intervention import PredictionIntervention, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DiverseFlow(PredictionIntervention):
    """Predictions climb the likelihood of their images under a determinantal point process.

    With F_i the features of the finished image that a prediction points to and d_ij^2 their squared distances,

        L_ij = exp(-spread d_ij^2 / median d^2),    LL = logdet L - logdet(L + I),
        v <- v - strength t (|v| / |grad LL|) grad LL,

    with the gradient in the image at a constant velocity, so nothing is propagated through the denoiser, and lengths
    over all images of the prompt. Predictions grow towards noise, so LL rises. One image is left alone; two move
    straight apart in feature space.

    Attributes:
        strength: length of a push at t = 1, in lengths of the prediction; 0 is off.
        spread: h, of the kernel.
        features: differentiable, from images as latents `[B, ...]` to `[B, F]`; None: the latents themselves.
        start, stop: see `Intervention`.
        branch: guidance branches that get the push, which is that of the prompt's own.

    Raises:
        ValueError: if a value is out of its range, or `features` is no function or not differentiable; at the first
            step, if gradients are being recorded, which its own would have to be taken of.

    Reference:
        arXiv 2504.07894. *Deviation*: the printed sign lets LL fall; the paper's factor gamma(t) and its default h
        could not be verified (a summary halves h), so the push is measured in lengths of the prediction and shrinks
        with t, and its default is for emoji-base; the median counts as a constant; the term that keeps noise
        estimates at typical lengths is left out; with guidance the images are those that the prompt's prediction
        points to.

    Example:
        >>> DiverseFlow(strength=0.2).spread
        1.0
    """

    strength: Strength = 0.3
    spread: Annotated[float, Range(1e-3, 1_000)] = 1.0
    features: Callable[[Any], Any] | None = None

    shared: ClassVar[bool] = True

    def edit(self, prediction: Tensor, latents: Tensor, moment: Moment) -> Tensor:
        """See `PredictionIntervention.edit`."""
        prediction, latents = prediction.detach(), latents.detach()  # the push's own gradient is not taken
        gradient = self._gradient(moment.images(prediction, latents)).to(prediction).flatten(1)
        ratio = prediction.flatten(1).norm(dim=-1) / gradient.norm(dim=-1).clamp_min(1e-12)
        push = self.strength * moment.noise * ratio[:, None] * gradient
        pushed: Tensor = prediction - push.view(prediction.shape)
        return pushed

    def _gradient(self, images: Tensor) -> Tensor:
        """Of the log-likelihood, in every image."""
        import torch

        with torch.inference_mode(False), torch.enable_grad():
            images = images.clone().requires_grad_()
            every = images.flatten(0, 1)
            found = every if self.features is None else self.features(every)
            if len(found) != len(every) or not found.requires_grad:
                raise ValueError(
                    f"features={self.features!r} made {list(found.shape)} of {list(every.shape)}, differentiable: "
                    f"{found.requires_grad}; use a differentiable function that makes a row of each image."
                )
            rows = found.double().reshape(*images.shape[:2], -1)
            (gradient,) = torch.autograd.grad(self.log_likelihood(rows).sum(), images)
        return gradient

    def log_likelihood(self, features: Tensor) -> Tensor:
        """LL of each set, up to 0; higher is more diverse.

        Args:
            features: `[S, B, F]` with at least two rows a set.

        Returns:
            `[S]`.
        """
        import torch

        rows = features - features.mean(1, keepdim=True)
        gram = rows @ rows.mT
        squares = gram.diagonal(dim1=1, dim2=2)
        distances = (squares[:, :, None] + squares[:, None] - 2 * gram).clamp_min(0)
        one = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        first, second = torch.triu_indices(len(one), len(one), 1)
        median = distances[:, first, second].median(-1).values.detach().clamp_min(1e-30)[:, None, None]
        kernel = (-self.spread * distances / median).exp() + 1e-6 * one  # equal images make it singular
        return torch.logdet(kernel) - torch.logdet(kernel + one)
