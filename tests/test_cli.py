"""The command line: files and a table for good input, one sentence and exit code 2 for bad."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPTextModel
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate import ContextualRepulsion, Request, __version__, architectures
from variegate.architectures import Architecture, dual
from variegate.cli import app
from variegate.emoji.models import bundled_models, call_defaults, describe, load_pipeline
from variegate.gallery import read_recipe

SMALL = ["-n", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def output(model, tmp_path_factory):
    """A gallery made from the command line."""
    folder = tmp_path_factory.mktemp("made") / "out"
    result = run("generate", "a cat", "--model", model, "--strength", "2", "--stop", "1", *SMALL, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_prints_a_table_and_where_the_files_are(model, tmp_path):
    result = run("generate", "a cat", "a [red] bird", "--model", model, *SMALL, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == f"8 pictures, sheet.png and run.json are in {tmp_path / 'out'}"
    assert sum("stock pipeline" in line for line in lines) == 2
    assert sum("contextual-repulsion" in line for line in lines) == 2
    assert any("a [red] bird" in line for line in lines)
    assert len(re.findall(r"\b[12]\.\d{3}\b", result.stdout)) == 4
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_the_same_command_gives_the_same_bytes(model, output, tmp_path):
    run("generate", "a cat", "--model", model, "--strength", "2", "--stop", "1", *SMALL, "-o", tmp_path)
    files = sorted(file.name for file in output.iterdir())
    assert files == sorted(file.name for file in tmp_path.iterdir())
    for file in files:
        assert (output / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_replay_of_an_untouched_picture(model, output, tmp_path):
    result = run("replay", output / "a-cat-01.png", "--model", model, "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("a-cat-01.png is identical.")
    assert Image.open(output / "a-cat-00.png").tobytes() == Image.open(tmp_path / "again" / "a-cat-00.png").tobytes()


def test_replay_of_a_changed_picture(model, output, tmp_path):
    with Image.open(output / "a-cat-01.png") as image:
        changed = np.array(image)
        changed[0, 0, 0] ^= 1
        info = PngInfo()
        info.add_text("variegate", image.info["variegate"])
    Image.fromarray(changed).save(tmp_path / "changed.png", pnginfo=info)
    result = run("replay", tmp_path / "changed.png", "--model", model)
    assert result.exit_code == 1
    assert "changed.png is not identical: pixels differ by up to 1 of 255; all library" in result.stdout


BAD = [
    (["--model", "no-such-model"], "model='no-such-model' is unknown; use a bundled model"),
    (["--model", "nobody/no-such-model"], "model='nobody/no-such-model' is neither a bundled model"),
    (["--model", "."], "model='.' is a folder without model_index.json"),
    (["--method", "magic"], "method='magic' is unknown; use one of contextual-repulsion, cads, "),
    (["--method", "none", "--strength", "1"], "strength is no parameter of method 'none'; leave it out."),
    (["--dtype", "int8"], "dtype='int8' is unknown; use one of auto, float32, bfloat16, float16."),
    (["--device", "tpu"], "device='tpu' is unknown; use one of auto, cpu, cuda, mps."),
    (["--offload", "model", "--device", "cpu"], "offload='model' moves weights off an accelerator"),
    (["--revision", "main"], "only models on the hub have revisions"),
    (["--strength", "nan"], "strength=nan is out of range"),
    (["--strength", "-1"], "strength=-1.0 is out of range"),
    (["--stop", "1.5"], "stop=1.5 is out of range; use a step count"),
    (["--stop", "soon"], "'soon' is neither a step count nor a fraction of the steps"),
    (["--blocks", "upper"], "blocks='upper' is unknown"),
    (["--blocks", "7"], "blocks=(7,): the denoiser has 4 joint blocks"),
    (["--height", "15"], "`height` and `width` have to be divisible"),
    (["--method", "sgi", "-p", "candidates=5"], "candidates=5 are fewer than the n=8 pictures"),
    (["--method", "sgi", "-p", "candidates=all"], "candidates='all' is of type str; use an integer from 1"),
    (["--method", "sgi", "-p", "ratio=1"], "ratio=1 is out of range; use a number between 0 and 1"),
    (["--method", "sgi", "-p", "solver=gurobi"], "solver='gurobi' is unknown; use 'swap' or 'exact'"),
    (["--method", "sgi", "--blocks", "all"], "blocks is no parameter of method 'sgi'"),
    (["--method", "cads", "-p", "strength=much"], "strength='much' is of type str; use a number from 0 to 1,000."),
    (["-n", "0"], "n=0 is out of range; use an integer from 1 to 1,024."),
    (["--steps", "0"], "steps=0 is out of range"),
    (["--model", "emoji-turbo", "--steps", "1"], "steps=1 is too few: the scheduler stretches its steps"),
    (["--seed", "-1"], "seed=-1 is out of range"),
    (["--height", str(2**40)], "height=1099511627776 is out of range; use an integer from 1 to 16,384"),
    (["--strength", "1e30"], "strength=1e+30 is out of range; use a number from 0 to 1,000."),
    (["-p", "eta=1", "--strength", "2"], "strength=2.0 beside eta=1: each is the step length; give one."),
    (["-p", "strength=1", "--strength", "2"], "strength is given twice; give it once."),
    (["-p", "tokens=3"], "tokens=3 is of type int; use a slice, a list of integers or None."),
    (["-p", "inner_steps=2.5"], "inner_steps=2.5 is of type float; use an integer from 1"),
    (["-p", f"inner_steps={'[' * 100_000}"], "use an integer from 1"),
    (["-p", f"inner_steps={'1' * 5000}"], "use an integer from 1"),
    (["--negative-prompt", "\udcff"], "negative_prompt='\\udcff' has bytes that are no text; use text or None."),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[" ".join(options)[:40] for options, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(model, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a cat", "--model", model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert sentence in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
    assert result.stdout == ""
    if "soon" not in options:  # typer's own complaint has a frame around it
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    result = run("generate", "a cat", "--model", "no-such-model", "-o", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "can't be written to" in result.stderr


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with what files and folders can't be saved over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


PLACES = [
    ("dangling", "can't be written to|a link to nothing"),
    ("loop", "can't be written to|a link to nothing"),
    ("dangling/x", "can't be written to"),
    ("loop/x", "can't be written to"),
    ("file/x", "can't be written to"),
    ("a" * 300, "can't be written to: .*File name too long"),
    ("x/" + "a" * 300, "can't be written to: .*File name too long"),
    ("a\udcffb", "is no name for a file"),
]
FILES = [
    ("folder", "is a folder, a device or a link to nothing"),
    (".", "is a folder, a device or a link to nothing"),
    ("..", "is a folder, a device or a link to nothing"),
    ("/dev/null", "is a folder, a device|can't be written to"),
    ("a" * 252, "can't be written to: .*File name too long"),  # with the name that it has while it is written
]


def refused_first(places, *command):
    """The sentence that refuses a command before it loads a model, which there is not."""
    before = sorted(places.rglob("*"))
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "no-such-model" not in result.stderr
    assert sorted(places.rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize(("name", "sentence"), PLACES)
def test_a_folder_that_can_not_be_is_refused_first(places, name, sentence):
    assert re.search(sentence, refused_first(places, "generate", "a cat", "--model", "no-such-model", "-o", name))


@pytest.mark.parametrize(("name", "sentence"), PLACES + FILES)
def test_a_file_that_can_not_be_is_refused_first(places, name, sentence):
    command = ["score", "folder", "--extractor", "clip", "--model", "no-such-model", "--json"]
    assert re.search(sentence, refused_first(places, *command, name))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dg", "has no ending of a picture that can be saved; use one such as .png"),
        ("dg.psd", "has no ending of a picture that can be saved"),
        ("dg.txt", "has no ending of a picture that can be saved"),
        ("folder", "has no ending of a picture that can be saved"),
        ("file/dg.png", "can't be written to"),
        ("dangling/dg.png", "can't be written to"),
    ],
)
def test_a_diagnosis_that_can_not_be_saved_is_refused_first(places, name, sentence):
    assert sentence in refused_first(places, "diagnose", "a cat", "--model", "no-such-model", "-o", name)


def test_a_diagnosis_is_saved_in_the_format_of_its_name(model, tmp_path):
    result = run("diagnose", "a cat", "--model", model, *SMALL, "-o", tmp_path / "new" / "dg.JPG")
    assert (result.exit_code, result.stderr) == (0, "")
    with Image.open(tmp_path / "new" / "dg.JPG") as image:
        assert image.format == "JPEG"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dg.JPG"]


def test_a_gallery_is_not_replaced_unless_told(model, output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    sentence = refused_first(tmp_path, "generate", "a dog", "--model", "no-such-model", "-o", tmp_path / "out")
    assert "holds a gallery already; replace it by --overwrite" in sentence
    assert "or use another -o" in sentence
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    picture = tmp_path / "out" / "a-cat-00.png"
    assert "holds a gallery already" in refused_first(tmp_path, "replay", picture, "-o", tmp_path / "out")
    result = run("generate", "a dog", "--model", model, *SMALL, "-o", tmp_path / "out", "--overwrite")
    assert (result.exit_code, result.stderr) == (0, "")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    listed = {name for group in record["groups"] for row in group["rows"] for name in row["files"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == listed | {"sheet.png", "run.json"}
    assert all(name.startswith("a-dog") for name in listed)


def test_pictures_whose_names_are_taken_are_refused_first(places):
    (places / "out").mkdir()
    (places / "out" / "a-cat-03.png").touch()
    command = ["generate", "a cat", "--model", "no-such-model", "-o", "out", "--overwrite"]
    assert "holds a-cat-03.png, which is of no gallery there; use another -o" in refused_first(places, *command)


def test_what_is_made_is_saved_elsewhere_if_its_folder_is_taken_meanwhile(model, output, tmp_path, monkeypatch):
    from variegate import generation

    made = generation.generate

    def slow(*arguments, **options):
        shutil.copytree(output, tmp_path / "out")  # another run is faster
        return made(*arguments, **options)

    monkeypatch.setattr(generation, "generate", slow)
    result = run("generate", "a cat", "--model", model, *SMALL, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: ")
    assert "holds a gallery already" in result.stderr
    (elsewhere,) = (path for path in tmp_path.iterdir() if path.name != "out")
    assert str(elsewhere) in result.stdout
    assert len(list(elsewhere.iterdir())) == 6


def test_pictures_without_a_recipe(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, sentence in (
        ("plain.png", "has no variegate recipe in its metadata"),
        ("text.png", "can't be read as a picture: it is none of PNG, JPEG, WEBP, TIFF, BMP, GIF, AVIF, PPM."),
        ("missing.png", "can't be read as a picture: No such file or directory."),
    ):
        result = run("replay", tmp_path / name)
        assert result.exit_code == 2
        assert sentence in result.stderr


def test_a_pipeline_without_contextual_space(tmp_path):
    parts = tiny_sd3().components
    width = parts["text_encoder"].config.hidden_size
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=width,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=parts["vae"], unet=unet, tokenizer=parts["tokenizer"],
        text_encoder=CLIPTextModel(parts["text_encoder"].config), safety_checker=None, feature_extractor=None,
        scheduler=EulerDiscreteScheduler(steps_offset=1), requires_safety_checker=False,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    command = ["generate", "a cat", "--model", tmp_path / "unet", *SMALL, "-o", tmp_path / "out"]
    result = run(*command)
    assert result.exit_code == 2
    assert "UNet2DConditionModel has no contextual space" in result.stderr
    assert not (tmp_path / "out").exists()
    for options in (["--method", "none"], ["--site", "cross_attention"]):
        result = run(*command, *options, "--overwrite")
        assert (result.exit_code, result.stderr) == (0, "")
    result = run("check", tmp_path / "unet")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("UNet2DConditionModel, site cross_attention: right")


def test_warnings_are_one_line_each(model, tmp_path):
    result = run(
        "generate",
        "a cat and a dog and some red birds",
        "--model",
        model,
        "-n",
        1,
        "--steps",
        1,
        "-o",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    single, long = result.stderr.splitlines()
    assert single.startswith("Warning: n=1: a single picture")
    assert long.startswith("Warning: The prompt 'a cat and a dog and some red birds' is too long")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_help_shows_the_defaults_of_the_classes():
    text = " ".join(re.sub("[│╭╮╰╯─]", "", run("generate", "--help").stdout).split())
    fields = {field.name: field.default for cls in (Request, ContextualRepulsion) for field in dataclasses.fields(cls)}
    for option in (
        "-n",
        "--model",
        "--method",
        "--strength",
        "--start",
        "--stop",
        "--blocks",
        "--seed",
        "--dtype",
    ):
        described = text.split(f" {option} ")[1]
        default = re.search(r"\[default: (.*?)\]", described)[1]
        assert default == str(fields[option.strip("-")])
    assert "[default: (the model's)]" in text.split("--steps")[1]


def test_a_fresh_process_answers_without_loading_torch():
    command = [sys.executable, "-X", "importtime", "-m", "variegate", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"variegate {__version__}"
    assert "variegate.cli" in result.stderr
    assert not re.search(r"\| +(torch|diffusers|transformers)$", result.stderr, re.MULTILINE)


def test_check_says_whether_the_record_is_right(model, monkeypatch):
    result = run("check", model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("SD3Transformer2DModel, site context: right\n  ok    tokens put back")
    wrong = Architecture("SD3Transformer2DModel", (dual("transformer_blocks", text=1),))
    monkeypatch.setitem(architectures._REGISTERED, wrong.denoiser, wrong)
    result = run("check", model)
    assert result.exit_code == 1
    assert "site context: WRONG" in result.stdout
    assert "FAIL  no image token among the text" in result.stdout
    for options, message in (
        (["--site", "latent"], "site='latent' is unknown"),
        (["--site", "cross_attention"], "site='cross_attention' does not exist"),
    ):
        result = run("check", model, *options)
        assert result.exit_code == 2
        assert message in result.stderr


def test_pictures_of_chosen_seeds_are_made_again(model, tmp_path):
    command = ["generate", "a cat", "--model", model, *SMALL, "-o", tmp_path, "--method", "sgi", "-p", "candidates=6"]
    result = run(*command)
    assert (result.exit_code, result.stderr) == (0, "")
    *_, last = sorted(path for path in tmp_path.glob("a-cat-*.png") if "stock" not in path.name)
    assert read_recipe(last)["seeds"][1] == int(last.stem.split("-")[-1]) > 1
    result = run("replay", last, "--model", model)
    assert (result.exit_code, result.stdout) == (0, f"{last.name} is identical.\n")


def test_models_lists_what_is_bundled():
    text = run("models").stdout
    for name, folder in bundled_models().items():
        assert name in text
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == describe(name).pipeline
        pipe = load_pipeline(name)
        assert describe(name).parameters == sum(tensor.numel() for tensor in pipe.transformer.state_dict().values())
        assert describe(name).steps == call_defaults(name)["num_inference_steps"]
    with pytest.raises(ValueError, match="model='emoji' is not bundled; use one of emoji-base"):
        describe("emoji")


def test_methods_lists_them_with_their_parameters():
    lines = run("methods").stdout.splitlines()
    assert "contextual-repulsion: Push the images of one prompt apart in the contextual space" in lines[0]
    assert "    strength=0.6" in lines
    assert any(line.startswith("cads: ") for line in lines)
    assert lines[lines.index("    candidates=64") - 1].startswith("sgi: Choose among many seeds")


def test_any_parameter_of_any_method(model, tmp_path):
    command = ["generate", "a cat", "--model", model, *SMALL, "-o", tmp_path, "--method", "cads"]
    result = run(*command, "--strength", "0.5", "-p", "clear=0.1", "-p", "branch=both")
    assert (result.exit_code, result.stderr) == (0, "")
    for options, message in (
        (["-p", "clear"], "'clear' is not of the form NAME=VALUE"),
        (["-p", "clear=2"], "clear=2 and blind=0.9 are no noise levels"),
        (["-p", "colour=2"], "colour is no parameter of method 'cads'; use one of"),
    ):
        result = run(*command, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
