"""The judge of emoji pictures: which real drawing does each show, and is it what the prompt asked for?

Its eyes are a network trained on photographs, never the generator's own, and see nothing finer than strokes: what
a decoder does to texture is not what a picture shows. Its error: docs/judge.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from variegate.emoji.reference import Reference
from variegate.metrics import Extractor, Network, efficientnet_lite0, kid, mean_pairwise_distance, vendi_score

if TYPE_CHECKING:
    from PIL.Image import Image


BLUR = 3.0  # deviation in pixels of the 128 that the network sees: 1.5 of a picture's 64


def eyes(device: str | torch.device = "cpu") -> Network:
    """What the judge sees of images, and saw of the drawings of its bundled reference."""
    return efficientnet_lite0(blur=BLUR, device=device)


@dataclass(frozen=True)
class Verdict:
    """The real drawing nearest to a picture.

    Attributes:
        label: its emoji.
        style: its style.
        subgroup: Unicode's subgroup of the emoji.
        similarity: cosine of the features of picture and drawing, in [-1, 1].
    """

    label: str
    style: str
    subgroup: str
    similarity: float


@dataclass(frozen=True)
class Report:
    """How well and how diversely N pictures answer one prompt.

    Attributes:
        prompt: the prompt.
        verdicts: one per picture, in order.
        precision: share of pictures whose nearest emoji the prompt allows, whatever its style.
        style_precision: share of pictures whose nearest drawing has the style that the prompt names; None
            where it names none.
        similarity: mean similarity to the nearest drawing.
        labels: number of distinct emoji, at most N.
        drawings: number of distinct pairs of emoji and style, at most N.
        styles: number of distinct styles.
        vendi: effective number of distinct pictures, in [1, N].
        distance: mean cosine distance between two of the pictures.
        kid: kernel distance of the pictures to the real drawings that the prompt allows, all of them alike: the
            estimate is unbiased, so its mean over prompts is worth more than each; None where it allows only one.
    """

    prompt: str
    verdicts: tuple[Verdict, ...]
    precision: float
    style_precision: float | None
    similarity: float
    labels: int
    drawings: int
    styles: int
    vendi: float
    distance: float
    kid: float | None


class Judge:
    """Compares pictures with every real drawing of the bundled models' domain.

    Images are what extractors take: a sequence of PIL images, or a float tensor `[N, 3, H, W]` in [-1, 1].

    Args:
        reference: the real drawings.
        extract: makes features of images, as it made those of the reference.

    Example:
        >>> from PIL import Image, ImageDraw
        >>> image = Image.new("RGB", (64, 64), "white")
        >>> draw = ImageDraw.Draw(image)
        >>> draw.ellipse((0, 3, 34, 37), "#d24")
        >>> draw.ellipse((30, 3, 64, 37), "#d24")
        >>> draw.polygon([(2, 28), (62, 28), (32, 62)], "#d24")
        >>> judge = Judge.load()
        >>> judge([image])[0].label
        'red heart'
        >>> judge.report([image, image.rotate(180)], "a heart").precision
        0.5
    """

    def __init__(self, reference: Reference, extract: Extractor) -> None:
        self.reference = reference
        self.extract = extract

    @classmethod
    def load(cls, *, device: str | torch.device = "cpu") -> Judge:
        """The judge in the package, with its network and its reference on `device`."""
        return cls(Reference.load(device=device), eyes(device))

    def __call__(self, images: Sequence[Image] | Tensor) -> list[Verdict]:
        """The nearest real drawing of each image, in order."""
        return self._verdicts(self.extract(images))

    def report(self, images: Sequence[Image] | Tensor, prompt: str) -> Report:
        """Measure the pictures of one prompt.

        Args:
            images: at least two.
            prompt: one that `Reference.truth` knows.

        Raises:
            ValueError: if the prompt has no truth, or there are fewer than two images.
        """
        truth = self.reference.truth(prompt)
        if len(images) < 2:
            raise ValueError(f"images has {len(images)} pictures; a report of diversity needs at least two.")
        features = self.extract(images)
        verdicts = self._verdicts(features)
        count = len(verdicts)
        allowed = self.reference.features[
            [d.label in truth.labels and truth.style in (None, d.style) for d in self.reference.drawings]
        ]
        return Report(
            prompt=prompt,
            verdicts=tuple(verdicts),
            precision=sum(v.label in truth.labels for v in verdicts) / count,
            style_precision=sum(v.style == truth.style for v in verdicts) / count if truth.style else None,
            similarity=sum(v.similarity for v in verdicts) / count,
            labels=len({v.label for v in verdicts}),
            drawings=len({(v.label, v.style) for v in verdicts}),
            styles=len({v.style for v in verdicts}),
            vendi=vendi_score(features).item(),
            distance=mean_pairwise_distance(features).item(),
            kid=kid(features, allowed, scale=1.0).item() if len(allowed) > 1 else None,
        )

    def kid(self, images: Sequence[Image] | Tensor) -> float:
        """Kernel inception distance of images to all drawings of the reference; 0 for more of the same kind.

        Args:
            images: at least two; the estimate is unbiased, but noisy below some hundred.

        Raises:
            ValueError: if there are fewer than two images.
        """
        return kid(self.extract(images), self.reference.features, scale=1.0).item()

    def _verdicts(self, features: Tensor) -> list[Verdict]:
        similarity, rows = (features @ self.reference.features.T).max(dim=1)
        nearest = [self.reference.drawings[row] for row in rows.tolist()]
        return [
            Verdict(drawing.label, drawing.style, drawing.subgroup, value)
            for drawing, value in zip(nearest, similarity.tolist(), strict=True)
        ]
