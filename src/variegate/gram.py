"""The exact Gram flow: any number of gradient steps for one read and one write of the tokens.

A gradient step of an objective that sees the samples C (rows c_1 .. c_B) only through G = C C^T is a B x B
matrix acting on them, C <- (I + rate A(G)) C. M steps therefore compose without the tokens:

    W = I;  repeat M times:  W <- W + (eta / M) A(W G W^T) W;   then once  C <- W C.

The B x B part is float64 on the CPU. The two passes over the tokens are float64 too, except for many tokens on
the CPU, where that costs time: there they are float32 wherever the difference would not show, which takes samples
distinct enough for a float32 Gram matrix and a displacement well above the rounding of a float32 product. (On a
GPU the time is in the memory, and a float32 product may silently be TF32.) Tokens on a device without float64,
Apple's MPS, are copied to the CPU and back: that path has run on tokens of the CPU, never on MPS. The Gram matrix of
a group whose squares leave the range of these numbers is that of its tokens times a power of two, which is exact.

W depends on the tokens, but gradients that are recorded take it for a constant: backwards, C' = W C is W^T.

Reference:
    arXiv:2603.28762, eq. 2 (the inner iterations), 3 and 4 (objective `Vendi()`).
    Deviation: none in exact arithmetic below 16 inner steps; for more see `flow_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from variegate.inner_steps import flow
from variegate.objectives import Array, Objective, float64_device, identity

_AT_ONCE = 2**17  # numbers: more than a call costs, less than the cache holds
_ORDINARY = 2.0**-80, 2.0**120  # a group whose greatest |c|^2 is in here has squares that float32 holds, too


@torch.no_grad()
def gram_matrix(tokens: Tensor) -> Tensor:
    """Inner products of the samples of each group, accurate enough to take their differences.

    Args:
        tokens: `[..., B, N, D]`, any floating dtype and strides; a sample is its N x D tokens as one vector.

    Returns:
        `[..., B, B]`, float64, on the tokens' device, or on the CPU where the device has no float64.

    Raises:
        ValueError: if `tokens` has fewer than three axes or is not of a floating dtype.

    Example:
        >>> gram_matrix(torch.ones(2, 3, 4))
        tensor([[12., 12.],
                [12., 12.]], dtype=torch.float64)
    """
    if tokens.ndim < 3 or not tokens.is_floating_point():
        raise ValueError(
            f"tokens must be floating-point [..., B, N, D], got {tokens.dtype} {list(tokens.shape)}; "
            "unsqueeze(-2) makes B vectors B samples of one token"
        )
    tokens = tokens.to(float64_device(tokens.device))
    if tokens.numel() <= _AT_ONCE:
        rows = tokens.flatten(-2).double()
        return rows @ rows.mT
    *groups, samples, _, _ = tokens.shape
    gram = torch.empty(*groups, samples, samples, dtype=torch.float64, device=tokens.device)
    fast = _fast_dtype(tokens)
    for index in np.ndindex(*groups):
        gram[index] = _inner_products(tokens[index], fast)
        if fast == torch.float32 and not _distinct(gram[index]):
            gram[index] = _inner_products(tokens[index], torch.float64)
    return gram


@np.errstate(all="ignore")  # what leaves the range of numbers is looked for in the result
def flow_weights(
    gram: Tensor,
    objective: Objective,
    *,
    strength: float | None = None,
    eta: float | None = None,
    inner_steps: int = 50,
    target: float | None = None,
    preserve_norm: bool = False,
    frozen: Tensor | None = None,
) -> Tensor:
    """The matrix W of the flow: after it, the samples of a group are W C.

    From 16 inner steps without a `target`, the M-step result is read off the polynomial in 1/M through five
    runs of 3 to 8 steps: Euler's method is smooth in its step size. If the last term of that polynomial is more
    than 1e-5 of the displacement (which itself is then good to about 1e-6), or the displacement exceeds the
    samples' norm, five longer runs are tried, up to 22 steps if M >= 44 and up to 88 if M >= 176; where none will
    do, as at great strengths, all M steps are taken.

    Args:
        gram: `[..., B, B]`, inner products of the samples of each group.
        objective: what to ascend.
        strength: eta / mean_i |c_i|^2 of each group before the flow, over its non-zero rows, frozen ones
            included; dimensionless, so that one number suits every model, block and prompt length; >= 0.
        eta: total step size in the paper's unit, |c|^2; >= 0. Give exactly one of `strength` and `eta`.
        inner_steps: M >= 1, the number of gradient steps, each of eta / M.
        target: a group takes no further step once exp(objective) has reached this (for Vendi: a number of
            samples in [1, B]). The last step may overshoot.
        preserve_norm: rescale every row to its initial norm after each step.
        frozen: bool, `[B]` or `[..., B]`; True rows push the others and do not move.

    Returns:
        `[..., B, B]`, float64, on the device of `gram`, or on the CPU where that has no float64. The rows of
        frozen samples, zero samples, and groups with non-finite products or fewer than two non-zero samples
        are those of the identity.

    Raises:
        ValueError: if not exactly one of `strength` and `eta` is given, an argument is out of range, or the
            steps are so great that the products overflow.

    Example:
        >>> from variegate.objectives import Cosine
        >>> flow_weights(torch.eye(2), Cosine(), strength=1.0, inner_steps=1)  # each leaves the other
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    _step_size(strength, eta, inner_steps, target)
    return _flow_weights(gram, objective, strength, eta, inner_steps, target, preserve_norm, frozen)


def _flow_weights(
    gram: Tensor,
    objective: Objective,
    strength: float | None,
    eta: float | None,
    inner_steps: int,
    target: float | None,
    preserve_norm: bool,
    frozen: Tensor | None,
    exponents: npt.NDArray[np.int64] | None = None,
) -> Tensor:
    """See `flow_weights`; `gram` is of tokens that were divided by 2^exponents, one for each group."""
    size = eta if strength is None else strength
    assert size is not None
    samples = gram.shape[-1]
    initial = gram.detach().cpu().double().numpy().reshape(-1, samples, samples)
    squares = initial.diagonal(axis1=-2, axis2=-1)
    present = squares > 0
    rates: Array = size * present.astype(np.float64)
    if eta is None:
        rates *= squares.sum(-1, keepdims=True) / np.maximum(present.sum(-1, keepdims=True), 1)
    elif exponents is not None:
        rates = np.ldexp(rates, -2 * exponents.reshape(-1, 1))
    if frozen is not None:
        rates *= ~frozen.cpu().expand(gram.shape[:-1]).numpy().reshape(-1, samples)
    moving = np.isfinite(initial).all((-2, -1)) & (present.sum(-1) > 1) & (size > 0)
    weights = np.zeros_like(initial) + identity(samples)
    settings = objective, inner_steps, target, preserve_norm
    try:
        if moving.all() and present.all():
            weights = flow(initial, rates[..., None], *settings)
        else:
            for pattern in set(map(tuple, present[moving].tolist())):
                groups, rows = np.flatnonzero(moving & (present == pattern).all(-1)), np.flatnonzero(pattern)
                block = np.ix_(groups, rows, rows)
                weights[block] = flow(initial[block], rates[groups[:, None], rows][..., None], *settings)
    except np.linalg.LinAlgError:  # non-finite products have no spectrum
        weights.fill(np.nan)
    if not np.isfinite(weights).all():
        raise _too_far(strength, eta, torch.float64)
    return torch.from_numpy(weights).reshape(gram.shape).to(float64_device(gram.device))


@np.errstate(all="ignore")  # products of groups that stay may be non-finite
def gram_flow(
    tokens: Tensor,
    objective: Objective,
    *,
    strength: float | None = None,
    eta: float | None = None,
    inner_steps: int = 50,
    target: float | None = None,
    preserve_norm: bool = False,
    frozen: Tensor | None = None,
) -> Tensor:
    """Move the samples of each group `inner_steps` gradient steps up `objective`.

    Gradients pass through the product C' = W C with W, which is computed from the tokens, held constant: a loss's
    gradient g by C' becomes W^T g by C. That is not the derivative of the flow, of which W's own is a part.

    Samples are written once, rounded once to the tokens' dtype. In float32 the displacement is exact to about
    1e-5 of itself, except where that rounding is larger: a sample displaced by less than 1e-4 of its norm (a
    strength of 1e-3 on samples that differ by 1e-3, say) carries an error of up to 6e-8 of its norm, which no
    float32 result can avoid. Equal samples stay equal.

    Args:
        tokens: `[..., B, N, D]`, float32, bfloat16, float16 or float64; leading axes are groups, which do not
            see each other. A sample is its N x D tokens as one vector c_i.
        objective: what to ascend; `Vendi()` is the paper's.
        strength: dimensionless step size; see `flow_weights`, also for the arguments that follow.
        eta: total step size in the paper's unit. Give exactly one of `strength` and `eta`.
        inner_steps: M >= 1.
        target: stop a group at this value of exp(objective).
        preserve_norm: keep the norm of every sample.
        frozen: bool, `[B]` or `[..., B]`; True rows push and do not move.

    Returns:
        The moved tokens: same shape, dtype and device. What does not move is bit-identical to the input:
        frozen samples, zero samples, groups with fewer than two non-zero samples, and groups with a
        non-finite token (they have no right answer, and a denoising loop is no place to raise). If nothing
        moves, which includes a step size of 0, this is `tokens` itself.

    Raises:
        ValueError: if not exactly one of `strength` and `eta` is given, an argument is out of range, or the
            steps are so great that finite tokens would leave the range of their dtype: unlike a non-finite token
            that is the step's doing, and a smaller one, or a wider dtype, is the remedy.

    Reference:
        arXiv:2603.28762, eq. 2; see the module for the form it takes here.

    Example:
        >>> from variegate.objectives import Vendi
        >>> tokens = torch.tensor([[[1.0, 0.1]], [[1.0, -0.1]]])  # two samples, 11 degrees apart
        >>> moved = gram_flow(tokens, Vendi(), strength=0.5)
        >>> [round(Vendi().value(gram_matrix(c)).exp().item(), 2) for c in (tokens, moved)]
        [1.06, 1.54]
    """
    step_size = _step_size(strength, eta, inner_steps, target)
    if step_size == 0:
        return tokens
    gram, exponents = _scaled_gram(tokens.detach())
    weights = _flow_weights(gram, objective, strength, eta, inner_steps, target, preserve_norm, frozen, exponents)
    if _unmoved(weights).all():
        return tokens
    norms = np.sqrt(gram.numpy().diagonal(axis1=-2, axis2=-1))
    reach = (np.abs(weights.numpy()) @ norms[..., None])[..., 0]  # no sample is longer after the flow

    def float32_suffices(index: tuple[int, ...]) -> bool:
        ordinary = exponents[index] == 0
        return bool(ordinary) and _float32_suffices(weights[index].numpy(), gram[index].numpy(), reach[index])

    moved: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        tokens.to(float64_device(tokens.device)), weights, float32_suffices
    )
    reach = np.ldexp(reach, exponents[..., None])
    if (reach > torch.finfo(moved.dtype).max).any() and not moved.detach()[~_unmoved(weights)].isfinite().all():
        raise _too_far(strength, eta, moved.dtype)
    return moved.to(tokens.device)


class _Product(torch.autograd.Function):
    """The weights, which are constants, times the samples: a linear map, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, float32_suffices: Callable[[tuple[int, ...]], bool]) -> Any:
        ctx.weights = weights
        if tokens.numel() <= _AT_ONCE:
            product = (weights.to(tokens.device) @ tokens.flatten(-2).double()).to(tokens.dtype).view(tokens.shape)
        else:
            product = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
            for index in np.ndindex(*tokens.shape[:-3]):
                dtype = _fast_dtype(tokens) if float32_suffices(index) else torch.float64
                _combine(weights[index], tokens[index], dtype, product[index])
        still = _unmoved(weights)
        if still.any():
            product[still] = tokens[still]
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        passed = _Product.apply(gradients[0], ctx.weights.mT, lambda index: True)  # type: ignore[no-untyped-call]
        return passed, None, None


def _unmoved(weights: Tensor) -> Tensor:
    """Which rows are those of the identity, `[..., B]`."""
    return torch.from_numpy((weights.numpy() == identity(weights.shape[-1])).all(-1))


def _scaled_gram(tokens: Tensor) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """The Gram matrices, on the CPU, of tokens divided by 2^exponent, which is 1 for ordinary groups; the exponents."""
    gram = gram_matrix(tokens).cpu()
    exponents = np.zeros(gram.shape[:-2], dtype=np.int64)
    greatest = gram.numpy().diagonal(axis1=-2, axis2=-1).max(-1, initial=0)
    low, high = _ORDINARY
    for index in map(tuple, np.argwhere(~((low <= greatest) & (greatest <= high))).tolist()):
        group = tokens[index].to(float64_device(tokens.device)).double()
        peak = float(group.abs().max()) if group.numel() else 0.0
        if 0 < peak < math.inf:
            exponents[index] = exponent = min(max(math.frexp(peak)[1], -1000), 1000)  # 2^-exponent is a number, too
            gram[index] = gram_matrix(group * 2.0**-exponent).cpu()
    return gram, exponents


def _step_size(strength: float | None, eta: float | None, inner_steps: int, target: float | None) -> float:
    given = {name: size for name, size in (("strength", strength), ("eta", eta)) if size is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of strength and eta, got strength={strength} and eta={eta}")
    [(name, size)] = given.items()
    if not 0 <= size < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {size}")
    if inner_steps < 1:
        raise ValueError(f"inner_steps must be >= 1, got {inner_steps}; strength=0 turns the flow off")
    if target is not None and not target > 0:
        raise ValueError(f"target must be > 0, got {target}; for Vendi it is a number of samples, in [1, B]")
    return size


def _too_far(strength: float | None, eta: float | None, dtype: torch.dtype) -> ValueError:
    step = f"strength={strength:g}" if eta is None else f"eta={eta:g}"
    return ValueError(f"{step} takes the samples out of the range of {dtype}; use a smaller step or a wider dtype")


def _fast_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float32 if tokens.device.type == "cpu" and tokens.dtype != torch.float64 else torch.float64


def _pieces(group: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Tokens of a group `[B, N, D]` in `dtype`: all at once, or `[B, n, D]` at a time if that takes a copy."""
    samples, count, channels = group.shape
    length = count if group.dtype == dtype else max(1, _AT_ONCE // (samples * channels))
    for start in range(0, count, length):
        where = slice(start, start + length)
        yield where, group[:, where].to(dtype)


def _inner_products(group: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(len(group), len(group), dtype=torch.float64, device=group.device)
    for _, piece in _pieces(group, dtype):
        batch = piece.transpose(0, 1)  # one small product for each token, so that float32 sums stay short
        total += torch.bmm(batch, batch.mT).sum(0, dtype=torch.float64)
    return total


def _combine(weights: Tensor, group: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Write `weights` times the samples to the contiguous `out`, rounded once."""
    weights = weights.to(group.device, dtype)
    for where, piece in _pieces(group, dtype):
        place = out[:, where].flatten(1)
        if place.dtype == dtype:
            torch.mm(weights, piece.flatten(1), out=place)
        else:
            place.copy_(weights @ piece.flatten(1))


def _distinct(gram: Tensor) -> bool:
    """Whether the directions are far enough from dependent for a float32 Gram matrix to tell them apart."""
    norms = gram.diagonal().sqrt()
    return bool(torch.linalg.eigvalsh((gram / norms / norms[:, None]).nan_to_num())[0] > 1e-3)


def _float32_suffices(weights: Array, gram: Array, reach: Array) -> bool:
    """Whether the rounding of a float32 product stays under 1e-4 of the displacement of every sample."""
    change = weights - identity(len(weights))
    displacement = np.sqrt(((change @ gram) * change).sum(-1).clip(0))
    rounding = np.finfo(np.float32).eps * reach
    return bool(((rounding <= 1e-4 * displacement) | (change == 0).all(-1)).all())
