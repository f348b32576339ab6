"""STRIDE: pink noise along the principal components of the image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from variegate.fields import Range
from variegate.intervention import BlockCall, BlockChoice, ImageIntervention, Place, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class STRIDE(ImageIntervention):
    """Add noise that is smooth over the picture to the image tokens of early blocks, where they vary by themselves.

    With the tokens h of one image, their mean mu over the picture, the first components V of h - mu and a field n of
    1 / f^exponent noise for each of them,

        h <- h + strength |h - mu| n V^T / |n V^T|.

    Each image has its own noise, so it works on a single one; within a step it is the same in every block.

    Attributes:
        strength: size of the noise in that of the tokens' variation; 0 is off.
        components: how many principal components.
        exponent: 0 is white, 1 pink.
        start, stop, blocks, site, branch: see `BlockIntervention`; `site` is "image".

    Raises:
        ValueError: if a value is out of its range, or at the first step, if the tokens are no grid in the shape of
            the picture.

    Reference:
        arXiv 2605.11494: pink noise, projected on the principal components of each image's own activations, in early
        blocks. Not verified: its strength, its number of components and how it scales the noise. *Deviation*: noise is
        drawn for each component, which has the law of noise drawn for each channel and projected.

    Example:
        >>> STRIDE(strength=0.5).blocks
        'first'
    """

    strength: Strength = 0.7
    components: Annotated[int, Range(1, 10_000)] = 4
    exponent: Annotated[float, Range(0, 10)] = 1.0
    stop: Place | None = 0.2
    blocks: BlockChoice = "first"

    needs_company: ClassVar[bool] = False

    def edit(self, tokens: Tensor, block: BlockCall) -> Tensor:
        """See `ImageIntervention.edit`."""
        from variegate.noise import coloured, grid

        if block.size is None:
            raise ValueError(
                "STRIDE needs the size of the pictures to lay out their tokens, and this pipeline makes videos or does "
                "not tell."
            )
        wide = tokens if tokens.element_size() == 8 else tokens.float()
        centred = wide - wide.mean(2, keepdim=True)
        basis = principal(centred, self.components, block.moment)
        fields = centred.new_empty(*basis.shape[:2], basis.shape[3], *grid(tokens.shape[2], *block.size))
        noise = coloured(block.moment.randn(fields), self.exponent).flatten(3).mT @ basis.mT
        size = centred.flatten(2).norm(dim=2) / noise.flatten(2).norm(dim=2).clamp_min(1e-30)
        moved: Tensor = wide + self.strength * size[..., None, None] * noise
        return moved.to(tokens.dtype)


def principal(rows: Tensor, count: int, moment: Moment) -> Tensor:
    """The first principal components of centred rows, by subspace iteration: four products with the rows, no more.

    Args:
        rows: `[S, B, N, D]`.
        count: how many components.
        moment: for the random directions that it starts from.

    Returns:
        `[S, B, D, count]`, orthonormal; fewer of them if N - 1 or D is smaller. Their signs, which are nobody's choice
        but the solver's, are those that make the largest entry positive: the same on every device.
    """
    import torch

    # Eight more than asked for make the last ones converge, too; more than centred rows span would have no gradient.
    width = min(count + 8, rows.shape[2] - 1, rows.shape[3])
    basis = moment.randn(rows.new_empty(*rows.shape[:2], rows.shape[3], width))
    for _ in range(4):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    _, _, turn = torch.linalg.svd(rows @ basis, full_matrices=False)
    first: Tensor = basis @ turn[..., :count, :].mT
    return first * first.gather(-2, first.abs().argmax(-2, keepdim=True)).sign()
