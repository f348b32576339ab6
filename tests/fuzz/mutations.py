"""Tables, and their texts, broken in one place or several; always the same for the same seed."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

SEED = int(os.environ.get("VARIEGATE_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("VARIEGATE_FUZZ_COUNT", "300"))

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 3.5, 2**31, 2**63, 2**64, 10**9, 10**18, -(10**30), 10**400, 1e-300, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "a cat", "0", "1e9", "0:3", "0,,1", ":::", "all", "none",
    "cads", "nobody/nothing", "../up", "/etc", "~", "emoji-base", "emoji-base/../..", "C:\\x", "\0", "\x1b[2J",
    "\ud800", "猫", "a\nb", "x" * 300, "x" * 100_000, [], {}, [[]], [{}], {"": ""}, {"a": {"b": [1]}}, [None],
    [1, "2"], [0.5] * 3, [10**400], list(range(2000)), ["a cat", "a cat"],
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b".",
    b"=",
    b"\n",
    b"\\",
    b"\xed\xa0\x80",
    b"NaN",
    b"1e999",
)
DEEP = 100_000


def texts(name: str, table: Any, write: Callable[[Any], str] = json.dumps) -> Iterator[bytes]:
    """So many texts of a table as the environment asks for."""
    for place in range(COUNT):
        chance = random.Random(f"{SEED} {name} {place}")
        kind = chance.random()
        if kind < 0.7:
            changed = copy.deepcopy(table)
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                changed = with_a_flaw(chance, changed)
            yield write(changed).encode("utf-8", "surrogatepass")
        else:
            yield broken(chance, write(table).encode())


def with_a_flaw(chance: random.Random, value: Any) -> Any:
    """A value of which one part, at any depth, is another, lost, moved or repeated."""
    inside = isinstance(value, (dict, list)) and value and chance.random() < 0.85
    if not inside:
        return copy.deepcopy(chance.choice(VALUES))
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place, other = chance.choice(places), chance.choice(places)
    act = chance.random()
    if act < 0.65:
        value[place] = with_a_flaw(chance, value[place])
    elif act < 0.75:
        del value[place]
    elif act < 0.85:
        value[place], value[other] = value[other], value[place]
    elif isinstance(value, dict):
        value[chance.choice(["format", "colour", "n", "", "\x1b", "x" * 300])] = chance.choice(VALUES)
    else:
        value += [value[place]] * chance.choice((1, 100))
    return value


def broken(chance: random.Random, text: bytes) -> bytes:
    """A text that is cut, doubled, nested far too deeply, or has other bytes in it."""
    start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
    act = chance.randrange(6)
    if act == 0:
        return text[:start]
    if act == 1:
        return text[:start] + text[end:]
    if act == 2:
        return text[:end] + text[start:]
    if act == 3:
        return text[:start] + chance.choice((b"[", b'{"a":', b"a.", b"(", b"9")) * DEEP + text[end:]
    if act == 4:
        return chance.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"")) + text.decode().encode(
            chance.choice(("utf-16", "utf-8"))
        )
    for _ in range(chance.choice((1, 3, 20))):
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(BYTES) + text[place + chance.randrange(2) :]
    return text


def one_sentence(error: BaseException | str) -> str:
    """What an error says, if that is fit for a terminal."""
    text = str(error)
    assert text
    assert len(text) < 2000, text[:2000]
    assert not any(character in text for character in "\n\x1b\0"), repr(text)
    return text
