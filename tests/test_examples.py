"""The examples run, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from tiny import tiny_sd3
from variegate.request import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3().save_pretrained(folder)
    return str(folder)


def test_a_row_for_each_method(model, tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "new" / "methods.png"
    options = ["-n", "2", "--steps", "2", "--model", model, "--output", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *options])
    with pytest.warns(UserWarning, match="SPELL changed nothing"):  # not made for a model this small
        runpy.run_path(str(EXAMPLES / "compare_methods.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(METHODS)
    assert len({line.split(":")[1] for line in lines}) > len(METHODS) / 2  # they differ
    with Image.open(sheet) as image:
        assert image.height > 128 * len(METHODS)
