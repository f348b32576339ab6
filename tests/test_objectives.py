"""The objectives against their definitions, written again in torch and differentiated by autograd."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from variegate.objectives import RKE, Cosine, LogDet, Objective, Vendi, objective


def cosines(samples: Tensor) -> Tensor:
    directions = samples / samples.norm(dim=-1, keepdim=True)
    return directions @ directions.mT


def renyi(samples: Tensor, order: float) -> Tensor:
    shares = torch.linalg.eigvalsh(cosines(samples) / samples.shape[-2])
    if order == 1:
        return -(shares * shares.log()).sum(-1)
    if order == math.inf:
        return -shares.amax(-1).log()
    return (shares**order).sum(-1).log() / (1 - order)


def mean_cosine(samples: Tensor) -> Tensor:
    count = samples.shape[-2]
    return (cosines(samples).sum((-2, -1)) - count) / (count * (count - 1))


DEFINITIONS = {
    Vendi(): lambda samples: renyi(samples, 1),
    Vendi(0.5): lambda samples: renyi(samples, 0.5),
    Vendi(2): lambda samples: renyi(samples, 2),
    Vendi(7.5): lambda samples: renyi(samples, 7.5),
    Vendi(math.inf): lambda samples: renyi(samples, math.inf),
    RKE(): lambda samples: renyi(samples, 2),
    LogDet(): lambda samples: cosines(samples).logdet(),
    Cosine(): lambda samples: -mean_cosine(samples),
}
every_objective = pytest.mark.parametrize("chosen", DEFINITIONS, ids=str)


def samples(*shape: int, seed: int = 0, spread: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    own = torch.randn(*shape, generator=generator, dtype=torch.float64)
    norms = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) + 0.5
    return 3 * norms * (shared + spread * own)


@every_objective
def test_value_and_gradient_match_the_definition(chosen: Objective) -> None:
    rows = samples(3, 2, 5, 40).requires_grad_()
    value = DEFINITIONS[chosen](rows)
    (gradient,) = torch.autograd.grad(value.sum(), rows)
    rows = rows.detach()
    gram = rows @ rows.mT
    torch.testing.assert_close(chosen.value(gram), value.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chosen.coefficients(gram) @ rows, gradient, rtol=1e-8, atol=1e-10)


@every_objective
def test_numpy_in_numpy_out(chosen: Objective) -> None:
    rows = samples(2, 4, 40)
    gram = rows @ rows.mT
    for method in (chosen.value, chosen.coefficients):
        result = method(gram.numpy())
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, method(gram).numpy())


@every_objective
def test_float32_gram_gives_float64(chosen: Objective) -> None:
    gram = torch.eye(3) + 0.5
    assert chosen.value(gram).dtype == chosen.coefficients(gram).dtype == torch.float64


@every_objective
def test_scale_of_a_sample_does_not_matter(chosen: Objective) -> None:
    rows = samples(4, 40)
    scaled = rows * torch.tensor([[1e-3], [1.0], [10.0], [1e5]], dtype=torch.float64)
    torch.testing.assert_close(chosen.value(scaled @ scaled.mT), chosen.value(rows @ rows.mT))


@every_objective
def test_equal_samples_do_not_push_each_other(chosen: Objective) -> None:
    rows = samples(1, 40).expand(4, -1)
    gradient = chosen.coefficients(rows @ rows.mT) @ rows
    assert gradient.norm() < 1e-7 / rows[0].norm()


@every_objective
def test_an_equal_pair_is_moved_as_one(chosen: Objective) -> None:
    rows = samples(3, 40)[[0, 0, 1, 2]]
    gradient = chosen.coefficients(rows @ rows.mT) @ rows
    assert chosen.value(rows @ rows.mT).isfinite()
    assert gradient[0].norm() > 1e-3 * gradient[2].norm()
    torch.testing.assert_close(gradient[0], gradient[1], rtol=1e-7, atol=1e-7 * gradient.abs().max().item())


@pytest.mark.parametrize("chosen", [Vendi(), Vendi(0.5), Vendi(math.inf), RKE(), LogDet()], ids=str)
def test_orthogonal_samples_are_at_the_top(chosen: Objective) -> None:
    gradient = chosen.coefficients(torch.eye(4))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_orders_join_up() -> None:
    rows = samples(5, 40, spread=0.1)
    gram = rows @ rows.mT
    for order, limit in ((1 + 1e-7, 1.0), (1 - 1e-7, 1.0), (1e5, math.inf), (2, 2)):
        near, exact = Vendi(order), RKE() if limit == 2 else Vendi(limit)
        torch.testing.assert_close(near.value(gram), exact.value(gram), rtol=1e-4, atol=0)
        torch.testing.assert_close(near.coefficients(gram), exact.coefficients(gram), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shared", [1e-3, 1e3])  # spectrum flat: powers underflow; peaked: they overflow
def test_large_orders_stay_finite(shared: float) -> None:
    gram = torch.eye(16) + shared
    assert Vendi(1000.0).value(gram).isfinite()
    assert Vendi(1000.0).coefficients(gram).isfinite().all()


def test_equal_top_eigenvalues_share_the_push() -> None:
    pair = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    coefficients = Vendi(math.inf).coefficients(torch.block_diag(pair, pair))
    assert coefficients[0, 1] < -0.1
    torch.testing.assert_close(coefficients[:2, :2], coefficients[2:, 2:])


@pytest.mark.parametrize("order", [0.0, -1.0, math.nan])
def test_order_must_be_positive(order: float) -> None:
    with pytest.raises(ValueError, match="order must be"):
        Vendi(order)


def test_objectives_by_name() -> None:
    assert [objective(name) for name in ("vendi", "rke", "log_det", "cosine")] == [
        Vendi(),
        RKE(),
        LogDet(),
        Cosine(),
    ]
    assert objective("vendi", order=math.inf) == Vendi(math.inf)
    with pytest.raises(ValueError, match=r"'vendi', 'rke', 'log_det', 'cosine'.*'entropy'"):
        objective("entropy")
