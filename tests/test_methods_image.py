"""Methods that edit image tokens with the help of their block: against a second derivation, and on whole pipelines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from pipelines import PIPELINES
from test_attach import Shift, hook_count, joint_blocks, run
from test_methods_noise import slope, untouched, white
from tiny import Recorder, one_and_two, through_a_request, tiny_flux, tiny_sd3
from variegate import (
    STRIDE,
    Architecture,
    Attachment,
    Blocks,
    FeatureSelfGuidance,
    ImageIntervention,
    Part,
    attach,
)
from variegate.intervention import BlockCall
from variegate.interventions.feature_self_guidance import Dispersion
from variegate.interventions.stride import principal
from variegate.noise import coloured
from variegate.step import Moment

METHODS = {
    "stride": (STRIDE(strength=1.0, stop=None), STRIDE(strength=0.0)),
    "feature-self-guidance": (FeatureSelfGuidance(low=0.0), FeatureSelfGuidance(blend=0.0)),
}
ALONE = ("stride",)
BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


def block(samples=((0, 1, 2),), size=(48, 64), noise=0.9, index=0, rerun=None):
    return BlockCall(Moment(noise, samples, 0, index), size, rerun)


def textured(*shape):
    """Tokens with a few strong components among weak ones."""
    *sets, tokens, channels = shape
    strong = white(*sets, tokens, 5, seed=1) @ white(*sets, 5, channels, seed=2)
    return 3 * strong + 0.01 * white(*sets, tokens, channels, seed=3) + 2.0


def test_stride_is_its_equation():
    tokens = textured(1, 3, 12, 10)
    method = STRIDE(strength=0.7, components=5, exponent=1.5)
    moved = method.edit(tokens, block())
    moment = block().moment
    moment.randn(torch.empty(1, 3, 10, 13))  # the directions that the components are found from
    fields = coloured(moment.randn(torch.empty(1, 3, 5, 3, 4).double()), 1.5)
    for h, new, n in zip(tokens[0], moved[0], fields[0], strict=True):
        centred = h - h.mean(0)
        components = torch.linalg.svd(centred).Vh[:5]
        n = n.flatten(1)
        signs = torch.sign(torch.linalg.lstsq(n.T, (new - h) @ components.T).solution.diagonal())
        noise = (n.T * signs) @ components  # a component has no sign of its own
        expected = h + 0.7 * centred.norm() * noise / noise.norm()
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-4)


def test_the_components_are_the_principal_ones():
    rows = textured(2, 2, 40, 30)
    rows = rows - rows.mean(2, keepdim=True)
    basis = principal(rows, 5, Moment(1.0, ((0, 1), (2, 3)), 0, 0))
    expected = torch.linalg.svd(rows).Vh[..., :5, :]
    torch.testing.assert_close((expected @ basis).abs(), torch.eye(5).double().expand(2, 2, 5, 5), rtol=0, atol=1e-4)
    assert principal(rows[..., :3, :], 5, Moment(1.0, ((0, 1), (2, 3)), 0, 0)).shape == (2, 2, 30, 2)  # if centred
    assert (basis.amax(-2) == basis.abs().amax(-2)).all()  # whatever sign the solver found


def test_the_noise_of_stride_is_pink_and_the_images_own():
    tokens = textured(1, 3, 64 * 64, 6)
    moved = STRIDE(components=1).edit(tokens, block(size=(64, 64)))
    noise = (moved - tokens)[0].mT.unflatten(-1, (64, 64))
    assert abs(slope(noise) + 1) < 0.15
    flat = torch.nn.functional.normalize(noise.flatten(1), dim=1)
    assert ((flat @ flat.T).abs() < 0.5).sum() == 6  # all but the images with themselves
    alone = STRIDE(components=1).edit(tokens[:, 2:], block(((2,),), size=(64, 64)))
    torch.testing.assert_close(alone, moved[:, 2:])
    later = STRIDE(components=1).edit(tokens, block(size=(64, 64), index=1))
    assert not torch.allclose(later, moved)


def test_stride_spreads_the_images():
    same = textured(1, 1, 12, 10).expand(1, 4, 12, 10)
    moved = STRIDE().edit(same, block(((0, 1, 2, 3),)))
    torch.testing.assert_close((moved - same).flatten(2).norm(dim=2), torch.full((1, 4), 0.7).double() * spread(same))
    assert torch.pdist(moved[0].flatten(1)).min() > 0.3 * spread(same)[0, 0]


def spread(tokens):
    return (tokens - tokens.mean(2, keepdim=True)).flatten(2).norm(dim=2)


def test_stride_needs_a_grid():
    for size, message in ((None, "makes videos or does not tell"), ((64, 64), "12 tokens are no grid")):
        with pytest.raises(ValueError, match=message):
            STRIDE().edit(textured(1, 3, 12, 10), block(size=size))


def dispersion(rows, temperature):
    """G of one set `[B, D]`."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return ((unit @ unit.T) / temperature).exp().mean().log()


def dispersed(rows, *, temperature, learning_rate, inner_steps):
    """The steps one by one, on the tokens."""
    length = rows.norm(dim=1, keepdim=True)
    rate = learning_rate * length.square().mean()
    for _ in range(inner_steps):
        moving = rows.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(dispersion(moving, temperature), moving)
        rows = rows - rate * gradient
        rows = rows * length / rows.norm(dim=1, keepdim=True)
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_coefficients_are_the_gradient(temperature):
    rows = white(5, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(-dispersion(rows, temperature), rows)
    gram = (rows @ rows.T).detach().numpy()
    objective = Dispersion(temperature)
    torch.testing.assert_close(torch.tensor(objective.coefficients(gram)) @ rows.detach(), gradient)
    assert objective.value(gram) == pytest.approx(-dispersion(rows, temperature).item())


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("apart", [1.0, 0.05])
def test_feature_self_guidance_is_its_equation(samples, apart):
    tokens = 2 + apart * white(2, samples, 6, 7)
    method = FeatureSelfGuidance(blend=0.3, learning_rate=0.2, inner_steps=30, temperature=0.5)
    seen = []
    moved = method.edit(tokens, block(rerun=lambda new: seen.append(new) or 10 * new))
    for h, new, given in zip(tokens, moved, seen[0], strict=True):  # the sets do not see each other
        expected = dispersed(h.flatten(1), temperature=0.5, learning_rate=0.2, inner_steps=30).view_as(h)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new, 0.7 * h + 0.3 * 10 * expected, rtol=1e-4, atol=1e-3)
        assert dispersion(given.flatten(1), 0.5) < dispersion(h.flatten(1), 0.5) - 0.001
    assert method.edit(tokens, block(noise=0.79)) is tokens


@dataclass(frozen=True, kw_only=True)
class Inner(ImageIntervention):
    """Keeps what a block makes of doubled image tokens, and of those it had."""

    seen: list = field(default_factory=list, compare=False)
    observes: ClassVar[bool] = True

    def edit(self, tokens, block):
        self.seen.append((tokens, block.rerun(2 * tokens)))
        return tokens


@pytest.mark.parametrize("index", [1, 2])  # on Flux a dual-stream block and a single-stream one
def test_a_block_runs_again_with_other_image_tokens(pipe, index):
    inner, calls = Inner(blocks=(index,)), []
    module = joint_blocks(pipe)[index]
    hook = module.register_forward_hook(lambda m, args, kwargs, output: calls.append((args, kwargs)), with_kwargs=True)
    with hook, attach(pipe, inner):
        run(pipe, num_inference_steps=2)
    assert len(calls) == len(inner.seen) == 2  # the second runs are no calls
    for (args, kwargs), (tokens, left) in zip(calls, inner.seen, strict=True):
        assert not args
        changed = kwargs | {"hidden_states": 2 * tokens.flatten(0, 1)}
        with torch.no_grad():
            output = module.forward(**changed)
        torch.testing.assert_close(left.flatten(0, 1), output[1])


def test_a_block_on_a_joint_sequence_runs_again():
    """Text and image in one tensor."""
    made = PIPELINES["Flux2"]()
    inner, calls = Inner(blocks=(-1,)), []
    module = joint_blocks(made.pipe)[-1]
    hook = module.register_forward_hook(lambda m, args, kwargs, output: calls.append((args, kwargs)), with_kwargs=True)
    with hook, attach(made.pipe, inner):
        made()
    for (args, kwargs), (tokens, left) in zip(calls, inner.seen, strict=True):
        assert not args
        text = kwargs["hidden_states"].shape[1] - tokens.shape[2]
        assert text > 0
        changed = torch.cat((kwargs["hidden_states"][:, :text], 2 * tokens.flatten(0, 1)), 1)
        with torch.no_grad():
            output = module.forward(**kwargs | {"hidden_states": changed})
        torch.testing.assert_close(left.flatten(0, 1), output[:, text:])


def test_a_block_that_takes_something_else_is_refused():
    pipe = tiny_sd3()
    text_for_image = Architecture("SD3Transformer2DModel", (Blocks("transformer_blocks.*", image=Part(0)),))
    attachment = Attachment(pipe, [FeatureSelfGuidance(low=0.0)], architecture=text_for_image)
    with attachment, pytest.raises(ValueError, match="is not given image tokens as it returns them"):
        run(pipe)


def test_no_edit_acts_on_the_second_run(pipe):
    counting = Recorder(blocks=(2,), site="image")
    attention = Recorder(blocks=(2,), site="attention") if isinstance(pipe, StableDiffusion3Pipeline) else counting
    with attach(pipe, FeatureSelfGuidance(low=0.0), counting, attention):
        run(pipe)
    assert len(attention.seen) == (3 if attention is not counting else 6)
    shift = Shift(site="image", blocks=(0, 2), amount=3.0)
    after = Recorder(blocks=(2,), site="image")
    with attach(pipe, FeatureSelfGuidance(low=0.0), shift, after):
        run(pipe)
    plain = Recorder(blocks=(2,), site="image")
    with attach(pipe, Shift(site="image", blocks=(0,), amount=3.0), FeatureSelfGuidance(low=0.0), plain):
        run(pipe)
    offset = 3.0 * torch.arange(4.0)[:, None, None]
    torch.testing.assert_close(after.seen[0], plain.seen[0] + offset)


def test_the_tokens_of_a_pipeline_are_dispersed(pipe):
    stock, guided = Recorder(blocks=(2,), site="image"), Recorder(blocks=(2,), site="image")
    with attach(pipe, stock):
        run(pipe)
    with attach(pipe, FeatureSelfGuidance(low=0.0, blend=1.0), guided):
        run(pipe)
    for before, after in zip(stock.seen[0], guided.seen[0], strict=True):
        assert dispersion(after.flatten(1), 1.0) < dispersion(before.flatten(1), 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_pipeline(pipe, name):
    on, off = METHODS[name]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if isinstance(pipe, FluxPipeline) else {}
    stock, hooks = run(pipe, **guided), hook_count(pipe)
    with attach(pipe, off):
        assert torch.equal(run(pipe, **guided), stock)
    with attach(pipe, on):
        changed = run(pipe, **guided)
        assert torch.equal(run(pipe, **guided), changed)
    assert changed.isfinite().all()
    assert not torch.equal(changed, stock)
    assert hook_count(pipe) == hooks
    assert untouched(pipe)
    assert torch.equal(run(pipe, **guided), stock)
    with attach(pipe, on, seed=1):
        assert torch.equal(run(pipe, **guided), changed) == (name != "stride")


@pytest.mark.parametrize("name", METHODS)
def test_one_image_and_two(pipe, name):
    for n, stock, changed in one_and_two(pipe, METHODS[name][0]):
        assert changed.isfinite().all()
        assert torch.equal(changed, stock) == (n == 1 and name not in ALONE)


def test_a_group_is_apart_from_the_others(pipe):
    stock = run(pipe)
    with attach(pipe, FeatureSelfGuidance(low=0.0), groups=["a", "b", "a", "a"]):
        changed = run(pipe)
    same = [torch.equal(a, b) for a, b in zip(stock, changed, strict=True)]
    assert same == [False, True, False, False]
    for method, _ in METHODS.values():
        made = []
        for last in (3, 30):
            generator = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, last)]
            with attach(pipe, method):
                made.append(run(pipe, ["a cat", "a dog"], n=2, latents=None, generator=generator))
        assert torch.equal(made[0][:2], made[1][:2])


def test_stride_refuses_videos():
    made = PIPELINES["Wan 2.1"]()
    with pytest.raises(ValueError, match="makes videos or does not tell"), attach(made.pipe, STRIDE(stop=None)):
        made()


def test_stride_on_a_picture_that_is_no_square(pipe):
    stock = run(pipe, height=16, width=24)
    with attach(pipe, STRIDE(stop=None)):
        assert not torch.equal(run(pipe, height=16, width=24), stock)


@pytest.mark.parametrize("name", METHODS)
def test_everything_is_restored_after_an_error(pipe, name):
    def fail(pipe, index, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(pipe, METHODS[name][0]):
        run(pipe, callback_on_step_end=fail)
    assert untouched(pipe)
    with pytest.raises(ValueError, match="joint blocks"):
        attach(pipe, METHODS[name][0], STRIDE(blocks=(99,)))
    assert untouched(pipe)
    with (
        attach(pipe.transformer, dataclasses.replace(METHODS[name][0], stop=None)),
        pytest.raises(ValueError, match="The noise level is unknown"),
    ):
        run(pipe)


def test_inside_a_compiled_denoiser(pipe):
    torch.compiler.reset()
    with attach(pipe, STRIDE(stop=None, blocks=(0,))):
        expected = run(pipe, n=2)
    whole = pipe.transformer
    pipe.transformer = torch.compile(whole, backend="eager", fullgraph=True)
    try:
        with attach(pipe, STRIDE(stop=None, blocks=(0,))):
            torch.testing.assert_close(run(pipe, n=2), expected)
        with (
            pytest.raises(ValueError, match="attach it to one that is not compiled"),
            attach(pipe, FeatureSelfGuidance(low=0.0)),
        ):
            run(pipe, n=2)
    finally:
        pipe.transformer = whole
        torch.compiler.reset()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_through_a_request(name):
    stock, changed = through_a_request(name, METHODS[name][0])
    assert any(a.tobytes() != b.tobytes() for a, b in zip(stock, changed, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STRIDE(strength=-1), "strength=-1 is out of range"),
        (lambda: STRIDE(components=0), "components=0 is out of range"),
        (lambda: STRIDE(exponent=math.nan), "exponent=nan is out of range"),
        (lambda: STRIDE(site="context"), "site='context': STRIDE edits image tokens"),
        (lambda: FeatureSelfGuidance(blend=1.1), "blend=1.1 is out of range"),
        (lambda: FeatureSelfGuidance(learning_rate=math.inf), "learning_rate=inf is out of range"),
        (lambda: FeatureSelfGuidance(inner_steps=0), "inner_steps=0 is out of range"),
        (lambda: FeatureSelfGuidance(temperature=0), "temperature=0 is out of range"),
        (lambda: FeatureSelfGuidance(low=2), "low=2 is out of range"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
