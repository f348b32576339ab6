"""Judge a model, and the trade-off of repulsion on it: a row per setting.

    python training/evaluate.py src/variegate/emoji/emoji-base --split heldout
    python training/evaluate.py src/variegate/emoji/emoji-base --split tuning --setting "strength=1, stop=0.2"
    python training/evaluate.py src/variegate/emoji/emoji-base --split tuning --setting "method=cads, strength=0.1"

Generic prompts measure diversity and whether a picture is allowed by its prompt; specific ones (without a
`--setting`) whether it shows the emoji that was asked for. The model's own steps and guidance, groups of 8.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import DiffusionPipeline

import prompts
from variegate import attach
from variegate.emoji import call_defaults, load_pipeline
from variegate.emoji.judge import Judge, Report
from variegate.emoji.models import quiet
from variegate.intervention import Intervention
from variegate.request import METHODS, from_text

MEASURES = ("precision", "similarity", "labels", "drawings", "vendi", "distance")


def reports(
    pipe: DiffusionPipeline, judge: Judge, texts: tuple[str, ...], seed: int, args: argparse.Namespace
) -> list[Report]:
    """A report for each group of each prompt; every group has the same seeds."""
    found = []
    for group in range(args.groups):
        for start in range(0, len(texts), 4):
            some = list(texts[start : start + 4])
            images = pipe(
                some,
                num_images_per_prompt=args.n,
                **args.call,
                generator=[
                    torch.Generator().manual_seed(seed + group * args.n + i) for _ in some for i in range(args.n)
                ],
            ).images
            found += [judge.report(images[i * args.n : (i + 1) * args.n], text) for i, text in enumerate(some)]
    return found


def summary(found: list[Report]) -> dict[str, float]:
    """Means over groups; drawings counts distinct pairs of emoji and style."""
    return {measure: fmean(getattr(report, measure) for report in found) for measure in MEASURES}


def labels_of_data(frequencies: dict[str, dict[str, float]], texts: tuple[str, ...], n: int) -> float:
    """Distinct emoji among n drawings of the training data, in the mean over generic prompts, whatever their style."""
    phrases = [text.split(",")[0] for text in texts]
    return fmean(sum(1 - (1 - p) ** n for p in frequencies[phrase].values()) for phrase in phrases)


def parse(setting: str) -> dict[str, Any]:
    """`strength=0.5, blocks=0:2` to keyword arguments."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return from_text(text)

    return {name: value(text) for name, text in (part.split("=", 1) for part in re.split(r",\s*(?=\w+=)", setting))}


def method(setting: str) -> Intervention:
    """The intervention of a setting, contextual repulsion unless it says `method=`."""
    values = parse(setting)
    return METHODS[values.pop("method", "contextual-repulsion")](**values)


def main() -> None:
    """Print a Markdown table; `--json` also keeps the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="pipeline folder")
    parser.add_argument("--split", choices=("tuning", "heldout"), default="tuning")
    parser.add_argument("--setting", action="append", default=[], help="e.g. 'strength=0.5, blocks=middle'")
    parser.add_argument("--groups", type=int, default=1, help="groups of n pictures for each prompt")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--like", help="bundled model whose steps and guidance serve; default the folder's name")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--no-specific", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    args.call = call_defaults(args.like or args.model.name) | {k: v for k, v in given.items() if v is not None}
    judge = Judge.load()
    seed = prompts.SEEDS[args.split]
    generic = prompts.GENERIC_TUNING if args.split == "tuning" else prompts.GENERIC_HELDOUT
    specific = prompts.SPECIFIC_TUNING if args.split == "tuning" else prompts.SPECIFIC_HELDOUT
    rows: dict[str, dict[str, float]] = {}

    print("| setting | " + " | ".join(MEASURES) + " | seconds |\n|" + "---|" * (len(MEASURES) + 2))

    def row(name: str, texts: tuple[str, ...], context: Any) -> None:
        began = time.monotonic()
        with context, quiet():  # prompts longer than the model's twelve tokens
            rows[name] = summary(reports(pipe, judge, texts, seed, args))
        cells = " | ".join(f"{rows[name][m]:.3f}" for m in MEASURES)
        print(f"| {name} | {cells} | {time.monotonic() - began:.0f} |", flush=True)

    if not args.no_specific:
        row("specific, stock", specific, contextlib.nullcontext())
    row("generic, stock", generic, contextlib.nullcontext())
    for setting in args.setting:
        row(f"generic, {setting}", generic, attach(pipe, method(setting)))
    frequencies = json.loads((args.model / "frequencies.json").read_text())["emoji"]
    labels = labels_of_data(frequencies, generic, args.n)
    print(f"\n{args.n} drawings of the training data show {labels:.2f} distinct emoji under these generic prompts.")
    if args.json:
        args.json.write_text(json.dumps({"split": args.split, "groups": args.groups, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
