"""Grids on real pipelines: what a record holds, resuming, workers, a Ray cluster with a killed worker."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate import generate
from variegate.bench.grid import read_grid
from variegate.bench.records import read
from variegate.bench.running import run
from variegate.bench.worker import digest, measure
from variegate.cli import app
from variegate.emoji.judge import Judge
from variegate.emoji.models import load_pipeline

GRID = """
model = "{model}"
prompts = ["a cat", "a red bird"]
n = 2
steps = 3
[[method]]
name = "contextual-repulsion"
strength = [1.0, 3.0]
stop = 1.0
"""
CELLS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("grids") / "grid.toml"
    path.write_text(GRID.format(model=model))
    return path


@pytest.fixture(scope="module")
def plain(path, tmp_path_factory):
    """What one process makes of the grid."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(read_grid(path), folder).made == CELLS
    return facts(path, folder)


def facts(path, folder):
    """Records by key, without what differs from run to run."""
    grid = read_grid(path)
    found = read(Path(folder), grid)
    return {key: lasting(record) for key, record in found.items()}


def lasting(record):
    table = json.loads(json.dumps(dataclasses.asdict(record)))
    for name in ("seconds", "peak_memory"):
        table["measures"].pop(name)
    table["hardware"].pop("threads")
    return table


def contents(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(folder).glob("*.json")}


def command(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_a_record_is_what_the_engine_and_the_judge_say(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text('prompts = ["an animal, 3d style"]\nn = 3\nsteps = 2\nseed = 5\njudge = true\n')
    (cell,) = read_grid(path)
    record, gallery = measure(cell)
    pipeline = load_pipeline("emoji-base")
    (row,) = generate(dataclasses.replace(cell.request), pipeline=pipeline).groups[0].rows
    report = Judge.load().report(row.images, "an animal, 3d style")
    assert [image.tobytes() for image in gallery.groups[0].rows[0].images] == [i.tobytes() for i in row.images]
    assert (record.measures["vendi"], record.measures["distance"]) == (row.vendi, row.distance)
    for name in ("precision", "style_precision", "similarity", "labels", "drawings", "styles"):
        assert record.measures[name] == pytest.approx(getattr(report, name), abs=1e-4), name
    assert [label for label, _, _ in record.verdicts] == [verdict.label for verdict in report.verdicts]
    assert list(record.seeds) == [5, 6, 7]
    made = {"model": "emoji-base", "steps": 2, "guidance": 4.0, "dtype": "float32"}
    assert made.items() <= record.made.items()
    assert 0 < record.measures["seconds"] < 60
    assert 100 < record.measures["peak_memory"] < 20_000
    assert set(record.versions) >= {"variegate", "torch", "diffusers"}
    assert record.hardware["device"] == "cpu"


def test_the_digest_of_a_model_is_of_its_weights(model, tmp_path):
    first = digest(model)
    other = tmp_path / "other"
    tiny_sd3(seed=1).save_pretrained(other)
    assert first == digest(model)
    assert digest(other) != first


def test_a_run_resumes_and_repeats_nothing(path, plain, tmp_path):
    grid = read_grid(path)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(done, total):
        assert total == CELLS
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(grid, tmp_path, progress=stop)
    before = contents(tmp_path)
    assert len(before) == 2
    seen = []
    outcome = run(grid, tmp_path, progress=lambda done, total: seen.append(done))
    assert (outcome.before, outcome.made, outcome.failures) == (2, 4, {})
    assert seen == [2, 3, 4, 5, 6]
    assert before.items() <= contents(tmp_path).items()
    assert facts(path, tmp_path) == plain
    assert run(grid, tmp_path).made == 0


def test_killed_with_its_workers_at_work(path, plain, tmp_path):
    arguments = [sys.executable, "-m", "variegate", "bench", "run", path, "-r", tmp_path, "--workers", "2"]
    process = subprocess.Popen(list(map(str, arguments)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait(lambda: contents(tmp_path), 120)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    before = contents(tmp_path)
    assert len(before) > 0
    outcome = run(read_grid(path), tmp_path, workers=2)
    assert (outcome.before, outcome.made) == (len(before), CELLS - len(before))
    assert before.items() <= contents(tmp_path).items()
    assert facts(path, tmp_path) == plain


def test_a_worker_process_that_is_killed(path, plain, tmp_path):
    def kill(done, total):
        if done == 1:
            for worker in psutil.Process().children(recursive=True):
                if "spawn_main" in " ".join(worker.cmdline()):
                    worker.kill()

    with pytest.raises(ValueError, match=r"A worker process was killed, .* run again, with fewer than workers=2"):
        run(read_grid(path), tmp_path, workers=2, progress=kill)
    run(read_grid(path), tmp_path)
    assert facts(path, tmp_path) == plain


def test_a_ray_cluster_with_a_worker_killed(path, plain, tmp_path):
    ray = pytest.importorskip("ray")
    killed = []

    def kill(done, total):
        for process in psutil.process_iter(["cmdline"]):
            if not killed and done == 1 and (process.info["cmdline"] or [""])[0].startswith("ray::attempt"):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        outcome = run(read_grid(path), tmp_path, ray="auto", progress=kill)
        assert ray.is_initialized()  # the caller's connection is left open
    finally:
        ray.shutdown()
    assert killed
    assert (outcome.made, outcome.failures) == (CELLS, {})
    assert facts(path, tmp_path) == plain


def test_ray_is_optional(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    result = command("run", path, "-r", tmp_path, "--ray", "auto")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: ray is not installed; use pip install 'variegate[bench]'.\n",
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "host:port"])
def test_a_cluster_that_is_not_there(path, tmp_path, address):
    pytest.importorskip("ray")
    result = command("run", path, "-r", tmp_path, "--ray", address)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: ray='{address}' is no cluster that can be reached: ")


def test_other_weights_of_the_same_name(path, plain, tmp_path):
    grid = read_grid(path)
    one = dataclasses.replace(grid, settings=grid.settings[:1])
    run(one, tmp_path / "records")
    before = contents(tmp_path / "records")
    tiny_sd3(seed=1).save_pretrained(tmp_path / "tiny")
    other = tmp_path / "grid.toml"
    other.write_text(GRID.format(model=tmp_path / "tiny"))
    with pytest.raises(ValueError, match="holds records of other weights of tiny; nothing was changed"):
        run(read_grid(other), tmp_path / "records")
    assert contents(tmp_path / "records") == before


def test_a_setting_that_fails_does_not_hold_up_the_others(model, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(model=model).replace("[1.0, 3.0]", '3.0\nblocks = ["all", "0,99"]'))
    result = command("run", path)
    assert result.exit_code == 1
    assert result.stdout.startswith("4 records made, 0 were there before")
    assert result.stderr.startswith("2 could not be made: ")
    assert "99" in result.stderr
    assert len(contents(tmp_path / "grid")) == 4


def test_a_model_that_is_not_there_ends_the_run_and_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"Picture {i}." for i in range(1000)))
    result = command("run", "paper-flux-dev", "--prompts", captions, "-r", tmp_path / "records")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: model='black-forest-labs/FLUX.1-dev' is neither")
    assert "needs the weights of FLUX.1-dev (about 34 GB" in result.stderr
    assert not contents(tmp_path / "records")


def test_warnings_are_part_of_the_record(model, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(f'model = "{model}"\nprompts = ["{"long " * 9}", "short"]\nn = 2\nsteps = 1\n')
    long, short = (measure(cell).record for cell in read_grid(path))
    assert len(long.warnings) == 1
    assert "is too long: CLIPTokenizer takes 24 tokens" in long.warnings[0]
    assert short.warnings == ()


def test_pictures_are_kept_where_that_is_asked(path, plain, tmp_path):
    grid = dataclasses.replace(read_grid(path), images=True)
    run(grid, tmp_path)
    for cell in grid:
        assert len(list((tmp_path / "images" / cell.key).glob("*.png"))) == 3  # two pictures and the sheet
    assert facts(path, tmp_path) == plain
    assert run(grid, tmp_path).made == 0


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_out_of_range(path, tmp_path, workers):
    with pytest.raises(ValueError, match=f"workers={workers} is out of range; use an integer from 1"):
        run(read_grid(path), tmp_path, workers=workers)


def test_a_folder_that_is_none(path, tmp_path):
    (tmp_path / "file").write_text("")
    result = command("run", path, "-r", tmp_path / "file" / "records")
    assert result.exit_code == 2
    assert "can't be written to" in result.stderr


def test_the_three_commands(path, tmp_path):
    assert command("table", path, "-r", tmp_path).exit_code == 2  # nothing there yet
    result = command("run", path, "-r", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"6 records made, 0 were there before; they are in {tmp_path}\n"
    table = command("table", path, "-r", tmp_path, "-m", "vendi")
    assert [line.split(" | ")[0] for line in table.stdout.splitlines()[2:5]] == [
        "| stock",
        "| contextual-repulsion stop=1 strength=1",
        "| contextual-repulsion stop=1 strength=3",
    ]
    result = command("plot", path, "-r", tmp_path, "--against", "seconds", "-o", tmp_path / "plot.svg")
    assert (result.exit_code, (tmp_path / "plot.svg").is_file()) == (0, True)


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
