"""The bundled models are what their cards say: complete, small, and made for the calls they are given."""

from __future__ import annotations

import threading
from logging import ERROR

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging

from variegate import ContextualRepulsion, attach
from variegate.check import capture_call, check_layout
from variegate.emoji.models import bundled_models, call_defaults, describe, load_pipeline, locate, quiet

MODELS = tuple(bundled_models())


def latents(pipe, prompt="an animal", n=2, **changes):
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    options = {"num_images_per_prompt": n, "generator": generators, "output_type": "latent"}
    return pipe(prompt, **{**options, **changes}).images


def test_they_are_three_and_small():
    assert MODELS == ("emoji-base", "emoji-dev", "emoji-turbo")
    assert sum(describe(name).bytes for name in MODELS) <= 90e6


@pytest.mark.parametrize("name", MODELS)
def test_their_configurations_name_no_folder(name):
    texts = [path.read_text() for path in locate(name).folder.rglob("*.json")]
    assert texts
    assert not any("_name_or_path" in text for text in texts)


@pytest.mark.parametrize("name", MODELS)
def test_repulsion_changes_their_pictures(name):
    pipe, call = load_pipeline(name), call_defaults(name)
    stock = latents(pipe, **call)
    with attach(pipe, ContextualRepulsion(blocks="all")):
        repelled = latents(pipe, **call)
    assert not torch.allclose(stock, repelled)
    assert torch.equal(stock, latents(pipe, **call))


@pytest.mark.parametrize("name", MODELS)
def test_their_records_are_right(name):
    pipe = load_pipeline(name)
    assert check_layout(pipe.transformer, capture_call(pipe, "an animal", **call_defaults(name))).passed


@pytest.mark.parametrize("first_out", [0, 1])
def test_libraries_are_as_loud_as_they_were_after_the_last_of_two_threads(first_out):
    loggers = (diffusers.utils.logging, transformers.utils.logging)

    def loudness():
        return [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]

    before, inside, leave = loudness(), [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    assert (ERROR, False) not in before

    def stay(place):
        with quiet():
            inside[place].set()
            leave[place].wait(10)

    threads = [threading.Thread(target=stay, args=(place,)) for place in range(2)]
    for thread, entered in zip(threads, inside, strict=True):
        thread.start()
        assert entered.wait(10)
    for place in (first_out, 1 - first_out):
        assert loudness() == [(ERROR, False)] * 2
        leave[place].set()
        threads[place].join(10)
    assert loudness() == before


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_any_length_is_the_same_text(name):
    """The short text form of `call_defaults` is a part of what a plain call says."""
    pipe, length = load_pipeline(name), call_defaults(name)["max_sequence_length"]
    short, longer = (pipe.encode_prompt("an animal", None, **_third(pipe), max_sequence_length=m) for m in (length, 40))
    assert torch.equal(short[0], longer[0][:, : short[0].shape[1]])
    assert longer[0][:, short[0].shape[1] :].abs().max() == 0


def _third(pipe):
    return {"prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}


def test_turbo_takes_four_equal_steps():
    pipe = load_pipeline("emoji-turbo")
    pipe.scheduler.set_timesteps(call_defaults("emoji-turbo")["num_inference_steps"])
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_dev_reads_its_guidance():
    pipe, call = load_pipeline("emoji-dev"), {**call_defaults("emoji-dev"), "num_inference_steps": 2}
    assert not torch.allclose(latents(pipe, **call), latents(pipe, **{**call, "guidance_scale": 1.0}), atol=0.1)
