"""Calls of a pipeline: who attaches to it is told when one begins and ends, and hooks ask whether they are inside one.

Pipelines share denoisers, one pipeline a thread, so a hook on a denoiser has to know for whom it runs. Python looks
`__call__` up on the class, so an attached pipeline gets a class of its own, derived from the one it has and of the same
name; with the last attachment it has its old class again.
"""

from __future__ import annotations

import functools
import sys
import threading
from types import FrameType
from typing import Any, Protocol


class Listener(Protocol):
    """What an attachment wants to know of a pipeline's calls."""

    def begin_call(self) -> None:
        """Before a call; what it raises ends the call."""

    def end_call(self, finished: bool) -> None:
        """After a call, finished or broken off by an exception."""


class Shadow:
    """What an attachment puts in the place of a pipeline's attribute; `shadowed` is what was set there, if anything."""

    shadowed: Any = None


def _itself(value: Any) -> Any:
    return value


class _Calls(threading.local):
    """Attached pipelines whose calls run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.pipelines: list[Any] = []


_CALLS = _Calls()


def is_called(pipeline: Any) -> bool:
    """Whether this thread is inside a call of an attached pipeline, and of none within it."""
    return bool(_CALLS.pipelines) and _CALLS.pipelines[-1] is pipeline


def caller_of(denoiser: Any) -> Any | None:
    """The pipeline, attached or not, inside whose call this thread calls a denoiser; None for a loop of one's own."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if callable(owner) and any(value is denoiser for value in getattr(owner, "__dict__", {}).values()):
            return owner
        frame = frame.f_back
    return None


def listen(pipeline: Any, listener: Listener) -> None:
    """Tell a listener of every call of a pipeline from now on, after those who listen already."""
    if not hasattr(type(pipeline), "listeners_of_variegate"):
        object.__setattr__(pipeline, "__class__", _listening(type(pipeline)))  # pipelines look at what is set
    type(pipeline).listeners_of_variegate.append(listener)


def leave(pipeline: Any, listener: Listener) -> None:
    """Tell a listener no longer; harmless when done twice."""
    listeners = getattr(type(pipeline), "listeners_of_variegate", [])
    if listener in listeners:
        listeners.remove(listener)
        if not listeners:
            object.__setattr__(pipeline, "__class__", type(pipeline).__base__)


def _listening(cls: Any) -> Any:
    """A class for one pipeline, like its own but that it tells of its calls."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = list(type(self).listeners_of_variegate)
        finished = False
        _CALLS.pipelines.append(self)
        try:
            for listener in told:
                listener.begin_call()
            result = cls.__call__(self, *args, **kwargs)
            finished = True
        finally:
            _CALLS.pipelines.pop()
            for listener in told:
                listener.end_call(finished)
        return result

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are of the old class, with what it had: nobody listens to them."""
        copy = cls.__new__(cls)
        for name, value in vars(self).items():
            kept = value.shadowed if isinstance(value, Shadow) else value
            if kept is not None or value is None:
                vars(copy)[name] = kept
        return _itself, (copy,)

    def new(_: Any, *args: Any, **kwargs: Any) -> Any:
        """Another pipeline made by this class, as `type(pipe)(**pipe.components)`, is of the old one."""
        return cls(*args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members = {"__new__": new, "__call__": call, "__reduce_ex__": reduce, "listeners_of_variegate": []}
    return type(cls)(cls.__name__, (cls,), names | members)
