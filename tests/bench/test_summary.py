"""Averages over prompts, their intervals, the table and the plot."""

from __future__ import annotations

import dataclasses
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from variegate.bench.grid import read_grid
from variegate.bench.plotting import plot
from variegate.bench.records import write
from variegate.bench.summary import bootstrap, frontier, markdown, summarise

GRID = """
prompts = ["an animal", "food", "a plant", "a bird"]
n = 2
groups = 2
[[method]]
name = "cads"
strength = [0.1, 0.2]
[[method]]
name = "none"
label = "half | guidance"
guidance = [2]
"""
# What a prompt, a group and each setting add to the Vendi score.
PROMPT = {"an animal": 0.0, "food": 1.0, "a plant": 2.0, "a bird": 3.0}
SETTING = {"stock": 2.0, "cads strength=0.1": 2.5, "cads strength=0.2": 3.0, "half | guidance guidance=2": 1.0}


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return read_grid(path)


@pytest.fixture
def folder(grid, record, tmp_path):
    """Records with measures that are known."""
    folder = tmp_path / "grid"
    folder.mkdir()
    for setting in grid.settings:
        for index, cell in enumerate(grid.cells(setting)):
            group = index % 2
            vendi = SETTING[setting.name] + PROMPT[cell.request.prompts[0]] + 0.5 * group
            measures = {"vendi": vendi, "precision": 1 - vendi / 10, "seconds": 0.5 + group}
            write(folder, dataclasses.replace(record, settings=cell.settings, measures=measures))
    return folder


def remove(grid, folder, setting, index):
    (folder / f"{grid.cells(grid.settings[setting])[index].key}.json").unlink()


def test_means_are_over_groups_then_prompts(grid, folder):
    summary = summarise(grid, folder)
    assert [row.setting.name for row in summary.rows] == list(SETTING)
    for row in summary.rows:
        assert row.values["vendi"].mean == pytest.approx(SETTING[row.setting.name] + 1.5 + 0.25)
        assert row.values["seconds"] == pytest.approx((1, 1, 1))
    assert (summary.missing, summary.cells) == (0, 32)


def test_further_measures_of_a_record(grid, folder):
    stock, cads, *_ = summarise(grid, folder, lambda record: {"twice": 2 * record.measures["vendi"]}).rows
    assert stock.values["twice"].mean == pytest.approx(2 * stock.values["vendi"].mean)
    assert cads.changes["twice"].mean == pytest.approx(1)


def test_differences_are_paired_over_prompts(grid, folder):
    stock, cads, *_ = summarise(grid, folder).rows
    low, high = stock.values["vendi"][1:]
    assert high - low > 1  # the prompts differ
    assert stock.changes == {}
    assert cads.changes["vendi"] == pytest.approx((0.5, 0.5, 0.5))  # but the method adds the same to each


def test_only_prompts_that_are_complete_on_both_sides_count(grid, folder):
    remove(grid, folder, 1, 0)  # a group of "an animal" with cads 0.1
    remove(grid, folder, 0, 2)  # one of "food" with the stock pipeline
    summary = summarise(grid, folder)
    stock, cads, strong, _ = summary.rows
    assert (stock.prompts, cads.prompts, strong.prompts) == (3, 2, 3)
    assert cads.values["vendi"].mean == pytest.approx(2.5 + 2.5 + 0.25)
    assert cads.changes["vendi"].mean == pytest.approx(0.5)
    assert summary.missing == 2
    assert "2 of 32 cells have no record yet." in markdown(summary, ["vendi"])


def test_the_interval_holds_the_mean_of_as_many_prompts_as_it_says():
    rng = np.random.default_rng(1)
    held = [low <= 0 <= high for _, low, high in (bootstrap(rng.normal(size=40)) for _ in range(200))]
    assert 0.88 < np.mean(held) < 0.99


def test_the_table(grid, folder):
    lines = markdown(summarise(grid, folder), ["vendi", "precision"]).splitlines()
    assert lines[0] == "| setting | prompts | vendi | precision |"
    assert lines[2] == "| stock | 4 | 3.75 | 0.625 |"
    assert lines[3] == "| cads strength=0.1 | 4 | 4.25 (+0.50: +0.50 to +0.50) | 0.575 (-0.050: -0.050 to -0.050) |"
    assert len({len(re.findall(r"\|", line)) for line in lines[:6]}) == 1
    assert lines[-1] == "Made with variegate 0.1.0; any, 1 threads."
    with pytest.raises(ValueError, match="measure='kid' is unknown; use one of vendi, precision, seconds"):
        markdown(summarise(grid, folder), ["kid"])


def test_measures_from_elsewhere(grid, folder):
    cells = [*grid.cells(grid.settings[0]), *grid.cells(grid.settings[1])]
    lines = [f"{cell.key},{index}" for index, cell in enumerate(cells)]
    (folder / "reward.csv").write_text("\n".join(["record,value", *lines, "unknown-1,3"]))
    stock, cads, *others = summarise(grid, folder).rows
    assert stock.values["reward"].mean == pytest.approx(3.5)
    assert cads.changes["reward"] == pytest.approx((8, 8, 8))
    assert all("reward" not in row.values for row in others)
    for text in ("record,score\na,1\n", "record,value\na,nan\n", f"record,value\n{'a' * 200_000},1\n"):
        (folder / "reward.csv").write_text(text)
        with pytest.raises(ValueError, match=r"reward\.csv is no table of the columns record and value"):
            summarise(grid, folder)


def test_no_records_of_the_stock_pipeline(grid, tmp_path):
    with pytest.raises(ValueError, match=r"has no records of the stock pipeline of grid; use `variegate bench run`"):
        summarise(grid, tmp_path)


def test_the_frontier_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [tuple(point) for point in rng.normal(size=(200, 2))]
    chosen = set(frontier(points))
    for i, (x, y) in enumerate(points):
        beaten = any(a > x and b > y for a, b in points)
        assert beaten != (i in chosen)


def test_the_plot_is_a_picture_with_every_curve(grid, folder, tmp_path):
    summary = summarise(grid, folder)
    with Image.open(plot(summary, tmp_path / "plot.png")) as image:
        assert image.width > image.height > 400
    first = plot(summary, tmp_path / "first.svg").read_bytes()
    ElementTree.fromstring(first)
    text = first.decode()
    assert plot(summary, tmp_path / "again.svg").read_bytes() == first
    for words in ("cads", "half | guidance", "stock pipeline", "prompt precision", "seconds per group", "better"):
        assert f"<!-- {words} -->" in text, words
    assert "fidelity" not in text  # was not measured
    assert not list(tmp_path.glob(".*"))


def test_bad_plots_are_refused_in_one_sentence(grid, folder, tmp_path, monkeypatch):
    summary = summarise(grid, folder)
    with pytest.raises(ValueError, match=r"'fun' against .*: these are not measured; there are vendi, precision"):
        plot(summary, tmp_path / "plot.svg", diversity="fun")
    (tmp_path / "plot.xyz").write_text("kept")
    with pytest.raises(ValueError, match="xyz"):
        plot(summary, tmp_path / "plot.xyz")
    assert (tmp_path / "plot.xyz").read_text() == "kept"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"matplotlib is not installed; use pip install 'variegate\[bench\]'"):
        plot(summary, tmp_path / "plot.svg")
