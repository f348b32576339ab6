"""The table of architectures against every denoiser class of diffusers, tiny and real."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import matrix
import pytest
import torch
from denoisers import CALLS, CONFIGS, CROSSING, IMAGE_ONLY, JOINT, ROWS, find_class, tiny
from diffusers.models import transformers
from torch import nn

from tiny import Recorder
from variegate import ContextualRepulsion, attach, check_layout
from variegate.architectures import architecture_of, known_architectures
from variegate.objectives import Vendi

# Not made from a text, or not images and videos.
OTHERS = {
    "AceStepTransformer1DModel": "audio",
    "LongCatAudioDiTTransformer": "audio",
    "MiniMaxMusic3RVQDepthDecoder": "audio",
    "MiniMaxMusic3Transformer1DModel": "audio",
    "StableAudio3DiTModel": "audio",
    "StableAudioDiTModel": "audio",
    "T5FilmDecoder": "audio",
    "RFD4ProteinaTransformer": "proteins",
    "DiTTransformer2DModel": "class labels",
    "PriorTransformer": "makes image embeddings",
    "Transformer2DModel": "a part of U-Nets",
    "DualTransformer2DModel": "a part of U-Nets",
    "TransformerTemporalModel": "a part of U-Nets",
}
# Text by cross-attention, each in its own way, and none of them run here.
UNSERVED = {
    "AnyFlowFARTransformer3DModel",
    "DreamLiteTransformer2DModel",
    "Kandinsky6SRTransformer3DModel",
    "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel",
    "WanAnimate2Transformer3DModel",
}


@pytest.fixture(scope="module", params=sorted(CALLS))
def name(request):
    return request.param


def site_of(name):
    return "context" if name in JOINT else "cross_attention" if name in CROSSING else "image"


def forward(model, call):
    """What the denoiser returns, as one tensor."""
    found = model(**call, return_dict=False)[0]
    return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found


def twice(call, latents):
    """The call with two more rows; those are the same prompt too, with other latents."""

    def doubled(key, value):
        if isinstance(value, torch.Tensor):
            if key == "encoder_hidden_states_llama3":
                return value.repeat(1, 2, 1, 1)
            if value.ndim and value.shape[0] == ROWS:
                other = value.flip(-1) if key == latents else value
                return torch.cat([value, other])
        if isinstance(value, list) and len(value) == ROWS:
            return value + ([x.flip(-1) for x in value] if key == latents else value)
        if isinstance(value, list) and all(isinstance(x, torch.Tensor) and x.shape[0] == ROWS for x in value):
            return [x.repeat(2, *[1] * (x.ndim - 1)) for x in value]
        return value

    return {key: doubled(key, value) for key, value in call.items()}


def test_the_record_is_right(name):
    report = check_layout(tiny(name), CALLS[name]())
    assert report.passed, str(report)
    assert report.site == site_of(name)


@torch.no_grad()
def test_off_is_bit_identical_and_on_is_not(name):
    model, call = tiny(name), CALLS[name]()
    stock = forward(model, call)
    for strength in (0.0, 1.0):
        with attach(
            model, ContextualRepulsion(strength=strength, start=0, stop=None, blocks="all", site=site_of(name))
        ):
            assert torch.equal(forward(model, call), stock) == (strength == 0)
    assert torch.equal(forward(model, call), stock)


@torch.no_grad()
def test_repulsion_raises_the_vendi_score(name):
    model, call, site = tiny(name), CALLS[name](), site_of(name)
    before, after = (Recorder(blocks=[0], site=site) for _ in range(2))
    repulsion = ContextualRepulsion(strength=0.1, start=0, stop=None, blocks=[0], site=site)
    with attach(model, before, repulsion, after):
        forward(model, call)
    old, new = (Vendi().value((rows := x.seen[0].flatten(2).double()) @ rows.mT) for x in (before, after))
    assert (new > old).all()


@torch.no_grad()
def test_groups_do_not_touch_each_other(name):
    model = tiny(name)
    latents = architecture_of(model).latents
    call = twice(CALLS[name](), latents)
    other = dict(call)
    last = [x.clone() for x in call[latents]]
    last[3] = last[3].flip(-2)
    other[latents] = last if isinstance(call[latents], list) else torch.stack(last)
    repulsion = ContextualRepulsion(strength=1.0, start=0, stop=None, blocks="all", site=site_of(name))

    def rows(call):
        found = forward(model, call)
        # Kandinsky 5 returns its first row alone; MiniMax-H3 is packed, so all its rows are of one call.
        return found.unflatten(0, (len(call[latents]), -1)) if len(found) >= len(call[latents]) else found[None]

    with attach(model, repulsion, groups=[0, 0, 1, 1]):
        one, two = rows(call), rows(other)
    with attach(model, repulsion, groups=[0, 1, 0, 1]):
        mixed = rows(call)
    assert torch.equal(one[:2], two[:2])
    assert not torch.equal(mixed[:2], one[:2])


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in JOINT if n != "MochiTransformer3DModel"])  # no bfloat16 of its own on CPUs
def test_bfloat16_stays_finite(name):
    def half(value):
        if isinstance(value, torch.Tensor):
            return value.bfloat16() if value.is_floating_point() else value
        return [half(x) for x in value] if isinstance(value, list) else value

    model, call = tiny(name).bfloat16(), {key: half(value) for key, value in CALLS[name]().items()}
    stock = forward(model, call)
    with attach(model, ContextualRepulsion(strength=5.0, start=0, stop=None, blocks="all")):
        repelled = forward(model, call)
    assert repelled.isfinite().all()
    assert not torch.equal(repelled, stock)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(JOINT))
def test_the_attention_site_is_where_the_text_is(name):
    model, call = tiny(name), CALLS[name]()
    texts, attended = Recorder(blocks=[0]), Recorder(blocks=[0], site="attention")
    with attach(model, texts, attended):
        forward(model, call)
    assert texts.seen[0].shape[:3] == attended.seen[0].shape[:3]
    report = check_layout(model, call, "attention")
    assert report.passed, str(report)


def mutations(record):
    """Records that are wrong in one place: text and image exchanged, a stretch off by one token."""
    for index, blocks in enumerate(record.blocks):

        def changed(index=index, blocks=blocks, **parts):
            new = replace(blocks, **parts)
            return replace(record, blocks=(*record.blocks[:index], new, *record.blocks[index + 1 :]))

        yield f"{blocks.name} exchanged", changed(context=blocks.image, image=blocks.context)
        for part in ("context", "image"):
            locate = getattr(blocks, part).tokens
            for edge, by in (("start", -1), ("start", 1), ("stop", -1), ("stop", 1)):
                if locate is not None:
                    moved = replace(getattr(blocks, part), tokens=off_by_one(locate, edge, by))
                    yield f"{blocks.name} {part} {edge}{by:+d}", changed(**{part: moved})


def off_by_one(locate, edge, by):
    def wrong(call):
        place = locate(call)
        start, stop = place.start or 0, place.stop
        if edge == "stop":
            return place if stop is None else slice(start, (stop + by) or None)
        return place if start == 0 and by < 0 else slice(start + by, stop)

    return wrong


def tokens_of(record, model, call):
    """Which tokens of which element every list's text and image are: a wrong record differs from the right one here."""
    lengths = []
    first = [blocks.of(model)[0] for blocks in record.blocks]
    hooks = [block.register_forward_hook(lambda module, args, output: lengths.append(output)) for block in first]
    with torch.no_grad():
        forward(model, call)
    for hook in hooks:
        hook.remove()
    for blocks, output in zip(record.blocks, lengths, strict=True):
        for part in (blocks.context, blocks.image):
            length = (output if part.element is None else output[part.element]).shape[1 - part.batch]
            place = part.locate({**call, "self": model})
            yield part.element, list(range(length))[place or slice(None)]


@pytest.mark.parametrize("name", sorted(JOINT))
def test_a_wrong_record_is_found_out(name):
    model, call = tiny(name), CALLS[name]()
    record = architecture_of(model)
    right = list(tokens_of(record, model, call))
    wrongs = [(what, wrong) for what, wrong in mutations(record) if list(tokens_of(wrong, model, call)) != right]
    for what, wrong in wrongs:
        try:
            passed = check_layout(model, call, architecture=wrong).passed
        except (ValueError, IndexError, RuntimeError):
            passed = False
        assert not passed, what
    assert wrongs


def test_rows_of_different_length():
    model = tiny("Lumina2Transformer2DModel")
    call = twice(CALLS["Lumina2Transformer2DModel"](), "hidden_states")
    call["encoder_attention_mask"][:2, 3:] = False  # the first prompt has 3 tokens, the second 5
    call["encoder_hidden_states"][2:] += 1
    recorder = Recorder(blocks=[0])
    with torch.no_grad():
        stock = forward(model, call)
        with attach(model, recorder, ContextualRepulsion(start=0, stop=None, blocks="all", strength=1.0)):
            repelled = forward(model, call)
    [tokens] = recorder.seen
    assert tokens.shape[:3] == (2, 2, 5)
    assert (tokens[0, :, 3:] == 0).all()
    assert (tokens[1] != 0).all()
    assert not torch.equal(stock, repelled)
    with torch.no_grad(), attach(model, Recorder()):
        assert torch.equal(forward(model, call), stock)


def test_padding_can_be_left_out():
    model, call = tiny("QwenImageTransformer2DModel"), CALLS["QwenImageTransformer2DModel"]()
    call["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 0, 0]] * 2)

    def texts(**kwargs):
        before, after = Recorder(blocks=[0]), Recorder(blocks=[0])
        with (
            torch.no_grad(),
            attach(model, before, ContextualRepulsion(blocks=[0], start=0, stop=None, **kwargs), after),
        ):
            forward(model, call)
        return before.seen[0], after.seen[0]

    old, new = texts(padding=False)
    assert torch.equal(old[:, :, 3:], new[:, :, 3:])
    assert (old[:, :, :3] != new[:, :, :3]).any(-1).all()
    old, new = texts()
    assert (old != new).any(-1).all()


@pytest.mark.parametrize("name", sorted(CROSSING | IMAGE_ONLY))
def test_no_contextual_space_is_said(name):
    advice = 'site="cross_attention"' if name in CROSSING else 'site="image"'
    with pytest.raises(ValueError, match=f"{name} has no contextual space: its text .*{advice}"):
        attach(tiny(name), ContextualRepulsion())


def test_a_missing_site_is_said():
    with pytest.raises(
        ValueError, match="site='cross_attention' does not exist in SD3Transformer2DModel; use 'context'"
    ):
        attach(tiny("SD3Transformer2DModel"), ContextualRepulsion(site="cross_attention"))


def test_every_denoiser_of_diffusers_is_known():
    names = set()
    for module in pkgutil.iter_modules(transformers.__path__):
        loaded = importlib.import_module(f"{transformers.__name__}.{module.name}")
        for name, cls in inspect.getmembers(loaded, inspect.isclass):
            if issubclass(cls, diffusers.ModelMixin) and cls.__module__ == loaded.__name__:
                names.add(name)
    assert {"FluxTransformer2DModel", "WanTransformer3DModel"} <= names
    table = {cls for cls in names if cls in known_architectures("image")}
    unknown = names - table - set(OTHERS) - UNSERVED - set(_refused())
    assert not unknown, f"describe these in src/variegate/architectures: {', '.join(sorted(unknown))}"


def _refused():
    """Classes in the table without a single site."""
    from variegate.architectures import _BUNDLED

    return [record.denoiser for record in _BUNDLED if not record.blocks]


def test_predictions_that_a_pipeline_turns_round_are_recorded_as_such():
    folder = Path(diffusers.__file__).parent / "pipelines"
    turned = [text for path in folder.rglob("*.py") if "noise_pred = -noise_pred" in (text := path.read_text())]
    denoisers = {name for text in turned for name in re.findall(r"transformer: (\w+)", text)}
    assert {"HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel"} <= denoisers
    assert {name: architecture_of(tiny(name)).sign for name in denoisers} == dict.fromkeys(denoisers, -1)


def test_the_page_of_architectures_is_up_to_date():
    assert matrix.page() == matrix.PAGE.read_text(), "run `make matrix`"


def test_every_record_of_a_joint_class_is_tested_here():
    untested = set(known_architectures()) - set(JOINT)
    # Each shares its blocks with a class that is: CogVideoX, HunyuanVideo.
    assert {n for n in untested if hasattr(diffusers, n)} == {
        "ConsisIDTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
    }
    assert set(CALLS) == set(CONFIGS)
    assert all(issubclass(find_class(name), nn.Module) for name in CALLS)
