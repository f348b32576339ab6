"""Distance between two sets of features: the Frechet inception distance."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from variegate.metrics.features import finite, power_below


def fid(features: Tensor, reference: Tensor) -> Tensor:
    """Frechet distance of the normal distributions that fit two sets of features.

    With means m and covariances C, |m_x - m_y|^2 + tr C_x + tr C_y - 2 tr (C_x C_y)^(1/2). 0 for equal sets; of two
    samples of one distribution it is positive, the more so the fewer rows there are.

    The roots of the eigenvalues of C_x C_y are the singular values of R_x R_y^T, where C = R^T R and R is the
    triangle of the centred rows' QR decomposition: so no covariance is ever formed or squared.

    Args:
        features: `[N, D]`; arithmetic is float64.
        reference: `[M, D]`.

    Returns:
        `[]`, float64, in [0, inf); in [0, 4] for rows of length 1.

    Raises:
        ValueError: if the two are not matrices of equal width, one has fewer than two rows, or values that are not
            finite, or so large that the distance is not.

    Warns:
        UserWarning: if one has no more rows than D: its covariance is singular, and the distance mostly bias.

    Reference:
        Heusel et al., arXiv:1706.08500, eq. 6; covariances over N - 1.

    Example:
        >>> rows = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> round(fid(rows + 3, 2 * rows).item(), 4)  # means 3 apart, deviations 1 and 2: 3**2 + (1 - 2)**2
        10.0
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or value.shape[0] < 2 or value.shape[1] != features.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; use [N, D] and [M, D] with N and M at least 2.")
        if value.shape[0] <= value.shape[1]:
            warnings.warn(
                f"{name} has {value.shape[0]} rows of width {value.shape[1]}; "
                "with no more rows than that, the Frechet distance is mostly bias.",
                stacklevel=2,
            )
    x, y = finite(features).double(), finite(reference, "reference").double()
    # Squares stay in range at a scale near one; a power of two there and back changes nothing else.
    scale = power_below(torch.maximum(x.abs().max(), y.abs().max()))
    x, y = x / scale, y / scale

    def root(rows: Tensor) -> Tensor:
        triangle: Tensor = torch.linalg.qr((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5, mode="r").R
        return triangle

    a, b = root(x), root(y)
    apart: Tensor = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    distance: Tensor = apart - 2 * torch.linalg.svdvals(a @ b.T).sum()
    found = distance.clamp(min=0) * scale * scale
    if not found.isfinite():
        raise ValueError("features or reference are so large that squares of their distances overflow.")
    return found
