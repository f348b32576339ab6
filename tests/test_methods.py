"""The methods beside contextual repulsion: against a second derivation, and on whole pipelines."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines import PIPELINES
from test_attach import hook_count, run
from tiny import one_and_two, through_a_request, tiny_flux, tiny_sd3
from variegate import CADS, DAVE, IntervalGuidance, ParticleGuidance, SeedVariance, attach
from variegate.step import Moment

METHODS = {
    "cads": (CADS(strength=0.5), CADS(strength=0.0)),
    "dave": (DAVE(keep=0.5), DAVE(keep=1.0)),
    "interval-guidance": (IntervalGuidance(high=0.8), IntervalGuidance(low=0.0, high=1.0)),
    "particle-guidance": (ParticleGuidance(strength=100.0), ParticleGuidance(strength=0.0)),
    "seed-variance": (SeedVariance(strength=1.0), SeedVariance(strength=0.0)),
}
ALONE = ("cads", "dave", "interval-guidance", "seed-variance")  # act on a single image
BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


def moment(noise=0.8, samples=((0, 1, 2),), seed=0, index=0):
    return Moment(noise, samples, seed, index)


def embeddings(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_cads_is_its_equation():
    y = embeddings(1, 3, 4, 5)
    noised = CADS(strength=0.3, clear=0.5, blind=0.9, rescaling=0.25).edit(y, moment(noise=0.8))
    noise = moment().randn(y)
    for old, new, n in zip(y[0], noised[0], noise[0], strict=True):
        gamma = (0.9 - 0.8) / (0.9 - 0.5)
        plain = math.sqrt(gamma) * old + 0.3 * math.sqrt(1 - gamma) * n
        rescaled = (plain - plain.mean()) / plain.std() * old.std() + old.mean()
        torch.testing.assert_close(new, 0.25 * rescaled + 0.75 * plain, rtol=1e-5, atol=1e-5)
    assert CADS().edit(y, moment(noise=0.5)) is y
    blind = CADS(rescaling=0.0, strength=0.3).edit(y, moment(noise=0.95))
    torch.testing.assert_close(blind, 0.3 * noise, rtol=1e-5, atol=1e-5)


def test_seed_variance_is_its_equation():
    y = embeddings(1, 3, 40, 50)
    new = SeedVariance(strength=2.0, share=0.25).edit(y, moment())
    width = 2.0 * y.flatten(2).std(-1)[..., None, None]
    relative = (new - y) / width
    assert relative.abs().max() <= 1
    assert abs((relative.abs() > 1e-6).double().mean() - 0.25) < 0.02
    moved = relative[relative.abs() > 1e-6]
    assert abs(moved.mean()) < 0.05
    assert abs(moved.std() - 1 / math.sqrt(3)) < 0.02
    assert torch.equal(new, SeedVariance(strength=2.0, share=0.25).edit(y, moment(index=3)))  # the same in every step


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_particle_guidance_is_the_gradient_of_its_potential(samples):
    x = embeddings(1, samples, 4, 5)
    prediction = torch.zeros_like(x)
    pushed = ParticleGuidance(strength=3.0).edit(prediction, x, moment(noise=0.7))
    rows = x[0].flatten(1)
    squares = torch.cdist(rows, rows) ** 2
    for i in range(samples):
        width = torch.cat([squares[i, :i], squares[i, i + 1 :]]).median() / math.log(samples)
        row = rows[i].clone().requires_grad_()
        potential = sum((-((row - rows[j]) ** 2).sum() / width).exp() for j in range(samples) if j != i)
        (gradient,) = torch.autograd.grad(potential, row)
        torch.testing.assert_close(pushed[0, i].flatten(), 3.0 * 0.7 * gradient)
    # Predictions grow towards noise, so a step against them goes down the potential: away from the others.
    step = (x - 0.1 * pushed)[0].flatten(1)
    assert torch.pdist(step).sum() > torch.pdist(rows).sum()
    assert ParticleGuidance().edit(prediction, x, moment(noise=0.4)) is prediction


def test_interval_guidance_is_its_equation():
    unconditional, conditional = embeddings(1, 2, 3), embeddings(1, 2, 3) + 1
    for noise, inside in ((0.2, False), (0.22, False), (0.5, True), (0.84, True), (0.9, False)):
        assert IntervalGuidance().edit(unconditional, conditional, moment(noise)) is (
            unconditional if inside else conditional
        )


def test_dave_is_its_equation():
    h = embeddings(1, 2, 7, 3)
    mean = h.mean(2, keepdim=True)
    torch.testing.assert_close(DAVE(keep=0.3).edit(h), 0.3 * mean + (h - mean))


def test_every_sample_has_a_stream_of_its_own():
    y = torch.zeros(1, 3, 4)
    noise = moment().randn(y)[0]
    assert len({tuple(row.tolist()) for row in noise}) == 3
    assert torch.equal(moment(samples=((2, 0),)).randn(y[:, :2])[0], noise[[2, 0]])
    assert torch.equal(moment().randn(y)[0], noise)
    for other in (moment(seed=1), moment(index=1)):
        assert not torch.equal(other.randn(y)[0], noise)
    twice = moment()
    assert not torch.equal(twice.randn(y), twice.randn(y))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_pipeline(pipe, name):
    on, off = METHODS[name]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if "Flux" in type(pipe).__name__ else {}
    stock, hooks = run(pipe, **guided), hook_count(pipe)
    with attach(pipe, off):
        assert torch.equal(run(pipe, **guided), stock)
    with attach(pipe, on):
        changed = run(pipe, **guided)
        assert torch.equal(run(pipe, **guided), changed)  # the same seeds, the same images
    assert changed.isfinite().all()
    assert not torch.equal(changed, stock)
    assert hook_count(pipe) == hooks
    assert torch.equal(run(pipe, **guided), stock)


@pytest.mark.parametrize("name", METHODS)
def test_one_image_and_two(pipe, name):
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if "Flux" in type(pipe).__name__ else {}
    for n, stock, changed in one_and_two(pipe, METHODS[name][0], **guided):
        assert changed.isfinite().all()
        assert torch.equal(changed, stock) == (n == 1 and name not in ALONE)


def test_the_seed_of_an_attachment(pipe):
    made = []
    for seed in (0, 0, 1):
        with attach(pipe, CADS(strength=0.5), seed=seed):
            made.append(run(pipe, n=2))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_interval_guidance_off_everywhere_is_the_conditional_model():
    pipe = tiny_sd3()
    with attach(pipe, IntervalGuidance(low=0.0, high=1e-9)):
        unguided = run(pipe, guidance_scale=7.0)
    torch.testing.assert_close(unguided, run(pipe, guidance_scale=1.0), rtol=1e-4, atol=1e-4)
    pipe = tiny_flux()
    with attach(pipe, IntervalGuidance(low=0.0, high=1e-9)):
        unguided = run(pipe, true_cfg_scale=7.0, negative_prompt="a dog")
    torch.testing.assert_close(unguided, run(pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["CogVideoX", "HiDream", "Ideogram4", "Lumina2", "Mochi", "Wan 2.2", "Z-Image"])
def test_interval_guidance_on_pipelines_of_all_kinds(name):
    """The prompt's prediction comes in the same call, an earlier one, or from a denoiser that also returns text."""
    made = PIPELINES[name]()
    conditional = made(guidance_scale=0.0 if name == "Z-Image" else 1.0)  # what turns guidance off there
    stock = made()
    with attach(made.pipe, IntervalGuidance(low=0.0, high=1e-9)):
        unguided = made()
    for row, alone, guided in zip(unguided, conditional, stock, strict=True):
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
        assert not torch.equal(alone, guided)


def test_methods_compose(pipe):
    both = [CADS(strength=0.5), ParticleGuidance(strength=100.0)]
    with attach(pipe, *both):
        together = run(pipe, n=2)
    # The second attachment sees conditions that differ between the images: it must be told what belongs together.
    with attach(pipe, both[0]), attach(pipe, both[1], groups=[0, 0]):
        nested = run(pipe, n=2)
    assert torch.equal(together, nested)
    with attach(pipe, both[0]):
        assert not torch.equal(run(pipe, n=2), together)


def test_a_bare_denoiser_has_no_noise_level(pipe):
    with attach(pipe.transformer, CADS()), pytest.raises(ValueError, match="The noise level is unknown"):
        run(pipe)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_through_a_request(name):
    stock, changed = through_a_request(name, METHODS[name][0], seed=4)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(stock, changed, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CADS(strength=-1), "strength=-1 is out of range"),
        (lambda: CADS(clear=0.9, blind=0.5), "clear=0.9 and blind=0.5 are no noise levels in order"),
        (lambda: CADS(rescaling=2), "rescaling=2 is out of range"),
        (lambda: SeedVariance(strength=math.nan), "strength=nan is out of range"),
        (lambda: SeedVariance(share=1.5), "share=1.5 is out of range"),
        (lambda: IntervalGuidance(low=0.5, high=0.5), "low=0.5 and high=0.5 are no noise levels in order"),
        (lambda: ParticleGuidance(strength=math.inf), "strength=inf is out of range"),
        (lambda: ParticleGuidance(low=-0.1), "low=-0.1 is out of range"),
        (lambda: DAVE(keep=math.inf), "keep=inf is out of range; use a number from -100 to 100"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
