"""Diversity objectives on a Gram matrix, and the coefficients of their gradients.

An objective here sees the samples c_1 .. c_B only through their inner products G_ij = c_i . c_j, by way of
the cosine kernel K_ij = G_ij / (|c_i| |c_j|). Its gradient is therefore a combination of the samples,

    d objective / d c_i = sum_j A_ij c_j,

and A depends on G alone. An objective gives its `value` and that A, its `coefficients`; up is more diverse.

Conventions: leading axes are independent sets of samples; no sample is zero, for that has no direction;
arithmetic is float64 on the CPU, where a matrix this small belongs. Eigenvalues of K below 1e-14 are rounding
of zero, so samples that differ by less than about 1e-7 of their norm count as equal.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Matrix = TypeVar("Matrix", Tensor, Array)  # an array gives an array, which is the cheaper kind at this size

_RANK_FLOOR = 1e-14


class Objective(Protocol):
    """What the Gram flow needs of an objective."""

    def value(self, gram: Matrix) -> Matrix:
        """Objective of each set: inner products `[..., B, B]` to `[...]`, float64, same kind; see `float64_device`."""
        ...

    def coefficients(self, gram: Matrix) -> Matrix:
        """A with gradient_i = sum_j A_ij c_j: inner products `[..., B, B]` to `[..., B, B]`, likewise."""
        ...


class _OfKernel:
    """An objective given as a function of the cosine kernel and its derivative."""

    def value(self, gram: Matrix) -> Matrix:
        """See `Objective.value`."""
        inner = _array(gram)
        return _like(gram, self._value(inner / _products_of_norms(inner)))

    def coefficients(self, gram: Matrix) -> Matrix:
        """See `Objective.coefficients`.

        With u_i = c_i / |c_i| the chain rule gives (2 / |c_i|) sum_j slope_ij (u_j - K_ij u_i): of each pull,
        the part tangent to the sphere. The term j = i is zero whatever the diagonal of the slope.
        """
        inner = _array(gram)
        products = _products_of_norms(inner)
        kernel = inner / products
        slope = self._slope(kernel)
        return _like(gram, (slope - identity(kernel.shape[-1]) * (slope @ kernel)) / (0.5 * products))

    def _value(self, kernel: Array) -> Any:
        raise NotImplementedError

    def _slope(self, kernel: Array) -> Any:
        """Derivative by K_ij; its diagonal is free, since K_ii is constant."""
        raise NotImplementedError


@dataclass(frozen=True)
class Vendi(_OfKernel):
    """Renyi entropy of the spectrum of K/B, in nats, in [0, log B]; its exponential is the Vendi score.

    Args:
        order: Renyi order q in (0, inf]. 1 is the von Neumann entropy, the objective of contextual repulsion;
            a larger order attends to the few directions that most samples share.

    Raises:
        ValueError: if `order` is not positive.

    Reference:
        arXiv:2603.28762, eq. 3-4 (order 1); arXiv:2310.12952 (other orders).

    Example:
        >>> samples = torch.eye(3)[[0, 0, 1, 2]]  # two equal, two distinct: 2**1.5
        >>> round(Vendi().value(samples @ samples.T).exp().item(), 4)
        2.8284
    """

    order: float = 1.0

    def __post_init__(self) -> None:
        if not self.order > 0:
            raise ValueError(f"order must be in (0, inf], got {self.order}; 1 is the paper's entropy")

    def _value(self, kernel: Array) -> Any:
        shares = np.linalg.eigvalsh(kernel).clip(0) / kernel.shape[-1]
        top = shares[..., -1]
        if self.order == 1:
            return -(shares * np.log(np.maximum(shares, _RANK_FLOOR))).sum(-1)
        if math.isinf(self.order):
            return -np.log(top)
        powers = (shares / top[..., None]) ** self.order  # relative to the top share: no underflow
        return (self.order * np.log(top) + np.log(powers.sum(-1))) / (1 - self.order)

    def _slope(self, kernel: Array) -> Any:
        eigenvalues, vectors = np.linalg.eigh(kernel)
        log = np.log(np.maximum(eigenvalues, _RANK_FLOOR))
        # The slope by each eigenvalue is wanted up to a constant, which would only add to the diagonal.
        if self.order == 1:
            return _with_spectrum(log / -kernel.shape[-1], vectors)
        top = eigenvalues[..., -1:]
        if math.isinf(self.order):
            tops = eigenvalues > top * (1 - 1e-9)  # equal eigenvalues share the push: no sample is special
            return _with_spectrum(tops / (tops.sum(-1, keepdims=True) * -top), vectors)
        # The constant that puts the top eigenvalue's slope at zero: no cancellation near order 1, no overflow.
        log -= np.log(top)
        slopes = self.order / (1 - self.order) * np.expm1((self.order - 1) * log)
        powers = top * np.exp(self.order * log).sum(-1, keepdims=True)
        return _with_spectrum(slopes / powers * (eigenvalues > _RANK_FLOOR), vectors)


@dataclass(frozen=True)
class RKE(_OfKernel):
    """Renyi entropy of order 2, in nats: minus the log of the mean squared cosine; no eigendecomposition.

    Reference:
        arXiv:2310.12952 at order 2; the same number as `Vendi(order=2)`.

    Example:
        >>> RKE().value(torch.eye(4)).exp().item()
        4.0
    """

    def _value(self, kernel: Array) -> Any:
        return -np.log((kernel**2).mean((-2, -1)))

    def _slope(self, kernel: Array) -> Any:
        return -2 * kernel / (kernel**2).sum((-2, -1), keepdims=True)


@dataclass(frozen=True)
class LogDet(_OfKernel):
    """Log-determinant of K, <= 0: the log of the squared volume that the sample directions span.

    Pushes hardest on the closest pair, without bound as it closes. A direction that equal samples leave
    unspanned exerts no push, and keeps the value finite.

    Example:
        >>> LogDet().value(torch.eye(4)).item()
        0.0
    """

    def _value(self, kernel: Array) -> Any:
        eigenvalues = np.linalg.eigvalsh(kernel)
        return np.log(np.maximum(eigenvalues, _RANK_FLOOR)).sum(-1)

    def _slope(self, kernel: Array) -> Any:
        eigenvalues, vectors = np.linalg.eigh(kernel)
        spanned = eigenvalues > _RANK_FLOOR
        return _with_spectrum(spanned / np.maximum(eigenvalues, _RANK_FLOOR), vectors)


@dataclass(frozen=True)
class Cosine(_OfKernel):
    """Minus the mean cosine similarity of two different samples, in [-1, 1/(B-1)]; 0 for a single sample.

    Example:
        >>> Cosine().value(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).item()
        -0.5
    """

    def _value(self, kernel: Array) -> Any:
        return (kernel * self._slope(kernel)).sum((-2, -1))

    def _slope(self, kernel: Array) -> Any:
        size = kernel.shape[-1]
        return (identity(size) - 1) / max(size * (size - 1), 1)


def objective(name: str, order: float = 1.0) -> Objective:
    """The objective called `name`.

    Args:
        name: "vendi", "rke", "log_det" or "cosine".
        order: Renyi order, read by "vendi" alone.

    Raises:
        ValueError: if there is no objective of that name, or `order` is not positive.

    Example:
        >>> objective("vendi", order=2)
        Vendi(order=2)
    """
    if name == "vendi":
        return Vendi(order)
    others: dict[str, Objective] = {"rke": RKE(), "log_det": LogDet(), "cosine": Cosine()}
    if name not in others:
        raise ValueError(f"objective must be one of 'vendi', {', '.join(map(repr, others))}, got {name!r}")
    return others[name]


@functools.cache
def identity(size: int) -> Array:
    """The identity matrix, made once: not to be written to."""
    return np.eye(size)


def float64_device(device: torch.device) -> torch.device:
    """`device` itself, or the CPU in place of a kind of device that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _array(gram: Tensor | Array) -> Array:
    return gram if isinstance(gram, np.ndarray) else gram.detach().cpu().double().numpy()


def _products_of_norms(inner: Array) -> Array:
    norms = np.sqrt(inner.diagonal(axis1=-2, axis2=-1))
    return norms[..., None] * norms[..., None, :]


def _with_spectrum(eigenvalues: Array, vectors: Array) -> Any:
    return (vectors * eigenvalues[..., None, :]) @ vectors.swapaxes(-1, -2)


def _like(gram: Matrix, values: Array) -> Matrix:
    if isinstance(gram, np.ndarray):
        return values
    return torch.as_tensor(values, device=float64_device(gram.device))
