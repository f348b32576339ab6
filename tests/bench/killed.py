"""A run that is killed at one file operation after another, and resumed: `python killed.py GRID FOLDER POINTS`.

Prints one line for each kill: whether cells had records before, the operation, and what was there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from variegate.bench.grid import read_grid
from variegate.bench.running import run

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod"}


def main(grid_file: str, folder: str, points: str) -> None:
    """Kill and resume at so many points, spread evenly over the operations of a run with and without records."""
    torch.set_num_threads(1)  # forked processes have no others
    base = Path(folder)
    grid = replace(read_grid(grid_file), images=True)
    run(grid, base / "whole")  # also loads and warms everything that the forked processes use
    run(replace(grid, images=False), base / "records")
    for start in (None, base / "records"):
        place = prepared(base, "counted", start)
        total = in_child(lambda place=place: counted(place, lambda: run(grid, place)))
        for point in range(int(points) // 2):
            at = point * total // (int(points) // 2)
            place = prepared(base, f"{'fresh' if start is None else 'recorded'}-{at}", start)
            code = in_child(lambda place=place, at=at: counted(place, lambda: run(grid, place), kill_at=at))
            assert code == -signal.SIGKILL, code
            left = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
            assert in_child(lambda place=place: run(grid, place) and 0) == 0
            print(place.name, len(left), flush=True)


def prepared(base: Path, name: str, start: Path | None) -> Path:
    """A folder of results, as `start` is, if anything."""
    place = base / name
    shutil.rmtree(place, ignore_errors=True)
    if start is not None:
        shutil.copytree(start, place)
    return place


def counted(place: Path, act: Callable[[], object], kill_at: int | None = None) -> int:
    """How many file operations below a folder something takes; or the end of this process at one of them."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and (str(place) in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)
    act()
    return count


def in_child(act: Callable[[], int]) -> int:
    """What something returns in a forked process, up to 255; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
