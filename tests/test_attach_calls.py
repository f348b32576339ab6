"""An attachment acts on calls of its own pipeline, all of them, whoever shares the denoiser; copies come without it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from test_attach import STRONG, hook_count, joint_blocks
from tiny import STEPS, generators, run, tiny_flux, tiny_sd3
from variegate import (
    CADS,
    CNO,
    DAVE,
    SPARKE,
    SPELL,
    STRIDE,
    ContextualRepulsion,
    DiverseFlow,
    FeatureSelfGuidance,
    IntervalGuidance,
    ParticleGuidance,
    PinkNoise,
    SeedVariance,
    attach,
    detach,
)

METHODS = [
    STRONG,
    CADS(strength=0.5),
    CNO(strength=0.2),
    DAVE(keep=0.5),
    DiverseFlow(strength=0.5),
    FeatureSelfGuidance(low=0.0),
    IntervalGuidance(high=0.8),
    ParticleGuidance(strength=100.0),
    PinkNoise(exponent=1.0),
    SeedVariance(strength=1.0),
    SPARKE(strength=0.2),
    SPELL(radius=2.0),
    STRIDE(strength=1.0, stop=None),
]


def name(method):
    return type(method).__name__


@pytest.fixture
def pipe():
    return tiny_sd3()


def sharing(pipe):
    """Another pipeline of the same components, with a scheduler of its own: one for each thread of a server."""
    return type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})


def encoded(pipe, rows):
    """Embeddings of a prompt as given to a pipeline whose encoders are gone, with guidance off."""
    if isinstance(pipe, FluxPipeline):
        text, pooled, _ = pipe.encode_prompt("a cat", None, max_sequence_length=16)
        guidance = {}
    else:
        text, _, pooled, _ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
        guidance = {"guidance_scale": 1.0}
    return {"prompt_embeds": text.repeat(rows, 1, 1), "pooled_prompt_embeds": pooled.repeat(rows, 1)} | guidance


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
def test_another_pipeline_with_the_same_denoiser_is_stock(build):
    pipe = build()
    other = sharing(pipe)
    other.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):
        other.default_sample_size = pipe.default_sample_size
    stock = run(pipe)
    with attach(pipe, STRONG):
        pushed = run(pipe)
        assert torch.equal(run(other), stock)
        with attach(other, STRONG):
            assert torch.equal(run(other), pushed)  # and not twice
            assert torch.equal(run(pipe), pushed)
    assert not torch.equal(pushed, stock)
    assert type(pipe) is type(other)


def test_pipelines_in_two_threads_at_once_do_not_meet(pipe):
    """One pushed, one stock, one pushed otherwise, all on one transformer, step by step in turn."""
    pipes = [pipe, sharing(pipe), sharing(pipe)]
    methods = [STRONG, None, ContextualRepulsion(strength=0.7, stop=None, blocks="all")]
    for each in pipes:
        each.set_progress_bar_config(disable=True)

    prompts = encoded(pipe, 4)  # tokenizers are not made for threads

    def made(each, method, **call):
        with attach(each, method) if method else nullcontext():
            return each(
                **prompts, generator=generators(range(4)), num_inference_steps=STEPS, output_type="latent", **call
            ).images

    alone = [made(*pair) for pair in zip(pipes, methods, strict=True)]
    barrier = threading.Barrier(len(pipes), timeout=60)

    def in_turn(pipe, index, timestep, tensors):
        barrier.wait()
        return {}

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(made, *pair, callback_on_step_end=in_turn) for pair in zip(pipes, methods, strict=True)]
        found = [job.result() for job in jobs]
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_hooks_of_one_thread_are_off_in_another(pipe):
    """While a pushed call stands still between two blocks, a stock call of the other pipeline runs through them."""
    other = sharing(pipe)
    other.set_progress_bar_config(disable=True)
    stock, found = run(pipe), []

    def stand_still(module, args, output):
        if threading.current_thread() is threading.main_thread() and not found:
            thread = threading.Thread(target=lambda: found.append(run(other)))
            thread.start()
            thread.join(60)

    with attach(pipe, STRONG):
        pushed = run(pipe)
        handle = joint_blocks(pipe)[0].register_forward_hook(stand_still)
        assert torch.equal(run(pipe), pushed)
        handle.remove()
    assert torch.equal(found[0], stock)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_another_denoiser_is_followed(pipe, method):
    other = tiny_sd3(seed=1).transformer
    old, guidance = pipe.transformer, {"guidance_scale": 3.0}
    pipe.transformer = other
    with attach(pipe, method):
        expected = run(pipe, **guidance)
    pipe.transformer = old
    with attach(pipe, method):
        pipe.transformer = other
        assert torch.equal(run(pipe, **guidance), expected)
        assert not any(module._forward_hooks for module in old.modules())
    assert hook_count(pipe) == 0


def test_another_block_is_followed(pipe):
    blocks = pipe.transformer.transformer_blocks
    new = copy.deepcopy(tiny_sd3(seed=1).transformer.transformer_blocks[1])
    old, blocks[1] = blocks[1], new
    with attach(pipe, STRONG):
        expected = run(pipe)
    blocks[1] = old
    with attach(pipe, STRONG):
        blocks[1] = new
        assert torch.equal(run(pipe), expected)


def test_a_denoiser_that_can_not_be_followed_is_refused_at_the_call(pipe):
    with attach(pipe, STRONG):
        pipe.transformer = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="Linear is not a known denoiser"):
            run(pipe)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_without_a_handle_it_lives_and_dies_with_the_pipeline(method):
    pipe = tiny_sd3()
    stock = run(pipe, guidance_scale=3.0)
    attach(pipe, method)
    gc.collect()
    assert not torch.equal(run(pipe, guidance_scale=3.0), stock)
    gone = [weakref.ref(pipe), weakref.ref(pipe.transformer)]
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_bare_denoiser_is_freed_with_its_attachment():
    pipe = tiny_sd3()
    attach(pipe.transformer, ContextualRepulsion(strength=2.0, start=0, stop=2))
    run(pipe, guidance_scale=1.0)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_second_attachment_of_a_method_is_told_of_and_detach_takes_off_both(pipe):
    stock = run(pipe)
    attach(pipe, STRONG)
    once = run(pipe)
    with pytest.warns(UserWarning, match="ContextualRepulsion is attached to this StableDiffusion3Pipeline already"):
        attach(pipe, STRONG)
    assert not torch.equal(run(pipe), once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(pipe, DAVE(keep=0.5))  # another method
    detach(pipe)
    assert hook_count(pipe) == 0
    assert type(pipe) is StableDiffusion3Pipeline
    assert torch.equal(run(pipe), stock)
    detach(pipe)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_copies_and_pickles_come_without_the_attachment(pipe, method):
    call = {"guidance_scale": 3.0, "num_inference_steps": 2}
    stock = run(pipe, **call)
    fresh = tiny_sd3()  # text encoders that have run can't be pickled, attached or not
    with attach(pipe, method), attach(fresh, method):
        copies = [copy.deepcopy(pipe), copy.copy(pipe), pickle.loads(pickle.dumps(fresh))]
        copies.append(sharing(pipe))
        copies[-1].transformer = copy.deepcopy(pipe.transformer)
        for each in copies:
            each.set_progress_bar_config(disable=True)
            assert type(each) is StableDiffusion3Pipeline
            assert torch.equal(run(each, **call), stock)
        assert not torch.equal(run(pipe, **call), stock)
        detach(fresh)
    for each in copies:
        assert torch.equal(run(each, **call), stock)


def test_an_attachment_itself_is_not_copied(pipe):
    with attach(pipe, STRONG) as attachment:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="copy the pipeline, and attach to the copy"):
                act(attachment)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize(
    "method", [STRONG, CADS(strength=0.5), SeedVariance(strength=1.0), SPARKE(strength=0.2)], ids=name
)
def test_one_row_of_embeddings_is_that_of_all_images(build, method):
    pipe = build()

    def made(rows, n):
        call = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators(range(4))}
        return pipe(num_images_per_prompt=n, **encoded(pipe, rows), **call).images

    torch.testing.assert_close(made(1, 4), made(4, 1), rtol=0, atol=1e-5)
    with attach(pipe, method):
        shared = made(1, 4)
    with attach(pipe, method):  # anew: SPARKE remembers
        torch.testing.assert_close(shared, made(4, 1), rtol=0, atol=2e-4)
    assert not torch.equal(shared, made(1, 4))


@pytest.mark.parametrize("first", [CADS(strength=0.1), SeedVariance(strength=0.1)], ids=name)
def test_groups_are_of_the_prompts_as_they_were_given(first):
    """Methods that give every image its own embeddings leave the groups alone, however they are attached."""
    pipe = tiny_sd3()
    with attach(pipe, first, STRONG):
        together = run(pipe, ["a cat", "a dog"], 2)
    with attach(pipe, first), attach(pipe, STRONG):
        assert torch.equal(run(pipe, ["a cat", "a dog"], 2), together)
    with attach(pipe, STRONG), attach(pipe, first):
        assert torch.equal(run(pipe, ["a cat", "a dog"], 2), together)
    with attach(pipe, first):
        assert not torch.equal(run(pipe, ["a cat", "a dog"], 2), together)


def test_a_loop_of_ones_own_attaches_to_the_denoiser(pipe):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with hook:
        run(pipe)
    with attach(pipe, STRONG), pytest.warns(UserWarning, match="outside of any call of the StableDiffusion3Pipeline"):
        stock = pipe.transformer(**calls[0])[0]
    assert torch.equal(stock, pipe.transformer(**calls[0])[0])


def test_a_call_of_the_wrong_pipeline_alone_is_told_of(pipe):
    other = sharing(pipe)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="was never called while something was attached"), attach(pipe, STRONG):
        run(other)
