"""Requests, methods and command lines of whatever kind: taken and written as JSON, or refused in one sentence.

VARIEGATE_FUZZ_SEED (0) and VARIEGATE_FUZZ_COUNT (300) choose the inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tiny import tiny_sd3
from variegate import SGI, Request, attach
from variegate.cli import app
from variegate.request import METHODS, to_text

SEED = int(os.environ.get("VARIEGATE_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("VARIEGATE_FUZZ_COUNT", "300"))
SECONDS = 2  # for any one of them, on a slow machine

DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]

INTEGERS = (-1, 0, 1, 2, 3, 8, 64, 1000, 1024, 2**31, 2**40, 2**62, 2**64, -(2**63), 10**400)
FLOATS = (-1.0, -0.0, 0.0, 1e-320, 1e-3, 0.2, 0.5, 1.0, 1.5, 2.0, 1e6, 1e30, 1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    "", " ", "a", "2", "0.5", "0,2", "3:6", "::2", "::0", "1,", ",", ":", "1:2:3:4", "all", "first", "cond", "both",
    "image", "vendi", "log_det", "swap", "exact", "none", "cads", "sgi", "auto", "cpu", "float16", "nan", "true",
    "null", "\udcff", "a\0b", "a\nb", "猫", "x" * 10_000, "1" * 5000, "-" * 50, "{}", "[1,2]", "1e999",
)  # fmt: skip
OTHERS = (
    None, True, False, b"a", 1j, [], (), {}, set(), {1}, {"a": 1}, [0, 1], [0, "1"], [True], [1.0], [[0]], (0, -1),
    (5,), [math.nan], slice(None), slice(0, 2), slice(0, 4, 0), slice(4, 0, -1), slice("a"), slice(0.5), range(2),
    range(10**12), range(10**30), np.arange(2), np.arange(2.0), np.ones((2, 2)), np.array(1), np.array([]),
    np.str_("all"), np.int64(2), np.uint8(3), np.float32(0.5), np.float16("nan"), np.bool_(True), np.datetime64("nat"),
    Fraction(1, 3), Fraction(10**400), Decimal("0.5"), torch.tensor(1), torch.tensor([0, 1]), object(), object, len,
    lambda x: x, Path("a"), DEEP, iter(()), memoryview(b"12"), NotImplemented, ...,
)  # fmt: skip


def value(rng):
    """Of any type."""
    return rng.choice(rng.choice((INTEGERS, FLOATS, TEXTS, OTHERS)))


def parameters(rng, cls):
    """Some of a method, near their defaults or of any type, and now and then one that it does not have."""
    found = {}
    for option in dataclasses.fields(cls) if cls else ():
        if rng.random() < 0.3:
            near = [option.default, rng.choice(FLOATS), rng.choice(INTEGERS)]
            found[option.name] = rng.choice(near) if rng.random() < 0.7 else value(rng)
    if rng.random() < 0.05:
        found[rng.choice(("power", "", "\udcff", 3, None, "x" * 1000))] = value(rng)
    return found


def sentence(error):
    """The words of an error, which fit into one line."""
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 1500, text
    return text


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3()


def attempt(make):
    """What it makes, or None where it is refused as it should be, soon."""
    start = time.monotonic()
    try:
        return make()
    except (ValueError, TypeError) as error:
        sentence(error)
        return None
    finally:
        assert time.monotonic() - start < SECONDS


def test_methods(pipe):
    rng = random.Random(SEED)
    taken = 0
    for _ in range(COUNT):
        cls = METHODS[rng.choice(list(METHODS))]
        given = {name: value for name, value in parameters(rng, cls).items() if isinstance(name, str)}
        method = attempt(lambda cls=cls, given=given: cls(**given)) if cls else None
        if method is None:
            continue
        taken += 1
        if not isinstance(method, SGI):
            attempt(lambda method=method: attach(pipe, method).remove())  # blocks that it does not have are refused
    assert taken > COUNT / 20


def test_requests():
    rng = random.Random(SEED + 1)
    taken = 0
    for _ in range(COUNT):
        name = rng.choice(list(METHODS))
        given = {"method": name, "parameters": parameters(rng, METHODS[name]) if rng.random() < 0.5 else {}}
        for option in dataclasses.fields(Request):
            if rng.random() < 0.1:
                given[option.name] = value(rng)
        prompts = given.pop("prompts", ("a cat",))
        request = attempt(lambda prompts=prompts, given=given: Request(prompts, **given))
        if request is None:
            continue
        taken += 1
        facts = dataclasses.asdict(request) | {"prompts": list(request.prompts)}
        if callable(facts["parameters"].get("features")):
            continue
        again = json.loads(json.dumps(facts))
        if again["seeds"] is not None:
            again["seeds"] = tuple(again["seeds"])
        assert Request(tuple(again.pop("prompts")), **again) == request
        method = request.configured
        complete = {
            option.name: to_text(getattr(method, option.name))
            for option in (dataclasses.fields(method) if method else ())
        }
        recipe = json.loads(json.dumps(complete))
        assert Request(("a cat",), n=request.n, method=request.method, parameters=recipe).configured == method
    assert taken > COUNT / 20


def words(rng):
    """An argument of a command line."""
    text = str(rng.choice((*TEXTS, *INTEGERS[:-1], *FLOATS)))
    return text.replace("\0", "")  # of which no command line has any


def option(rng, names):
    """An option with its value, or one that takes none."""
    name = rng.choice(names)
    if name in ("-p", "--parameter"):
        known = [option.name for cls in METHODS.values() if cls for option in dataclasses.fields(cls)]
        return [name, f"{rng.choice(known)}={words(rng)}" if rng.random() < 0.9 else words(rng)]
    if name in ("--compare", "--no-compare", "--overwrite"):
        return [name]
    return [name, words(rng)]


GENERATE = (
    "-n", "--method", "--strength", "--start", "--stop", "--blocks", "--site", "-p", "--seed", "--steps", "--guidance",
    "--negative-prompt", "--height", "--width", "--compare", "--no-compare", "--dtype", "--offload", "--revision",
    "--overwrite",
)  # fmt: skip
DIAGNOSE = ("-n", "--seed", "--steps", "--guidance")
OUTPUTS = (
    "out", "full", "full/a-cat-00.png", "dangling", "dangling/x", "loop", "file.png", "file.png/x", "", ".", "..",
    "a" * 300, "\udcff", "dg", "dg.png", "dg.jpg", "dg.gif", "dg.psd", "new/dg.webp", ".png", "/dev/null",
)  # fmt: skip


def test_command_lines(tmp_path, monkeypatch):
    """Of a model that there is not: all end in exit code 2, without a trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file.png").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").write_text('{"groups": []}')
    before = tree(tmp_path)
    rng = random.Random(SEED + 2)
    for _ in range(COUNT):
        command, names = rng.choice((("generate", GENERATE), ("diagnose", DIAGNOSE)))
        prompts = [rng.choice(("a cat", words(rng))) for _ in range(rng.choice((1, 1, 2)))]
        options = [part for _ in range(rng.choice((0, 1, 1, 2, 4))) for part in option(rng, names)]
        line = [command, "--model", "no-such-model", *options, "-o", rng.choice(OUTPUTS), "--", *prompts]
        start = time.monotonic()
        result = CliRunner().invoke(app, line)
        assert time.monotonic() - start < 10 * SECONDS  # the first one loads torch
        assert isinstance(result.exception, SystemExit), (line, result.exception)
        assert (result.exit_code, result.stdout) == (2, ""), line
        assert "Traceback" not in result.stderr
        if result.stderr.startswith("Error: "):
            assert result.stderr.count("\n") == 1, line
        else:
            assert result.stderr.startswith("Usage: "), line  # what typer itself refuses has a frame around it
        assert tree(tmp_path) == before, line


def tree(folder):
    """All there is, and what is in the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
