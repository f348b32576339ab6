"""Diversity of a set of features: effective number of distinct rows, and their mean distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from variegate.metrics.features import unit_rows


def vendi_score(features: Tensor, *, order: float = 1.0) -> Tensor:
    """Effective number of distinct rows in each set of features.

    Exponential of the Renyi entropy of the spectrum of the cosine Gram matrix over N: 1 when every row points
    the same way, N when all are mutually orthogonal.

    Args:
        features: `[..., N, D]`, any scale; rows are L2-normalised, arithmetic is float64.
        order: Renyi order q in (0, inf]; 1 is Shannon, larger q discounts rare modes.

    Returns:
        `[...]`, float64, unit: items, in [1, N].

    Raises:
        ValueError: if N is 0, a row is zero or not finite, or `order` is not positive.

    Reference:
        Friedman & Dieng, arXiv:2210.02410 (q = 1); Pasarkar & Dieng, arXiv:2310.12952 (q != 1).

    Example:
        >>> round(vendi_score(torch.eye(3)[[0, 0, 1, 2]]).item(), 4)  # two equal, two distinct: 2**1.5
        2.8284
        >>> round(vendi_score(torch.eye(3)[[0, 0, 1, 2]], order=2).item(), 4)  # 1 / (1/4 + 1/16 + 1/16)
        2.6667
    """
    if not order > 0:
        raise ValueError(f"order={order!r} is no Renyi order; use a positive number, math.inf included.")
    rows = _unit_rows(features, least=1)
    spectrum = torch.linalg.eigvalsh(rows @ rows.mT / rows.shape[-2])
    # Rounding leaves specks, of either sign, where equal rows have eigenvalue 0; orders below 1 magnify them.
    spectrum = spectrum.where(spectrum > rows.shape[-2] * torch.finfo(spectrum.dtype).eps, 0)
    entropy: Tensor
    if order == 1:
        entropy = torch.special.entr(spectrum).sum(dim=-1)
    elif math.isinf(order):
        entropy = -spectrum.amax(dim=-1).log()
    else:
        entropy = (order * spectrum.log()).logsumexp(dim=-1) / (1 - order)
    return entropy.exp()


def mean_pairwise_vendi(features: Tensor, *, order: float = 1.0) -> Tensor:
    """Mean Vendi score of the pairs of rows of each set of features: comparable whatever N is.

    Args:
        features: `[..., N, D]`, as for `vendi_score`.
        order: as there.

    Returns:
        `[...]`, float64, unit: items, in [1, 2].

    Raises:
        ValueError: if N is below 2, or as there.

    Example:
        >>> round(mean_pairwise_vendi(torch.eye(3)[[0, 0, 1]]).item(), 4)  # one equal pair of three: (1 + 2 + 2) / 3
        1.6667
    """
    cosine = _pairwise_cosines(features).clamp(-1, 1)
    # Two rows at the same angle in a plane have the same score, and D stays out of the pairs.
    other = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=-1)
    first = torch.tensor([1.0, 0.0], dtype=other.dtype, device=other.device).expand_as(other)
    return vendi_score(torch.stack([first, other], dim=-2), order=order).mean(dim=-1)


def mean_pairwise_distance(features: Tensor) -> Tensor:
    """Mean cosine distance between the rows of each set of features.

    The mean of 1 - cos(x_i, x_j) over the pairs i < j: 0 when every row points the same way, 1 when all are
    mutually orthogonal.

    Args:
        features: `[..., N, D]`, any scale; arithmetic is float64.

    Returns:
        `[...]`, float64, in [0, 2].

    Raises:
        ValueError: if N is below 2, or a row is zero or not finite.

    Example:
        >>> round(mean_pairwise_distance(torch.eye(3)[[0, 0, 1]]).item(), 4)  # one equal pair of three
        0.6667
    """
    return 1 - _pairwise_cosines(features).mean(dim=-1)


def _pairwise_cosines(features: Tensor) -> Tensor:
    """Cosine of each pair of rows i < j, `[..., N (N - 1) / 2]`."""
    rows = _unit_rows(features, least=2)
    count = rows.shape[-2]
    first, second = torch.triu_indices(count, count, offset=1, device=rows.device)
    return (rows @ rows.mT)[..., first, second]


def _unit_rows(features: Tensor, least: int) -> Tensor:
    """Rows at length 1 in float64, checked."""
    if features.ndim < 2 or features.shape[-2] < least:
        raise ValueError(f"features has shape {tuple(features.shape)}; use [..., N, D] with N at least {least}.")
    return unit_rows(features)
