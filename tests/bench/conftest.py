"""A record to write, read and vary."""

import pytest

from variegate.bench.grid import Cell
from variegate.bench.records import Record
from variegate.request import Request


@pytest.fixture
def cell():
    return Cell(Request(("a cat",), n=2, method="none", compare=False))


@pytest.fixture
def record(cell):
    return Record(
        settings=cell.settings,
        made={"model": "emoji-base", "weights": "0", "steps": 20, "guidance": 4.0, "dtype": "float32"},
        seeds=(0, 1),
        pixels="0",
        measures={"vendi": 1.5},
        verdicts=(("cat", "noto", 0.5),),
        versions={"variegate": "0.1.0"},
        hardware={"processor": "any", "device": "cpu", "threads": 1},
        warnings=(),
    )
