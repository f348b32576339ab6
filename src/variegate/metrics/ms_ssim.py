"""Diversity of a set of images without a network: mean pairwise multi-scale structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from variegate.metrics.features import finite

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def scales(height: int, width: int) -> int:
    """How many of the five scales, each half the size of the one before, have room for the window; 3 for 64 x 64.

    Raises:
        ValueError: if it is none.
    """
    count = sum(min(height, width) >= WINDOW << scale for scale in range(len(WEIGHTS)))
    if count == 0:
        raise ValueError(f"images of {height} x {width} are too small for MS-SSIM; use at least {WINDOW} x {WINDOW}.")
    return count


def mean_pairwise_ms_ssim(images: Tensor) -> Tensor:
    """Mean multi-scale structural similarity of two images of a set: 1 when all are equal, lower when they differ.

    Args:
        images: `[N, 3, H, W]`, N at least 2, in [-1, 1].

    Returns:
        `[]`, float32, in [0, 1].

    Raises:
        ValueError: for another shape, if an image is smaller than 11 x 11, or values are not finite.

    Reference:
        Wang et al. 2003, "Multi-scale structural similarity for image quality assessment", eq. 7, without padding, each
        colour by itself; as a measure of diversity Odena et al., arXiv:1610.09585. *Deviation*: images with a side
        below 176 have fewer `scales`, and the exponents of those are divided by their sum.

    Example:
        >>> images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)
        >>> round(mean_pairwise_ms_ssim(images[[0, 0]]).item(), 4)
        1.0
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
        raise ValueError(f"images has shape {tuple(images.shape)}; use [N, 3, H, W] with N at least 2.")
    weights = WEIGHTS[: scales(*images.shape[2:])]
    x = (finite(images, "images").float() + 1) / 2
    product = x.new_ones(())
    for scale, weight in enumerate(weights):
        mean = _blur(x)
        variance = _blur(x.square()) - mean.square()
        found = []
        for i in range(len(x) - 1):  # against all later ones at once
            later = slice(i + 1, None)
            means = mean[i] * mean[later]
            similarity = (2 * (_blur(x[i] * x[later]) - means) + C2) / (variance[i] + variance[later] + C2)
            if scale == len(weights) - 1:
                similarity = similarity * (2 * means + C1) / (mean[i].square() + mean[later].square() + C1)
            found.append(similarity.mean(dim=(2, 3)))
        product = product * torch.cat(found).clamp(min=0) ** (weight / sum(weights))
        x = avg_pool2d(x, 2)
    return product.mean()


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of each place that has the whole window around it."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-places.square() / (2 * SIGMA**2)).softmax(dim=0)
    planes = conv2d(conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    return planes.view(*x.shape[:2], *planes.shape[2:])
