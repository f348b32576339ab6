"""What all commands do alike in a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input ends in one sentence and exit code 2; of warnings, only ours are shown, one line each."""

    def show(message: Warning | str, *details: Any, **more: Any) -> None:
        typer.echo(f"Warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"variegate\.")
        warnings.showwarning = show
        try:
            yield
        except (ValueError, OSError, MemoryError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


@contextmanager
def progress(waiting: str, counting: str = "denoising") -> Iterator[Callable[[int, int], None]]:
    """A bar, once there is something to count; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        place = bar.add_task(escape(waiting), total=None)

        def report(done: int, total: int) -> None:
            bar.update(place, description=counting, completed=done, total=total)

        yield report
