"""Is a model typical on a prompt? Its pictures of one prompt beside those of prompts that have nothing in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from variegate.gallery import Gallery, Group, Row
from variegate.generation import diversity, generate
from variegate.request import Request

INDEPENDENT = (
    "red apple", "rocket", "elephant", "sailboat", "sunflower", "bicycle", "mushroom", "penguin",
    "tractor", "cupcake", "butterfly", "cactus", "helicopter", "strawberry", "tiger", "anchor",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """How varied a model's pictures of a prompt are, and how varied its pictures can be.

    Attributes:
        gallery: the prompt's pictures, the most typical first (the one most similar to the others); then one picture
            each of independent prompts.
        typicality: in [0, 1]: 1 is one picture n times, 0 as varied as independent prompts.
    """

    gallery: Gallery
    typicality: float


def diagnose(
    request: Request, *, pipeline: Any | None = None, progress: Callable[[int, int], None] | None = None
) -> Diagnosis:
    """Compare the variety of one prompt's pictures with that of independent prompts, by the same model.

    Typicality is 1 - (V - 1) / (U - 1), from the Vendi scores V of the n pictures of the prompt and U of one picture
    each of n independent prompts, at most 1 and at least 0.

    Args:
        request: of one prompt, with n from 2 to 16; its method is what is diagnosed, "none" for the model itself.
        pipeline: as in `generate`.
        progress: as in `generate`, over both runs.

    Raises:
        ValueError: if the request has several prompts or another n, or as in `generate`.

    Example:
        >>> found = diagnose(Request(("an animal",), n=4, steps=8, method="none"))
        >>> 0 <= found.typicality <= 1
        True
    """
    from variegate.metrics import efficientnet_lite0

    if len(request.prompts) != 1:
        raise ValueError(f"prompts={request.prompts!r}: a diagnosis is of one prompt.")
    if not 2 <= request.n <= len(INDEPENDENT):
        raise ValueError(f"n={request.n} is out of range; a diagnosis takes 2 to {len(INDEPENDENT)} pictures.")

    def share(first: bool) -> Callable[[int, int], None]:
        # Both runs make n pictures, the second one at a time: halves of the bar.
        return lambda done, total: progress(done if first else total + done, 2 * total) if progress else None

    own = generate(replace(request, compare=False), pipeline=pipeline, progress=share(True))
    others = replace(request, prompts=INDEPENDENT[: request.n], n=1, method="none", parameters={}, seeds=None)
    beside = generate(others, pipeline=pipeline, progress=share(False))
    extract = efficientnet_lite0()
    (row,) = own.groups[0].rows
    images = tuple(group.rows[0].images[0] for group in beside.groups)
    features = extract(row.images)
    order = (features @ features.mT).sum(1).argsort(descending=True).tolist()
    sorted_row = replace(row, images=tuple(row.images[i] for i in order))
    vendi, distance = diversity(extract(images))
    assert row.vendi is not None  # there are two pictures at least
    typicality = 1 - (row.vendi - 1) / max(vendi - 1, 1e-9)
    name = "independent prompts: " + ", ".join(others.prompts)
    groups = (Group(request.prompts[0], sorted_row, None), Group(name, Row("none", {}, images, vendi, distance), None))
    return Diagnosis(Gallery(groups, own.settings), min(1.0, max(0.0, typicality)))
