"""Hostile grids: read, or refused in one sentence, at once, with nothing made.

New ones: VARIEGATE_FUZZ_SEED=7 VARIEGATE_FUZZ_COUNT=5000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import json
import math
import time

import pytest
from typer.testing import CliRunner

from fuzz.mutations import COUNT, one_sentence, texts
from variegate.bench.grid import MOST_CELLS, read_grid
from variegate.cli import app

SECONDS = 5  # for one, on a slow machine
GRID = {
    "format": 1, "model": "emoji-base", "prompts": ["a cat", "a red bird"], "count": 2, "n": 2, "groups": 2,
    "seed": 7, "steps": 2, "guidance": 4.0, "dtype": "float32", "negative_prompt": "grey", "height": 64, "width": 64,
    "judge": False, "images": True, "needs": "nothing",
    "method": [
        {"name": "contextual-repulsion", "label": "ours", "strength": [0.5, 1.0], "blocks": ["0,2", "all"], "steps": 3},
        {"name": "cads", "strength": [0.1, 0.2], "guidance": [1, 2.5], "seed": [1, 2]},
        {"name": "sgi", "candidates": 6, "ratio": [0.5, 0.9]},
        {"name": "none", "guidance": [1, 2]},
    ],
}  # fmt: skip


def to_toml(value: object) -> str:
    """A table as TOML, as far as TOML has words for it: the rest comes out as no TOML, which is one more flaw."""
    if not isinstance(value, dict):
        return inline(value)
    methods = value.get("method")
    tables = isinstance(methods, list) and methods and all(isinstance(method, dict) for method in methods)
    lines = [f"{key(name)} = {inline(item)}" for name, item in value.items() if not (tables and name == "method")]
    for method in methods if tables else ():
        lines += ["[[method]]", *(f"{key(name)} = {inline(item)}" for name, item in method.items())]
    return "\n".join(lines) + "\n"


def key(name: str) -> str:
    return name if name.isidentifier() else json.dumps(name)


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {inline(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


@pytest.mark.parametrize(("suffix", "form"), [("json", json.dumps), ("toml", to_toml)])
def test_grids(tmp_path, suffix, form):
    """A grid has at most as many cells as are made without being asked twice; nothing is made of the others."""
    path, fine = tmp_path / f"grid.{suffix}", 0
    path.write_text(form(GRID))
    assert len(list(read_grid(path))) == 4 * (1 + 4 + 8 + 2 + 2)
    for text in texts(f"grid {suffix}", GRID, form):
        path.write_bytes(text)
        began = time.monotonic()
        try:
            grid = read_grid(path)
        except ValueError as error:
            said = one_sentence(error)
            assert str(path) in said
            result = CliRunner().invoke(app, ["bench", "run", str(path)])
            assert (result.exit_code, result.stdout) == (2, "")
            one_sentence(result.stderr.rstrip("\n"))
            assert [file.name for file in tmp_path.iterdir()] == [path.name]
        else:
            fine += 1
            cells = list(grid)
            assert 0 < len(cells) <= MOST_CELLS
            json.dumps([cell.settings for cell in cells], allow_nan=False)
        assert time.monotonic() - began < SECONDS, text[:200]
    assert COUNT < 100 or 0 < fine < COUNT
