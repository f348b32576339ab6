"""SPARKE, SPELL and DiverseFlow: against a second derivation, on whole pipelines, and what they remember."""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from pipelines import PIPELINES, STEPS
from test_attach import hook_count, run
from tiny import through_a_request, tiny_flux, tiny_sd3
from variegate import SPARKE, SPELL, DiverseFlow, PredictionIntervention, attach
from variegate.step import Moment

METHODS = {
    "diverse-flow": DiverseFlow(strength=0.5),
    "sparke": SPARKE(strength=0.2),
    "spell": SPELL(radius=2.0),
}
REMEMBERING = ("sparke", "spell")
BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


def guided(pipe):
    """Arguments of guidance: in one batch on SD3, in two calls on Flux."""
    return {"true_cfg_scale": 3.0, "negative_prompt": "a dog"} if "Flux" in type(pipe).__name__ else {}


def draw(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(noise=0.8, next_noise=0.7, samples=3, sets=1, **kwargs):
    places = [[i + s * samples for i in range(samples)] for s in range(sets)]
    text = kwargs.pop("text", torch.ones(sets, samples, 4, dtype=torch.float64))
    return Moment(noise, places, 0, 0, next_noise, text=text, **kwargs)


def sparke_score(rows, others, texts, other_texts):
    """1 / mean of k_img^2 k_txt^2 of one latent against others, straight from the paper."""
    unit = torch.nn.functional.normalize
    image = (-(unit(rows, dim=0) - unit(others, dim=1)).square().sum(1) / (2 * 0.7**2)).exp()
    text = (-(unit(texts, dim=0) - unit(other_texts, dim=1)).square().sum(1) / (2 * 0.35**2)).exp()
    return 1 / (image**2 * text**2).mean()


def test_sparke_is_the_gradient_of_its_score():
    x, text, bank, bank_text = draw(1, 3, 2, 5), draw(1, 3, 4, seed=6), draw(6, 10, seed=7), draw(6, 4, seed=8)
    text[0] = text[0, 0]  # of one prompt
    bank_text[:3] = text[0, 0] + 0.1 * bank_text[:3]
    now = moment(text=text, noise=0.8, next_noise=0.7)
    unit = torch.nn.functional.normalize
    now.keep(torch.cat((unit(bank, dim=1), unit(bank_text, dim=1)), 1), 10)
    prediction = draw(1, 3, 2, 5, seed=9)
    edited = SPARKE(strength=0.05).edit(prediction, x, now)
    moved = x + (0.7 - 0.8) * edited - (x + (0.7 - 0.8) * prediction)  # where Euler's step ends
    rows = x[0].flatten(1)
    for i in range(3):
        latent = rows[i].clone().requires_grad_()
        others = torch.cat((bank, rows[:i], latent.detach()[None], rows[i + 1 :]))
        texts = torch.cat((bank_text, text[0]))
        score = sparke_score(latent, others, text[0, i], texts)
        (gradient,) = torch.autograd.grad(score, latent)
        torch.testing.assert_close(moved[0, i].flatten(), 0.05 * rows[i].norm() * gradient / gradient.norm())
        assert sparke_score(rows[i] + 0.1 * moved[0, i].flatten(), others, text[0, i], texts) > score


def test_sparke_looks_at_similar_prompts():
    x, prediction = draw(1, 1, 2, 5), torch.zeros(1, 1, 2, 5, dtype=torch.float64)
    near, far = draw(1, 10, seed=7)[0], draw(1, 10, seed=8)[0]
    text = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)

    def pushed(*bank):
        now = moment(samples=1, text=text)
        for latents, prompt in bank:
            row = torch.cat((latents / latents.norm(), torch.tensor(prompt, dtype=torch.float64)))
            now.keep(row[None], 10)
        return SPARKE().edit(prediction, x, now)

    alone = pushed((near, [1.0, 0.0]))
    torch.testing.assert_close(pushed((near, [1.0, 0.0]), (far, [0.0, 1.0])), alone, rtol=1e-3, atol=1e-4)
    assert (pushed((near, [1.0, 0.0]), (far, [1.0, 0.0])) - alone).abs().max() > 0.01


def test_sparke_rests_between_its_steps():
    x, prediction = draw(1, 3, 2, 5), draw(1, 3, 2, 5, seed=6)
    resting = [
        SPARKE(every=4).edit(prediction, x, dataclasses.replace(moment(), index=index)) is prediction
        for index in range(6)
    ]
    assert resting == [False, True, True, True, False, True]


def test_spell_is_its_equation():
    x, bank = draw(1, 4, 3, 5), draw(5, 15, seed=7)
    now = moment(samples=4, noise=0.6)
    images = x - 0.6 * (x - 0.3 * x)
    prediction = (x - images) / 0.6
    now.keep(bank, 10)
    radius = 1.2
    edited = SPELL(strength=1.6, radius=radius).edit(prediction, x, now)
    after = (x - 0.6 * edited)[0].flatten(1)
    before = images[0].flatten(1)
    ball, active = radius * math.sqrt(15), 0
    for i in range(4):
        away = torch.zeros(15, dtype=torch.float64)
        for other in [*bank, *(before[j] for j in range(4) if j != i)]:
            gap = before[i] - other
            active += bool(gap.norm() < ball)
            away += max(ball / gap.norm() - 1, 0) * gap
        torch.testing.assert_close(after[i], before[i] + 1.6 * away)
    assert 0 < active < 4 * 8  # some are in a ball and some are not


def test_spell_leads_out_of_the_ball_and_is_sparse():
    start = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    start[0, 1, 0, 0], start[0, 2, 0, 1] = 0.5, 50.0
    prediction = -start / 0.8  # from latents of zero
    edited = SPELL(strength=1.0, radius=1.0).edit(prediction, 0 * start, moment(noise=0.8))
    after = -0.8 * edited[0].flatten(1)
    assert torch.equal(edited[0, 2], prediction[0, 2])
    # Each of the two goes all the way to the other's surface: .5 apart become .5 + 2 (2 - .5).
    assert (after[1] - after[0]).norm().item() == pytest.approx(3.5)
    equal = SPELL().edit(torch.zeros_like(start), 0 * start, moment(noise=0.8))
    assert torch.equal(equal, torch.zeros_like(start))


def log_likelihood(rows, spread, median):
    """From eigenvalues, where the method takes determinants."""
    kernel = (-spread * torch.cdist(rows, rows).square() / median).exp()
    values = torch.linalg.eigvalsh(kernel)
    return (values / (1 + values)).log().sum()


@pytest.mark.parametrize("samples", [2, 3, 5])
@pytest.mark.parametrize("linear", [False, True])
def test_diverse_flow_is_its_equation(samples, linear):
    x, prediction = draw(1, samples, 3, 5), draw(1, samples, 3, 5, seed=6)
    matrix = draw(15, 4, seed=7) if linear else torch.eye(15, dtype=torch.float64)
    features = (lambda images: images.flatten(1) @ matrix) if linear else None
    method = DiverseFlow(strength=0.2, spread=0.7, features=features)
    edited = method.edit(prediction, x, moment(samples=samples, noise=0.6))
    images = (x - 0.6 * prediction)[0].flatten(1)
    rows = images @ matrix
    squares = torch.cdist(rows, rows).square()
    median = squares[tuple(torch.triu_indices(samples, samples, 1))].median()
    kernel = (-0.7 * squares / median).exp()
    one = torch.eye(samples, dtype=torch.float64)
    inner = kernel.inverse() - (kernel + one).inverse()  # the gradient of LL in L
    gradient = torch.zeros_like(rows)
    for i in range(samples):
        for j in range(samples):
            gradient[i] += 2 * inner[i, j] * kernel[i, j] * (-2 * 0.7 / median) * (rows[i] - rows[j])
    push = gradient @ matrix.T
    push = 0.2 * 0.6 * prediction.norm() / push.norm() * push
    torch.testing.assert_close(edited[0].flatten(1), prediction[0].flatten(1) - push, rtol=1e-4, atol=1e-5)
    after = (x - 0.6 * edited)[0].flatten(1) @ matrix
    expected = log_likelihood(rows, 0.7, median)
    torch.testing.assert_close(method.log_likelihood(rows[None])[0], expected, rtol=1e-4, atol=1e-4)
    assert log_likelihood(after, 0.7, median) > expected
    with torch.inference_mode():
        torch.testing.assert_close(method.edit(prediction, x, moment(samples=samples, noise=0.6)), edited)


def test_equal_images_stay_finite():
    x = draw(1, 1, 2, 5).expand(1, 3, 2, 5)
    for method in METHODS.values():
        edited = method.edit(x, x, moment())
        torch.testing.assert_close(edited, x)


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_follows_the_order_of_images_and_keeps_sets_apart(name):
    x, prediction, order = draw(2, 4, 3, 5), draw(2, 4, 3, 5, seed=6), [2, 0, 3, 1]
    edited = METHODS[name].edit(prediction, x, moment(samples=4, sets=2))
    torch.testing.assert_close(
        METHODS[name].edit(prediction[:, order], x[:, order], moment(samples=4, sets=2)), edited[:, order]
    )
    torch.testing.assert_close(METHODS[name].edit(prediction[1:], x[1:], moment(samples=4)), edited[1:])


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
def test_images_and_moves_agree_with_the_scheduler(kind):
    if kind == "flow_prediction":
        scheduler = FlowMatchEulerDiscreteScheduler()
    else:
        scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(4)
    x, prediction, move = draw(1, 2, 3), draw(1, 2, 3, seed=6), draw(1, 2, 3, seed=7)

    def level(index):
        if kind == "flow_prediction":
            return scheduler.sigmas[index].item()
        if index == 4:
            return 0.0
        alpha = scheduler.alphas_cumprod[scheduler.timesteps[index]].item()
        return math.sqrt(1 - alpha) / (math.sqrt(1 - alpha) + math.sqrt(alpha))

    for index, t in enumerate(scheduler.timesteps):
        now = moment(level(index), level(index + 1), prediction_type=kind)
        end = scheduler.step(prediction, t, x)
        again = dataclasses.replace(now, next_noise=0.0)
        clean = now.images(prediction, x)
        if kind != "flow_prediction":
            torch.testing.assert_close(end.pred_original_sample, clean, rtol=1e-5, atol=1e-5)
            moved = scheduler.step(prediction + now.to_move_latents(move), t, x).prev_sample
            torch.testing.assert_close(moved, end.prev_sample + move, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(now.images(prediction + now.to_move_images(move), x), clean + move)
        torch.testing.assert_close(again.to_move_latents(move), now.to_move_images(move))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move(PredictionIntervention):
    """Moves the latents by a different constant for each sample."""

    shared: ClassVar[bool] = True

    def edit(self, prediction, latents, moment):
        steps = torch.arange(1.0, latents.shape[1] + 1).view(1, -1, *[1] * (latents.ndim - 2))
        return prediction + moment.to_move_latents(steps.expand(latents.shape))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
def test_latents_move_as_asked_whatever_guidance_does(kind, index):
    for build in BUILDERS.values():
        pipe = build()
        if kind != "flow_prediction":
            if "Flux" in type(pipe).__name__:  # its loop asks for a schedule of sigmas
                continue
            pipe.scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
        seen = []

        def keep(pipe, step, timestep, kwargs, seen=seen):
            seen.append(kwargs["latents"])
            return {}

        run(pipe, callback_on_step_end=keep, **guided(pipe))
        with attach(pipe, Move(start=index, stop=index + 1)):
            run(pipe, callback_on_step_end=keep, **guided(pipe))
        stock, moved = seen[:3], seen[3:]
        for before in range(index):
            assert torch.equal(stock[before], moved[before])
        expected = torch.arange(1.0, 5.0).view(-1, *[1] * (stock[0].ndim - 1)).expand(stock[0].shape)
        torch.testing.assert_close(moved[index] - stock[index], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["CogVideoX", "HiDream", "HunyuanImage", "Ideogram4", "Lumina2", "Mochi", "SD3 PAG", "SDXL", "Wan 2.2", "Z-Image"],
)
def test_pipelines_of_all_kinds(name):
    """Guidance by a second denoiser or in a second call, masks of another length, v and epsilon, signs, times."""
    made = PIPELINES[name]()
    stock = made()
    with attach(made.pipe, Move(start=STEPS - 1)):
        moved = made()
    rows = [(new - old).float().mean() for new, old in zip(moved, stock, strict=True)]
    torch.testing.assert_close(torch.stack(rows), torch.tensor([1.0, 2.0, 1.0, 2.0]), rtol=1e-3, atol=1e-3)
    for method in (SPARKE(strength=0.2), SPELL(radius=1000.0), DiverseFlow()):
        with attach(made.pipe, method):
            first, second = made(), made()
        assert all(row.isfinite().all() for row in first)
        assert not all(torch.equal(a, b) for a, b in zip(first, stock, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert same == isinstance(method, DiverseFlow)


def test_a_stage_that_goes_nowhere_moves_nothing():
    assert not moment(0.5, 0.5).to_move_latents(draw(1, 2, 3)).any()


def test_nothing_of_a_step_is_kept():
    pipe = tiny_sd3()
    with attach(pipe, DiverseFlow(stop=1)) as attachment:
        run(pipe)
        assert not attachment._plans[0]._call.clock.offsets


def test_a_scheduler_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match="prediction_type='sample' of the scheduler does not tell"):
        SPELL().edit(draw(1, 3, 2), draw(1, 3, 2), moment(prediction_type="sample"))
    made = PIPELINES["SDXL"]()
    made.pipe.scheduler = EDMEulerScheduler()
    with attach(made.pipe, SPELL()), pytest.raises(ValueError, match="prediction_type=None of the scheduler"):
        made()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_pipeline(pipe, name):
    stock, hooks = run(pipe, **guided(pipe)), hook_count(pipe)
    with attach(pipe, dataclasses.replace(METHODS[name], strength=0.0)):
        assert torch.equal(run(pipe, **guided(pipe)), stock)
    made = []
    for _ in range(2):
        with attach(pipe, METHODS[name]):
            made.append([run(pipe, **guided(pipe)), run(pipe, **guided(pipe))])
    assert made[0][0].isfinite().all()
    assert not torch.equal(made[0][0], stock)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))  # the same calls, the same images
    assert torch.equal(made[0][0], made[0][1]) == (name not in REMEMBERING)  # the second call knows of the first
    assert hook_count(pipe) == hooks
    assert torch.equal(run(pipe, **guided(pipe)), stock)


@pytest.mark.parametrize("name", METHODS)
def test_one_image_and_two(pipe, name):
    stock = run(pipe, n=1, **guided(pipe))
    with attach(pipe, METHODS[name]), warnings.catch_warnings():
        warnings.simplefilter("error" if name in REMEMBERING else "ignore")
        assert torch.equal(run(pipe, n=1, **guided(pipe)), stock)
        assert torch.equal(run(pipe, n=1, **guided(pipe)), stock) == (name not in REMEMBERING)
    stock = run(pipe, n=2, **guided(pipe))
    with attach(pipe, METHODS[name]):
        changed = run(pipe, n=2, **guided(pipe))
    assert changed.isfinite().all()
    assert not torch.equal(changed, stock)


@pytest.mark.parametrize("name", METHODS)
def test_a_pipeline_follows_the_order_of_its_latents(pipe, name):
    start = torch.randn(4, *start_shape(pipe), generator=torch.Generator().manual_seed(0))
    order = [2, 0, 3, 1]
    with attach(pipe, METHODS[name]):
        made = run(pipe, latents=start)
    with attach(pipe, METHODS[name]):
        again = run(pipe, latents=start[order])
    torch.testing.assert_close(again, made[order], rtol=1e-3, atol=1e-3)


def start_shape(pipe):
    return run(pipe, n=1).shape[1:]


@pytest.mark.parametrize("name", METHODS)
def test_prompts_do_not_push_each_other(pipe, name):
    both = ["a cat", "a mountain"]
    start = torch.randn(4, *start_shape(pipe), generator=torch.Generator().manual_seed(0))
    with attach(pipe, METHODS[name]):
        together = run(pipe, both, n=2, latents=start)
    with attach(pipe, METHODS[name]):
        alone = run(pipe, both[1], n=2, latents=start[2:])
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", REMEMBERING)
def test_memory_is_bounded_and_gone_after_remove(name):
    pipe = tiny_sd3()
    attachment = attach(pipe, dataclasses.replace(METHODS[name], bank=6, stop=1))
    sizes = []
    for seed in range(3):
        run(pipe, seed=seed)
        (memory,) = attachment._plans[0]._call.clock.memory.values()
        sizes.append(len(memory["rows"]))
    assert sizes == [4, 6, 6]
    rows = weakref.ref(memory["rows"])
    last = memory["rows"][-1]
    final = run(pipe, seed=7)
    remembered = memory["rows"][-1, : final[0].numel()]
    assert not torch.equal(remembered, last[: len(remembered)])
    del memory, remembered, last
    assert attachment._plans[0]._call.clock.memory
    attachment.remove()
    gc.collect()
    assert rows() is None
    stock = run(pipe)
    with attach(pipe, dataclasses.replace(METHODS[name], bank=0)):
        first, second = run(pipe), run(pipe)
    assert torch.equal(first, second)
    assert not torch.equal(first, stock)


def test_what_is_remembered_is_the_image():
    pipe = tiny_flux()  # not guided, so the prompt's prediction is the one the scheduler takes
    with attach(pipe, SPELL(radius=2.0)) as attachment:
        made = run(pipe)
        (memory,) = attachment._plans[0]._call.clock.memory.values()
        torch.testing.assert_close(memory["rows"], made.flatten(1), rtol=1e-4, atol=1e-4)


def test_a_memory_of_another_size_is_not_read():
    now = moment()
    now.keep(draw(3, 5), 10)
    assert now.recall(draw(2, 4)).shape == (0, 4)
    now.keep(draw(2, 4), 10)
    assert now.recall(draw(1, 4)).shape == (2, 4)


def test_padding_is_no_part_of_a_prompt():
    made = PIPELINES["Mochi"]()
    mask = made.call["prompt_attention_mask"].clone()
    mask[:, 2:] = False
    with attach(made.pipe, SPARKE()) as attachment:
        made(prompt_attention_mask=mask)
        (memory,) = attachment._plans[0]._call.clock.memory.values()
    text = torch.nn.functional.normalize(made.texts[0][:2].mean(0), dim=0)
    torch.testing.assert_close(memory["rows"][0, -len(text) :], text)


def test_methods_do_not_share_a_memory(pipe):
    with attach(pipe, METHODS["sparke"], METHODS["spell"]) as attachment:
        with pytest.warns(UserWarning, match="SPELL changed nothing: no two images came within radius=2.0"):
            run(pipe, n=2)
        assert len(attachment._plans[0]._call.clock.memory) == 2


def test_features_that_do_not_fit_are_refused():
    x = draw(1, 3, 2, 5)
    for features in (lambda images: images.detach().flatten(1), lambda images: images.mean(0, keepdim=True)):
        with pytest.raises(ValueError, match=r"use a differentiable function that makes a row of each image"):
            DiverseFlow(features=features).edit(x, x, moment())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_through_a_request(name):
    stock, changed = through_a_request(name, METHODS[name])
    assert any(a.tobytes() != b.tobytes() for a, b in zip(stock, changed, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPARKE(strength=-1), "strength=-1 is out of range"),
        (lambda: SPARKE(every=0), "every=0 is out of range"),
        (lambda: SPARKE(image_width=0), "image_width=0 is out of range"),
        (lambda: SPARKE(text_width=math.nan), "text_width=nan is out of range"),
        (lambda: SPARKE(bank=-1), "bank=-1 is out of range"),
        (lambda: SPELL(strength=math.inf), "strength=inf is out of range"),
        (lambda: SPELL(radius=-1), "radius=-1 is out of range"),
        (lambda: SPELL(bank=-1), "bank=-1 is out of range"),
        (lambda: DiverseFlow(strength=-1), "strength=-1 is out of range"),
        (lambda: DiverseFlow(spread=0), "spread=0 is out of range"),
        (lambda: DiverseFlow(features="clip"), "features='clip' is of type str; use a function or None"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
