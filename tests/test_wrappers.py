"""Denoisers inside wrappers: torch.compile, peft, data parallelism; attached to and checked as they are without."""

from __future__ import annotations

import pytest
import torch
from denoisers import CALLS, tiny
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pipelines import stable_diffusion
from tiny import run, tiny_sd3
from variegate import ContextualRepulsion, attach
from variegate.architectures.layout import unwrapped
from variegate.check import capture_call, check_layout

NAME = "SD3Transformer2DModel"
STRONG = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all")


@pytest.fixture(scope="module")
def _one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["to_q", "to_k"]))  # LoRA starts as nothing


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "peft": with_lora,
    "DDP": DistributedDataParallel,
    "DP": DataParallel,
    "all": lambda model: compiled(DistributedDataParallel(with_lora(model))),
}


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_a_wrapped_denoiser_is_attached_to_and_checked_as_the_denoiser(wrap):
    model, call = tiny(NAME), CALLS[NAME]()
    stock = model(**call, return_dict=False)[0]
    with attach(model, STRONG):
        expected = model(**call, return_dict=False)[0]
    wrapped = wrap(model)
    with attach(wrapped, STRONG):
        found = wrapped(**call, return_dict=False)[0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, stock)
    assert unwrapped(wrapped) is unwrapped(model) is model
    assert check_layout(wrapped, call).passed


def test_the_call_of_a_wrapped_denoiser_is_captured():
    pipe = tiny_sd3()
    with attach(pipe, STRONG):
        expected = run(pipe)
    pipe.transformer = with_lora(pipe.transformer)
    assert check_layout(pipe.transformer, capture_call(pipe, "a cat", max_sequence_length=16)).passed
    with attach(pipe, STRONG):
        assert torch.allclose(run(pipe), expected)
    pipe = stable_diffusion().pipe  # which gives some arguments by place
    pipe.unet = with_lora(pipe.unet)
    assert check_layout(pipe.unet, capture_call(pipe, "a cat", height=16, width=16)).passed
