"""What the fields of a dataclass may hold: their annotations say it, and one function checks them all."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import operator
import sys
import types
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

LONGEST = 100_000  # list that is read at all


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included, in its annotation: `Annotated[float, Range(0, 1)]`.

    Attributes:
        low: None: any.
        high: None: any finite number; infinity itself is a number only if it is named here.
        noun: what the number is, for the sentence that refuses another.
    """

    low: float | None = None
    high: float | None = None
    noun: str = ""

    def __contains__(self, value: float) -> bool:
        # An integer may be too great for a float, as which it is going to be used; NaN is on no side of anything.
        if not (abs(value) <= sys.float_info.max or (value == math.inf and self.high == math.inf)):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def describe(self, kind: str) -> str:
        """The numbers inside, of this kind, such as "a number": "a number from 0 to 1"."""
        low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound or 0:,g}" for bound in (self.low, self.high))
        if self.low is not None:
            kind += f" from {low}" + (" upwards" if self.high is None else f" to {high}")
        elif self.high is not None:
            kind += f" up to {high}"
        else:
            kind = kind.replace("a number", "a finite number")
        return f"{self.noun} ({kind})" if self.noun else kind


class _Flaw(Exception):  # noqa: N818, never leaves this file
    """What is wrong with a value; `of_type` if all there is to say is that it is of another type."""

    def __init__(self, text: str, of_type: bool = False) -> None:
        super().__init__(text)
        self.of_type = of_type


def check_fields(settings: object) -> None:
    """Check every field of a dataclass by its annotation, and make its numbers plain Python's.

    Known are `int`, `float`, `bool`, `str`, `None`, `slice`, `Literal`, `Callable`, `Mapping`, sequences of integers
    or texts, unions of them, and a `Range` in `Annotated`; a field of any other annotation is left alone. Numbers of
    NumPy count as numbers, and whole ones as integers; an integer does where a number is asked for; no bool is a
    number, 2.0 is no integer, and text is neither. What is not finite is no number, unless its range says so.

    Raises:
        ValueError: one sentence with the name of the field, its value and what would do.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Push:
        ...     strength: Annotated[float, Range(0, 1)] = 0.5
        ...     steps: int = 4
        ...
        ...     def __post_init__(self):
        ...         check_fields(self)
        >>> Push(steps=np.int64(3))
        Push(strength=0.5, steps=3)
        >>> Push(strength=math.nan)
        Traceback (most recent call last):
        ValueError: strength=nan is out of range; use a number from 0 to 1.
    """
    for name, hint in _hints(type(settings)).items():  # type: ignore[arg-type]  # a class has a hash
        # Around the dataclass, which may be frozen.
        object.__setattr__(settings, name, checked(name, getattr(settings, name), hint))


def checked(name: str, value: Any, hint: Any) -> Any:
    """A value as its annotation wants it; see `check_fields`.

    Raises:
        ValueError: see `check_fields`.

    Example:
        >>> checked("n", "2", int)
        Traceback (most recent call last):
        ValueError: n='2' is of type str; use an integer.
    """
    try:
        return _fit(value, hint, Range())
    except _Flaw as flaw:
        *others, last = _wanted(hint, Range())
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name}={shown(value)} {flaw}; use {wanted}.") from None


def shown(value: Any) -> str:
    """A value in a sentence: on one line, and not all of it if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, a list inside itself
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-20:]}"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotation of each field; `Any` where it has names that only a type checker knows."""
    hints = {}
    for option in dataclasses.fields(cls):
        hint: Any = option.type
        if isinstance(hint, str):
            owner = next(base for base in cls.__mro__ if option.name in inspect.get_annotations(base))
            try:
                hint = eval(hint, dict(vars(sys.modules[owner.__module__])))
            except Exception:
                hint = Any
        hints[option.name] = hint
    return hints


def _fit(value: Any, hint: Any, bounds: Range) -> Any:
    """The value as the annotation wants it, or a `_Flaw`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fit(value, options[0], _bounds(options, bounds))
    if origin in (Union, types.UnionType):
        flaws = []
        for option in options:
            try:
                return _fit(value, option, bounds)
            except _Flaw as flaw:
                flaws.append(flaw)
        raise min(flaws, key=lambda flaw: flaw.of_type)  # what else is wrong says more than the type
    if origin is Literal:
        if any(isinstance(value, type(option)) for option in options):
            return _member(value, options)
    elif (item := _item(hint)) is not None:
        if isinstance(value, abc.Collection) and not isinstance(value, (str, bytes, abc.Mapping, abc.Set)):
            return _items(value, item, bounds)
    elif (kind := _kind(hint)) is None:
        return value
    elif isinstance(value, kind.accepts) and (kind is _KINDS[bool] or not isinstance(value, bool)):
        return kind.make(value, bounds)
    raise _Flaw(f"is of type {type(value).__name__}", of_type=True)


def _wanted(hint: Any, bounds: Range) -> list[str]:
    """What would do, in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _wanted(options[0], _bounds(options, bounds))
    if origin in (Union, types.UnionType):
        return [words for option in options for words in _wanted(option, bounds)]
    if origin is Literal:
        return [repr(option) for option in options]
    if (item := _item(hint)) is not None:
        kind, item_bounds = _kind(item), _bounds(get_args(item), bounds)
        return [item_bounds.describe("a list of texts" if kind is _KINDS[str] else "a list of integers")]
    kind = _kind(hint)
    assert kind is not None  # whatever else is asked for is not refused
    return [bounds.describe(kind.words) if kind.make is _number else kind.words]


def _bounds(options: tuple[Any, ...], outer: Range) -> Range:
    return next((extra for extra in options[1:] if isinstance(extra, Range)), outer)


def _kind(hint: Any) -> _Kind | None:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return _KINDS.get(hint if hint in _KINDS else get_origin(hint) or Any)


def _item(hint: Any) -> Any:
    """The annotation of the items, if it is one of a sequence of integers or texts."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is abc.Sequence or (origin is tuple and options[1:] == (...,)):
        return options[0] if _kind(options[0]) in (_KINDS[int], _KINDS[str]) else None
    return None


def _member(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        if value == option:
            return option
    raise _Flaw("is unknown")


def _number(value: Any, bounds: Range) -> int | float:
    try:
        number = operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    except OverflowError:  # a fraction of great integers
        number = math.inf
    if number not in bounds:
        raise _Flaw("is out of range")
    return number


def _text(value: str, bounds: Range) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Flaw("has bytes that are no text") from None
    return str(value)


def _slice(value: slice, bounds: Range) -> slice:
    try:
        parts = [None if part is None else operator.index(part) for part in (value.start, value.stop, value.step)]
    except TypeError:
        raise _Flaw("has bounds that are no integers") from None
    if parts[2] is not None and parts[2] < 1:
        raise _Flaw("has a step below 1")
    return slice(*parts)


def _items(value: Any, item: Any, bounds: Range) -> tuple[Any, ...]:
    try:
        length = len(value)
    except (TypeError, OverflowError):  # an array without axes; a range of more than there can be
        length = LONGEST + 1
    if length > LONGEST:
        raise _Flaw(f"is no list of up to {LONGEST:,}")
    if length == 0:
        raise _Flaw("is empty")
    found = []
    for one in value:
        try:
            found.append(_fit(one, item, bounds))
        except _Flaw as flaw:
            raise _Flaw(f"holds {shown(one)}, which {flaw}") from None
    return tuple(found)


def _as_it_is(value: Any, bounds: Range) -> Any:
    return value


@dataclass(frozen=True)
class _Kind:
    accepts: Any  # types
    make: Callable[[Any, Range], Any]  # the value of it
    words: str


_KINDS: Mapping[Any, _Kind] = {
    bool: _Kind((bool, np.bool_), lambda value, bounds: bool(value), "True or False"),
    int: _Kind(numbers.Integral, _number, "an integer"),
    float: _Kind(numbers.Real, _number, "a number"),
    str: _Kind(str, _text, "text"),
    slice: _Kind(slice, _slice, "a slice"),
    None: _Kind(types.NoneType, _as_it_is, "None"),
    types.NoneType: _Kind(types.NoneType, _as_it_is, "None"),
    abc.Mapping: _Kind(abc.Mapping, _as_it_is, "a mapping"),
    abc.Callable: _Kind(abc.Callable, _as_it_is, "a function"),
}
