"""Runs that are killed, out of disk or robbed of their folder: nothing is lost, nothing half-written, nothing wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate.bench.grid import read_grid
from variegate.bench.running import run
from variegate.cli import app

GRID = """
model = "{model}"
prompts = ["a cat"]
n = 2
steps = 2
images = true
[[method]]
name = "contextual-repulsion"
strength = 3.0
stop = 1.0
"""
CELLS = 2
KILLS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    tiny_sd3().save_pretrained(folder / "tiny")
    path = folder / "grid.toml"
    path.write_text(GRID.format(model=folder / "tiny"))
    return path


@pytest.fixture(scope="module")
def grid(path):
    return read_grid(path)


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory):
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(grid, folder).made == CELLS
    return folder


def contents(folder):
    """Every file but records, by place and bytes; of records, what does not differ from run to run."""
    found = {}
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.parent == Path(folder):
            table = json.loads(file.read_text())
            del table["measures"]["seconds"], table["measures"]["peak_memory"], table["hardware"]["threads"]
            found[name] = table
        else:
            found[name] = file.read_bytes()
    return found


def without(folder, tmp_path, *patterns):
    """A copy that lacks some files."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for pattern in patterns:
        for file in list(copy.glob(pattern)):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return copy


def test_killed_at_many_file_operations_and_resumed(path, whole, tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(path), str(tmp_path), str(KILLS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    resumed = [line.split()[0] for line in result.stdout.splitlines()]
    assert len(resumed) == KILLS
    expected = contents(whole)
    for name in resumed:
        assert contents(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    "lost", ["images", "images/none-*", "images/*/sheet.png", "images/*/run.json", "images/*/a-cat-01*.png"]
)
def test_a_cell_without_all_its_pictures_is_made_again(grid, whole, tmp_path, lost):
    copy = without(whole, tmp_path, lost)
    outcome = run(grid, copy)
    assert outcome.made == (1 if "none" in lost else CELLS)
    assert contents(copy) == contents(whole)


def test_pictures_asked_for_later_join_the_records(grid, whole, tmp_path):
    run(dataclasses.replace(grid, images=False), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    assert (len(before), (tmp_path / "images").exists()) == (CELLS, False)
    assert run(grid, tmp_path).made == CELLS
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")} == before
    assert contents(tmp_path) == contents(whole)


def test_a_disk_that_fills_up_while_pictures_are_saved(grid, whole, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            run(grid, tmp_path, progress=lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*")] == ["images"]
    assert run(grid, tmp_path).made == CELLS
    assert contents(tmp_path) == contents(whole)


def test_left_overs_of_killed_runs_are_removed(grid, whole, tmp_path):
    copy = without(whole, tmp_path)
    pictures = next((copy / "images").iterdir())
    (copy / ".abc.tmp").write_text("half a record")
    for folder in (copy / ".variegate-a", pictures / ".variegate-b", copy / "images" / ".none-0.tmp"):
        folder.mkdir()
        (folder / "file.png").touch()
    assert run(grid, copy).made == 0
    assert contents(copy) == contents(whole)
    assert list(copy.rglob(".*")) == []


def test_left_overs_stay_while_another_run_is_at_work(grid, whole, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    copy = without(whole, tmp_path)
    (copy / ".abc.tmp").touch()
    handle = os.open(copy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        run(grid, copy)
        assert (copy / ".abc.tmp").exists()
    finally:
        os.close(handle)
    run(grid, copy)
    assert not (copy / ".abc.tmp").exists()


@pytest.mark.parametrize(
    ("gone", "images"), [("", True), ("", False), ("*.json", True), ("*.json", False), ("images", True)]
)
def test_a_folder_that_is_removed_during_the_run_is_an_error(grid, tmp_path, gone, images):
    folder = tmp_path / "results"

    def remove(done, total):
        if done == 1:
            for path in folder.glob(gone) if gone else [folder]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(ValueError, match=r"results was removed, or records in it, while the run was at work"):
        run(dataclasses.replace(grid, images=images), folder, progress=remove)
    assert folder.exists() == bool(gone)


def test_pictures_that_contradict_their_record_are_not_kept(path, whole, tmp_path):
    copy = without(whole, tmp_path, "images")
    record = next(copy.glob("none-*.json"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "pixels": "0"}))
    result = CliRunner().invoke(app, ["bench", "run", str(path), "-r", str(copy)])
    assert result.exit_code == 1
    assert result.stdout.startswith("1 records made, 0 were there before")
    assert "1 could not be made: its pictures came out different" in result.stderr
    assert [folder.name.split("-")[0] for folder in (copy / "images").iterdir()] == ["contextual"]
