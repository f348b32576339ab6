"""The folder of a gallery: replaced as a whole or not at all, wherever the run is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from variegate.gallery import Gallery, Group, Row, check_output, read_recipe

SETTINGS = {
    "n": 3, "seed": 0, "model": "m", "revision": None, "steps": 1, "guidance": None, "negative_prompt": None,
    "height": None, "width": None, "dtype": "float32", "device": "cpu", "offload": "none", "versions": {},
}  # fmt: skip
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "tempfile.mkdtemp"}


def gallery(colour, prompts=("a cat",), seed=0, n=3):
    row = Row("none", {}, tuple(Image.new("RGB", (4, 4), colour) for _ in range(n)), None, None)
    groups = tuple(Group(prompt, row, None) for prompt in prompts)
    return Gallery(groups, {**SETTINGS, "n": n, "seed": seed})


OLD = gallery("red", ("a cat", "a dog"))
NEW = gallery("blue", ("a cat", "food"), seed=1)  # some names are those of old pictures, some are not


def colours(folder):
    """Of all pictures there."""
    return {Image.open(path).getpixel((0, 0)) for path in folder.glob("*.png") if path.name != "sheet.png"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    """Name and bytes of every file, of hidden folders none."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_gallery_is_replaced_only_when_told(tmp_path):
    OLD.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds a gallery already; replace it by --overwrite .*, or use another -o"):
        NEW.save(tmp_path)
    assert contents(tmp_path) == before
    files = NEW.save(tmp_path, overwrite=True)
    assert names(tmp_path) == {file.name for file in files} | {"notes.txt"}
    record = json.loads((tmp_path / "run.json").read_text())
    listed = {name for group in record["groups"] for row in group["rows"] for name in row["files"]}
    assert listed | {"sheet.png", "run.json", "notes.txt"} == names(tmp_path)
    assert colours(tmp_path) == {(0, 0, 255)}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["a-cat-02-stock.png", "sheet.png", "run.json"])
def test_what_is_of_no_gallery_is_left_alone(tmp_path, name, overwrite):
    (tmp_path / name).write_bytes(b"mine")
    for save in (lambda: OLD.save(tmp_path, overwrite=overwrite), lambda: check_output(tmp_path, ["a cat"])):
        with pytest.raises(ValueError, match=f"holds {name}, which is of no gallery there; use another -o"):
            save()
    assert contents(tmp_path) == {name: b"mine"}


def test_a_record_from_elsewhere_reaches_no_other_folder(tmp_path):
    (tmp_path / "mine.png").touch()
    folder = tmp_path / "out"
    pictures = [path.name for path in OLD.save(folder)[:-2]]
    (folder / "notes.txt").touch()
    for name in ("../mine.png", str(tmp_path / "mine.png"), "notes.txt", 3, None):
        record = {"groups": [{"rows": [{"files": [*pictures, name]}]}]}
        (folder / "run.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="which is of no gallery there"):
            NEW.save(folder, overwrite=True)
    (folder / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="which is of no gallery there"):
        NEW.save(folder, overwrite=True)
    assert (tmp_path / "mine.png").exists()
    assert (folder / "notes.txt").exists()


def killed_at(event, work):
    """Do it in a process that is killed at so many file operations; whether it was."""
    child = os.fork()
    if child == 0:
        left = event

        def hook(name, arguments):
            nonlocal left
            if name in EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")
@pytest.mark.parametrize("over", [False, True], ids=["an empty folder", "an older gallery"])
def test_killed_at_any_file_operation_nothing_is_mixed_or_lost(tmp_path, over):
    NEW.save(tmp_path / "new")
    complete = {"new": contents(tmp_path / "new"), "old": {}}
    if over:
        OLD.save(tmp_path / "old")
        complete["old"] = contents(tmp_path / "old")
    seen, event, was_killed = set(), 0, True
    while was_killed:
        folder = tmp_path / f"killed at {event}"
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if over:
            OLD.save(folder)
        was_killed = killed_at(event, lambda folder=folder: NEW.save(folder, overwrite=True))
        assert len(colours(folder)) <= 1
        if (folder / "run.json").exists():
            visible = {name: data for name, data in contents(folder).items() if name != "notes.txt"}
            assert visible in complete.values()
        # The next run finishes what was complete, and removes the rest.
        check_output(folder, ["another"], overwrite=True)
        assert not any(name.startswith(".") for name in names(folder))
        after = contents(folder)
        assert after.pop("notes.txt") == b"mine"
        seen.add(next(name for name, files in complete.items() if files == after))
        event += 1
    assert seen == {"old", "new"}
    assert event > 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")
def test_a_run_that_finishes_for_another_may_be_killed_as_well(tmp_path):
    NEW.save(tmp_path / "new")
    OLD.save(tmp_path / "old")
    both = contents(tmp_path / "old"), contents(tmp_path / "new")
    for event in range(40):
        folder = tmp_path / f"killed at {event}"
        OLD.save(folder)
        killed_at(event, lambda folder=folder: NEW.save(folder, overwrite=True))
        for again in range(3):
            killed_at(4 + 5 * again, lambda folder=folder: check_output(folder, overwrite=True))
            assert len(colours(folder)) <= 1
        check_output(folder, overwrite=True)
        assert contents(folder) in both


def test_left_overs_of_killed_runs_are_removed(tmp_path):
    (tmp_path / ".variegate-1a2b3c").mkdir()
    (tmp_path / ".variegate-1a2b3c" / "a-cat-00-stock.png").touch()
    OLD.save(tmp_path)
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_two_runs_at_once_do_not_meddle_with_each_other(tmp_path):
    """Each waits for the other, and only one gallery is there in the end."""
    errors = []

    def save(made):
        try:
            made.save(tmp_path)
        except ValueError as error:
            errors.append(str(error))

    made = [gallery(colour, ("a cat",), seed=seed) for seed, colour in enumerate(["red", "blue", "green", "white"])]
    threads = [threading.Thread(target=save, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert all("holds a gallery already" in error for error in errors)
    assert len(colours(tmp_path)) == 1
    assert len(names(tmp_path)) == 5


def test_a_failure_while_saving_leaves_the_old_gallery(tmp_path):
    OLD.save(tmp_path)
    before = contents(tmp_path)
    row = NEW.groups[0].stock
    bad = replace(row, images=(*row.images[:2], "no picture"))
    with pytest.raises(AttributeError):
        replace(NEW, groups=(replace(NEW.groups[0], stock=bad),)).save(tmp_path, overwrite=True)
    assert contents(tmp_path) == before
    assert read_recipe(Path(tmp_path, "a-cat-00-stock.png"))["seed"] == 0
