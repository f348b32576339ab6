"""Extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from variegate.metrics.extractors import efficientnet_lite0
from variegate.metrics.features import Network
from variegate.metrics.pretrained import clip, dinov2

EFFICIENTNET = "efficientnet-lite0"
PRETRAINED = {"dinov2": dinov2, "clip": clip}


def extractor(
    name: str = EFFICIENTNET, *, model: str | Path | None = None, device: str | torch.device = "cpu"
) -> Network:
    """The extractor of a name.

    Args:
        name: "efficientnet-lite0", which is in the package, "dinov2" or "clip".
        model: hub id or folder of the network; None is the usual one of that name.
        device: where the network runs and the features stay.

    Raises:
        ValueError: for another name, a model for the network in the package, or one that can't be loaded.

    Example:
        >>> print(extractor().features)
        efficientnet-lite0, 128 x 128 bilinear antialiased, (v - 127) / 128, rows of length 1
    """
    if name == EFFICIENTNET:
        if model is not None:
            raise ValueError(f"model={str(model)!r}: {name} is in the package; a model is for {', '.join(PRETRAINED)}.")
        return efficientnet_lite0(device=device)
    if name not in PRETRAINED:
        raise ValueError(
            f"extractor={name!r} is unknown; use {EFFICIENTNET}, {', '.join(PRETRAINED)}, "
            "or in Python any function of images to [N, D]."
        )
    return PRETRAINED[name](device=device) if model is None else PRETRAINED[name](model, device=device)
