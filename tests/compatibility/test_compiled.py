"""Which graphs fit what is attached, and what they keep alive."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import (
    CROSSING,
    EDITS_IN_GRAPHS,
    STRONG,
    bare,
    close,
    compiled_blocks,
    compiled_in_place,
    counting,
    run_bare,
    short_flux,
    unchanged,
)  # fmt: skip
from cases import run as run_pipeline
from denoisers import CALLS, ROWS
from diffusers import FlowMatchEulerDiscreteScheduler

from tiny import Recorder
from variegate import CADS, attach, compiled

BUILD = bare("WanTransformer3DModel")


def images(*interventions, build=BUILD, run=run_bare):
    """Of an eager denoiser."""
    pipe = build()
    for intervention in interventions:
        attach(pipe.transformer, intervention)
    return run(pipe)


@pytest.fixture(autouse=True)
def graphs():
    """The number of edits in every graph that is made."""
    torch.compiler.reset()
    EDITS_IN_GRAPHS.clear()
    return EDITS_IN_GRAPHS


def test_a_later_attachment_makes_no_graph(graphs):
    pipe, expected, stock = compiled_in_place(BUILD()), images(CROSSING), images()
    for _ in range(3):
        with attach(pipe.transformer, CROSSING):
            assert close(run_bare(pipe), expected)
        assert close(run_bare(pipe), stock)
    assert graphs == [2, 0]


def test_blocks_share_a_graph(graphs):
    """More of them than dynamo makes graphs for one function, which with `fullgraph=True` is an error."""
    build = bare("WanTransformer3DModel", num_layers=torch._dynamo.config.recompile_limit + 2)
    expected = images(CROSSING, build=build)
    pipe = compiled_blocks(build())
    with attach(pipe.transformer, CROSSING):
        assert close(run_bare(pipe), expected)
    assert graphs == [1]


def test_the_second_of_two_attachments_outlives_the_first():
    pipe, other, expected = BUILD(), compiled_in_place(BUILD()), images(CROSSING)
    run_bare(other)
    first, _ = attach(pipe.transformer, Recorder(site="cross_attention")), attach(pipe.transformer, CROSSING)
    first.remove()
    assert close(run_bare(compiled_in_place(pipe)), expected)


def test_a_block_with_a_forward_of_its_own():
    pipe, expected = compiled_in_place(BUILD()), images(CROSSING)
    for block in pipe.transformer.blocks:
        block.attn2.forward = functools.partial(type(block.attn2).forward, block.attn2)
    stock = run_bare(pipe)
    with attach(pipe.transformer, CROSSING):
        assert close(run_bare(pipe), expected)
        assert not close(stock, expected)
    assert all(isinstance(block.attn2.forward, functools.partial) for block in pipe.transformer.blocks)


def test_what_is_put_over_a_forward_meanwhile_stays():
    pipe, stock, calls = BUILD(), images(), []
    attachment = attach(pipe.transformer, CROSSING)
    attention = pipe.transformer.blocks[0].attn2
    below = attention.forward

    def forward(*args, **kwargs):
        calls.append(args)
        return below(*args, **kwargs)

    attention.forward = forward
    attachment.remove()
    assert close(run_bare(pipe), stock)
    assert calls


@pytest.mark.parametrize("intervention", [STRONG, CADS(strength=1.0)], ids=lambda method: type(method).__name__)
def test_a_compiled_function_that_calls_the_denoiser(intervention):
    """Its graph holds the denoiser, with the hooks before it."""

    def holder():
        denoiser = bare("SD3Transformer2DModel")().transformer
        return SimpleNamespace(transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler())

    def run(pipe, call):
        pipe.scheduler.set_timesteps(2)
        steps = [CALLS["SD3Transformer2DModel"]() | {"timestep": torch.full((ROWS,), t)} for t in (0.9, 0.4)]
        with torch.no_grad():
            return torch.cat([call(pipe.transformer, **step, return_dict=False)[0] for step in steps])

    def plainly(denoiser, **arguments):
        return denoiser(**arguments)

    compiled_call = torch.compile(plainly, backend=counting)
    eager, other, pipe = holder(), holder(), holder()
    stock = run(other, compiled_call)
    attach(eager, intervention)
    expected = run(eager, plainly)
    assert not close(expected, stock)
    with attach(pipe, intervention):
        assert close(run(pipe, compiled_call), expected)
        assert close(run(other, compiled_call), stock)


def test_a_copy_has_weights_of_its_own():
    pipe, stock = BUILD(), images()
    with attach(pipe.transformer, CROSSING):
        other = copy.deepcopy(pipe)
    for parameter in pipe.transformer.parameters():
        parameter.data.zero_()
    with attach(other.transformer, CROSSING):
        pass
    assert all(module.forward.__self__ is module for module in other.transformer.modules())
    assert not close(run_bare(pipe), stock)


@pytest.mark.parametrize("change", [unchanged, compiled_in_place, compiled_blocks])
def test_nothing_of_it_keeps_a_pipeline_alive(change):
    pipe = change(short_flux())
    attach(pipe, STRONG)
    run_pipeline(pipe)
    assert len(compiled._EDITS)
    dead = [weakref.ref(pipe), weakref.ref(pipe.transformer)]
    del pipe
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert not len(compiled._EDITS) + len(compiled._MARKS)
