"""The Gram flow against eq. 2-4 of arXiv:2603.28762 as written: float64, autograd, one step after another."""

import re
import warnings

import pytest
import torch
from torch import Tensor

from variegate import gram
from variegate.gram import flow_weights, gram_flow, gram_matrix
from variegate.objectives import RKE, Cosine, LogDet, Objective, Vendi, float64_device

N, D = 6, 64


@pytest.fixture(autouse=True, params=[gram._AT_ONCE, 0], ids=["few", "many"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens go at once and in float64, many in pieces and mostly in float32: these few go both ways."""
    monkeypatch.setattr(gram, "_AT_ONCE", request.param)


def entropy(rows: Tensor) -> Tensor:
    directions = rows / rows.norm(dim=1, keepdim=True)
    return torch.special.entr(torch.linalg.eigvalsh(directions @ directions.T / len(rows))).sum()


def paper(
    tokens: Tensor,
    eta: float,
    steps: int,
    *,
    target: float | None = None,
    preserve_norm: bool = False,
    frozen: Tensor | None = None,
) -> Tensor:
    rows = tokens.double().flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    for _ in range(steps):
        if target is not None and entropy(rows).exp() >= target:
            break
        variable = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(entropy(variable), variable)
        if frozen is not None:
            gradient[frozen] = 0
        rows = rows + eta / steps * gradient
        if preserve_norm:
            rows = rows * norms / rows.norm(dim=1, keepdim=True)
    return rows.view_as(tokens)


def group(samples: int, spread: float, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples that differ from a shared vector by `spread` of its norm."""
    generator = torch.Generator().manual_seed(seed)
    shared = 3 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    own = torch.randn(samples, N, D, generator=generator, dtype=torch.float64)
    own /= own.flatten(1).norm(dim=1)[:, None, None]
    return (shared + spread * shared.norm() * own).to(dtype)


def mean_square(tokens: Tensor) -> float:
    return tokens.double().flatten(1).square().sum(1).mean().item()


def displacement_errors(moved: Tensor, expected: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Error over displacement, and displacement over norm, of each sample."""
    displacement = (expected - tokens.double()).flatten(1).norm(dim=1)
    error = (moved.double() - expected).flatten(1).norm(dim=1)
    return error / displacement, displacement / expected.flatten(1).norm(dim=1)


@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
@pytest.mark.parametrize("samples", [2, 4, 8, 16])
def test_matches_the_paper(samples: int, spread: float) -> None:
    tokens = group(samples, spread)
    # The result is a float32 number: rounding it is off by half a unit in the last place, eps / 2 of the norm,
    # which is more than 1e-3 of a displacement smaller than 6e-5 of the norm.
    rounding = torch.finfo(torch.float32).eps / 2
    for steps in (1, 10, 100):
        for strength in (1e-3, 1e-2, 0.1, 1, 10):
            expected = paper(tokens, strength * mean_square(tokens), steps)
            moved = gram_flow(tokens, Vendi(), strength=strength, inner_steps=steps)
            error, displacement = displacement_errors(moved, expected, tokens)
            assert (error <= (rounding / displacement).clamp_min(1e-3)).all(), (steps, strength, error)


@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
def test_float64_tokens_reach_float64_accuracy(spread: float) -> None:
    tokens = group(4, spread, dtype=torch.float64)
    expected = paper(tokens, 0.5 * mean_square(tokens), 50)
    moved = gram_flow(tokens, Vendi(), strength=0.5)
    assert moved.dtype == torch.float64
    assert displacement_errors(moved, expected, tokens)[0].max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1, 0.1])
def test_half_precision_is_rounded_once(dtype: torch.dtype, spread: float) -> None:
    tokens = group(4, spread, dtype=dtype)
    expected = paper(tokens, 0.5 * mean_square(tokens), 50)
    moved = gram_flow(tokens, Vendi(), strength=0.5)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("strength", [0.1, 1, 10])  # at 10 the polynomial is not good enough, and is not used
@pytest.mark.parametrize("steps", [129, 1000])
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_many_steps_equal_the_plain_loop(strength: float, steps: int, preserve_norm: bool) -> None:
    tokens = group(2, 1, dtype=torch.float64)
    expected = paper(tokens, strength * mean_square(tokens), steps, preserve_norm=preserve_norm)
    moved = gram_flow(tokens, Vendi(), strength=strength, inner_steps=steps, preserve_norm=preserve_norm)
    assert displacement_errors(moved, expected, tokens)[0].max() < 1e-6


@pytest.mark.parametrize("objective", [Vendi(2), RKE(), LogDet(), Cosine()], ids=str)
def test_every_objective_is_ascended(objective: Objective) -> None:
    tokens = group(4, 0.3)
    moved = gram_flow(tokens, objective, strength=0.05)
    assert objective.value(gram_matrix(moved)) > objective.value(gram_matrix(tokens)) + 1e-3


def test_strength_is_eta_over_the_mean_square_of_each_group() -> None:
    tokens = torch.stack([group(3, 0.3), 10 * group(3, 0.3, seed=1)])
    moved = gram_flow(tokens, Vendi(), strength=0.5)
    for one, before in zip(moved, tokens, strict=True):
        torch.testing.assert_close(one, gram_flow(before, Vendi(), eta=0.5 * mean_square(before)))


def test_gram_matrix_resolves_close_samples() -> None:
    tokens = group(4, 1e-4)
    rows = tokens.double().flatten(1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    gram = gram_matrix(tokens)
    squares = gram.diagonal()
    torch.testing.assert_close(squares + squares[:, None] - 2 * gram, distances, rtol=1e-5, atol=1e-10)


def test_gram_matrix_is_summed_in_float64() -> None:
    whole = torch.randint(1000, (2, 20_000, 1), generator=torch.Generator().manual_seed(0))
    rows = whole.flatten(1)  # their products are exact in float32, and the sums of those are not
    assert torch.equal(gram_matrix(whole.float()), (rows @ rows.T).double())


def test_gram_matrix_of_half_precision_does_not_overflow() -> None:
    assert gram_matrix(torch.full((2, 2, 3), 6e4, dtype=torch.float16))[0, 1] == 6 * 6e4**2


def test_gram_matrix_wants_tokens() -> None:
    with pytest.raises(ValueError, match=r"tokens must be .* \[4, 8\]"):
        gram_matrix(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="int64"):
        gram_matrix(torch.zeros(4, 8, 2, dtype=torch.int64))


@pytest.mark.parametrize("step", [{"strength": 0.0}, {"eta": 0.0}])
def test_off_returns_the_input_itself(step: dict[str, float]) -> None:
    tokens = group(4, 0.3)
    assert gram_flow(tokens, Vendi(), **step) is tokens
    assert torch.equal(flow_weights(gram_matrix(tokens), Vendi(), **step), torch.eye(4, dtype=torch.float64))


def test_off_does_not_read_the_tokens() -> None:
    tokens = torch.empty(4, N, D, device="meta")  # has a shape and nothing to read
    assert gram_flow(tokens, Vendi(), strength=0.0) is tokens


def test_a_group_of_one_is_returned_itself() -> None:
    for seed in range(20):  # the norms of some would round their own cosine to something other than 1
        tokens = group(1, 0.3, seed=seed)
        assert gram_flow(tokens, RKE(), strength=10.0, inner_steps=1) is tokens


def test_frozen_samples_push_and_stay() -> None:
    tokens = group(4, 0.3)
    tokens[2, 0, 0] = -0.0
    frozen = torch.tensor([True, False, True, False])
    moved = gram_flow(tokens, Vendi(), strength=0.5, frozen=frozen)
    assert torch.equal(moved[frozen].view(torch.int32), tokens[frozen].view(torch.int32))
    expected = paper(tokens, 0.5 * mean_square(tokens), 50, frozen=frozen)
    torch.testing.assert_close(moved, expected.float())
    assert gram_flow(tokens, Vendi(), strength=0.5, frozen=torch.ones(4, dtype=torch.bool)) is tokens


def test_frozen_can_differ_between_groups() -> None:
    tokens = torch.stack([group(3, 0.3), group(3, 0.3, seed=1)])
    frozen = torch.tensor([[True, False, False], [False, False, True]])
    moved = gram_flow(tokens, Vendi(), strength=0.5, frozen=frozen)
    assert torch.equal((moved == tokens).all((-2, -1)), frozen)


def test_preserve_norm() -> None:
    tokens = group(4, 0.3)
    moved = gram_flow(tokens, Vendi(), strength=0.5, preserve_norm=True)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), tokens.flatten(1).norm(dim=1))
    torch.testing.assert_close(moved, paper(tokens, 0.5 * mean_square(tokens), 50, preserve_norm=True).float())


@pytest.mark.parametrize("steps", [50, 200])
def test_target_stops_each_group_at_its_own_step(steps: int) -> None:
    tokens = torch.stack([group(4, 0.3), group(4, 0.6, seed=1), group(4, 3.0, seed=2)])
    scores = [entropy(one.double().flatten(1)).exp() for one in tokens]
    target = 2.5
    assert scores[0] < scores[1] < target < scores[2]
    moved = gram_flow(tokens, Vendi(), strength=1.0, inner_steps=steps, target=target)
    for before, after in zip(tokens, moved, strict=True):
        torch.testing.assert_close(
            after, paper(before, mean_square(before), steps, target=target).float(), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(moved[2], tokens[2])
    reached = tokens[2]
    assert gram_flow(reached, Vendi(), strength=1.0, target=target) is reached


@pytest.mark.parametrize("objective", [Vendi(), Vendi(0.5), RKE(), LogDet(), Cosine()], ids=str)
def test_equal_samples_stay_put(objective: Objective) -> None:
    tokens = group(1, 0.3).repeat(4, 1, 1)
    assert torch.equal(gram_flow(tokens, objective, strength=0.5), tokens)


def test_an_equal_pair_stays_a_pair() -> None:
    tokens = group(3, 0.3)[[0, 0, 1, 2]]
    moved = gram_flow(tokens, Vendi(), strength=0.5)
    assert (moved[0] - tokens[0]).norm() > 0.01 * tokens[0].norm()
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize("objective", [Vendi(), RKE(), LogDet(), Cosine()], ids=str)
def test_a_zero_sample_takes_no_part(objective: Objective) -> None:
    present = group(3, 0.3)
    with_zero = torch.stack([present[0], torch.zeros(N, D), *present[1:]])
    moved = gram_flow(torch.stack([with_zero, group(4, 0.3, seed=1)]), objective, strength=0.2)
    assert not moved[0, 1].any()
    torch.testing.assert_close(moved[0, [0, 2, 3]], gram_flow(present, objective, strength=0.2))
    torch.testing.assert_close(moved[1], gram_flow(group(4, 0.3, seed=1), objective, strength=0.2))


@pytest.mark.parametrize("present", [0, 1])
def test_zeros_and_at_most_one_sample_stay(present: int) -> None:
    tokens = torch.cat([group(present, 0.3), torch.zeros(2, N, D)])
    assert gram_flow(tokens, Vendi(), strength=0.5) is tokens


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_group_is_left_alone(bad: float) -> None:
    tokens = torch.stack([group(4, 0.3), group(4, 0.3, seed=1)])
    tokens[0, 2, 1, 3] = bad
    moved = gram_flow(tokens, Vendi(), strength=0.5)
    assert torch.equal(moved[0].view(torch.int32), tokens[0].view(torch.int32))
    torch.testing.assert_close(moved[1], gram_flow(tokens[1], Vendi(), strength=0.5))


@pytest.mark.parametrize("objective", [Vendi(), Vendi(0.5), Vendi(float("inf")), RKE(), LogDet(), Cosine()], ids=str)
@pytest.mark.parametrize("eta", [1e30, 1e60, 1e160, 1e300])
@pytest.mark.parametrize("steps", [1, 20, 200])
def test_absurd_steps_move_finitely_or_are_refused(objective: Objective, eta: float, steps: int) -> None:
    other = group(4, 0.3, seed=1)
    other[0, 0, 0] = float("nan")
    tokens = torch.stack([group(4, 0.3), other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if eta == 1e30:
            assert gram_flow(tokens, objective, eta=eta, inner_steps=steps)[0].isfinite().all()
        else:
            with pytest.raises(ValueError, match=re.escape(f"eta={eta:g} takes")):
                gram_flow(tokens, objective, eta=eta, inner_steps=steps)


def test_steps_too_great_for_the_dtype_are_refused() -> None:
    tokens = group(4, 0.3)
    assert gram_flow(tokens.bfloat16(), Vendi(), strength=1e6).isfinite().all()
    with pytest.raises(ValueError, match=r"strength=1e\+06 takes .* out of the range of torch.float16"):
        gram_flow(tokens.half(), Vendi(), strength=1e6)
    large = (tokens * (3e4 / tokens.abs().max())).half()  # longer than the greatest float16, and yet in range
    assert large.double().norm() > torch.finfo(torch.float16).max
    assert gram_flow(large, Vendi(), strength=0.01).isfinite().all()
    with pytest.raises(ValueError, match=r"strength=1000 takes .* out of the range of torch.float64"):
        gram_flow(group(4, 0.3, dtype=torch.float64) * 2.0**1018, Vendi(), strength=1000)


def test_a_device_without_float64_is_left_for_the_cpu() -> None:
    assert float64_device(torch.device("mps", 0)) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_groups_do_not_see_each_other() -> None:
    tokens = torch.stack([group(3, spread, seed=i) for i, spread in enumerate((1, 0.3, 0.1, 1e-2, 1e-3, 0))])
    moved = gram_flow(tokens.view(2, 3, 3, N, D), Vendi(), strength=0.5).view_as(tokens)
    for alone, together in zip(tokens, moved, strict=True):
        torch.testing.assert_close(together, gram_flow(alone, Vendi(), strength=0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [Vendi(), Vendi(float("inf")), LogDet()], ids=str)
def test_permuting_the_samples_permutes_the_result(objective: Objective) -> None:
    tokens = group(6, 0.3, dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    moved = gram_flow(tokens, objective, strength=0.1)
    torch.testing.assert_close(gram_flow(tokens[order], objective, strength=0.1), moved[order], rtol=1e-9, atol=1e-9)


def test_strided_tokens() -> None:
    joint = torch.cat([group(4, 0.3), group(4, 0.3, seed=1)], dim=1)
    moved = gram_flow(joint[:, N:], Vendi(), strength=0.5)
    torch.testing.assert_close(moved, gram_flow(group(4, 0.3, seed=1), Vendi(), strength=0.5))
    transposed = group(4, 0.3).mT.contiguous().mT
    torch.testing.assert_close(
        gram_flow(transposed, Vendi(), strength=0.5), gram_flow(group(4, 0.3), Vendi(), strength=0.5)
    )


def test_input_is_not_written() -> None:
    tokens = group(4, 0.3)
    before = tokens.clone()
    gram_flow(tokens, Vendi(), strength=0.5)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of strength and eta"),
        ({"strength": 0.5, "eta": 1.0}, "exactly one of strength and eta"),
        ({"strength": -0.5}, "strength must be finite and >= 0, got -0.5"),
        ({"eta": float("nan")}, "eta must be finite and >= 0, got nan"),
        ({"strength": 0.5, "inner_steps": 0}, "inner_steps must be >= 1, got 0"),
        ({"strength": 0.5, "target": 0.0}, "target must be > 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram_flow(group(2, 0.3), Vendi(), **arguments)


@pytest.mark.parametrize("power", [-1000, -600, -60, 60, 600, 1000])  # float64 squares leave its range beyond 511
def test_a_power_of_two_in_the_tokens_is_one_in_the_result(power: int) -> None:
    tokens = torch.stack([group(4, 0.3, dtype=torch.float64), group(4, 0.3, seed=1, dtype=torch.float64)])
    tokens[0, 1] = 0
    scaled = tokens * 2.0**power
    for options in ({}, {"preserve_norm": True}, {"frozen": torch.tensor([True, False, False, False])}):
        expected = gram_flow(tokens, Vendi(), strength=0.1, **options)
        assert (expected[:, 3] != tokens[:, 3]).any()
        expected = expected * 2.0**power
        assert torch.equal(gram_flow(scaled, Vendi(), strength=0.1, **options), expected)
        mixed = gram_flow(torch.stack([tokens[0], scaled[1]]), Vendi(), strength=0.1, **options)
        assert torch.equal(mixed[1], expected[1])
    if abs(power) < 500:
        moved = gram_flow(scaled, Vendi(), eta=100 * 4.0**power)
        assert torch.equal(moved, gram_flow(tokens, Vendi(), eta=100) * 2.0**power)


@pytest.mark.parametrize("power", [-120, 120])
def test_squares_out_of_the_range_of_float32(power: int) -> None:
    tokens = group(4, 0.3)
    moved = gram_flow(tokens * 2.0**power, Vendi(), strength=0.5) * 2.0**-power
    torch.testing.assert_close(moved, gram_flow(tokens, Vendi(), strength=0.5))


def test_the_smallest_numbers_are_rounded_once() -> None:
    tokens = group(4, 0.3) * 2.0**-135  # 14 bits are left of them
    weights = flow_weights(gram_matrix(tokens.double() * 2.0**135), Vendi(), strength=0.5)
    expected = (weights @ tokens.flatten(1).double()).float().view_as(tokens)
    assert torch.equal(gram_flow(tokens, Vendi(), strength=0.5), expected)


def test_eta_that_leaves_the_range_of_numbers() -> None:
    tokens = group(4, 0.3, dtype=torch.float64)
    assert torch.equal(gram_flow(tokens * 2.0**600, Vendi(), eta=1.0), tokens * 2.0**600)  # 1e-360 of their square
    with pytest.raises(ValueError, match=r"eta=1 takes the samples out of the range"):
        gram_flow(tokens * 2.0**-600, Vendi(), eta=1.0)


@pytest.mark.parametrize(
    "options", [{}, {"preserve_norm": True}, {"target": 2.5}, {"frozen": torch.tensor([False, True, False, False])}]
)
def test_gradients_are_those_of_the_product_with_the_weights_held_constant(options: dict[str, object]) -> None:
    tokens = torch.stack([group(4, 0.3, seed=seed, dtype=torch.float64) for seed in range(3)])
    tokens[0, 2] = 0
    tokens[1, 0, 0, 0] = float("nan")  # this group stays
    weights = flow_weights(gram_matrix(tokens), Vendi(), strength=0.5, **options)
    loss = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    given = tokens.clone().requires_grad_()
    moved = gram_flow(given, Vendi(), strength=0.5, **options)
    assert torch.equal(moved.nan_to_num(), gram_flow(tokens, Vendi(), strength=0.5, **options).nan_to_num())
    (gradient,) = torch.autograd.grad((loss * moved).nansum(), given, create_graph=True)
    loss[1, 0, 0, 0] = 0  # of nansum

    def frozen_map(flat: Tensor) -> Tensor:
        return (loss * (weights @ flat).view_as(tokens)).sum()

    flat, step = tokens.nan_to_num().flatten(2), 1e-3
    for index in torch.cartesian_prod(torch.tensor([0, 1, 2]), torch.arange(4), torch.tensor([0, 65, 383])).tolist():
        there, back = flat.clone(), flat.clone()
        there[tuple(index)] += step
        back[tuple(index)] -= step
        difference = (frozen_map(there) - frozen_map(back)) / (2 * step)
        torch.testing.assert_close(gradient.flatten(2)[tuple(index)].detach(), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    given = group(4, 0.3, dtype=dtype).requires_grad_()
    weights = flow_weights(gram_matrix(given), Vendi(), strength=0.5)
    gram_flow(given, Vendi(), strength=0.5).float().square().sum().backward()
    assert given.grad is not None
    moved = gram_flow(given.detach(), Vendi(), strength=0.5)
    expected = weights.T @ (2 * moved).double().flatten(1)
    torch.testing.assert_close(given.grad.double().flatten(1), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-3)


def test_what_stays_passes_gradients() -> None:
    given = group(1, 0.3).repeat(2, 1, 1).requires_grad_()
    assert gram_flow(given, Vendi(), strength=0.0) is given
    (gradient,) = torch.autograd.grad(gram_flow(given, Vendi(), strength=0.5).sum(), given)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))
    with torch.no_grad():
        assert not gram_flow(given, Vendi(), strength=0.5).requires_grad
