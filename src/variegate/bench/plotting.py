"""Pictures of a summary: diversity against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from variegate.bench.summary import HIGHER_IS_BETTER, Row, Summary, frontier
from variegate.files import replacing

# Okabe and Ito's colours, which the colour-blind tell apart, without yellow and black; then again in other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STROKES = ("-", "--", ":")
MARKERS = "osD^vP<>XhpH8d"
LABELS = {
    "vendi": "diversity: Vendi score",
    "distance": "diversity: mean distance",
    "labels": "diversity: distinct emoji",
    "drawings": "diversity: distinct drawings",
    "similarity": "fidelity: similarity to the nearest real drawing",
    "precision": "prompt precision",
    "seconds": "seconds per group",
}
AGAINST = ("similarity", "precision", "seconds")


def plot(summary: Summary, path: str | Path, *, diversity: str = "vendi", against: Sequence[str] = AGAINST) -> Path:
    """Draw diversity against each of some measures: a line for every curve, the frontier of all of them in grey.

    Args:
        summary: of a grid.
        path: .svg, .png or .pdf; replaced whole or not at all.
        diversity: measure of the vertical axis.
        against: measures of the horizontal axes, one panel each; those without records are left out.

    Raises:
        ValueError: if matplotlib is missing, the format is unknown or there is nothing to draw.
    """
    try:
        matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError("matplotlib is not installed; use pip install 'variegate[bench]'.") from error
    path = Path(path)
    stock = summary.rows[0]
    panels = [name for name in against if name in stock.values]
    if diversity not in stock.values or not panels:
        raise ValueError(
            f"diversity={diversity!r} against {', '.join(against)}: these are not measured; "
            f"there are {', '.join(stock.values)}."
        )
    rows = [row for row in summary.rows if diversity in row.values]
    curves = list(dict.fromkeys(row.setting.curve for row in rows[1:]))
    figure = figures.Figure(figsize=(4.6 * len(panels), 5.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, [row for row in rows if name in row.values], curves, name, diversity)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, 2 * len(panels) - 1), frameon=False)
    # No date and no random ids: the same records give the same file.
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "variegate"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(temporary, format=path.suffix[1:].lower() or None, dpi=160, metadata=metadata)
    return path


def _panel(axes: Any, rows: Sequence[Row], curves: Sequence[str], name: str, diversity: str) -> None:
    sign = 1 if HIGHER_IS_BETTER.get(name, True) else -1
    points = [(sign * row.values[name].mean, row.values[diversity].mean) for row in rows]
    best = [points[i] for i in frontier(points)]
    # The frontier as stairs: all below and behind it is beaten by some point.
    axes.step([sign * x for x, _ in best], [y for _, y in best], where="pre", color="#bbbbbb", lw=5, zorder=0)
    for index, curve in enumerate(curves):
        own = [row for row in rows if row.setting.curve == curve]
        colour = COLOURS[index % len(COLOURS)]
        stroke = STROKES[index // len(COLOURS) % len(STROKES)]
        xs, ys = ([row.values[m].mean for row in own] for m in (name, diversity))
        _intervals(axes, own, name, diversity, colour)
        axes.plot(xs, ys, stroke, marker=MARKERS[index % len(MARKERS)], ms=5, lw=1.5, color=colour, label=curve)
    x, y = (rows[0].values[m].mean for m in (name, diversity))
    axes.plot([x], [y], "x", ms=11, mew=3, color="black", label="stock pipeline", zorder=5)
    values = [row.values[name].mean for row in rows]
    if name == "seconds" and max(values) > 4 * min(values):  # as methods do that choose among many pictures
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(LABELS.get(name, name))
    axes.set_ylabel(LABELS.get(diversity, diversity))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    _arrow(axes, sign)


def _intervals(axes: Any, rows: Sequence[Row], name: str, diversity: str, colour: str) -> None:
    """The intervals of the difference to the stock pipeline, which are what methods are compared by."""
    for row in rows:
        dx, dy = row.changes[name], row.changes[diversity]
        axes.errorbar(
            row.values[name].mean,
            row.values[diversity].mean,
            xerr=[[dx.mean - dx.low], [dx.high - dx.mean]],
            yerr=[[dy.mean - dy.low], [dy.high - dy.mean]],
            color=colour,
            alpha=0.25,
            lw=1,
            fmt="none",
        )


def _arrow(axes: Any, sign: int) -> None:
    x = 0.98 if sign > 0 else 0.02
    axes.annotate(
        "better",
        (x, 0.98),
        (x - sign * 0.13, 0.87),
        xycoords="axes fraction",
        color="#555555",
        ha="center",
        va="center",
        arrowprops={"arrowstyle": "-|>", "color": "#555555"},
    )
