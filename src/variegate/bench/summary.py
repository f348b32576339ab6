"""What the records of a grid say together: means over prompts, and how sure they are."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from variegate.bench.grid import Grid, Setting
from variegate.bench.records import Record, read

DRAWS = 4000
LEVEL = 95  # per cent of an interval
HIGHER_IS_BETTER = {"seconds": False, "peak_memory": False, "kid": False}  # all others: True


class Estimate(NamedTuple):
    """A mean over prompts, with the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What was measured of one setting.

    Attributes:
        setting: the method and its parameters.
        prompts: with all their groups recorded, of this setting and of the stock pipeline.
        values: measure to its mean over these prompts.
        changes: measure to the mean difference to the stock pipeline on these prompts; empty for that itself.
    """

    setting: Setting
    prompts: int
    values: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """What was measured of a grid.

    Attributes:
        rows: the stock pipeline's first; settings without records have none.
        missing: cells without a record.
        cells: all cells.
        origins: the different libraries and machines that the records come from, in words.
    """

    rows: tuple[Row, ...]
    missing: int
    cells: int
    origins: tuple[str, ...]


def bootstrap(values: NDArray[np.float64]) -> Estimate:
    """Mean, and its 95 % interval over resampled prompts (percentiles of 4,000 draws, always the same).

    Args:
        values: `[P]`, one per prompt.

    Example:
        >>> bootstrap(np.array([1.0, 2.0, 3.0, 4.0]))
        Estimate(mean=2.5, low=1.5, high=3.5)
    """
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def summarise(
    grid: Grid, folder: str | Path, derive: Callable[[Record], Mapping[str, float]] = lambda record: {}
) -> Summary:
    """Read the records of a grid and average them: over the groups of a prompt, then over prompts.

    A file `NAME.csv` beside the records, with the columns `record` (name of its file, without .json) and `value`, is
    one more measure.

    Args:
        grid: the experiment.
        folder: of its records.
        derive: further measures of a record, by name.

    Raises:
        ValueError: if there are no records of the stock pipeline, or some can't be read.
    """
    folder = Path(folder)
    cells = list(grid)
    records = read(folder, cells)
    values = {key: {**record.measures, **derive(record)} for key, record in records.items()}
    for name, key, value in _foreign(folder):
        if key in values:
            values[key][name] = value
    per_setting = [_per_prompt(grid, setting, values) for setting in grid.settings]
    stock = per_setting[0]
    if not stock:
        raise ValueError(f"{folder} has no records of the stock pipeline of {grid.name}; use `variegate bench run`.")
    rows = []
    for setting, own in zip(grid.settings, per_setting, strict=True):
        shared = [prompt for prompt in own if prompt in stock]
        if not shared:
            continue
        measures = [m for m in own[shared[0]] if all(m in table[p] for p in shared for table in (own, stock))]
        columns = {m: np.array([own[p][m] for p in shared]) for m in measures}
        changes = {} if own is stock else {m: c - [stock[p][m] for p in shared] for m, c in columns.items()}
        rows.append(
            Row(
                setting,
                len(shared),
                {m: bootstrap(column) for m, column in columns.items()},
                {m: bootstrap(column) for m, column in changes.items()},
            )
        )
    origins = sorted({_origin(record) for record in records.values()})
    return Summary(tuple(rows), len(cells) - len(records), len(cells), tuple(origins))


def _per_prompt(grid: Grid, setting: Setting, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Prompt to measure to the mean over its groups; only prompts that are complete."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for cell in grid.cells(setting):
        if cell.key in values:
            groups.setdefault(cell.request.prompts[0], []).append(values[cell.key])
    return {
        prompt: {m: fmean(group[m] for group in found) for m in found[0] if all(m in group for group in found)}
        for prompt, found in groups.items()
        if len(found) == grid.groups
    }


def _foreign(folder: Path) -> Iterator[tuple[str, str, float]]:
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            try:
                for row in csv.DictReader(file):
                    if not math.isfinite(value := float(row["value"])):
                        raise ValueError(f"{value} is not finite")
                    yield path.stem, row["record"], value
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise ValueError(f"{path} is no table of the columns record and value (a number): {error}.") from error


def _origin(record: Record) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    hardware = record.hardware
    device = "" if hardware["device"] == "cpu" else f"{hardware['device']}, "
    return f"{libraries}; {device}{hardware['processor']}, {hardware['threads']} threads"


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is better than in both coordinates, by the first; more is better.

    Example:
        >>> frontier([(1, 3), (2, 1), (0, 2), (2, 2)])
        [0, 3]
    """

    def beaten(x: float, y: float) -> bool:
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])


def markdown(summary: Summary, measures: Sequence[str]) -> str:
    """A table of measures with their differences to the stock pipeline.

    Raises:
        ValueError: if a measure is unknown.
    """
    known = list(summary.rows[0].values)
    for name in measures:
        if name not in known:
            raise ValueError(f"measure={name!r} is unknown; use one of {', '.join(known)}.")
    lines = ["| setting | prompts | " + " | ".join(measures) + " |", "|---" * (len(measures) + 2) + "|"]
    for row in summary.rows:
        cells = [_cell(row, name) for name in measures]
        lines.append(f"| {row.setting.name.replace('|', '/')} | {row.prompts} | " + " | ".join(cells) + " |")
    notes = [
        f"Means over prompts; differences to stock on the same prompts and seeds, with {LEVEL} % bootstrap intervals."
    ]
    if summary.missing:
        notes.append(f"{summary.missing} of {summary.cells} cells have no record yet.")
    notes.append(f"Made with {'; and with '.join(summary.origins)}.")
    return "\n".join([*lines, "", *notes])


def _cell(row: Row, name: str) -> str:
    if name not in row.values:
        return "-"
    digits = _digits(row.values[name].mean)
    text = f"{row.values[name].mean:.{digits}f}"
    if name in row.changes:
        mean, low, high = row.changes[name]
        text += f" ({mean:+.{digits}f}: {low:+.{digits}f} to {high:+.{digits}f})"
    return text


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
