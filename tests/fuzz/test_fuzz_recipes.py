"""Hostile recipes and records: read, or refused in one sentence, at once, with nothing loaded and nothing written.

New ones: VARIEGATE_FUZZ_SEED=7 VARIEGATE_FUZZ_COUNT=5000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from fuzz.mutations import COUNT, one_sentence, texts
from variegate import Request
from variegate.bench.grid import Cell
from variegate.bench.records import RECORD, Record, read, write
from variegate.cli import app
from variegate.emoji.models import bundled_models
from variegate.gallery import NoRecipeError, read_recipe
from variegate.recipes import MOST, RECIPE, check_size, request_of
from variegate.schema import check

SECONDS = 5  # for one, on a slow machine
RECIPES = [
    {
        "format": 1, "prompt": "a cat", "index": 1, "method": method, "parameters": parameters, **more, "n": 3,
        "seed": 5, "model": "emoji-base", "revision": None, "negative_prompt": None, "height": 64, "width": None,
        "dtype": "float32", "device": "cpu", "offload": "none", "steps": 4, "guidance": 4.0,
        "versions": {"variegate": "0.1.0"},
        "scheduler": {"class": "UniPCMultistepScheduler", "digest": "00"},
        "adapters": [{"model": "transformer", "name": "style", "scales": [1.0], "digest": None}],
    }
    for method, parameters, more in (
        ("contextual-repulsion", {"strength": 2.0, "blocks": "0,2", "stop": 0.5, "inner_steps": 5}, {}),
        ("cads", {"strength": 0.1, "branch": "both"}, {}),
        ("sgi", {"candidates": 6, "solver": "swap"}, {"seeds": [5, 7, 9]}),
        ("none", {}, {}),
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["method"])
def test_recipes(tmp_path, recipe):
    """A recipe that is followed asks for a bundled model and a sane amount; every other one leaves no trace."""
    check(recipe, RECIPE)
    path, followed, foreign = tmp_path / "a.png", 0, 0
    for place, text in enumerate(texts(f"recipe {recipe['method']}", recipe)):
        if place % len(RECIPES):
            continue
        info = PngInfo()
        # As bytes in Latin-1, and as Unicode where they are any: PNG has a chunk for each.
        info.add_text("variegate", text.decode("latin-1") if b"\xff" in text else text.decode("utf-8", "replace"))
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
        began = time.monotonic()
        try:
            found = read_recipe(path)
            request = request_of(found, path)
            check_size(request, path, None)
        except ValueError as error:
            foreign += isinstance(error, NoRecipeError)
            said = one_sentence(error)
            assert str(path) in said
            result = CliRunner().invoke(app, ["replay", str(path), "-o", str(tmp_path / "out")])
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr.startswith("Error: ")
            one_sentence(result.stderr.rstrip("\n"))
            assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
        else:
            followed += 1
            check(found, RECIPE)
            assert request.model in bundled_models()
            assert 0 <= found["index"] < request.n <= MOST["n"]
            assert request.steps <= MOST["steps"]
            assert (request.height or 64) * (request.width or 64) <= 4 * 64 * 64
        assert time.monotonic() - began < SECONDS, text[:200]
    assert COUNT < 100 or (followed and foreign and followed + foreign < COUNT // len(RECIPES))


def test_records(tmp_path):
    """A record is what its name says, or it is refused; it stays as it is."""
    cells = [Cell(Request(("a cat",), n=2, method=method, compare=False)) for method in ("none", "cads")]
    records = [
        Record(
            settings=cell.settings,
            made={"model": "emoji-base", "weights": "0", "steps": 20, "guidance": 4.0, "dtype": "float32"},
            seeds=(0, 1),
            pixels="0",
            measures={"vendi": 1.5, "seconds": 0.5},
            verdicts=(("cat", "noto", 0.5), ("dog", "noto", 0.25)),
            versions={"variegate": "0.1.0"},
            hardware={"processor": "any", "device": "cpu", "threads": 1},
            warnings=("One.",),
        )
        for cell in cells
    ]
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"prompts": ["a cat"], "n": 2, "method": [{"name": "cads"}]}))
    folder = tmp_path / "grid"
    folder.mkdir()
    paths = [write(folder, record) for record in records]
    good, path, seen = [path.read_bytes() for path in paths], paths[1], set()
    for text in texts("record", json.loads(good[1])):
        path.write_bytes(text)
        began = time.monotonic()
        try:
            found = read(folder, cells)
        except ValueError as error:
            said = one_sentence(error)
            assert str(path) in said
            code = 2
        else:
            check(json.loads(json.dumps(asdict(found[cells[1].key]))), {**RECORD, "format?": int})
            code = 0
        result = CliRunner().invoke(app, ["bench", "table", str(grid)])
        assert result.exit_code == code, (text[:500], result.output, result.exception)
        one_sentence(result.stderr.rstrip("\n") or "fine")
        seen.add(code)
        assert time.monotonic() - began < SECONDS, text[:200]
        assert path.read_bytes() == text
    assert paths[0].read_bytes() == good[0]
    assert sorted(file.name for file in folder.iterdir()) == sorted(path.name for path in paths)
    assert COUNT < 100 or seen == {0, 2}
