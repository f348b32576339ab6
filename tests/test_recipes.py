"""Recipes from elsewhere: what is read, what is followed, and what of a pipeline they tell."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate import Request, generate
from variegate.cli import app
from variegate.emoji import load_pipeline
from variegate.gallery import NoRecipeError, read_recipe
from variegate.generation import replay
from variegate.recipes import RECIPE, name_of
from variegate.sampling import adapters_of, scheduler_of, seeded

REQUEST = Request(("a cat",), n=2, steps=2, method="none", model="tiny")
OPTIONAL = {key.removesuffix("?") for key in RECIPE if key is not ... and key.endswith("?")}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3()


@pytest.fixture(scope="module")
def bundled():
    return load_pipeline("emoji-base")


@pytest.fixture(scope="module")
def file(bundled, tmp_path_factory):
    """A picture of a bundled model."""
    made = generate(dataclasses.replace(REQUEST, model="emoji-base"), pipeline=bundled)
    return made.save(tmp_path_factory.mktemp("made"))[1]


@pytest.fixture(scope="module")
def recipe(file):
    return read_recipe(file)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def picture(path, text):
    info = PngInfo()
    info.add_text("variegate", text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(path, *options):
    """The sentence with which a picture is not made again."""
    result = run("replay", path, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 1000
    return result.stderr


def pixels(gallery):
    return [np.stack([np.asarray(image) for image in row.images]) for row in gallery.groups[0].rows]


@pytest.mark.parametrize(
    "text",
    [
        "", "no JSON", "[]", "3", "null", '{"prompt": 3, "index": 0}', '{"prompt": "a cat", "seed": 1, "steps": 3}',
        "[" * 100_000, '{"prompt": ' + "[" * 100_000, "9" * 5000,
    ],
    ids=lambda text: text[:30] or "empty",
)  # fmt: skip
def test_what_is_not_of_ours_is_no_recipe(tmp_path, text):
    with pytest.raises(NoRecipeError, match="has no variegate recipe in its metadata"):
        read_recipe(picture(tmp_path / "a.png", text))
    assert "has no variegate recipe" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("key", [key.removesuffix("?") for key in RECIPE if key is not ...])
def test_a_recipe_without_a_key_or_with_one_of_another_type_is_damaged(tmp_path, recipe, key):
    wrong = [[[]], {"a": {"b": [1]}}, 1e400, True]
    for value in wrong:
        picture(tmp_path / "a.png", {**recipe, key: value})
        with pytest.raises(ValueError, match=rf"a\.png has (a recipe that is damaged: {key}|format )") as caught:
            read_recipe(tmp_path / "a.png")
        assert not isinstance(caught.value, NoRecipeError)
    assert key in refused(tmp_path / "a.png")
    picture(tmp_path / "a.png", {name: value for name, value in recipe.items() if name != key})
    if key in OPTIONAL:
        assert key not in read_recipe(tmp_path / "a.png")
    else:
        assert f"damaged: {key} is missing" in refused(tmp_path / "a.png")


def test_a_recipe_of_the_first_version_is_read_and_one_of_the_next_is_not(tmp_path, file, recipe):
    old = {name: value for name, value in recipe.items() if name not in ("format", "scheduler", "adapters")}
    info = PngInfo()
    info.add_text("variegate", json.dumps(old))
    with Image.open(file) as image:
        image.save(tmp_path / "old.png", pnginfo=info)
    result = run("replay", tmp_path / "old.png")
    assert (result.exit_code, result.stdout) == (0, "old.png is identical.\n")
    picture(tmp_path / "new.png", {**recipe, "format": 2})
    assert "has format 2, and this version of variegate reads format 1" in refused(tmp_path / "new.png")
    picture(tmp_path / "more.png", {**recipe, "colour": ["anything"]})
    assert read_recipe(tmp_path / "more.png")["colour"] == ["anything"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 10**9}, "n=1000000000 is out of range; a recipe gets up to 256"),
        ({"steps": 10**9}, "steps=1000000000 is out of range; a recipe gets up to 1,000"),
        ({"height": 2**40}, "height=1099511627776 is out of range; a recipe gets up to 16,384"),
        ({"height": 10**30}, "damaged: height=1000000000000000000000000000000 is out of range"),
        ({"width": 264}, "the model is made for 64 x 64 pixels, and a recipe gets at most 4 times as many"),
        ({"width": 136, "height": 128}, "the model is made for 64 x 64 pixels"),
        ({"n": 0}, "can't be followed: n=0 is out of range"),
        ({"index": 2}, "index=2 is none of n=2 pictures"),
        ({"index": -1}, "index=-1 is none of n=2 pictures"),
        ({"seeds": [1]}, "do not fit n=2"),
        ({"prompt": " "}, "is blank"),
        ({"prompt": "\ud800"}, r"prompt='\ud800' has a character that is none"),
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"method": "cads", "parameters": {"strength": -1}}, "strength=-1 is out of range"),
        ({"method": "cads", "parameters": {"colour": 1}}, "colour is no parameter of method 'cads'"),
        ({"method": "cads", "parameters": {"strength": [1]}}, "damaged: parameters.strength=[1] is not text or a"),
        ({"method": "x" * 1000}, "is no name; use up to 255 characters"),
        ({"versions": {"torch": "\x1b[2J"}}, "is no name; use up to 255 characters, none for control"),
        ({"guidance": float("inf")}, "damaged: guidance=inf is out of range; use a finite number"),
        ({"model": "owner/name"}, "names the model 'owner/name' of the hub"),
        (
            {"model": "owner/name", "revision": "refs/pr/1"},
            "(revision 'refs/pr/1') of the hub, which a recipe does not",
        ),
        ({"model": "/tmp"}, "was made with a local model, '/tmp', and what a recipe says of folders is not followed"),
        ({"model": "../up"}, "was made with a local model, '../up'"),
        ({"model": "tiny"}, "give its folder with --model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_recipe_that_must_not_be_followed(tmp_path, recipe, change, sentence):
    assert sentence in refused(picture(tmp_path / "a.png", {**recipe, **change}))


def test_four_times_the_pixels_are_followed(tmp_path, recipe):
    picture(tmp_path / "a.png", {**recipe, "height": 128, "width": 128})
    assert replay(tmp_path / "a.png").gallery.groups[0].rows[0].images[0].size == (128, 128)


def test_a_hub_id_takes_trust_and_a_local_folder_of_its_name_is_never_loaded(tmp_path, recipe, pipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = picture(tmp_path / "a.png", {**recipe, "model": "owner/name"})
    assert "give --model owner/name, or --trust-recipe if you trust who made the file" in refused(path)
    assert "nor to be had from the hub" in refused(path, "--trust-recipe")  # it went there, and here is no network
    pipe.save_pretrained(tmp_path / "owner" / "name")
    assert "what a recipe says of folders is not followed" in refused(path)
    assert "what a recipe says of folders is not followed" in refused(path, "--trust-recipe")
    result = run("replay", path, "--model", "owner/name")  # which the user has named
    assert result.exit_code == 1, result.stderr


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")  # to open it would wait for ever
    assert "can't be read as a picture: it is no file" in refused(tmp_path / "a.png")


def test_a_program_for_a_printer_is_never_opened(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    assert "can't be read as a picture: it is none of PNG" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/someone/models/mine/", "mine"),
        ("C:\\Users\\someone\\mine", "mine"),
        ("~/mine", "mine"),
        ("https://someone:secret@example.org/mine", "mine"),
        ("owner/mine", "owner/mine"),
        ("/", "unnamed"),
    ],
)
def test_a_recipe_tells_no_path(pipe, tmp_path, model, name):
    assert name_of(model) == name
    *pictures, _, record = generate(dataclasses.replace(REQUEST, model=model), pipeline=pipe).save(tmp_path)
    told = record.read_text() + "".join(str(Image.open(path).info) for path in pictures)
    assert read_recipe(pictures[0])["model"] == json.loads(record.read_text())["model"] == name
    assert not any(part in told for part in ("someone", "secret", "~", str(tmp_path)))


def unipc(stock):
    return UniPCMultistepScheduler.from_config(
        stock.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )


def stochastic(stock):
    return FlowMatchEulerDiscreteScheduler.from_config(stock.config, stochastic_sampling=True)


@pytest.mark.parametrize("scheduler", [unipc, stochastic])
def test_any_scheduler_makes_the_same_pictures_again_or_is_told(bundled, tmp_path, scheduler):
    stock, state = bundled.scheduler, torch.get_rng_state()
    request = dataclasses.replace(REQUEST, model="emoji-base", method="contextual-repulsion", steps=3)
    try:
        bundled.scheduler = scheduler(stock)
        first = generate(request, pipeline=bundled)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        again = generate(request, pipeline=bundled)
        assert all(map(np.array_equal, pixels(first), pixels(again)))
        files = first.save(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert [replay(file, pipeline=bundled).difference for file in (files[1], files[3])] == [0, 0]
    finally:
        bundled.scheduler = stock
    name = type(scheduler(stock)).__name__
    with pytest.warns(
        UserWarning, match=rf"not made as this pipeline would make it, but with scheduler {name} \(\w+\)"
    ):
        other = replay(files[3], pipeline=bundled)
    assert other.difference > 0
    assert list(other.changes) == ["scheduler"]
    result = run("replay", files[3])
    assert result.exit_code == 1
    assert f"of 255; what differs: scheduler {name} (" in result.stdout
    assert "are the same" not in result.stdout


def test_the_noise_of_the_steps_is_not_that_of_the_start(pipe):
    with seeded(pipe, [5, 6]):
        steps = torch.randn(4)
    with seeded(pipe, [5, 7]):
        others = torch.randn(4)
    start = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert not any(torch.equal(a, b) for a, b in ((steps, start), (steps, others)))


def test_a_scheduler_is_known_by_what_is_not_default():
    pipe = tiny_sd3()
    before = scheduler_of(pipe)
    older = dict(pipe.scheduler.config)
    del older["base_shift"]  # as of a release of diffusers that did not have it
    pipe.scheduler._internal_dict = FrozenDict(older)
    assert scheduler_of(pipe) == before
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_shift(3.0)
    shifted = scheduler_of(pipe)
    assert shifted["class"] == before["class"]
    assert shifted != before
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.4)
    assert scheduler_of(pipe) not in (before, shifted)


def test_adapters_are_told_with_their_scales_and_weights(tmp_path):
    pipe = tiny_sd3()
    assert adapters_of(pipe) == []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, "style")
    (style,) = adapters_of(pipe)
    assert (style["model"], style["name"], style["scales"]) == ("transformer", "style", [1.0])
    file = generate(REQUEST, pipeline=pipe).save(tmp_path)[0]
    assert read_recipe(file)["adapters"] == [style]
    assert replay(file, pipeline=pipe).changes == {}

    def change():
        with pytest.warns(UserWarning, match=r"but with adapters style on transformer, scale 1 \(\w+\), not "):
            again = replay(file, pipeline=pipe)
        assert again.difference > 0
        assert f"what differs: adapters style on transformer, scale 1 ({style['digest']}) -> " in again.report
        return again.changes["adapters"][1]

    pipe.set_adapters("style", 5.0)
    assert change() == f"style on transformer, scale 5 ({style['digest']})"
    pipe.set_adapters("style", 1.0)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_A" in name:
            weight.data.mul_(9)
    assert change().startswith("style on transformer, scale 1 (")
    pipe.transformer.disable_adapters()
    assert change() == "none"


def test_merged_adapters_are_told_too():
    pipe = tiny_sd3()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    before = adapters_of(pipe)
    pipe.fuse_lora()
    pipe.transformer.disable_adapters()
    assert adapters_of(pipe) == before
