"""What all commands do alike in a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


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
