"""Fidelity and variety of a set of features beside a reference: precision, recall, density, coverage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from variegate.metrics.features import finite, power_below


class PRDC(NamedTuple):
    """How two sets of features overlap; each a float64 tensor `[]`.

    Attributes:
        precision: share of rows near some reference row, in [0, 1].
        recall: share of reference rows near some row, by the rows' own distances, in [0, 1].
        density: how many reference rows a row is near, over k, in [0, M / k]; 1 for more of the same.
        coverage: share of reference rows that some row is near, by the reference's distances, in [0, 1].
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def prdc(features: Tensor, reference: Tensor, *, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage of features beside a reference.

    A row is near another if it is closer to it than the other's k-th nearest neighbour in its own set.

    Args:
        features: `[N, D]`; arithmetic is float64; any scale.
        reference: `[M, D]`, of the same scale.
        k: neighbours, at least 1 and below N and M.

    Returns:
        The four shares.

    Raises:
        ValueError: if the two are not matrices of equal width, k is out of range, or values are not finite.

    Reference:
        Naeem et al., arXiv:2002.09797, where k = 5; precision and recall are those of
        Kynkaanniemi et al., arXiv:1904.06991.

    Example:
        >>> places = torch.tensor([[0.0], [1.0], [5.0], [6.0]])  # two modes
        >>> [round(value.item(), 2) for value in prdc(places[:2] + 0.1, places, k=1)]  # found one of them
        [1.0, 0.5, 1.5, 0.5]
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        shapes = f"{tuple(features.shape)} and reference {tuple(reference.shape)}"
        raise ValueError(f"features has shape {shapes}; use [N, D] and [M, D].")
    fewest = min(len(features), len(reference))
    if not 1 <= k < fewest:
        raise ValueError(f"k={k} is out of range; use 1 to {fewest - 1}, fewer than there are rows in either set.")
    # At one scale for both, which changes nothing but keeps squares in range.
    x, y = finite(features).double(), finite(reference, "reference").double()
    scale = power_below(torch.maximum(x.abs().max(), y.abs().max()))
    x, y = x / scale, y / scale
    between = _distances(y, x)
    # The nearest neighbour is the row itself.
    radius, own = (_distances(rows, rows).kthvalue(k + 1).values for rows in (y, x))
    near = between < radius[:, None]
    return PRDC(
        precision=near.any(0).double().mean(),
        recall=(between < own).any(1).double().mean(),
        density=near.sum(0).double().mean() / k,
        coverage=near.any(1).double().mean(),
    )


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences: products round, and equal rows would be a little apart.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
