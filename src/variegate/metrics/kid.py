"""Distance between two sets of features: the kernel inception distance."""

from __future__ import annotations

from torch import Tensor

from variegate.metrics.features import finite


def kid(features: Tensor, reference: Tensor, *, degree: int = 3, scale: float | None = None) -> Tensor:
    """Unbiased estimate of how far two sets of features are apart.

    The squared maximum mean discrepancy under the kernel k(x, y) = (scale x.y + 1)^degree; means within a set
    leave out the pairs of a row with itself. 0 in expectation for two samples of one distribution, and then
    negative as often as not.

    Args:
        features: `[N, D]`; arithmetic is float64.
        reference: `[M, D]`.
        degree: of the polynomial.
        scale: factor of the inner product; None is 1 / D, for raw network features. For rows of length 1,
            whose inner product is a cosine already, use 1.

    Returns:
        `[]`, float64.

    Raises:
        ValueError: if the two are not matrices of equal width, one has fewer than two rows, or values
            that are not finite, or so large that their kernel is not.

    Reference:
        Binkowski et al., arXiv:1801.01401, kernel inception distance. *Deviation*: one estimate over all
        rows, instead of the mean over random subsets; so no random state, and the least variance.

    Example:
        >>> import torch
        >>> kid(torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0]])).item()  # 2**3 + 1 - 2 * 1
        7.0
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or value.shape[0] < 2 or value.shape[1] != features.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; use [N, D] and [M, D] with N and M at least 2.")
    x, y = finite(features).double(), finite(reference, "reference").double()
    factor = 1 / x.shape[1] if scale is None else scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (factor * a @ b.T + 1) ** degree

    def within(a: Tensor) -> Tensor:
        matrix, count = kernel(a, a), a.shape[0]
        return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))

    found = within(x) + within(y) - 2 * kernel(x, y).mean()
    if not found.isfinite():
        raise ValueError(f"features or reference are so large that their products to the power of {degree} overflow.")
    return found
