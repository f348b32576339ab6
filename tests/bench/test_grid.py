"""Experiments as files: what they sweep, what they refuse, and which prompts they read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from variegate.bench.grid import Cell, presets, read_grid
from variegate.bench.prompts import PROMPT_SETS, SEEDS, prompt_set
from variegate.cli import app
from variegate.emoji.reference import Reference
from variegate.request import METHODS, Request

ROOT = Path(__file__).parents[2]
GRID = """
model = "emoji-base"
prompts = ["an animal", "food"]
n = 4
groups = 2
seed = 100
steps = 5

[[method]]
name = "cads"
strength = [0.1, 0.2]
clear = [0.5, 0.6]
blind = 0.8

[[method]]
name = "none"
label = "lower guidance"
guidance = [1, 2.5]
"""


def few(text):
    """The name of a test: pytest hands the whole of it on to the environment."""
    return ascii(text[:40])


def write(folder, text=GRID, name="grid.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lists_are_swept_and_the_stock_pipeline_comes_first(tmp_path):
    grid = read_grid(write(tmp_path))
    assert [(setting.curve, setting.point) for setting in grid.settings] == [
        ("stock", ""),
        ("cads blind=0.8", "strength=0.1, clear=0.5"),
        ("cads blind=0.8", "strength=0.1, clear=0.6"),
        ("cads blind=0.8", "strength=0.2, clear=0.5"),
        ("cads blind=0.8", "strength=0.2, clear=0.6"),
        ("lower guidance", "guidance=1"),
        ("lower guidance", "guidance=2.5"),
    ]
    third = grid.settings[3].requests
    assert [(request.prompts, request.seed) for request in third] == [
        (("an animal",), 100),
        (("an animal",), 104),
        (("food",), 100),
        (("food",), 104),
    ]
    assert third[0].parameters == {"blind": 0.8, "strength": 0.2, "clear": 0.5}
    assert (third[0].steps, third[0].guidance, third[0].n) == (5, None, 4)
    assert grid.settings[6].requests[0].guidance == 2.5
    assert len(list(grid)) == 7 * 4


def test_a_method_may_have_seeds_of_its_own(tmp_path):
    grid = read_grid(write(tmp_path, GRID + '\n[[method]]\nname = "none"\nlabel = "other seeds"\nseed = [500, 600]\n'))
    stock, *_, five, six = grid.settings
    assert [setting.name for setting in (five, six)] == ["other seeds seed=500", "other seeds seed=600"]
    assert [[request.seed for request in setting.requests[:2]] for setting in (stock, five, six)] == [
        [100, 104], [500, 504], [600, 604],
    ]  # fmt: skip


def test_settings_take_turns_and_equal_cells_are_made_once(tmp_path):
    twice = '\n[[method]]\nname = "cads"\nstrength = [0.1]\nclear = 0.5\nblind = 0.8\n'
    cells = list(read_grid(write(tmp_path, GRID + twice)))
    assert len(cells) == 7 * 4
    assert len({(cell.request.prompts, cell.request.seed) for cell in cells[:7]}) == 1


def test_json_is_the_same_grid(tmp_path):
    table = {"prompts": ["food"], "n": 2, "method": [{"name": "cads", "strength": [0.1]}]}
    toml = 'prompts = ["food"]\nn = 2\n[[method]]\nname = "cads"\nstrength = [0.1]'
    first, second = (
        [cell.key for cell in read_grid(write(tmp_path, text, name))]
        for text, name in ((json.dumps(table), "a.json"), (toml, "a.toml"))
    )
    assert first == second


REQUEST = Request(("a cat",), method="cads", parameters={"strength": 0.1}, compare=False)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ("a dog",)},
        {"model": "other"},
        {"method": "none", "parameters": {}},
        {"parameters": {"strength": 0.2}},
        {"parameters": {"strength": 0.1, "start": 1}},
        {"n": 4},
        {"seed": 8},
        {"steps": 4},
        {"guidance": 2.0},
        {"dtype": "bfloat16"},
        {"negative_prompt": "grey"},
        {"height": 32},
        {"width": 32},
        {"revision": "main"},
    ],
)
def test_what_changes_the_pictures_is_another_cell(change):
    assert Cell(REQUEST).key != Cell(dataclasses.replace(REQUEST, **change)).key


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"model": "/somewhere/else/emoji-base"},
        {"parameters": {"strength": 0.1, "clear": 0.6}},  # a default, said aloud
    ],
)
def test_what_does_not_is_the_same_cell_and_tells_no_path(change):
    other = Cell(dataclasses.replace(REQUEST, **change))
    assert Cell(REQUEST).key == other.key
    assert "somewhere" not in json.dumps(other.settings)


def test_whether_it_is_judged_is_another_cell():
    assert Cell(REQUEST).key != Cell(REQUEST, judge=True).key


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("groups = 2", "group = 2", "group is no key of an experiment; use one of model"),
        ("groups = 2", 'groups = "2"', "groups='2' is not int"),
        ("groups = 2", "groups = 0", "groups=0 is out of range; use an integer from 1"),
        ("n = 4", "n = 1", "n=1 is out of range; use an integer from 2"),
        ("steps = 5", "steps = 0", "steps=0 is out of range"),
        ("steps = 5", "judge = 1", "judge=1 is not bool"),
        ('name = "cads"', 'label = "cads"', r"has no name; every \[\[method\]\] needs one"),
        ('name = "cads"', 'name = "magic"', "method='magic' is unknown; use one of contextual-repulsion"),
        ("blind = 0.8", "blond = 0.8", "blond is no parameter of method 'cads'"),
        ("strength = [0.1, 0.2]", "strength = [0.1, -1.0]", "strength=-1.0 is out of range"),
        ("strength = [0.1, 0.2]", 'strength = ["much"]', "strength='much' is of type str; use a number"),
        ("strength = [0.1, 0.2]", "steps = [1.5]", r"method\[0\].steps\[0\]=1.5 is not int"),
        ("strength = [0.1, 0.2]", "label = [1, 2]", r"method\[0\].label=\[1, 2\] is not str"),
        ("strength = [0.1, 0.2]", "strength = []", "strength=.* is an empty list"),
        ('prompts = ["an animal", "food"]', "", "prompts are missing"),
        ('["an animal", "food"]', '"animals"', "prompts='animals' is unknown; use one of emoji-generic-tuning"),
        ('["an animal", "food"]', '"gone.txt"', "prompts='gone.txt' can't be read: No such file"),
        ('["an animal", "food"]', "[1]", r"prompts=\[1\] .* not text"),
        ('["an animal", "food"]', "[]", r"prompts=\[\] has 0 different prompts"),
        ("steps = 5", "judge = true\nprompts_ = 1", "prompts_ is no key"),
        ("food", 'quarks"]\njudge = true\nnegative_prompt = ""\nneeds = ""\n#', "prompt='quarks' has no truth"),
        ("model =", "model", "is neither TOML nor JSON"),
        ("steps = 5", "steps = nan", "steps=nan is not int"),
        ("steps = 5", "format = 2", "has format 2, and this version of variegate reads format 1"),
        ("guidance = [1, 2.5]", "guidance = [1, inf]", r"method\[1\].guidance\[1\]=inf is out of range"),
        ("guidance = [1, 2.5]", "steps = [1.5]", r"method\[1\].steps\[0\]=1.5 is not int"),
        ('label = "lower guidance"', "label = [1, 2]", r"method\[1\].label=\[1, 2\] is not str"),
        ("blind = 0.8", "blind = 1979-05-27", r"method\[0\].blind=datetime.date\(1979, 5, 27\) is not"),
        ("blind = 0.8", "blind = {}", r"method\[0\].blind={} is not"),
        ("steps = 5", f"steps = {'[' * 10_000}", "is neither TOML nor JSON: it is nested too deeply"),
        ("steps = 5", f"x{'.x' * 10_000} = 1", "line 7 has more than 2,000 dots"),
        ("groups = 2", "groups = 1000000000", r"it has 14,000,000,000 cells .* more than 20,000 are made with --yes"),
        ("blind = 0.8", "\n".join(f"p{i} = {[*range(10)]}" for i in range(10)), r"it has 160,000,000,012 cells"),
        ("blind = 0.8", "\n".join(f"p{i} = [1, 2]" for i in range(10_000)), r"it has over 10\^15 cells"),
    ],
    ids=few,
)
def test_bad_experiments_are_refused_in_one_sentence(tmp_path, old, new, sentence):
    assert GRID.count(old) == 1
    path = write(tmp_path, GRID.replace(old, new))
    with pytest.raises(ValueError, match=sentence) as caught:
        read_grid(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "is neither TOML nor JSON: it is nested too deeply"),
        ('{"prompts": ' + "[" * 100_000, "is neither TOML nor JSON: it is nested too deeply"),
        ('{"n": 2, "n": 3}', "is neither TOML nor JSON: 'n' is given twice"),
        ('{"prompts": ["\\ud800"]}', r"prompts\[0\]='\\ud800' has a character that is none"),
        ('{"prompts": [1, 2]}', r"prompts=\[1, 2\] holds something that is not text"),
        ("[]", r"an experiment: \[\] is not table"),
        (" " * (9 << 20), "can't be read: it is larger than 8 MiB"),
        ("\udcff", "can't be read: it is not UTF-8 text"),
    ],
    ids=few,
)
def test_hostile_json_is_refused_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "grid.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=sentence):
        read_grid(path)


def test_a_pipe_is_no_grid(tmp_path):
    os.mkfifo(tmp_path / "grid.toml")  # to open it would wait for ever
    with pytest.raises(ValueError, match="can't be read: it is no file"):
        read_grid(tmp_path / "grid.toml")


def test_a_large_grid_takes_a_yes(tmp_path):
    path = write(tmp_path, 'prompts = ["food"]\nn = 2\ngroups = 20001\n')
    result = CliRunner().invoke(app, ["bench", "table", str(path)])
    assert result.exit_code == 2
    assert "it has 20,001 cells (1 prompts, groups=20,001," in result.stderr
    result = CliRunner().invoke(app, ["bench", "table", str(path), "--yes"])
    assert "has no records of the stock pipeline" in result.stderr
    assert len(read_grid(write(tmp_path, 'prompts = ["food"]\nn = 2\ngroups = 20000\n')).settings[0].requests) == 20_000


def test_a_missing_experiment_names_the_presets(tmp_path):
    with pytest.raises(ValueError, match=r"can't be read: No such file or directory; .* paper-flux-dev, paper-sd3"):
        read_grid(tmp_path / "gone.toml")


COCO = {
    "annotations": [
        {"image_id": 7, "id": 12, "caption": "Second of seven. "},
        {"image_id": 9, "id": 3, "caption": "A dog.\n"},
        {"image_id": 7, "id": 11, "caption": "First of seven."},
        {"image_id": 8, "id": 1, "caption": "A dog."},
    ]
}
PARTI = (
    'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\t\t\n"Go" on a wall \tArts\tBasic\t\nthe words "a\tArts\t\t\n'
)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("captions.json", json.dumps(COCO), ("First of seven.", "A dog.")),
        ("PartiPrompts.tsv", PARTI, ("bond", '"Go" on a wall', 'the words "a')),
        ("mine.txt", "a cat\n\n a dog \na cat\n", ("a cat", "a dog")),
    ],
)
def test_prompt_files(tmp_path, name, text, prompts):
    write(tmp_path, text, name)
    assert prompt_set(name, folder=tmp_path) == prompts
    grid = read_grid(write(tmp_path, f'prompts = "{name}"\n'))  # a file beside the experiment
    assert tuple(cell.request.prompts[0] for cell in grid) == prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{}"),
        ("a.json", "?"),
        ("a.json", "[]"),
        ("a.tsv", "Text\nhello"),
        ("a.tsv", "Prompt\n"),
        ("a.json", '{"annotations": [{"image_id": 1, "id": 1, "caption": 3}]}'),
        ("a.json", "[" * 100_000),
        ("a.tsv", "Note\tPrompt\nhello"),
        ("a.tsv", "Prompt\n" + "x" * 200_000),
        ("a.txt", "\0\ud800"),
    ],
    ids=few,
)
def test_prompt_files_of_another_kind(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"prompts={str(path)!r}"):
        prompt_set(str(path))


def test_a_sample_is_always_the_same_and_never_too_small():
    some = prompt_set("emoji-specific-heldout", count=5)
    assert some == prompt_set("emoji-specific-heldout", count=5)
    assert len(set(some)) == 5
    with pytest.raises(ValueError, match="has 20 different prompts, where count=21 is asked for"):
        prompt_set("emoji-generic-tuning", count=21)


def test_the_sets_have_a_truth_and_nothing_in_common():
    reference = Reference.load()
    for prompts in PROMPT_SETS.values():
        assert all(reference.truth(prompt).labels for prompt in prompts)
    every = [prompt for prompts in PROMPT_SETS.values() for prompt in prompts]
    assert len(every) == len(set(every))
    assert SEEDS["heldout"] - SEEDS["tuning"] == 1000


@pytest.mark.parametrize(
    ("name", "n", "steps", "guidance", "etas", "inner_steps", "stop"),
    [
        ("paper-flux-dev", 4, 20, 3.5, [5e6, 1e7, 1e8, 5e8], 50, 1),
        ("paper-sd3.5-large", 4, 28, 3.5, [5e2, 5e4, 5e5, 5e6], 100, 4),
        ("paper-sd3.5-turbo", 4, 4, 0, [1e5, 5e5, 1e6, 1e7], 100, 1),
    ],
)
def test_presets_are_the_papers_protocol(tmp_path, name, n, steps, guidance, etas, inner_steps, stop):
    from variegate import ContextualRepulsion

    captions = {"annotations": [{"image_id": i, "id": i, "caption": f"Picture {i}."} for i in range(1200)]}
    grid = read_grid(name, prompts=str(write(tmp_path, json.dumps(captions), "captions_val2017.json")))
    assert len(list(grid)) == 1000 * (1 + len(etas))
    stock, *rows = (setting.requests[0] for setting in grid.settings)
    assert (stock.method, stock.n, stock.steps, stock.guidance) == ("none", n, steps, guidance)
    model = name.removeprefix("paper-")
    assert [row.intervention for row in rows] == [ContextualRepulsion.paper(model, eta=eta) for eta in etas]
    assert {(row.intervention.inner_steps, row.intervention.stop) for row in rows} == {(inner_steps, stop)}


@pytest.mark.parametrize("name", presets())
def test_presets_say_what_they_need(name):
    with pytest.raises(ValueError, match=r"needs the weights of .* --prompts captions_val2017\.json"):
        read_grid(name)


@pytest.mark.parametrize("name", ["tuning", "heldout", "ablations", "batch-4", "batch-16"])
def test_the_experiments_of_the_report_can_be_read(name):
    split = "heldout" if name == "heldout" else "tuning"
    grid = read_grid(ROOT / "benchmarks" / "emoji" / f"{name}.toml")
    seeds = {
        cell.request.seed for setting in grid.settings if setting.curve != "other seeds" for cell in grid.cells(setting)
    }
    assert {seed // 1000 for seed in seeds} == {SEEDS[split] // 1000}
    assert {cell.request.prompts[0] for cell in grid} == set(prompt_set(f"emoji-generic-{split}"))
    assert not re.search(r"[/\\]|" + re.escape(socket.gethostname()), json.dumps(next(iter(grid)).settings))


def test_tuning_and_report_try_the_same_settings():
    tuning, heldout = (read_grid(ROOT / "benchmarks" / "emoji" / f"{name}.toml") for name in ("tuning", "heldout"))
    curves = [setting.curve for setting in tuning.settings[1:]]
    assert all(curves.count(curve) >= 3 for curve in curves)
    assert [setting.name for setting in tuning.settings] == [setting.name for setting in heldout.settings]


def test_another_model_in_place_of_the_grids(tmp_path):
    path = write(tmp_path, 'model = "emoji-base"\nprompts = ["an animal"]\n', "a.toml")
    assert {cell.request.model for cell in read_grid(path, model="emoji-turbo")} == {"emoji-turbo"}


def test_the_speed_of_every_method_is_measured():
    grid = read_grid(ROOT / "benchmarks" / "emoji" / "speed.toml")
    assert {cell.request.method for cell in grid} == set(METHODS)
