"""The B x B part of the Gram flow: M gradient steps one by one, or read off the polynomial in 1/M through a few runs.

Arithmetic is NumPy's float64; nothing here knows tokens. See `variegate.gram`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from variegate.objectives import Array, Objective, identity

_SHORT_RUNS = (3, 4, 5, 6, 8), (8, 10, 13, 17, 22), (32, 40, 52, 68, 88)


def flow(
    initial: Array,
    rates: Array,
    objective: Objective,
    inner_steps: int,
    target: float | None,
    preserve_norm: bool,
) -> Any:
    """W `[groups, B, B]` of the flow from `initial`, at rates `[groups, B, 1]` in units of |c|^2."""
    change = np.zeros_like(initial)
    pending = np.arange(len(initial))  # each group for itself, as the groups must not see each other
    for lengths in _SHORT_RUNS if target is None else ():
        if inner_steps < 2 * max(lengths) or not len(pending):
            break
        gram = initial[pending]
        # The changes, not W: the weights of a polynomial sum to 1 but for rounding, and what rests must rest.
        runs = _euler(gram, rates[pending], objective, lengths, None, preserve_norm) - identity(gram.shape[-1])
        change[pending] = at = _polynomial(1 / inner_steps, lengths, runs)
        last_term = at - _polynomial(1 / inner_steps, lengths[1:], runs[1:])
        moved, length = _energy(at, gram), _energy(identity(gram.shape[-1]), gram)
        pending = pending[~((_energy(last_term, gram) <= 1e-10 * moved) & (moved <= length))]
    weights = change + identity(initial.shape[-1])
    if len(pending):
        weights[pending] = _euler(initial[pending], rates[pending], objective, (inner_steps,), target, preserve_norm)[0]
    return weights


def _euler(
    initial: Array,
    rates: Array,
    objective: Objective,
    lengths: Sequence[int],
    target: float | None,
    preserve_norm: bool,
) -> Array:
    """W `[runs, groups, B, B]` of the plain loop, for runs of all `lengths`, ascending, side by side."""
    sizes = rates / np.array(lengths)[:, None, None, None]
    weights = np.zeros((len(lengths), *initial.shape)) + identity(initial.shape[-1])
    gram = initial + np.zeros_like(weights)
    norms = np.sqrt(initial.diagonal(axis1=-2, axis2=-1))
    for step in range(lengths[-1]):
        going = slice(sum(length <= step for length in lengths), None)
        w, g, rate = weights[going], gram[going], sizes[going]
        if target is not None:
            reached = np.exp(objective.value(g)) >= target
            if reached.all():
                break
            rate = rate * ~reached[..., None, None]
        w += (rate * objective.coefficients(g)) @ w
        np.matmul(w @ initial, w.swapaxes(-1, -2), out=g)
        if preserve_norm:
            factors = norms / np.sqrt(g.diagonal(axis1=-2, axis2=-1))
            w *= factors[..., None]
            g *= factors[..., None] * factors[..., None, :]
    return weights


def _polynomial(at: float, lengths: Sequence[int], runs: Array) -> Any:
    """Lagrange interpolation, at step size `at`, of the `runs` with step sizes 1 / `lengths`."""
    sizes = 1 / np.array(lengths)
    factors = (at - sizes) / (sizes[:, None] - sizes + np.eye(len(sizes)))
    np.fill_diagonal(factors, 1.0)
    return np.tensordot(factors.prod(-1), runs, 1)


def _energy(weights: Array, gram: Array) -> Any:
    """Squared norm of `weights` times the samples, over the group."""
    return ((weights @ gram) * weights).sum((-2, -1))
