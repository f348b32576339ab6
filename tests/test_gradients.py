"""A loss taken through an attachment: gradients pass with W held constant, are right, or are refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from denoisers import CALLS, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiny import run, tiny_sd3
from variegate import ContextualRepulsion, TokenIntervention, attach
from variegate.gradients import applied
from variegate.gram import flow_weights, gram_matrix
from variegate.intervention import BlockCall
from variegate.interventions import (
    CADS,
    CNO,
    DAVE,
    SPARKE,
    SPELL,
    STRIDE,
    DiverseFlow,
    FeatureSelfGuidance,
    IntervalGuidance,
    ParticleGuidance,
    PinkNoise,
    SeedVariance,
)
from variegate.interventions.feature_self_guidance import Dispersion
from variegate.objectives import Vendi
from variegate.step import Moment

STRONG = {"strength": 2.0, "start": 0, "stop": None, "blocks": "all"}
SD3 = "SD3Transformer2DModel"
QWEN = "QwenImageTransformer2DModel"  # is told which tokens are padding


@dataclass(frozen=True, kw_only=True)
class Plain(TokenIntervention):
    """The products W C of repulsion as plain autograd takes them, with the W of the first call for good."""

    strength: float = 2.0
    tokens: slice | None = None
    preserve_norm: bool = False
    known: list[torch.Tensor] = field(default_factory=list)
    calls: list[None] = field(default_factory=list)

    def split(self, count):
        return replace(self, strength=self.strength / count)

    def edit(self, tokens):
        where = self.tokens or slice(None)
        part = tokens[:, :, where]
        if len(self.calls) == len(self.known):
            options = {"inner_steps": 5, "preserve_norm": self.preserve_norm}
            self.known.append(flow_weights(gram_matrix(part), Vendi(), strength=self.strength, **options))
        moved = (self.known[len(self.calls)] @ part.flatten(2)).view_as(part)
        self.calls.append(None)
        edited = tokens.clone()
        edited[:, :, where] = moved
        return edited


def wide(value):
    """In float64, as finite differences want it."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def called(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    return model(**call, return_dict=False)[0].square().sum()


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    """Two more rows of other latents."""
    more = {key: value.flip(-1) if key == "hidden_states" else value for key, value in call.items()}
    return {key: torch.cat([value, more[key]]) for key, value in call.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "groups"),
    [
        (SD3, {}, [0, 0]),
        (SD3, {}, [0, 1, 0, 1]),
        (SD3, {}, [0, 0, 0, 1]),
        (SD3, {"site": "image"}, [0, 0]),
        (SD3, {"tokens": slice(1, 3)}, [0, 0]),
        (SD3, {"preserve_norm": True}, [0, 0]),
        ("FluxTransformer2DModel", {"site": "attention"}, [0, 0]),
        (QWEN, {"padding": False}, [0, 0]),
        ("PixArtTransformer2DModel", {"site": "cross_attention"}, [0, 0]),
    ],
)
def test_repulsion_passes_gradients_with_the_weights_held_constant(name, options, groups, checkpointed):
    model, call = tiny(name).double(), {key: wide(value) for key, value in CALLS[name]().items()}
    if name == QWEN:
        call["encoder_hidden_states_mask"] = torch.tensor([[True, True, True, False, False]] * 2)
    call = doubled(call) if len(groups) == 4 else call
    plain, parameters = Plain(**{**STRONG, **options}), list(model.parameters())
    with attach(model, plain, groups=groups):
        expected = torch.autograd.grad(called(model, call), parameters, materialize_grads=True)
    stock = torch.autograd.grad(called(model, call), parameters, materialize_grads=True)
    if checkpointed:
        model.enable_gradient_checkpointing()
    with attach(model, ContextualRepulsion(**{**STRONG, **options}), groups=groups):
        gradients = torch.autograd.grad(called(model, call), parameters, materialize_grads=True)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-9 * float(right.abs().max() + 1))
    assert [bool(gradient.any()) for gradient in gradients] == [bool(gradient.any()) for gradient in stock]
    assert not torch.allclose(gradients[-1], stock[-1])

    # What is expected is right: it is what differences of the map find.
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in parameters]
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for parameter, move in zip(parameters, direction, strict=True):
                parameter += step * move
            plain.calls.clear()
            with attach(model, plain, groups=groups):
                losses.append(called(model, call))
    slope = sum((gradient * move).sum() for gradient, move in zip(gradients, direction, strict=True))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, slope, rtol=1e-3, atol=1e-3)


def rollout(model: nn.Module, call: dict[str, Any], intervention: Any, backward_inside: bool) -> list[torch.Tensor]:
    """Gradients of one loss of three steps, in the first of which something acts."""
    model.zero_grad()
    with attach(model, intervention, groups=[0, 0]):
        loss = sum(called(model, {**call, "timestep": torch.full((2,), time)}) for time in (900.0, 500.0, 100.0))
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", ["context", "attention"])
def test_blocks_that_run_again_are_edited_as_in_their_own_step(site, reentrant, backward_inside):
    model, call = tiny(SD3), CALLS[SD3]()
    repulsion = ContextualRepulsion(**{**STRONG, "stop": 1, "site": site})
    expected = rollout(model, call, repulsion, backward_inside)

    def function(block, *args):
        return checkpoint(block, *args, use_reentrant=reentrant)

    model.enable_gradient_checkpointing(function)
    found = rollout(model, call, repulsion, backward_inside)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    assert all(
        x._gradient_checkpointing_func is function for x in model.modules() if hasattr(x, "gradient_checkpointing")
    )
    with attach(model, ContextualRepulsion(**STRONG), groups=[0, 0]):  # others make no difference
        with pytest.warns(UserWarning, match="attached to this SD3Transformer2DModel already"):
            one = attach(model, repulsion, groups=[0, 0])
        called(model, call)
        one.remove()
        copied = copy.deepcopy(model)
    assert all(
        x._gradient_checkpointing_func is function for x in model.modules() if hasattr(x, "gradient_checkpointing")
    )
    assert copied._gradient_checkpointing_func is function


def test_a_checkpoint_around_all_of_a_denoiser_is_refused():
    model, call = tiny(SD3), CALLS[SD3]()
    with attach(model, ContextualRepulsion(**STRONG), groups=[0, 0]):
        loss = checkpoint(called, model, call, use_reentrant=False)
        with pytest.raises(ValueError, match="SD3Transformer2DModel is run again in a backward pass"):
            loss.backward()


def test_a_checkpoint_around_a_block_that_is_not_its_models_own_is_refused():
    model, call = tiny(SD3), CALLS[SD3]()
    block = model.transformer_blocks[0]
    whole = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(whole, *args, use_reentrant=False, **kwargs)
    with attach(model, ContextualRepulsion(**STRONG, site="attention"), groups=[0, 0]):
        loss = called(model, call)
        with pytest.raises(ValueError, match="run again in a backward pass"):
            loss.backward()


@dataclass(frozen=True, kw_only=True)
class Detached(TokenIntervention):
    """A user's own, which does not think of gradients."""

    def edit(self, tokens):
        return tokens.detach() + 1


def test_a_method_that_loses_gradients_is_refused_where_they_are_recorded():
    model, call = tiny(SD3), CALLS[SD3]()
    with attach(model, Detached(), groups=[0, 0]):
        with pytest.raises(ValueError, match=r"Detached can't be differentiated, .* torch.no_grad\(\)"):
            called(model, call)
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                assert called(model, call).isfinite()
        model.requires_grad_(False)
        assert called(model, call).isfinite()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_denoiser_refuses_gradients(backend):
    torch.compiler.reset()
    model, call = tiny(SD3), CALLS[SD3]()
    compiled = torch.compile(model, backend=backend)
    with attach(compiled, ContextualRepulsion(**STRONG), groups=[0, 0]):
        with torch.no_grad():
            called(compiled, call)
        with pytest.raises(Exception, match="inside a compiled denoiser, which does not pass them on"):
            called(compiled, call).backward()
    torch.compiler.reset()


def slopes(function, given: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a random sum of what a function makes, along eight random ways: by autograd, and by finite differences."""
    generator = torch.Generator().manual_seed(11)

    def drawn(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    variable = given.clone().requires_grad_()
    made = function(variable)
    weights = drawn(made)
    (gradient,) = torch.autograd.grad((weights * made).sum(), variable)
    ways = [drawn(given) for _ in range(8)]

    def loss(at):
        with torch.no_grad():
            return (weights.double() * function(at).double()).sum()

    differences = [(loss(given + step * way) - loss(given - step * way)) / (2 * step) for way in ways]
    return torch.stack([(gradient.double() * way).sum() for way in ways]), torch.stack(differences)


def moment(**more: Any) -> Moment:
    return Moment(0.8, [[0, 1, 2], [3, 4, 5]], seed=0, index=0, next_noise=0.7, **more)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """With a part that the samples of a set share."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
    return own + torch.randn(2, 1, *shape, generator=generator, dtype=torch.float64)


LATENTS, PREDICTION, EMBEDDINGS = drawn(4, 8, 8), drawn(4, 8, 8, seed=1), drawn(7, 16, seed=2)
TEXT = drawn(16, seed=3)


def kept(size: int) -> dict[str, torch.Tensor]:
    return {"rows": torch.randn(5, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)}


def predicted(method: Any, size: int = 0) -> list[Any]:
    """Edits of a prediction as functions of it and of the latents."""

    def at():
        return moment(text=TEXT, memory=kept(size) if size else {})

    return [
        (f"{type(method).__name__} prediction {size}", PREDICTION, lambda x: applied(method, x, LATENTS, at())),
        (f"{type(method).__name__} latents {size}", LATENTS, lambda x: method.edit(PREDICTION, x, at())),
    ]


def block() -> BlockCall:
    return BlockCall(moment(), (16, 16), torch.tanh)


EDITS = [
    *[(type(m).__name__, EMBEDDINGS, lambda x, m=m: applied(m, x, moment())) for m in (CADS(), SeedVariance())],
    *predicted(ParticleGuidance()),
    *predicted(SPELL(radius=3.0)),
    *predicted(SPELL(radius=3.0), 256),
    *predicted(SPARKE(strength=1.0)),
    *predicted(SPARKE(strength=1.0), 256 + 16),
    ("DAVE", drawn(16, 32), lambda x: applied(DAVE(), x)),
    *[(f"STRIDE {n}", drawn(n, 32), lambda x: applied(STRIDE(), x, block())) for n in (4, 16, 64)],
    ("PinkNoise", LATENTS.flatten(0, 1), lambda x: applied(PinkNoise(), x)),
    ("IntervalGuidance inside", PREDICTION, lambda x: applied(IntervalGuidance(), x, LATENTS, moment())),
    ("IntervalGuidance outside", LATENTS, lambda x: IntervalGuidance(high=0.7).edit(PREDICTION, x, moment())),
]


@pytest.mark.parametrize(("name", "given", "function"), EDITS, ids=[name for name, *_ in EDITS])
def test_edits_have_the_gradients_that_differences_find(name, given, function):
    step = 1e-2 if name in ("CADS", "SeedVariance") else 1e-5  # these two reckon in float32
    found, expected = slopes(function, given, step)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_interval_guidance_may_hand_over_a_prediction_without_gradients():
    given = PREDICTION.clone().requires_grad_()
    assert applied(IntervalGuidance(high=0.7), given, LATENTS, moment()) is LATENTS


def test_feature_self_guidance_holds_the_weights_of_its_dispersion_constant():
    method, given = FeatureSelfGuidance(inner_steps=5), drawn(16, 32)
    gram, strength = gram_matrix(given), method.learning_rate * method.inner_steps
    weights = flow_weights(gram, Dispersion(1.0), strength=strength, inner_steps=5, preserve_norm=True)

    def frozen(tokens):
        return tokens.lerp(torch.tanh((weights @ tokens.flatten(2)).view_as(tokens)), method.blend)

    torch.testing.assert_close(applied(method, given, block()), frozen(given))
    found, _ = slopes(lambda x: applied(method, x, block()), given, 1e-5)
    torch.testing.assert_close(found, slopes(frozen, given, 1e-5)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "given", "rest"),
    [(DiverseFlow(), PREDICTION, (LATENTS, moment())), (CNO(), LATENTS, (torch.tanh,))],
)
def test_a_push_that_is_a_gradient_itself_is_refused(method, given, rest):
    with pytest.raises(ValueError, match=f"{type(method).__name__} can't be differentiated"):
        applied(method, given.clone().requires_grad_(), *rest)
    assert applied(method, given, *rest).isfinite().all()
    with torch.no_grad():
        assert applied(method, given.clone().requires_grad_(), *rest).isfinite().all()


RECORDED = [
    ContextualRepulsion(strength=0.0),  # the pipeline alone
    DAVE(keep=0.2, blocks="all", stop=None),
    STRIDE(blocks="all", stop=None),
    ParticleGuidance(low=0.0),
    SPELL(radius=5.0),
    SPARKE(strength=0.3),
    IntervalGuidance(high=0.4),
    CADS(strength=1.0, clear=0.1),
    SeedVariance(stop=None),
]


@pytest.mark.filterwarnings("ignore:IntervalGuidance changed nothing")
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("method", RECORDED, ids=lambda method: type(method).__name__)
def test_gradients_through_a_step_of_a_pipeline(method, guidance_scale):
    """By the latents of the second of two steps, in which alone they are recorded."""
    pipe = tiny_sd3()
    start = run(pipe, n=3, num_inference_steps=2, guidance_scale=guidance_scale)

    def step(latents):
        recording = torch.is_grad_enabled()

        def enter(pipe, index, timestep, kwargs):
            if index == 0:
                torch.set_grad_enabled(recording)
                return {"latents": latents}
            return kwargs

        with attach(pipe, method):
            return run(pipe, n=3, num_inference_steps=2, guidance_scale=guidance_scale, callback_on_step_end=enter)

    found, expected = slopes(step, start, 1e-3)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_a_checkpoint_around_the_denoiser_of_a_pipeline_is_refused():
    pipe = tiny_sd3()
    whole = pipe.transformer._call_impl
    pipe.transformer._call_impl = lambda **kwargs: checkpoint(whole, use_reentrant=False, **kwargs)

    def enter(pipe, index, timestep, kwargs):
        torch.set_grad_enabled(True)
        return kwargs

    with attach(pipe, ParticleGuidance(low=0.0)):
        latents = run(pipe, n=2, num_inference_steps=2, callback_on_step_end=enter)
        with pytest.raises(ValueError, match="SD3Transformer2DModel is run again in a backward pass"):
            latents.sum().backward()


def test_what_is_remembered_of_a_run_holds_no_gradients():
    later = moment(memory={})
    images = LATENTS.clone().requires_grad_()
    SPELL().remember(images, later)
    assert not later.memory["rows"].requires_grad
