"""SPELL: no image may end too close to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from variegate.fields import Range
from variegate.intervention import PredictionIntervention, Strength
from variegate.step import Moment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SPELL(PredictionIntervention):
    """Sparse repellency: an image that heads into a ball around another one is turned away to its surface.

    With y_i the finished image that a prediction points to and z_j those of its siblings and of earlier calls,

        y_i <- y_i + strength * sum_j max(radius / |y_i - z_j| - 1, 0) (y_i - z_j).

    It acts mostly in the early steps, where all images of a prompt head for the same mean, and leaves alone what is
    far enough from everything else. Earlier images are kept as long as the attachment lives; so it works on single
    images, one call after another. The first image of all, alone, is the stock pipeline's; two that are too close
    both go the whole way, straight apart, and two that are equal stay.

    Attributes:
        strength: 1 leads to the surface of one ball, more makes up for what the next steps undo; 0 is off.
        radius: of the balls, as the root mean square of a difference over the latent values, which are of unit size.
        bank: how many earlier images are kept, the latest; each takes 4 bytes per latent value.
        start, stop: see `Intervention`.
        branch: guidance branches that get the push, which is that of the prompt's own.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2410.06025, whose recommended strength is 1.6. *Deviation*: its radii are absolute and one for each
        model, and could not be verified; this default is for emoji-base. With guidance the images are those that the
        prompt's prediction points to, not the guided ones; no set of images to be shielded is read from outside.

    Example:
        >>> SPELL(radius=0.3).strength
        1.6
    """

    strength: Strength = 1.6
    radius: Annotated[float, Range(0, 1_000)] = 0.5
    bank: Annotated[int, Range(0)] = 1000

    needs_company: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the strength and the radius are above 0."""
        return self.strength > 0 and self.radius > 0

    def edit(self, prediction: Tensor, latents: Tensor, moment: Moment) -> Tensor:
        """See `PredictionIntervention.edit`."""
        images = moment.images(prediction, latents).flatten(2)
        earlier = moment.recall(images)
        away = self._push(images.flatten(0, 1), earlier).view(images.shape) + self._push(images, images)
        return prediction + moment.to_move_images(self.strength * away).view(prediction.shape)

    def idle(self) -> str:
        """See `Intervention.idle`."""
        return f"no two images came within radius={self.radius} of each other"

    def _push(self, images: Tensor, others: Tensor) -> Tensor:
        import torch

        distances = torch.cdist(images, others, compute_mode="donot_use_mm_for_euclid_dist")
        radius = self.radius * images.shape[-1] ** 0.5
        weights = (radius / distances.clamp_min(1e-6 * radius) - 1).clamp_min(0) * (distances > 0)
        push: Tensor = weights.sum(-1, keepdim=True) * images - weights @ others
        return push

    def remember(self, images: Tensor, moment: Moment) -> None:
        """See `PredictionIntervention.remember`."""
        moment.keep(images.flatten(2).flatten(0, 1), self.bank)
