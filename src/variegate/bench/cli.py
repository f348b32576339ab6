"""`variegate bench`: run a grid, print it, draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from variegate.terminal import plain_errors, progress

bench = typer.Typer(help="Compare methods on a grid of settings, prompts and seeds.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="GRID", help="A TOML or JSON file, or a preset.", show_default=False)]
Prompts = Annotated[str | None, typer.Option(help="A set or file of prompts, in place of the grid's.")]
Model = Annotated[str | None, typer.Option(help="A model, in place of the grid's.")]
Yes = Annotated[bool, typer.Option("--yes", help="Also if the grid has more than 20,000 cells.")]
Results = Annotated[
    Path | None, typer.Option("--results", "-r", help="Folder of the records.", show_default="beside the grid")
]


@bench.command()
def run(
    grid: Source,
    prompts: Prompts = None,
    model: Model = None,
    results: Results = None,
    yes: Yes = False,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Ray cluster: an address, auto or local.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    offload: Annotated[str, typer.Option(help="none, model or sequential.")] = "none",
) -> None:
    """Make the cells of a grid that are not done yet, record and pictures (exit code 1 if some can't be made)."""
    with plain_errors():
        from variegate.bench.grid import read_grid
        from variegate.bench.running import run as make
        from variegate.bench.worker import Place

        experiment = read_grid(grid, prompts=prompts, model=model, yes=yes)
        folder = _folder(grid, results)
        with progress("cells", "cells") as report:
            outcome = make(experiment, folder, workers=workers, ray=ray, place=Place(device, offload), progress=report)
    typer.echo(f"{outcome.made} records made, {outcome.before} were there before; they are in {folder}")
    for reason, count in outcome.failures.items():
        typer.echo(f"{count} could not be made: {' '.join(reason.split())}", err=True)
    raise typer.Exit(int(bool(outcome.failures)))


@bench.command()
def table(
    grid: Source,
    prompts: Prompts = None,
    model: Model = None,
    results: Results = None,
    yes: Yes = False,
    measure: Annotated[
        list[str] | None, typer.Option("--measure", "-m", help="A column; repeat for more.", show_default="all")
    ] = None,
) -> None:
    """Print the records of a grid as a Markdown table."""
    with plain_errors():
        from variegate.bench.grid import read_grid
        from variegate.bench.summary import markdown, summarise

        summary = summarise(read_grid(grid, prompts=prompts, model=model, yes=yes), _folder(grid, results))
        text = markdown(summary, measure or list(summary.rows[0].values))
    typer.echo(text)


@bench.command()
def plot(
    grid: Source,
    prompts: Prompts = None,
    model: Model = None,
    results: Results = None,
    yes: Yes = False,
    diversity: Annotated[str, typer.Option(help="Measure of the vertical axis.")] = "vendi",
    against: Annotated[
        list[str] | None, typer.Option(help="A panel; repeat for more.", show_default="similarity, precision, seconds")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="SVG, PNG or PDF file.", show_default="RESULTS.svg")
    ] = None,
) -> None:
    """Draw diversity against fidelity, prompt precision and time."""
    with plain_errors():
        from variegate.bench.grid import read_grid
        from variegate.bench.plotting import AGAINST
        from variegate.bench.plotting import plot as draw
        from variegate.bench.summary import summarise

        folder = _folder(grid, results)
        summary = summarise(read_grid(grid, prompts=prompts, model=model, yes=yes), folder)
        path = draw(
            summary, output or folder.with_name(f"{folder.name}.svg"), diversity=diversity, against=against or AGAINST
        )
    typer.echo(f"The plot is in {path}")


def _folder(grid: str, results: Path | None) -> Path:
    """Records lie beside their grid, in a folder of its name; those of a preset in the current folder."""
    from variegate.bench.grid import presets

    return results or (Path(grid) if grid in presets() else Path(grid).with_suffix(""))
