"""Feature Self-Guidance: image tokens of one block are dispersed, and the block itself makes them likely again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from variegate.fields import Range
from variegate.intervention import BlockCall, BlockChoice, ImageIntervention, Share, Strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureSelfGuidance(ImageIntervention):
    """Push the images of one prompt apart in the image tokens h of an early block while the noise is high.

    With the flattened tokens of image i as one vector h_i, `inner_steps` steps down

        G = log mean_ij exp(cos(h_i, h_j) / temperature)

    make h'; the same block, run again with h' in place of the image tokens it was given, takes it back to what the
    model knows, and h <- (1 - blend) h + blend block(h').

    Attributes:
        blend: beta in [0, 1]; 0 is off.
        learning_rate: of a step, for tokens scaled to mean |h_i|^2 = 1.
        inner_steps: how many.
        temperature: of G.
        low: noise level in [0, 1] below which it rests.
        start, stop, blocks, site, branch: see `BlockIntervention`; `site` is "image".

    Raises:
        ValueError: if a value is out of its range, or at the first step of a compiled denoiser, whose blocks can't be
            run again by themselves.

    Reference:
        arXiv 2606.27371, defaults as there, block 2 counted from 0. Not verified: its temperature; whether cosines are
        of whole images, as here, or of tokens; the scale of its learning rate; which text the second run is given
        (here that of the first). *Deviation*: the steps are taken exactly on the Gram matrix (see `variegate.gram`),
        and keep the length of every h_i.

    Example:
        >>> FeatureSelfGuidance(blend=0.2).low
        0.8
    """

    blend: Share = 0.4
    learning_rate: Strength = 0.5
    inner_steps: Annotated[int, Range(1, 10_000)] = 30
    temperature: Annotated[float, Range(1e-3, 1_000)] = 1.0
    low: Share = 0.8
    blocks: BlockChoice = (2,)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to blend in."""
        return self.blend > 0

    def idle(self) -> str:
        """See `Intervention.idle`."""
        return f"it acts from low={self.low} upwards"

    def edit(self, tokens: Tensor, block: BlockCall) -> Tensor:
        """See `ImageIntervention.edit`."""
        if block.moment.noise < self.low:
            return tokens
        from variegate.gram import gram_flow

        dispersed = gram_flow(
            tokens,
            Dispersion(self.temperature),
            strength=self.learning_rate * self.inner_steps,
            inner_steps=self.inner_steps,
            preserve_norm=True,
        )
        return tokens.lerp(block.rerun(dispersed), self.blend)


@dataclass(frozen=True)
class Dispersion:
    """-G on a Gram matrix; see `variegate.objectives.Objective`."""

    temperature: float

    def value(self, gram: Any) -> Any:
        """-log mean_ij exp(K_ij / temperature), from inner products `[..., B, B]`."""
        import numpy as np

        kernel = gram / _lengths(gram)
        # Relative to the greatest there can be, as below: no overflow.
        return -(np.log(np.exp((kernel - 1) / self.temperature).mean((-2, -1))) + 1 / self.temperature)

    def coefficients(self, gram: Any) -> Any:
        """A with gradient_i = sum_j A_ij h_j: the slope of each K_ij, without its part along h_i."""
        import numpy as np

        lengths = _lengths(gram)
        kernel = gram / lengths
        weights = np.exp((kernel - 1) / self.temperature)
        slope = -2 * weights / weights.sum((-2, -1), keepdims=True) / self.temperature
        return (slope - np.eye(kernel.shape[-1]) * (slope @ kernel)) / lengths


def _lengths(gram: Any) -> Any:
    """|h_i| |h_j|."""
    import numpy as np

    norms = np.sqrt(gram.diagonal(axis1=-2, axis2=-1))
    return norms[..., None] * norms[..., None, :]
