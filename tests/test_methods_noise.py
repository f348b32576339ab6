"""Methods that edit the noise a pipeline starts from: against a second derivation, and on whole pipelines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, StableDiffusion3Img2ImgPipeline

from pipelines import PIPELINES
from test_attach import hook_count, run
from tiny import CHANNELS, SAMPLE_SIZE, one_and_two, through_a_request, tiny_flux, tiny_sd3
from variegate import CNO, ContextualRepulsion, PinkNoise, attach
from variegate.noise import grid, unpack

METHODS = {
    "pink-noise": (PinkNoise(exponent=1.0), PinkNoise(exponent=0.0)),
    "cno": (CNO(strength=0.2), CNO(strength=0.0)),
}
ALONE = ("pink-noise",)
BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


def white(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def untouched(pipe) -> bool:
    return hook_count(pipe) == 0 and "prepare_latents" not in vars(pipe)


def drawn(pipe, n=4, seed=0):
    """The latents that a run starts from."""
    latents = pipe.prepare_latents(
        n,
        CHANNELS,
        2 * SAMPLE_SIZE,
        2 * SAMPLE_SIZE,
        torch.float32,
        torch.device("cpu"),
        [torch.Generator().manual_seed(seed + i) for i in range(n)],
    )
    return latents[0] if isinstance(latents, tuple) else latents


def slope(fields) -> float:
    """Of log power against log frequency, averaged over the fields `[..., n, n]`."""
    size = fields.shape[-1]
    power = torch.fft.fft2(fields).abs().square().flatten(0, -3).mean(0)
    down = torch.fft.fftfreq(size)
    frequencies = torch.hypot(down[:, None], down)
    inside = (frequencies > 1.5 / size) & (frequencies < 0.5)
    return float(np.polyfit(frequencies[inside].log().numpy(), power[inside].log().numpy(), 1)[0])


def test_pink_noise_is_its_equation():
    noise = white(2, 1, 4, 6)
    pink = PinkNoise(exponent=1.3).edit(noise)
    for old, new in zip(noise[:, 0].numpy(), pink[:, 0].numpy(), strict=True):
        expected = np.zeros((4, 6), complex)
        y, x = np.mgrid[:4, :6]
        for v in range(4):
            for u in range(6):
                wave = np.exp(2j * np.pi * (v * y / 4 + u * x / 6))
                f = max(math.hypot(min(v, 4 - v) / 4, min(u, 6 - u) / 6), 1 / 6)
                expected += (old * wave.conj()).sum() / 24 * wave * f ** (-1.3 / 2)
        assert abs(expected.imag).max() < 1e-12
        expected = expected.real * math.sqrt((old**2).sum() / (expected.real**2).sum())
        np.testing.assert_allclose(new, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_spectrum_falls_as_it_says(exponent):
    noise = white(8, 16, 64, 64)
    pink = PinkNoise(exponent=exponent).edit(noise)
    assert abs(slope(noise)) < 0.05
    assert abs(slope(pink) + exponent) < 0.05
    torch.testing.assert_close(pink.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))
    assert abs(pink.square().mean() - 1) < 0.02
    # The layout, which is the mean of large areas, has become more varied; the noise stays real and finite.
    assert pink.mean((-2, -1)).var() > 2 * noise.mean((-2, -1)).var()


def test_the_scale_of_the_noise_is_kept_and_images_are_apart():
    noise = white(3, 4, 8, 8) * torch.tensor([1.0, 14.6, 1.0]).view(3, 1, 1, 1)
    pink = PinkNoise().edit(noise)
    torch.testing.assert_close(pink.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))
    torch.testing.assert_close(pink[1:2], PinkNoise().edit(noise[1:2]))
    torch.testing.assert_close(PinkNoise().edit(noise.bfloat16()).double(), pink, rtol=0.02, atol=0.2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_packed_latents_are_pictures(height, width):
    pictures = white(2, 3, height, width)
    given = {"height": 8 * height, "width": 8 * width, "num_channels_latents": 3}
    packed = FluxPipeline._pack_latents(pictures, 2, 3, height, width)
    found, pack = unpack(packed, given)
    assert torch.equal(found, pictures)
    assert torch.equal(pack(found), packed)
    plain = pictures.flatten(2).mT  # one pixel a token
    found, pack = unpack(plain, given)
    assert torch.equal(found, pictures)
    assert torch.equal(pack(found), plain)
    for shape in ((2, 3, height, width), (2, 3, 5, height, width)):  # pictures, videos
        assert unpack(torch.zeros(shape), given)[0].shape == shape


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((2, 10, 12), {"height": 64, "width": 64, "num_channels_latents": 3}),  # no grid
        ((2, 16, 7), {"height": 64, "width": 64, "num_channels_latents": 3}),  # no patch
        ((2, 16, 12), {"height": 64, "width": 64}),  # channels unknown
        ((2, 16, 12), {"num_channels_latents": 3}),  # size unknown
        ((2, 16, 12), {"height": 64, "width": 64, "num_channels_latents": 3, "num_frames": 5}),  # a packed video
        ((2, 5, 64, 64, 16), {"height": 512, "width": 512, "num_channels_latents": 16}),  # channels last
    ],
)
def test_other_layouts_are_refused(shape, given):
    with pytest.raises(ValueError, match=r"can't be edited|are no grid"):
        unpack(torch.zeros(shape), given)


def test_grid_takes_the_rounding_of_pipelines():
    assert grid(63 * 64, 1000, 1024) == (63, 64)
    assert grid(1, 16, 16) == (1, 1)
    for tokens, height, width in ((8192, 512, 512), (12, 512, 512), (64, 512, 1024)):
        with pytest.raises(ValueError, match="are no grid"):
            grid(tokens, height, width)


def denoise(noise):
    """A denoiser with an opinion."""
    mix = white(12, 12, seed=8)
    return torch.tanh(noise.flatten(2) @ mix).view(noise.shape) + 0.3 * noise


def infonce(noise, anchors, temperature):
    """Of one set, image by image."""
    images = [image.flatten() for image in denoise(noise[None])[0]]
    total = 0.0
    for i, image in enumerate(images):
        cosines = [torch.cosine_similarity(image, other, dim=0) for other in images]
        cosines[i] = torch.cosine_similarity(image, anchors[i].flatten(), dim=0)
        shares = torch.stack([(cosine / temperature).exp() for cosine in cosines])
        total = total - (shares[i] / shares.sum()).log()
    return total


@pytest.mark.parametrize("samples", [2, 4])
def test_cno_is_its_equation(samples):
    noise = white(2, samples, 3, 4)
    method = CNO(strength=0.4, iterations=2, temperature=0.3)
    moved = method.edit(noise, denoise)
    for start, end in zip(noise, moved, strict=True):  # the sets do not see each other
        anchors, at = denoise(start[None])[0], start.clone()
        for _ in range(2):
            gradient = torch.zeros_like(at)
            for place in np.ndindex(*at.shape):  # central differences
                step = torch.zeros_like(at)
                step[place] = 1e-5
                gradient[place] = (infonce(at + step, anchors, 0.3) - infonce(at - step, anchors, 0.3)) / 2e-5
            for i in range(samples):
                length = start[i].norm()
                at[i] = at[i] - 0.4 / 2 * length * gradient[i] / gradient[i].norm()
                at[i] = at[i] * length / at[i].norm()
        torch.testing.assert_close(end, at, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.flatten(2).norm(dim=2), noise.flatten(2).norm(dim=2))
    assert not moved.requires_grad
    gentle = dataclasses.replace(method, strength=0.02).edit(noise, denoise)
    for start, end in zip(noise, gentle, strict=True):
        anchors = denoise(start[None])[0]
        assert infonce(end, anchors, 0.3) < infonce(start, anchors, 0.3)


@dataclass(frozen=True, kw_only=True)
class Witness(CNO):
    """Keeps the noise it makes, and what the denoiser saw in the old and the new one."""

    kept: list = field(default_factory=list, compare=False)

    def edit(self, noise, preview):
        new = super().edit(noise, preview)
        self.kept.extend((new, preview(noise), preview(new)))
        return new


def test_cno_raises_what_it_claims_to_raise(pipe):
    witness = Witness(strength=0.5)
    with attach(pipe, witness):
        changed = run(pipe)
    new, before, after = witness.kept
    before, after = (torch.nn.functional.normalize(images[0].flatten(1), dim=1) for images in (before, after))
    off = ~torch.eye(4, dtype=torch.bool)
    assert (after @ after.T)[off].mean() < (before @ before.T)[off].mean() - 0.01
    # The pipeline's loop has the new noise, too: a stock run from it is the same run.
    assert torch.equal(run(pipe, latents=new[0]), changed)


def test_the_preview_is_the_image_that_the_conditional_prediction_points_to():
    pipe = tiny_sd3()
    witness = Witness(strength=0.5)
    with attach(pipe, witness):
        run(pipe, guidance_scale=5.0)
    new, _, after = witness.kept
    one_step = run(pipe, guidance_scale=1.0, num_inference_steps=1, latents=new[0])
    torch.testing.assert_close(after[0], one_step, rtol=1e-4, atol=1e-4)


def test_pink_noise_reaches_the_loop(pipe):
    plain = drawn(pipe)
    with attach(pipe, PinkNoise()):
        started, changed = drawn(pipe), run(pipe)
        again = run(pipe, latents=plain)  # noise that is handed to the pipeline is edited as well
    is_flux = isinstance(pipe, FluxPipeline)
    pictures = FluxPipeline._unpack_latents(plain, 16, 16, 2) if is_flux else plain
    pink = PinkNoise().edit(pictures)
    expected = FluxPipeline._pack_latents(pink, 4, CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE) if is_flux else pink
    assert torch.equal(started, expected)
    assert torch.equal(run(pipe, latents=expected), changed)
    assert torch.equal(again, changed)
    assert torch.equal(plain, drawn(pipe))


def test_the_callers_latents_are_left_alone(pipe):
    latents = drawn(pipe)
    before = latents.clone()
    with attach(pipe, CNO(strength=0.5)):
        run(pipe, latents=latents)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_pipeline(pipe, name):
    on, off = METHODS[name]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if isinstance(pipe, FluxPipeline) else {}
    stock = run(pipe, **guided)
    with attach(pipe, off):
        assert torch.equal(run(pipe, **guided), stock)
    with attach(pipe, on):
        changed = run(pipe, **guided)
        assert torch.equal(run(pipe, **guided), changed)
        other = run(pipe, seed=50, **guided)
    assert changed.isfinite().all()
    assert not torch.equal(changed, stock)
    assert not torch.equal(other, changed)
    assert untouched(pipe)
    assert torch.equal(run(pipe, **guided), stock)


@pytest.mark.parametrize("name", METHODS)
def test_one_image_and_two(pipe, name):
    for n, stock, changed in one_and_two(pipe, METHODS[name][0]):
        assert changed.isfinite().all()
        assert torch.equal(changed, stock) == (n == 1 and name not in ALONE)


def test_prompts_are_apart(pipe):
    def generators(last):
        return [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, last)]

    made = []
    for last in (3, 30):
        with attach(pipe, CNO(strength=0.5)):
            made.append(run(pipe, ["a cat", "a dog"], n=2, latents=None, generator=generators(last)))
    assert torch.equal(made[0][:2], made[1][:2])
    assert not torch.equal(made[0][2], made[1][2])
    stock = run(pipe, n=3)
    with attach(pipe, CNO(strength=0.5), groups=["a", "b", "a"]):
        changed = run(pipe, n=3)
    assert [torch.equal(a, b) for a, b in zip(stock, changed, strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", METHODS)
def test_everything_is_restored_after_an_error(pipe, name):
    stock = run(pipe)
    on = METHODS[name][0]

    def fail(pipe, index, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(pipe, on):
        run(pipe, callback_on_step_end=fail)
    assert untouched(pipe)
    with pytest.raises(ValueError, match="joint blocks"):
        attach(pipe, on, ContextualRepulsion(blocks=(99,)))
    assert untouched(pipe)
    with pytest.raises(ValueError, match="attach it to one, not its denoiser"):
        attach(pipe.transformer, on)
    assert untouched(pipe)
    assert torch.equal(run(pipe), stock)


def test_attachments_go_in_any_order(pipe):
    first, second = attach(pipe, PinkNoise()), attach(pipe, CNO())
    both = run(pipe)
    first.remove()
    first.remove()
    only_second = run(pipe)
    second.remove()
    assert untouched(pipe)
    with attach(pipe, CNO()):
        assert torch.equal(run(pipe), only_second)
    with attach(pipe, PinkNoise(), CNO()):
        assert torch.equal(run(pipe), both)


def test_a_method_of_the_users_own_is_put_back():
    pipe = tiny_sd3()
    plain = pipe.prepare_latents

    def doubled(*args, **kwargs):
        return 2 * plain(*args, **kwargs)

    pipe.prepare_latents = doubled
    with attach(pipe, PinkNoise()):
        assert abs(drawn(pipe).square().mean() - 4) < 1
    assert vars(pipe)["prepare_latents"] is doubled
    # Put over that of an attachment it stays, and the attachment is no longer heard.
    del pipe.prepare_latents
    attachment = attach(pipe, PinkNoise())
    over = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: over(*args, **kwargs)
    attachment.remove()
    del pipe.prepare_latents
    assert torch.equal(drawn(pipe), drawn(tiny_sd3()))


@pytest.mark.parametrize("name", METHODS)
def test_a_start_that_is_no_noise_is_refused(pipe, name):
    other = FluxImg2ImgPipeline if isinstance(pipe, FluxPipeline) else StableDiffusion3Img2ImgPipeline
    image_to_image = other(**pipe.components)
    with pytest.raises(ValueError, match=f"{other.__name__} starts from more than noise"):
        attach(image_to_image, METHODS[name][0])


def test_latents_that_the_pipeline_changes_are_out_of_reach(pipe):
    def double(module, args, kwargs):
        return args, kwargs | {"hidden_states": 2 * kwargs["hidden_states"]}

    with (
        pipe.transformer.register_forward_pre_hook(double, with_kwargs=True),
        pytest.raises(ValueError, match="needs a denoiser that is given the pipeline's latents as they are"),
        attach(pipe, CNO()),
    ):
        run(pipe)
    assert untouched(pipe)


def test_predictions_of_another_shape_are_refused():
    made = PIPELINES["PixArt"]()
    with pytest.raises(ValueError, match="CNO needs predictions in the shape of the latents"), attach(made.pipe, CNO()):
        made()


def test_a_run_begins_once():
    witness, pipe = Witness(), tiny_flux()
    with attach(pipe, witness):
        run(pipe, true_cfg_scale=3.0, negative_prompt="a dog")  # two calls a step
        run(pipe, true_cfg_scale=3.0, negative_prompt="a dog")
    assert len(witness.kept) == 2 * 3


def test_cno_needs_gradients_and_takes_checkpointed_ones(pipe):
    with attach(pipe, CNO()):
        plain = run(pipe, n=2)
        with pytest.raises(ValueError, match=r"use torch.no_grad\(\)"), torch.inference_mode():
            run(pipe, n=2)
        pipe.transformer.enable_gradient_checkpointing()
        try:
            torch.testing.assert_close(run(pipe, n=2), plain)
        finally:
            pipe.transformer.disable_gradient_checkpointing()
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


def test_no_other_edit_acts_on_a_preview(pipe):
    alone, beside = Witness(strength=0.2), Witness(strength=0.2)
    with attach(pipe, alone):
        run(pipe)
    with attach(pipe, ContextualRepulsion(strength=5.0, start=0, stop=None, blocks="all"), beside):
        run(pipe)
    assert all(torch.equal(a, b) for a, b in zip(alone.kept, beside.kept, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_through_a_request(name):
    stock, changed = through_a_request(name, METHODS[name][0])
    assert any(a.tobytes() != b.tobytes() for a, b in zip(stock, changed, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PinkNoise(exponent=-1), "exponent=-1 is out of range"),
        (lambda: PinkNoise(exponent=math.inf), "exponent=inf is out of range"),
        (lambda: PinkNoise(stop=0.2), "stop=0.2: PinkNoise acts once, before the first step"),
        (lambda: CNO(start=1), "start=1: CNO acts once, before the first step"),
        (lambda: CNO(branch="both"), "branch='both': CNO acts once"),
        (lambda: CNO(strength=math.nan), "strength=nan is out of range"),
        (lambda: CNO(iterations=0), "iterations=0 is out of range"),
        (lambda: CNO(temperature=0), "temperature=0 is out of range"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
