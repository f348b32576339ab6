"""Conformance of `attach` on tiny real pipelines: off is off, nothing is left behind, sets are apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from tiny import STEPS, Recorder, run, tiny_flux, tiny_sd3
from variegate import ContextualRepulsion, Intervention, TokenIntervention, attach
from variegate.architectures import Architecture, architecture_of, dual, register_architecture
from variegate.clock import Clock
from variegate.objectives import objective

BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}
STRONG = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all")


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


def hook_count(pipe) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())


def joint_blocks(pipe) -> list[nn.Module]:
    return [block for layout in architecture_of(pipe.transformer).blocks for block in layout.of(pipe.transformer)]


@dataclass(frozen=True, kw_only=True)
class Shift(TokenIntervention):
    """Adds a different constant to each sample."""

    amount: float = 0.5

    def edit(self, tokens):
        return tokens + self.amount * torch.arange(tokens.shape[1], dtype=tokens.dtype)[:, None, None]


def test_repulsion_changes_the_images(pipe):
    stock = run(pipe)
    with attach(pipe, STRONG):
        assert not torch.equal(run(pipe), stock)


@pytest.mark.parametrize(
    "off",
    [
        ContextualRepulsion(strength=0.0, start=0, stop=None, blocks="all"),
        ContextualRepulsion(strength=2.0, start=0, stop=0, blocks="all"),
        ContextualRepulsion(eta=0.0, start=0, stop=None, blocks="all"),
    ],
    ids=["strength 0", "no window", "eta 0"],
)
def test_off_is_bit_identical(pipe, off):
    stock = run(pipe)
    with attach(pipe, off):
        assert torch.equal(run(pipe), stock)


def test_attach_and_detach_is_bit_identical(pipe):
    stock = run(pipe)
    attachment = attach(pipe, STRONG)
    run(pipe)
    attachment.remove()
    attachment.remove()
    assert torch.equal(run(pipe), stock)


def test_no_hook_is_left_after_exit_or_an_exception(pipe):
    before = hook_count(pipe)
    with attach(pipe, STRONG, Shift()):
        assert hook_count(pipe) > before
    assert hook_count(pipe) == before

    def fail(pipe, index, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attach(pipe, STRONG):
        run(pipe, callback_on_step_end=fail)
    assert hook_count(pipe) == before


class Nameless(Intervention):
    """Has an edit and no kind: nothing would call it."""

    def edit(self, tokens):
        return tokens


def test_no_hook_is_left_after_a_failed_attach(pipe, monkeypatch):
    before = hook_count(pipe)
    with pytest.raises(ValueError, match=r"blocks=\(99,\): the denoiser has \d+ joint blocks"):
        attach(pipe, STRONG, ContextualRepulsion(blocks=[99]))
    with pytest.raises(TypeError, match="not float"):
        attach(pipe, STRONG, 0.5)
    with pytest.raises(TypeError, match="Nameless derives from no kind of intervention"):
        attach(pipe, STRONG, Nameless())
    assert hook_count(pipe) == before

    def refuse(*args, **kwargs):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(joint_blocks(pipe)[1], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        attach(pipe, STRONG)
    assert hook_count(pipe) == before


def test_context_edits_text_and_leaves_image_tokens_alone(pipe):
    block = joint_blocks(pipe)[0]
    outputs = []
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    run(pipe, num_inference_steps=1)
    with attach(pipe, ContextualRepulsion(strength=2.0, start=0, stop=None, blocks=[0])):
        handle.remove()
        handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
        run(pipe, num_inference_steps=1)
    handle.remove()
    (stock_text, stock_image), (text, image) = outputs
    assert torch.equal(stock_image, image)
    assert not torch.equal(stock_text, text)


def test_repulsion_raises_the_vendi_score_of_the_context(pipe):
    before, after = Recorder(blocks=[0]), Recorder(blocks=[0])
    with attach(pipe, before, ContextualRepulsion(strength=0.5, start=0, stop=None, blocks=[0]), after):
        run(pipe)
    vendi = objective("vendi")
    for old, new in zip(before.seen, after.seen, strict=True):
        grams = [(x := tokens.flatten(2).double()) @ x.mT for tokens in (old, new)]
        assert (vendi.value(grams[1]) > vendi.value(grams[0])).all()


@pytest.mark.parametrize("site", ["context", "attention", "image"])
def test_strength_is_divided_among_the_blocks_and_eta_is_not(pipe, site):
    for whole, share in (({"strength": 2.0}, {"strength": 1.0}), ({"eta": 1.0}, {"eta": 1.0})):
        before, after = Recorder(blocks=[0], site=site), Recorder(blocks=[0], site=site)
        repulsion = ContextualRepulsion(**whole, start=0, stop=None, blocks=[0, 1], site=site)
        with attach(pipe, before, repulsion, after):
            run(pipe)
        assert torch.equal(after.seen[0], ContextualRepulsion(**share).edit(before.seen[0]))


def test_the_last_block_has_no_share_since_nobody_reads_its_text(pipe):
    count = len(joint_blocks(pipe))
    before, after = Recorder(blocks=[0]), Recorder(blocks=[0])
    with attach(pipe, before, ContextualRepulsion(strength=1.0, start=0, stop=None, blocks="all"), after):
        run(pipe)
    assert torch.equal(after.seen[0], ContextualRepulsion(strength=1 / (count - 1)).edit(before.seen[0]))


@pytest.mark.parametrize("site", ["context", "attention", "image"])
def test_every_site_is_reached_and_matters(pipe, site):
    stock = run(pipe)
    recorder = Recorder(site=site)
    with attach(pipe, recorder, Shift(site=site)):
        assert not torch.equal(run(pipe), stock)
    # The text that leaves the last block is read by nobody.
    assert len(recorder.seen) == STEPS * (len(joint_blocks(pipe)) - (site != "image"))


def test_the_number_of_tokens_follows_prompt_and_image(pipe):
    def lengths(site, **kwargs):
        recorder = Recorder(site=site)
        with attach(pipe, recorder):
            run(pipe, n=2, num_inference_steps=1, **kwargs)
        [length] = {tokens.shape[2] for tokens in recorder.seen}
        return length

    small, large, short = {"height": 16, "width": 16}, {"height": 32, "width": 32}, {"max_sequence_length": 5}
    assert lengths("image", **large) == 4 * lengths("image", **small)
    for site in ("context", "attention"):
        text = lengths(site, **small)
        assert lengths(site, **large) == text
        assert lengths(site, **short) < text
    assert lengths("image", **short) == lengths("image", **small)


def test_prompts_do_not_influence_each_other(pipe):
    with attach(pipe, STRONG):
        one = run(pipe, ["a cat", "a dog"], n=2)
        other = run(pipe, ["a cat", "a red bird"], n=2)
        alone = run(pipe, "a cat", n=2)
    assert torch.equal(one[:2], other[:2])
    assert not torch.equal(one[2:], other[2:])
    torch.testing.assert_close(one[:2], alone, rtol=1e-3, atol=1e-3)


def test_equal_prompts_are_one_group(pipe):
    with attach(pipe, STRONG):
        torch.testing.assert_close(run(pipe, ["a cat", "a cat"], n=2), run(pipe, "a cat", n=4), rtol=1e-3, atol=1e-3)


def test_groups_by_hand(pipe):
    by_hand, by_prompt = Recorder(blocks=[0], branch="cond"), Recorder(blocks=[0], branch="cond")
    with attach(pipe, by_hand, groups=["x", "y", "y", "x"]):
        run(pipe)
    with attach(pipe, by_prompt):
        run(pipe)
    whole = by_prompt.seen[0][0]
    assert torch.equal(by_hand.seen[0][0], whole[[0, 3]])
    assert torch.equal(by_hand.seen[0][1], whole[[1, 2]])
    with (
        attach(pipe, STRONG, groups=[0, 1, 0]),
        pytest.raises(ValueError, match="groups has 3 labels, but the pipeline makes 4 images"),
    ):
        run(pipe)


def test_permuting_the_samples_permutes_the_images(pipe):
    channels = pipe.transformer.config.in_channels
    size = (2, channels, 8, 8) if hasattr(pipe.transformer.config, "caption_projection_dim") else None
    noise = torch.randn((4, *size[1:]) if size else (4, 64, channels), generator=torch.Generator().manual_seed(1))
    extra = {} if size else {"height": 8 * pipe.vae_scale_factor * 2, "width": 8 * pipe.vae_scale_factor * 2}
    order = torch.tensor([2, 0, 3, 1])
    with attach(pipe, STRONG):
        straight = run(pipe, latents=noise, **extra)
        permuted = run(pipe, latents=noise[order], **extra)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(permuted, straight, atol=1e-2)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 1, [0]),
        (1, None, [1, 2, 3, 4]),
        (2, 4, [2, 3]),
        (0.0, 0.2, [0]),
        (0.2, 0.6, [1, 2]),
        (0.6, 1.0, [3, 4]),
        (0, 0.3, [0, 1]),
        (0.05, 0.3, [0, 1]),  # whatever a window touches
        (0.5, 0.7, [2, 3]),
    ],
)
def test_the_windows_edges_hold(pipe, start, stop, expected):
    recorder = Recorder(start=start, stop=stop, blocks=[0])
    counts = []

    def count(pipe, index, timestep, kwargs):
        counts.append(len(recorder.seen))
        return kwargs

    with attach(pipe, recorder):
        for _ in range(2):  # a second run starts from step 0 again
            counts.clear()
            recorder.seen.clear()
            run(pipe, n=2, num_inference_steps=5, callback_on_step_end=count)
            new = [b - a for a, b in zip([0, *counts], counts, strict=False)]
            assert [i for i, edits in enumerate(new) if edits] == expected


def test_guidance_branches_are_apart():
    pipe = tiny_sd3()
    recorder = Recorder(blocks=[0])
    with attach(pipe, recorder):
        run(pipe, n=3, guidance_scale=4.0)
        run(pipe, n=3, guidance_scale=1.0)
    assert [tokens.shape[:2] for tokens in recorder.seen] == [(2, 3)] * STEPS + [(1, 3)] * STEPS
    cond, uncond = (Recorder(blocks=[0], branch=branch) for branch in ("cond", "uncond"))
    with attach(pipe, cond, uncond):
        run(pipe, n=3, guidance_scale=4.0)
    assert torch.equal(recorder.seen[0], torch.cat([uncond.seen[0], cond.seen[0]]))


def test_equal_seeds_do_not_confuse_the_branches():
    pipe = tiny_sd3()
    recorder = Recorder(blocks=[0])
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    kwargs = {"generator": seeds, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    attach(pipe, recorder)
    with pytest.warns(UserWarning, match="a single image"):
        pipe(["a cat", "a dog"], **kwargs)
    assert recorder.seen == []  # two prompts of one image, not two branches


def test_true_cfg_calls_of_flux_are_two_branches():
    pipe = tiny_flux()
    both, cond = Recorder(blocks=[0]), Recorder(blocks=[0], branch="cond")
    with attach(pipe, both, cond):
        run(pipe, n=2, true_cfg_scale=2.0, negative_prompt="a dog")
    assert len(both.seen) == 2 * STEPS
    assert len(cond.seen) == STEPS
    assert torch.equal(cond.seen[1], both.seen[2])


def test_a_single_image_is_left_alone_with_one_warning(pipe):
    stock = run(pipe, n=1)
    with attach(pipe, STRONG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(run(pipe, n=1), stock)
        run(pipe, n=1)
    assert len([w for w in caught if "a single image" in str(w.message)]) == 1


def test_one_warning_does_not_hide_another(pipe):
    with attach(pipe, STRONG, ContextualRepulsion(start=0.05, stop=1)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(pipe, n=1, num_inference_steps=20)
    for part in ("a single image", "acts in no step"):
        assert len([w for w in caught if part in str(w.message)]) == 1


def test_rows_are_compared_only_where_something_acts(pipe, monkeypatch):
    steps = []
    told = Clock._sets

    def counted(clock, *args):
        steps.append(clock._index)
        return told(clock, *args)

    monkeypatch.setattr(Clock, "_sets", counted)
    with attach(pipe, ContextualRepulsion(start=2, stop=3)):
        run(pipe, num_inference_steps=5)
    assert steps == [0, 2]


def test_interventions_act_in_order(pipe):
    first, second, third = Recorder(blocks=[1]), Recorder(blocks=[1]), Recorder(blocks=[1])
    with attach(pipe, first, Shift(blocks=[1]), second, ContextualRepulsion(blocks=[1], start=0, stop=None), third):
        run(pipe, n=2)
    torch.testing.assert_close(second.seen[0], Shift().edit(first.seen[0]))
    assert torch.equal(third.seen[0], ContextualRepulsion().edit(second.seen[0]))


def test_two_attachments_at_once(pipe):
    with attach(pipe, Shift(blocks=[0])), attach(pipe, STRONG):
        nested = run(pipe)
    with attach(pipe, Shift(blocks=[0]), STRONG):
        assert torch.equal(run(pipe), nested)


@pytest.mark.parametrize(("start", "stop"), [(0.05, 1), (0.2, 0.2)])
def test_a_window_without_steps_is_told(pipe, start, stop):
    stock = run(pipe, num_inference_steps=20)
    with (
        attach(pipe, ContextualRepulsion(start=start, stop=stop)),
        pytest.warns(UserWarning, match=rf"acts in no step: start={start} and stop={stop} of 20 steps leave none"),
    ):
        assert torch.equal(run(pipe, num_inference_steps=20), stock)


def test_a_bare_transformer_counts_steps(pipe):
    window = ContextualRepulsion(strength=2.0, start=1, stop=2)
    with attach(pipe, window):
        through_pipeline = run(pipe)
    with attach(pipe.transformer, window):
        if pipe.transformer.__class__.__name__.startswith("SD3"):
            run(pipe)  # the next run starts over
        assert torch.equal(run(pipe), through_pipeline)
    with (
        attach(pipe.transformer, ContextualRepulsion(start=0.05, stop=0.5)),
        pytest.raises(ValueError, match=r"start=0.05 and stop=0.5 can't be found in a run"),
    ):
        run(pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUILDERS)
def test_half_precision_stays_finite(name, dtype):
    pipe = BUILDERS[name]().to(dtype=dtype)
    stock = run(pipe)
    for strength in (0.5, 10.0):
        with attach(pipe, ContextualRepulsion(strength=strength, start=0, stop=None, blocks="all")):
            images = run(pipe)
        assert images.dtype == dtype
        assert images.isfinite().all()
        assert not torch.equal(images, stock)


def test_chosen_tokens_only(pipe):
    whole, part = Recorder(blocks=[0]), Recorder(blocks=[0])
    with attach(
        pipe, whole, ContextualRepulsion(strength=2.0, tokens=slice(0, 3), start=0, stop=None, blocks=[0]), part
    ):
        run(pipe, n=2, num_inference_steps=1)
    before, after = whole.seen[0], part.seen[0]
    assert torch.equal(before[:, :, 3:], after[:, :, 3:])
    assert not torch.equal(before[:, :, :3], after[:, :, :3])


def test_targets_without_a_contextual_space_are_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DConditionModel has no contextual space: its text enters by cross"):
        attach(unet, STRONG)
    with pytest.raises(ValueError, match=r"Linear is not a known denoiser .*known are .*FluxTransformer2DModel"):
        attach(nn.Linear(2, 2), STRONG)
    with pytest.raises(ValueError, match="str has no denoiser to attach to"):
        attach("emoji-base", STRONG)
    assert not isinstance(AutoencoderKL, Intervention)


def test_a_registered_class_works():
    class Block(nn.Module):
        def forward(self, text, image):
            return text + image.mean(1, keepdim=True), image + text.mean(1, keepdim=True)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            text, image = encoder_hidden_states, hidden_states
            for block in self.blocks:
                text, image = block(text, image)
            return image

    register_architecture(Architecture("Mine", (dual("blocks"),), branches=()))
    model = Mine()
    image, text = torch.randn(4, 5, 8), torch.randn(1, 3, 8).repeat(4, 1, 1)
    stock = model(image, torch.tensor([1.0]), text)
    with attach(model, ContextualRepulsion(strength=1.0, start=0, stop=None, blocks="all")):
        assert not torch.equal(model(image, torch.tensor([1.0]), text), stock)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", {0, 1, 2, 3, 4, 5, 6}),
        ("first", {0, 1}),
        ("middle", {2, 3, 4}),
        ("last", {5, 6}),
        (slice(1, 6, 2), {1, 3, 5}),
        ([0, -1], {0, 6}),
    ],
)
def test_block_selection(blocks, expected):
    assert Recorder(blocks=blocks).select(7) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blocks": "centre"}, "blocks='centre' is unknown"),
        ({"site": "latent"}, "site='latent' is unknown; use 'context', 'attention', 'image' or"),
        ({"branch": "neither"}, "branch='neither' is unknown"),
        ({"start": -1}, "start=-1 is out of range; use a step count"),
        ({"stop": 1.5}, "stop=1.5 is out of range; use a step count"),
        ({"start": True}, "start=True is of type bool; use a step count"),
        ({"strength": -0.1}, "strength=-0.1 is out of range"),
        ({"strength": float("nan")}, "strength=nan is out of range"),
        ({"eta": float("inf")}, "eta=inf is out of range"),
        ({"target": 0.5}, "target=0.5 is out of range; use a number from 1"),
        ({"inner_steps": 0}, "inner_steps=0 is out of range"),
        (
            {"objective": "entropy"},
            "objective must be one of 'vendi', 'rke', 'log_det', 'cosine', got 'entropy'",
        ),
        ({"order": 0}, "order"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContextualRepulsion(**kwargs)


@pytest.mark.parametrize(("count", "blocks", "expected"), [(1, "first", 0), (1, "last", 0), (2, "middle", 0)])
def test_a_third_of_few_blocks_is_one(count, blocks, expected):
    assert Recorder(blocks=blocks).select(count) == {expected}


def test_a_selection_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match=r"selects none of the denoiser's 4 joint blocks"):
        ContextualRepulsion(blocks=slice(2, 2)).select(4)


def test_the_papers_settings():
    assert ContextualRepulsion.paper("flux-dev", eta=1e8) == ContextualRepulsion(
        eta=1e8, inner_steps=50, start=0, stop=1, blocks="all", site="context", objective="vendi", order=1.0
    )
    assert (ContextualRepulsion.paper("sd3.5-large", eta=5e5).inner_steps, 4) == (100, 4)
    assert ContextualRepulsion.paper("sd3.5-large", eta=5e5).stop == 4
    assert ContextualRepulsion.paper("sd3.5-turbo", eta=5e5).stop == 1
    with pytest.raises(ValueError, match=r"model='sd1\.5' is not in the paper; use one of flux-dev"):
        ContextualRepulsion.paper("sd1.5", eta=1.0)
