"""SPARKE: latents move away from those of earlier images with similar prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from variegate.fields import Range
from variegate.intervention import PredictionIntervention, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SPARKE(PredictionIntervention):
    """Raise the conditional Renyi kernel entropy of order 2 against a bank of earlier images and the image's siblings.

    With u the latents and p the embedding of the prompt, both of unit length, and Gaussian kernels k of these widths,
    image i moves up the gradient of

        1 / mean_j k(u_i, u_j)^2 k(p_i, p_j)^2,    brought to the length strength |x_i|,

    where j runs over the bank, over the images of the same prompt in the batch, and i itself. The bank holds the
    finished images of earlier calls, of any prompt, as long as the attachment lives; so it works on single images,
    one call after another. The first image of all, alone, is the stock pipeline's; two images of one call move
    straight apart.

    Attributes:
        strength: length of a move, in lengths of the latents; 0 is off.
        every: steps from one move to the next.
        image_width: of the kernel on latents.
        text_width: of the kernel on prompts.
        bank: how many earlier images are kept, the latest; each takes 4 bytes per latent value.
        start, stop: see `Intervention`.
        branch: guidance branches that get the push, which is that of the prompt's own.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2506.10173. Widths and the removal of the gradient's length are those of its released code, which runs
        50 steps with strength .02 or .03 and every=10. *Deviation*: that code does not square a Gaussian kernel; its
        bank holds the latents before the last step, here the images that the last prediction of the prompt points to;
        it embeds prompts by CLIP ViT-B/32, here it is the denoiser's own pooled or mean embedding; it knows no
        siblings, and moves the latents where here their move goes through the prediction (see
        `Moment.to_move_latents`). On emoji-base with 20 steps every=10 changes next to nothing, so every step moves.

    Example:
        >>> SPARKE(strength=0.03, every=10).bank
        4000
    """

    strength: Strength = 0.03
    every: Annotated[int, Range(1)] = 1
    image_width: Annotated[float, Range(1e-3, 1_000)] = 0.7
    text_width: Annotated[float, Range(1e-3, 1_000)] = 0.35
    bank: Annotated[int, Range(0)] = 4000

    needs_company: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def edit(self, prediction: Tensor, latents: Tensor, moment: Moment) -> Tensor:
        """See `PredictionIntervention.edit`."""
        if moment.index % self.every:
            return prediction
        rows, size = _rows(latents, moment), latents[0, 0].numel()
        move, weight = self._push(rows, moment.recall(rows), size)
        among, more = self._push(rows, rows, size)
        move, weight = move + among, weight + more
        length = move.norm(dim=-1, keepdim=True)
        # What is left of a sum of equal rows is rounding, and has no direction.
        direction = move / length.clamp_min(1e-30) * (length > 1e-5 * weight)
        scale = self.strength * latents.flatten(2).norm(dim=-1, keepdim=True)
        return prediction + moment.to_move_latents(scale * direction).view(latents.shape)

    def _push(self, rows: Tensor, others: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The gradient but for a factor per row, and the weights that it is made of."""
        cosines = rows[..., :size] @ others[..., :size].mT
        texts = rows[..., size:] @ others[..., size:].mT
        # Squared kernels exp(-d^2 / width^2) of unit vectors, whose d^2 is 2 - 2 cos.
        weights = (2 * (cosines - 1) / self.image_width**2 + 2 * (texts - 1) / self.text_width**2).exp()
        total = weights.sum(-1, keepdim=True)
        push = (weights * cosines).sum(-1, keepdim=True) * rows[..., :size] - weights @ others[..., :size]
        return push, total

    def remember(self, images: Tensor, moment: Moment) -> None:
        """See `PredictionIntervention.remember`."""
        moment.keep(_rows(images, moment).flatten(0, 1), self.bank)


def _rows(latents: Tensor, moment: Moment) -> Tensor:
    """Unit latents followed by unit embeddings of the prompt, `[S, B, D + C]`."""
    import torch
    from torch.nn.functional import normalize

    assert moment.text is not None
    return torch.cat((normalize(latents.flatten(2), dim=-1), normalize(moment.text.to(latents), dim=-1)), -1)
