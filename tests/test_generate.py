"""The engine: a request in, a gallery out, files that make themselves again."""

from __future__ import annotations

import json
import logging
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tiny import tiny_flux, tiny_sd3
from variegate import Request, generate
from variegate.gallery import Gallery, Group, Row, check_writable, read_recipe
from variegate.generation import replay
from variegate.request import from_text, to_text

STRONG = {"strength": 3.0, "stop": None}
REQUEST = Request(("a cat",), n=3, model="tiny", steps=3, parameters=STRONG)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3()


@pytest.fixture(scope="module")
def gallery(pipe):
    return generate(replace(REQUEST, prompts=("a cat", "a red bird")), pipeline=pipe)


def pixels(row: Row) -> np.ndarray:
    return np.stack([np.asarray(image) for image in row.images])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": ()}, r"prompts=\(\) is empty; use a list of texts"),
        ({"prompts": "a cat"}, "prompts='a cat' is of type str; use a list of texts"),
        ({"prompts": ("a cat", " ")}, r"prompts\[1\]=' ' is blank"),
        ({"prompts": ("a cat", "a cat")}, r"prompts\[1\]='a cat' is given twice"),
        ({"n": 0}, "n=0 is out of range; use an integer from 1 to 1,024"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"guidance": float("nan")}, "guidance=nan is out of range"),
        ({"method": "magic"}, "method='magic' is unknown; use one of contextual-repulsion, cads"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use one of auto, float32"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
        ({"offload": "disk"}, "offload='disk' is unknown"),
        (
            {"parameters": {"power": 1}},
            "power is no parameter of method 'contextual-repulsion'; use one of start",
        ),
        ({"parameters": {"strength": -1.0}}, "strength=-1.0 is out of range"),
        ({"parameters": {"blocks": "upper"}}, "blocks='upper' is unknown"),
        ({"method": "none"}, "is no parameter of method 'none'; leave it out"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        replace(REQUEST, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("all", "all"),
        ("3:6", slice(3, 6)),
        ("2:", slice(2, None)),
        ("::2", slice(None, None, 2)),
        ("0,2", (0, 2)),
    ],
)
def test_places_survive_their_text(text, place):
    assert from_text(text) == place
    assert to_text(place) == text
    assert from_text(place) == place


def test_the_stock_row_is_the_stock_pipelines(pipe, gallery):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = pipe("a red bird", num_images_per_prompt=3, num_inference_steps=3, generator=generators).images
    stock, diverse = gallery.groups[1].rows
    assert [np.array_equal(a, b) for a, b in zip(images, stock.images, strict=True)] == [True] * 3
    assert not np.array_equal(pixels(stock), pixels(diverse))
    assert (stock.method, diverse.method) == ("none", "contextual-repulsion")


def test_off_makes_the_stock_row_twice(pipe):
    off = generate(replace(REQUEST, parameters={"strength": 0.0}), pipeline=pipe)
    stock, diverse = off.groups[0].rows
    assert np.array_equal(pixels(stock), pixels(diverse))
    assert stock.vendi == diverse.vendi


def test_rows_asked_for(pipe, gallery):
    alone = generate(replace(REQUEST, compare=False), pipeline=pipe).groups[0]
    assert alone.stock is None
    assert np.array_equal(pixels(alone.diverse), pixels(gallery.groups[0].diverse))
    plain = generate(replace(REQUEST, method="none", parameters={}, compare=False), pipeline=pipe).groups[0]
    assert plain.diverse is None
    assert np.array_equal(pixels(plain.stock), pixels(gallery.groups[0].stock))


def test_a_single_picture_is_plain_with_one_warning(pipe, gallery):
    with pytest.warns(UserWarning, match="n=1: a single picture") as caught:
        (row,) = generate(replace(REQUEST, n=1), pipeline=pipe).groups[0].rows
    assert len(caught) == 1
    assert row.method == "none"
    assert (row.vendi, row.distance) == (None, None)
    np.testing.assert_allclose(pixels(row)[0].astype(int), pixels(gallery.groups[0].stock)[0], atol=2)


def test_vendi_and_distance_are_those_of_the_pictures(gallery):
    from variegate.metrics import efficientnet_lite0, vendi_score

    row = gallery.groups[0].stock
    assert row.vendi == pytest.approx(vendi_score(efficientnet_lite0()(row.images)).item(), abs=1e-4)
    assert 1 < row.vendi < 3
    assert 0 < row.distance < 1


def test_progress_counts_every_step(pipe):
    seen = []
    generate(REQUEST, pipeline=pipe, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {total for _, total in seen} == {6}


class Plain(StableDiffusion3Pipeline):
    """A pipeline that takes little."""

    def __call__(self, prompt, num_images_per_prompt=1, num_inference_steps=2, generator=None, output_type="pil"):
        return super().__call__(
            prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
        )


def test_a_pipeline_without_step_callback(pipe):
    plain, seen = Plain(**pipe.components), []
    plain.set_progress_bar_config(disable=True)
    request = replace(REQUEST, steps=None)
    made = generate(request, pipeline=plain, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]
    assert (made.settings["steps"], made.settings["guidance"]) == (2, None)
    with pytest.raises(ValueError, match="Plain takes no guidance_scale"):
        generate(replace(request, guidance=3.0), pipeline=plain)


class HandingOn(StableDiffusion3Pipeline):
    """A pipeline that hands on what it is given, as one that logs its calls."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_pipeline_that_hands_on_what_it_is_given(pipe, gallery):
    made = generate(replace(REQUEST, guidance=7.0), pipeline=HandingOn(**pipe.components))
    assert made.settings == gallery.settings
    assert np.array_equal(pixels(made.groups[0].diverse), pixels(gallery.groups[0].diverse))
    assert generate(replace(REQUEST, steps=None), pipeline=HandingOn(**pipe.components)).settings["steps"] == 28


class Unknown:
    """Takes anything, and does not tell what; all else is the pipeline's that it has."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __getattr__(self, name):
        return getattr(self.__dict__["pipe"], name)

    def __call__(self, **given):
        return self.pipe(**given)


def test_a_pipeline_that_does_not_tell_what_it_takes(pipe, gallery):
    request = replace(REQUEST, method="none", parameters={})
    made = generate(request, pipeline=Unknown(pipe))
    assert np.array_equal(pixels(made.groups[0].stock), pixels(gallery.groups[0].stock))
    with pytest.raises(ValueError, match="Unknown does not tell how many steps it takes; give steps, such as 20"):
        generate(replace(request, steps=None), pipeline=Unknown(pipe))


def test_a_request_that_does_not_fit_the_model_is_refused_before_the_first_step(pipe):
    seen = []
    with pytest.raises(ValueError, match="the denoiser has 4 joint blocks"):
        generate(
            replace(REQUEST, parameters={"blocks": "0,9"}),
            pipeline=pipe,
            progress=lambda *steps: seen.append(steps),
        )
    assert seen == []


def test_flux_works_too():
    made = generate(replace(REQUEST, n=2, steps=2), pipeline=tiny_flux())
    stock, diverse = made.groups[0].rows
    assert not np.array_equal(pixels(stock), pixels(diverse))


def test_a_long_prompt_is_cut_with_one_warning_from_us(pipe):
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    request = replace(REQUEST, prompts=("a cat and a dog and some red birds",), n=2)
    with pytest.warns(UserWarning, match="too long") as caught:
        generate(request, pipeline=pipe)
    for logger in loggers:
        logger.removeHandler(handler)
    (text,) = {str(warning.message) for warning in caught}
    assert len(caught) == 1
    assert text.count("CLIPTokenizer takes 24 tokens and leaves out 'irds'") == 1
    assert "T5" not in text
    assert messages == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    broken = tiny_sd3()
    broken.vae.post_quant_conv.bias.data.fill_(value)
    with pytest.raises(
        ValueError, match="dtype='float32' made pictures of 'a cat' with values that are not finite"
    ) as told:
        generate(REQUEST, pipeline=broken)
    assert str(told.value).endswith("; nothing is kept; use lower guidance.")  # not the dtype that it has
    with pytest.raises(ValueError, match="nothing is kept; use weaker contextual-repulsion"):
        generate(replace(REQUEST, compare=False), pipeline=broken)
    with pytest.raises(ValueError, match="nothing is kept; use dtype='float32', or lower guidance"):
        generate(REQUEST, pipeline=broken.to(torch.bfloat16))


def test_files_tell_how_to_make_them(gallery, tmp_path):
    files = gallery.save(tmp_path / "new" / "folder")
    names = [file.name for file in files]
    assert names[:6] == [f"a-cat-{i:02d}{kind}.png" for kind in ("-stock", "") for i in range(3)]
    assert names[-3:] == ["a-red-bird-02.png", "sheet.png", "run.json"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    recipe = read_recipe(files[4])
    assert recipe["prompt"] == "a cat"
    assert (recipe["seed"], recipe["index"], recipe["n"]) == (0, 1, 3)
    assert recipe["parameters"]["strength"] == 3.0
    assert recipe["parameters"]["inner_steps"] > 0
    assert (recipe["steps"], recipe["guidance"], recipe["dtype"]) == (3, 7.0, "float32")
    assert set(recipe["versions"]) == {"variegate", "torch", "diffusers", "transformers"}
    with Image.open(files[4]) as image:
        assert np.array_equal(image, gallery.groups[0].diverse.images[1])
        assert "Seed: 1" in image.info["parameters"]
    record = json.loads(files[-1].read_text())
    assert record["groups"][1]["rows"][1]["files"] == names[9:12]
    assert record["groups"][1]["rows"][1]["vendi"] == gallery.groups[1].diverse.vendi
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_same_request_gives_the_same_bytes(pipe, gallery, tmp_path):
    again = generate(replace(REQUEST, prompts=("a cat", "a red bird")), pipeline=pipe)
    for one, other in zip(gallery.save(tmp_path / "a"), again.save(tmp_path / "b"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_prompts_that_look_alike_have_files_of_their_own(tmp_path):
    row = Row("none", {}, (Image.new("RGB", (8, 8)),), None, None)
    settings = {"n": 1, "seed": 7, "model": "m", "steps": 1, "guidance": None, "negative_prompt": None}
    prompts = ("A cat!", "a cat", "???", "猫", "x" * 300)
    made = Gallery(tuple(Group(prompt, row, None) for prompt in prompts), settings)
    names = [file.name for file in made.save(tmp_path)]
    assert names[:4] == [
        "a-cat-07-stock.png",
        "a-cat-2-07-stock.png",
        "prompt-07-stock.png",
        "猫-07-stock.png",
    ]
    assert len(names[4]) < 80


def test_a_failure_while_saving_leaves_no_file(gallery, tmp_path):
    good = gallery.groups[0].stock
    bad = replace(good, images=(*good.images[:2], "no picture"))
    with pytest.raises(AttributeError):
        replace(gallery, groups=(replace(gallery.groups[0], stock=bad),)).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_shows_stock_above_diverse(gallery):
    sheet = np.asarray(gallery.sheet())
    assert (sheet[:8] == 255).all()
    assert (sheet[:, :8] == 255).all()
    two = sheet.shape[0]
    one = np.asarray(replace(gallery, groups=gallery.groups[:1]).sheet()).shape[0]
    assert one > 2 * 128
    assert two > 2 * one - 64
    stock = np.asarray(gallery.groups[0].stock.images[0].resize((128, 128), Image.Resampling.LANCZOS))
    rows = [y for y in range(one - 128) if np.array_equal(sheet[y : y + 128, 32:160], stock)]
    assert len(rows) == 1
    assert rows[0] < one / 2


def test_replay_makes_the_picture_again(pipe, gallery, tmp_path):
    files = gallery.save(tmp_path)
    for file, method in ((files[4], "contextual-repulsion"), (files[1], "none")):
        again = replay(file, pipeline=pipe)
        assert (again.index, again.difference, again.versions) == (1, 0, {})
        assert [row.method for row in again.gallery.groups[0].rows] == [method]


def test_replay_tells_what_differs(pipe, gallery, tmp_path):
    file = gallery.save(tmp_path)[4]
    recipe = read_recipe(file)
    recipe["versions"]["torch"] = "1.0"
    info = PngInfo()
    info.add_text("variegate", json.dumps(recipe))
    with Image.open(file) as image:
        changed = np.array(image)
    changed[3, 4, 1] ^= 16
    Image.fromarray(changed).save(tmp_path / "changed.png", pnginfo=info)
    again = replay(tmp_path / "changed.png", pipeline=pipe)
    assert again.difference == 16
    assert again.versions == {"torch": ("1.0", torch.__version__)}
    recipe["index"] = 3
    info.add_text("variegate", json.dumps(recipe))
    Image.fromarray(changed).save(tmp_path / "outside.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"outside\.png has a recipe that can't be followed"):
        replay(tmp_path / "outside.png", pipeline=pipe)


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="can't be written to"):
            check_writable(folder)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_quickstart_runs(pipe, tmp_path, monkeypatch, capsys):
    pipe.save_pretrained(tmp_path / "tiny")
    options = [
        "-n",
        "2",
        "--steps",
        "2",
        "--model",
        str(tmp_path / "tiny"),
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "quickstart.py"), run_name="__main__")
    assert "2 pictures of 16 x 16 pixels" in capsys.readouterr().out
    assert (tmp_path / "out" / "sheet.png").exists()


def test_no_warning_without_a_reason(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(replace(REQUEST, n=2, steps=1), pipeline=pipe)
