"""Write the tables of docs/RESULTS.md and its pictures from the records beside this file.

    python benchmarks/emoji/report.py

Every method is tuned alike: of its strengths the one that shows most distinct emoji on the tuning prompts while it
loses at most five points of precision there; if all lose more, the one that loses least. What is told of it are the
other prompts, with other seeds.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from variegate.bench.grid import read_grid
from variegate.bench.plotting import COLOURS, plot
from variegate.bench.records import Record
from variegate.bench.summary import Row, Summary, markdown, summarise
from variegate.emoji.models import bundled_models

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
MODELS = ("emoji-base", "emoji-turbo", "emoji-dev")
MOST_LOST = 0.05  # precision, on the tuning prompts
SHOWN = ("labels", "drawings", "tail", "vendi", "precision", "similarity", "kid")
CURVE = "contextual repulsion"


@functools.cache
def tail_of(phrase: str) -> tuple[frozenset[str], float]:
    """The rarest emoji under a generic phrase, at most half of what the training data shows, and their share."""
    table = json.loads((bundled_models()["emoji-base"] / "frequencies.json").read_text())["emoji"][phrase]
    total = 0.0
    rare = []
    for label, share in sorted(table.items(), key=lambda item: item[1]):
        if total + share > 0.5:
            break
        total += share
        rare.append(label)
    return frozenset(rare), total


def tail(record: Record) -> dict[str, float]:
    """How much of the tail is there: 1 if the rarer half of the data's emoji is as frequent as in the data."""
    if not record.verdicts:
        return {}
    rare, share = tail_of(record.settings["prompt"].split(",")[0])
    labels = [label for label, *_ in record.verdicts]
    return {"tail": sum(label in rare for label in labels) / len(labels) / share}


def results(model: str, split: str) -> Summary:
    """What the records of a model say."""
    return summarise(read_grid(HERE / f"{split}.toml", model=model), HERE / "records" / model / split, tail)


def best(rows: list[Row]) -> Row:
    """The strength of a method that is to be reported."""
    fair = [row for row in rows if row.changes["precision"].mean >= -MOST_LOST]
    if not fair:
        return max(rows, key=lambda row: row.changes["precision"].mean)
    return max(fair, key=lambda row: row.values["labels"].mean)


def tuned(tuning: Summary, heldout: Summary) -> Summary:
    """The held-out rows of the settings that tuning chose, most distinct emoji first."""
    curves: dict[str, list[Row]] = {}
    for row in tuning.rows[1:]:
        curves.setdefault(row.setting.curve, []).append(row)
    chosen = {best(rows).setting.name for rows in curves.values()}
    rows = sorted(
        (row for row in heldout.rows[1:] if row.setting.name in chosen), key=lambda row: -row.values["labels"].mean
    )
    return Summary((heldout.rows[0], *rows), heldout.missing, heldout.cells, heldout.origins)


def table(summary: Summary) -> str:
    """What is shown of each setting, as far as the records have it."""
    return markdown(summary, [measure for measure in SHOWN if measure in summary.rows[0].values])


def one_strength(found: dict[str, Summary], path: Path) -> None:
    """Distinct emoji and precision against the strength of contextual repulsion, a line for each model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("labels", "precision"), strict=True):
        for colour, (model, summary) in zip(COLOURS, found.items(), strict=False):
            rows = [row for row in summary.rows[1:] if row.setting.curve == CURVE]
            strengths = [float(re.sub(r".*strength=", "", row.setting.point)) for row in rows]
            change = [row.changes[measure] for row in rows]
            axes.plot(strengths, [c.mean for c in change], "o-", color=colour, label=model)
            axes.fill_between(strengths, [c.low for c in change], [c.high for c in change], color=colour, alpha=0.12)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
        axes.set_xlabel("strength")
        axes.set_ylabel({"labels": "distinct emoji of 8", "precision": "prompt precision"}[measure] + ", against stock")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Put the tables between their marks, and the pictures beside the page."""
    page = DOCS / "RESULTS.md"
    text = page.read_text(encoding="utf-8")

    def put(name: str, content: str) -> None:
        nonlocal text
        mark: Any = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"{page} has no mark {name!r}; put <!-- {name} --> and <!-- end --> where its table goes.")
        text = mark.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)

    curves = {}
    for model in MODELS:
        tuning, heldout = results(model, "tuning"), results(model, "heldout")
        put(f"{model} tuned", table(tuned(tuning, heldout)))
        put(f"{model} all", table(heldout))
        plot(heldout, DOCS / f"results-{model}.png", diversity="labels", against=("precision", "similarity"))
        curves[model] = heldout
    for split in ("ablations", "batch-4", "batch-16"):
        put(split, table(results("emoji-base", split)))
    put("speed", markdown(results("emoji-base", "speed"), ("seconds",)))
    one_strength(curves, DOCS / "strength.png")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
