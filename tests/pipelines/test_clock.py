"""Step, guidance branch and prompt group are right in every pipeline, as told by the texts that its denoiser gets."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from denoisers import tiny
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import Tensor

from pipelines import IMAGES, PICTURES, PIPELINES, PROMPTS, Pipeline
from variegate import ContextualRepulsion, TokenIntervention, attach
from variegate.architectures import architecture_of

COND, UNCOND = "cond", "uncond"


@pytest.fixture(scope="module", params=PIPELINES)
def made(request):
    return PIPELINES[request.param]()


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


@dataclass
class Call:
    """A call of a denoiser as it is seen from outside: its step, the prompt of each row, and its first edited block.

    Attributes:
        step: steps of the scheduler before it, over all runs.
        prompts: the prompt of each row; None for the negative one.
        tokens: what leaves the block, `[rows, N, D]`.
    """

    step: int
    prompts: list[int | None]
    tokens: Tensor | None = None

    def find(self, tokens: Tensor) -> int:
        """The first row that holds these tokens."""
        return next(i for i, row in enumerate(self.tokens) if torch.equal(row, tokens))


class Trace:
    """Watches denoisers and scheduler; attached before any intervention, so that it sees tokens before their edit."""

    def __init__(self, made: Pipeline) -> None:
        self.made, self.steps, self.calls, self.handles = made, 0, [], []
        self.scheduler = made.pipe.scheduler
        for denoiser in made.denoisers():
            architecture = architecture_of(denoiser)
            names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
            see = functools.partial(self.see, names, architecture.text)
            self.handles.append(denoiser.register_forward_pre_hook(see, with_kwargs=True))
            layout = architecture.blocks[0]
            part = getattr(layout, made.site)
            block = layout.of(denoiser)[0].get_submodule(part.module)
            self.handles.append(block.register_forward_hook(functools.partial(self.keep, part)))
        self.stock_step = self.scheduler.step

    def see(self, names, text, module, args, kwargs):
        call = dict(zip(names, args, strict=False)) | kwargs
        prompts = [
            next((i for i, known in enumerate(self.made.texts) if close(row, known)), None) for row in call[text]
        ]
        self.calls.append(Call(self.steps, prompts))
        self.now = {"self": module} | call

    def keep(self, part, module, args, output):
        self.calls[-1].tokens = part.get(output, part.locate(self.now))

    def __enter__(self) -> Trace:
        @functools.wraps(self.stock_step)
        def step(*args, **kwargs):
            self.steps += 1
            return self.stock_step(*args, **kwargs)

        self.scheduler.step = step
        return self

    def __exit__(self, *error: Any) -> None:
        del self.scheduler.step
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Recorder(TokenIntervention):
    """Keeps in which call it acted, and on which rows."""

    trace: Trace
    seen: list[tuple[int, list[list[int]]]] = field(default_factory=list, compare=False)
    observes: ClassVar[bool] = True

    def edit(self, tokens):
        call = self.trace.calls[-1]
        rows = [[call.find(sample) for sample in samples] for samples in tokens]
        self.seen.append((len(self.trace.calls) - 1, rows))
        return tokens


def expected(trace: Trace, steps: range, branch: str) -> list[tuple[int, list[list[int]]]]:
    """The calls of these steps and their sample sets: images of a prompt follow one another, prompt by prompt."""
    found = []
    for number, call in enumerate(trace.calls):
        rows = range(len(call.prompts))
        sets = [list(rows[i : i + IMAGES]) for i in rows[::IMAGES]]
        prompts = [{call.prompts[row] for row in samples} for samples in sets]
        assert all(len(prompt) == 1 for prompt in prompts)
        positive = [samples for samples, prompt in zip(sets, prompts, strict=True) if prompt != {None}]
        negative = [samples for samples in sets if samples not in positive]
        every = [{i} for i in range(PROMPTS)]  # twice, where the second is perturbed
        assert [prompt for prompt in prompts if prompt != {None}] in ([], every, 2 * every)
        wanted = positive[:PROMPTS] if branch == COND else negative
        if call.step in steps and wanted:
            found.append((number, [[call.find(call.tokens[row]) for row in samples] for samples in wanted]))
    return found


def check(made: Pipeline, target: Any, fractions: bool = True, runs: int = 2, **call: Any) -> None:
    """Windows of one step act in that step of each run, on the branch and the sample sets they should."""
    with Trace(made) as trace:
        stock = made(**call)
    total = trace.steps
    assert total >= 3
    assert len({call.step for call in trace.calls}) == total
    with Trace(made) as trace:
        windows: list[tuple[float, float]] = [(k, k + 1) for k in range(total)]
        if fractions:
            windows += [(k / total, (k + 1) / total) for k in range(total)]
        recorders = [
            (Recorder(trace=trace, start=start, stop=stop, branch=branch, blocks=[0], site=made.site), k % total)
            for k, (start, stop) in enumerate(windows)
            for branch in (COND, UNCOND)
        ]
        with attach(target, *[recorder for recorder, _ in recorders]):
            for run in range(runs):
                assert torch.equal(made(**call), stock)
                for recorder, k in recorders:
                    step = run * total + k
                    assert recorder.seen == expected(trace, range(step, step + 1), recorder.branch)
                    recorder.seen.clear()


def test_every_edit_meets_its_step_branch_and_group(made):
    check(made, made.pipe)


def test_a_bare_denoiser_will_do(made):
    denoiser, *more = made.denoisers()
    if more:
        pytest.skip("its clock needs both denoisers")
    if "PAG" in type(made.pipe).__name__:
        with attach(denoiser, ContextualRepulsion(site=made.site)), pytest.raises(ValueError, match="equal latents"):
            made()
    else:
        check(made, denoiser, fractions=False)


def hooks(made: Pipeline) -> int:
    modules = [module for denoiser in made.denoisers() for module in denoiser.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def test_off_is_stock_on_is_not_and_nothing_is_left(made):
    stock = made()
    for strength in (0.0, 2.0):
        repulsion = ContextualRepulsion(strength=strength, start=0, stop=None, blocks="all", site=made.site)
        with attach(made.pipe, repulsion):
            assert torch.equal(made(), stock) == (strength == 0)
        assert hooks(made) == 0
        assert torch.equal(made(), stock)


def acted(made: Pipeline, target: Any = None, groups: Any = None, branch: str = "both", **call: Any) -> list[Any]:
    """What an intervention in all steps got in a run: the number of each call of the denoiser, and its sample sets."""
    with Trace(made) as trace:
        recorder = Recorder(trace=trace, branch=branch, blocks=[0], site=made.site)
        with attach(target or made.pipe, recorder, groups=groups):
            made(**call)
    return recorder.seen


def sets(*starts: int) -> list[list[int]]:
    return [[start, start + 1] for start in starts]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Flux", [sets(0, 2)] * 6),
        ("SD3", [sets(0, 2, 4, 6)] * 3),
        ("SD3 SLG", [sets(0, 2, 4, 6)] + [sets(0, 2, 4, 6), sets(0, 2)] * 2),
        ("PixArt PAG", [sets(0, 2, 4, 6, 8, 10)] * 3),
        ("PixArt PAG alone", [sets(0, 2, 4, 6)] * 3),
        ("HunyuanImage SLG", [sets(0, 2)] * 8),  # two branches in the first step, then three
        ("Lumina2", [sets(0, 2)] * 5),  # both branches in two steps of three
        ("Z-Image truncated", [sets(0, 2, 4, 6)] * 2 + [sets(0, 2)]),
    ],
)
def test_sample_sets_of_a_run(name, expected):
    assert [found for _, found in acted(PIPELINES[name]())] == expected


SEEDS = (0, 1, 0, 1)  # the images of one prompt have the seeds of the other's


@pytest.mark.parametrize("name", ["SD3", "SD3 SLG", "SD3 PAG", "Z-Image", "Flux", "SD 1.5", "PixArt"])
def test_equal_seeds_with_guidance(name):
    made = PIPELINES[name]()
    check(made, made.pipe, seed=SEEDS)


def test_equal_seeds_in_a_call_of_the_prompt_alone():
    # In the first step the latents of both prompts are equal still.
    seen = acted(PIPELINES["SD3 SLG"](), branch=UNCOND, seed=SEEDS, skip_layer_guidance_start=-1.0)
    assert [number for number, _ in seen] == [0, 2, 4]


@pytest.mark.parametrize(
    ("name", "off"),
    [("SD3", {"guidance_scale": 1.0}), ("Z-Image", {"guidance_scale": 0.0}), ("Flux", {"true_cfg_scale": 1.0})],
)
def test_equal_seeds_without_guidance(name, off):
    made = PIPELINES[name]()
    check(made, made.pipe, seed=SEEDS, **off)


def test_only_groups_tell_equal_seeds_from_branches():
    made = PIPELINES["PixArt"]()
    call = {"seed": SEEDS, "guidance_scale": 1.0}
    for branch in (COND, "both"):
        with pytest.raises(ValueError, match=r"equal latents, .* pass groups="):
            acted(made, branch=branch, **call)
    assert acted(made, branch=COND, groups=["a", "a", "b", "b"], **call) == [(step, sets(0, 2)) for step in range(3)]
    text = made.texts[0]
    for texts in ([text, text], [text, text + 1, text + 2]):  # one prompt with one seed, and an odd number of rows
        embeds = {"prompt_embeds": torch.stack(texts), "prompt_attention_mask": torch.ones(len(texts), len(text))}
        embeds |= {f"negative_{name}": value for name, value in embeds.items()}
        with pytest.raises(ValueError, match="equal latents"):
            acted(
                made,
                num_images_per_prompt=1,
                seed=[0] * len(texts),
                num_inference_steps=1,
                guidance_scale=1.0,
                **embeds,
            )
    bare = PIPELINES["SD3"]()
    call = {"seed": SEEDS, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="equal latents"):
        acted(bare, bare.pipe.transformer, **call)
    assert acted(bare, bare.pipe.transformer, groups=[0, 0, 1, 1], **call)[0] == (0, sets(0, 2))


@pytest.mark.parametrize(
    ("name", "branches"), [("SD3", 2), ("Z-Image", 2), ("PixArt", 2), ("Flux", 1), ("Lumina2", 1), ("PixArt PAG", 3)]
)
def test_groups_by_hand_hold_in_every_branch(name, branches):
    seen = acted(PIPELINES[name](), groups=["x", "y", "y", "x"])
    expected = [[4 * k + row for row in rows] for k in range(branches) for rows in ([0, 3], [1, 2])]
    assert {tuple(map(tuple, found)) for _, found in seen[:2]} == {tuple(map(tuple, expected))}


@pytest.mark.parametrize("name", ["AuraFlow", "CogView4", "Z-Image", "Flux"])
def test_a_negative_prompt_for_each_prompt(name):
    made = PIPELINES[name]()
    if name == "Flux":
        check(made, made.pipe, negative_prompt=["blurry", "dull"])
    else:
        negative = made.call["negative_prompt_embeds"]
        made.call["negative_prompt_embeds"] = (
            [row + k // IMAGES for k, row in enumerate(negative)]
            if isinstance(negative, list)
            else negative + torch.arange(len(negative))[:, None, None] // (len(negative) // PROMPTS)
        )
        check(made, made.pipe)


@pytest.mark.parametrize("name", ["SD3", "Flux", "SD 1.5", "Z-Image", "CogVideoX"])
def test_runs_of_other_lengths_follow_each_other(name):
    made = PIPELINES[name]()
    with Trace(made) as trace:
        half = Recorder(trace=trace, blocks=[0], site=made.site, start=0.5)
        with attach(made.pipe, half):
            for length in (4, 6, 3):
                before = trace.steps
                made(num_inference_steps=length)
                later = range(before + (trace.steps - before) // 2, trace.steps)
                assert {trace.calls[number].step for number, _ in half.seen} == set(later)
                half.seen.clear()


def test_a_run_of_fewer_images_after_one_of_more():
    made = PIPELINES["SD3"]()
    with Trace(made) as trace:
        recorder = Recorder(trace=trace, branch=UNCOND, blocks=[0])
        with attach(made.pipe, recorder):
            made()
            made(prompt="a cat", negative_prompt="blurry")
    assert [found for _, found in recorder.seen] == [sets(0, 2)] * 3 + [sets(0)] * 3


def test_a_run_after_an_interrupted_one_starts_anew():
    made = PIPELINES["SD3"]()

    def stop(pipe, index, timestep, kwargs):
        raise KeyboardInterrupt

    with Trace(made) as trace:
        recorder = Recorder(trace=trace, stop=1, blocks=[0])
        with attach(made.pipe, recorder):
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    made(callback_on_step_end=stop)
            made()
    assert [number for number, _ in recorder.seen] == [0, 1, 2]


def test_a_second_denoiser_alone_counts_its_own_steps():
    made = PIPELINES["Wan 2.2"]()
    with Trace(made) as trace:
        recorder = Recorder(trace=trace, stop=1, blocks=[0], site=made.site)
        with attach(made.pipe.transformer_2, recorder):
            made()
            made()
    # Its calls are those of the steps 1 and 2, two each.
    assert [trace.calls[number].step for number, _ in recorder.seen] == [1, 1, 4, 4]


def test_one_step_runs_of_a_bare_denoiser():
    made = PIPELINES["Flux"]()
    call = {"num_inference_steps": 1, "true_cfg_scale": 1.0}
    with Trace(made) as trace:
        recorder = Recorder(trace=trace, branch=COND, blocks=[0], stop=1)
        with attach(made.pipe.transformer, recorder):
            made(prompt=["a cat", "a cat"], **call)
            made(seed=1, **call)
    assert recorder.seen == [(0, [[0, 1, 2, 3]]), (1, sets(0, 2))]


def test_a_batch_without_equal_copies_is_refused():
    made = PIPELINES["SD 1.5"]()
    parts = made.pipe.components | {"unet": tiny("UNet2DConditionModel", cross_attention_dim=16, in_channels=8)}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    call = {"image": PICTURES["image"][:1], "num_inference_steps": 2, "num_images_per_prompt": 2}
    with attach(pipe, ContextualRepulsion(site="cross_attention")):
        with pytest.raises(ValueError, match=r"not as equal copies .* guidance_scale=1.0"):
            pipe("a cat", **call)
        pipe("a cat", guidance_scale=1.0, **call)
