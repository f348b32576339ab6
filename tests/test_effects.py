"""A method that was on and changed nothing says so once a run, with the reason; silence is for what is meant."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline

from tiny import STEPS, Recorder, generators, run, tiny_flux, tiny_sd3
from variegate import (
    CADS,
    DAVE,
    SPARKE,
    SPELL,
    ContextualRepulsion,
    DiverseFlow,
    FeatureSelfGuidance,
    IntervalGuidance,
    ParticleGuidance,
    attach,
)

PUSH = ContextualRepulsion(strength=2.0, stop=None, blocks="all")


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3()


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


def told(pipe, method, call=run, **kwargs):
    """Warnings of two runs: what is to be said is said once."""
    with warnings.catch_warnings(record=True) as caught, attach(pipe, method):
        warnings.simplefilter("always")
        for _ in range(2):
            call(pipe, **kwargs)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (IntervalGuidance(high=0.8), "the denoiser was never called without the prompt"),
        (SPELL(radius=1e-4), "no two images came within radius=0.0001 of each other"),
        (ContextualRepulsion(branch="uncond"), "the denoiser was never called without the prompt"),
        (ContextualRepulsion(start=STEPS, stop=None), "outside of its window, start=3 and stop=None"),
        (ParticleGuidance(low=1.0, start=1), "it acts from low=1.0 upwards (noise levels of the run: 1.00 to"),
        (FeatureSelfGuidance(low=1.0, start=1, blocks=(1,)), "it acts from low=1.0 upwards"),
        (CADS(clear=0.8, start=2), "it acts above clear=0.8"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_changed_nothing_is_told_with_its_reason(flux, method, reason):
    stock = run(flux)
    (message,) = told(flux, method)
    assert message.startswith(f"{type(method).__name__} changed nothing: ")
    assert reason in message
    with pytest.warns(UserWarning, match="changed nothing"), attach(flux, method):
        assert torch.equal(run(flux), stock)


def test_guidance_that_stays_inside_its_interval_is_told(sd3):
    (message,) = told(sd3, IntervalGuidance(low=0.0, high=0.9, start=1), guidance_scale=3.0)
    assert "it acts outside of low=0.0 to high=0.9" in message


@pytest.mark.parametrize(
    "method",
    [PUSH, DiverseFlow(), ParticleGuidance(), SPELL(), FeatureSelfGuidance(blocks=(1,))],
    ids=lambda method: type(method).__name__,
)
def test_equal_noise_for_all_images_is_told(flux, method):
    latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    (message,) = told(flux, method, latents=latents)
    assert "could not tell the images of a prompt apart: they start from equal noise" in message


def test_levels_that_an_image_to_image_run_never_enters_are_told(flux):
    pipe = FluxImg2ImgPipeline(**flux.components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def call(pipe):
        pipe(
            "a cat", image=image, strength=0.4, num_inference_steps=10, height=16, width=16,
            generator=generators([0]), output_type="latent",
        )  # fmt: skip

    (message,) = told(pipe, CADS(clear=0.8), call)
    assert "it acts above clear=0.8 (noise levels of the run: 0.4" in message


def test_a_cache_that_skips_the_blocks_is_told():
    pipe = tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    for blocks in ([1, 2], "all"):  # what is pushed in the first block, which does run, is read by none
        (message,) = told(pipe, ContextualRepulsion(strength=2.0, start=1, stop=None, blocks=blocks))
        assert "a cache skipped its blocks, or those that would have read its edits" in message
    assert told(pipe, PUSH) == []


@pytest.mark.parametrize(
    "method",
    [
        ContextualRepulsion(strength=0.0),
        ContextualRepulsion(stop=0),
        ContextualRepulsion(stop=0.0),
        DAVE(keep=1.0),
        PUSH,
        Recorder(),
    ],
)
def test_what_is_off_and_what_acts_says_nothing(sd3, method):
    assert told(sd3, method) == []


@pytest.mark.parametrize("method", [SPELL(radius=2.0), SPARKE()])
def test_the_first_picture_of_a_series_says_nothing(sd3, method):
    assert told(sd3, method, n=1) == []


def test_a_run_that_is_broken_off_says_nothing(sd3):
    def fail(pipe, index, timestep, tensors):
        raise KeyboardInterrupt

    late = ContextualRepulsion(start=2, stop=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(sd3, late), pytest.raises(KeyboardInterrupt):
            run(sd3, callback_on_step_end=fail)


def test_a_bare_denoiser_is_told_of_at_its_next_run_or_at_the_end(sd3):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    attachment = attach(sd3.transformer, PUSH, groups=[0, 0])
    run(sd3, n=2, latents=latents, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="they start from equal noise"):
        run(sd3, n=2, latents=latents, guidance_scale=1.0)
    attachment.remove()
    attachment = attach(sd3.transformer, PUSH, groups=[0, 0])
    run(sd3, n=2, latents=latents, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="they start from equal noise"):
        attachment.remove()


def test_tensors_are_compared_until_something_has_changed(sd3, monkeypatch):
    compared = []
    equal = torch.equal
    with attach(sd3, PUSH):
        monkeypatch.setattr("variegate.effects.torch.equal", lambda *pair: compared.append(1) or equal(*pair))
        run(sd3, guidance_scale=1.0)
    assert sum(compared) < 20  # those of the clock are among them
