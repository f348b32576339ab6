"""What comes from elsewhere, read without trust: text of bounded size, parsed safely, and checked key by key.

A schema is a value of the kind it describes:

- `str`, `bool`, `int` (of 64 bits), `float` (finite; an int too), `None`; `SCALAR` for any of them, infinity too;
  `NAME` for a text of up to 255 characters without control characters; `object` for whatever it may be;
- `[spec]`, a list of any length; `[spec, spec, ...]`, one of exactly these;
- `{name: spec}`, a table of these keys: one that ends in "?" may be missing, and `...: spec` stands for all others;
- `(spec, spec, ...)`, any of these.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

if sys.version_info >= (3, 11):
    import tomllib
else:  # tomli is installed on Python 3.10 alone, so the ignore below is of no use elsewhere
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Schema: TypeAlias = Any

FORMAT = 1  # of recipes, records and grids; those without a number are of variegate 0.1.0, which is format 1
MOST_BYTES = 8 << 20  # of a file
MOST_DOTS = 2000  # in a line of TOML, whose parser takes a time that grows with their square


class SCALAR:
    """Schema of any text, number or truth, or nothing; infinity, too."""


class NAME:
    """Schema of a text that is shown: short, and without characters that steer a terminal."""


LONGEST_NAME = 255

_TYPES: Mapping[Any, tuple[type, ...]] = {
    str: (str,), NAME: (str,), bool: (bool,), int: (int,), float: (int, float), None: (type(None),),
    SCALAR: (str, bool, int, float, type(None)),
}  # fmt: skip
_WORDS: Mapping[Any, str] = {None: "null", NAME: "str", SCALAR: "text or a number", float: "int or float"}


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file of at most so many bytes.

    Raises:
        OSError: if there is none, or it can't be read.
        ValueError: if it is no regular file (a pipe would wait for ever), too large or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is none, is nested too deeply or gives a key twice.

    Example:
        >>> parse_json('{"n": 1, "n": 2}')
        Traceback (most recent call last):
        ValueError: 'n' is given twice
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{short(name)} is given twice")
            found[name] = value
        return found

    return _shallow(lambda: json.loads(text, object_pairs_hook=table))


def parse_toml(text: str) -> Any:
    """The table of a TOML text.

    Raises:
        ValueError: if it is none, is nested too deeply or has a line of more than 2,000 dots.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS:
            raise ValueError(f"line {number} has more than {MOST_DOTS:,} dots; use several lines")
    return _shallow(lambda: tomllib.loads(text))


def _shallow(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check(value: Any, schema: Schema, name: str = "", kind: str = "a table") -> None:
    """Make sure that a value is as its schema says.

    Args:
        value: as JSON and TOML know them.
        schema: see the module.
        name: of the value; none for the whole.
        kind: what the whole is.

    Raises:
        ValueError: one sentence with the place, the value and what it should be.

    Example:
        >>> check({"n": 2, "seeds": [1, "2"]}, {"n": int, "seeds": [int], "label?": str})
        Traceback (most recent call last):
        ValueError: seeds[1]='2' is not int.
    """
    for one in schema if isinstance(schema, tuple) else (schema,):
        if isinstance(one, list):
            if isinstance(value, list):
                return _check_list(value, one, name)
        elif isinstance(one, dict):
            if isinstance(value, dict):
                return _check_table(value, one, name, kind)
        elif one is object:
            return None
        elif type(value) in _TYPES[one]:
            return _check_scalar(value, one, name)
    raise ValueError(f"{name or kind}{'=' if name else ': '}{short(value)} is not {_described(schema)}.")


def check_format(table: Mapping[str, Any], name: object) -> None:
    """Make sure that what calls itself a format is the one that is read here; none at all is that of 0.1.0.

    Raises:
        ValueError: if not.
    """
    number = table.get("format", FORMAT)
    if type(number) is not int or number != FORMAT:
        raise ValueError(
            f"{name} has format {short(number)}, and this version of variegate reads format {FORMAT}; "
            "use the version that made it."
        )


def short(value: object) -> str:
    """A value in few words, however long or deep it is."""
    few = reprlib.Repr()
    few.maxstring = few.maxother = few.maxlong = 160
    try:
        return few.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a huge {type(value).__name__}"


def brief(error: Exception) -> str:
    """What an error says, without the middle where it quotes a value at length."""
    text = str(error)
    return text if len(text) <= 500 else f"{text[:300]} ... {text[-200:]}"


def _described(schema: Schema) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_described, schema))
    if isinstance(schema, list):
        return f"list of {len(schema)}" if len(schema) > 1 else "list"
    if isinstance(schema, dict):
        return "table"
    return _WORDS.get(schema) or str(schema.__name__)


def _check_scalar(value: Any, schema: Schema, name: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}={short(value)} has a character that is none (half of a pair).") from None
        if schema is NAME and (len(value) > LONGEST_NAME or re.search(r"[\x00-\x1f\x7f-\x9f]", value)):
            raise ValueError(
                f"{name}={short(value)} is no name; use up to {LONGEST_NAME} characters, none for control."
            )
    elif isinstance(value, float):
        if math.isnan(value) or (math.isinf(value) and schema is float):
            raise ValueError(f"{name}={value!r} is out of range; use a finite number.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={short(value)} is out of range; use an integer of 64 bits.")


def _check_list(value: list[Any], schema: list[Schema], name: str) -> None:
    if len(schema) > 1 and len(value) != len(schema):
        raise ValueError(f"{name}={short(value)} is not {_described(schema)}.")
    for place, item in enumerate(value):
        check(item, schema[place % len(schema)], f"{name}[{place}]")


def _check_table(value: dict[str, Any], schema: Mapping[Any, Schema], name: str, kind: str) -> None:
    known = {key.removesuffix("?"): key for key in schema if key is not ...}
    inside = f"{name}." if name else ""
    for key, full in known.items():
        if key not in value and not full.endswith("?"):
            raise ValueError(f"{inside}{key} is missing.")
    for key, item in value.items():
        check(key, NAME, f"key of {name or kind}")
        label = key if key.isidentifier() else short(key)
        if key not in known and ... not in schema:
            raise ValueError(f"{label} is no key of {name or kind}; use one of {', '.join(known)}.")
        check(item, schema[known.get(key, ...)], f"{inside}{label}")
