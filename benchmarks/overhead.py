"""What repulsion adds to the time of a generation: pairs of a stock and a repelled run, each first in every other one.

python benchmarks/overhead.py                       # emoji-base, 20 steps, 8 images
python benchmarks/overhead.py --model FOLDER --steps 28 --strength 1.0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.stats import bootstrap

from variegate import ContextualRepulsion, attach
from variegate.emoji.models import call_defaults, load_pipeline


def main() -> None:
    """Measure and print; `--json` also keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-base")
    parser.add_argument("--prompt", default="an animal")
    parser.add_argument("-n", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strength", type=float, default=ContextualRepulsion().strength)
    parser.add_argument("--blocks", default=ContextualRepulsion().blocks)
    parser.add_argument("--inner-steps", type=int, default=ContextualRepulsion().inner_steps)
    parser.add_argument("--repeats", type=int, default=31, help="pairs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(args.model), "num_inference_steps": args.steps, "num_images_per_prompt": args.n}
    repulsion = ContextualRepulsion(strength=args.strength, blocks=args.blocks, inner_steps=args.inner_steps)

    def seconds(*, repelled: bool) -> float:
        generators = [torch.Generator().manual_seed(i) for i in range(args.n)]
        with attach(pipe, repulsion) if repelled else contextlib.nullcontext():
            began = time.perf_counter()
            pipe(args.prompt, generator=generators, **call)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - began

    seconds(repelled=True)
    pairs = np.empty((args.repeats, 2))
    for index in track(range(args.repeats), description="pairs"):
        for repelled in (False, True) if index % 2 else (True, False):
            pairs[index, int(repelled)] = seconds(repelled=repelled)
    added = pairs[:, 1] / pairs[:, 0] - 1  # within a pair: what drifts between pairs cancels
    low, high = bootstrap((added,), np.median, rng=0).confidence_interval
    stock_seconds, repelled_seconds = np.median(pairs, axis=0)
    result: dict[str, Any] = {
        "model": args.model,
        "images": args.n,
        "steps": args.steps,
        "pairs": args.repeats,
        "stock_seconds": stock_seconds,
        "repelled_seconds": repelled_seconds,
        "added": float(np.median(added)),
        "added_95": [low, high],
    }
    print(
        f"{args.model}, {args.n} images, {args.steps} steps: stock {stock_seconds:.3f} s, "
        f"repelled {repelled_seconds:.3f} s, added {100 * result['added']:+.1f} % (median of {args.repeats} pairs; "
        f"95 %: {100 * low:+.1f} to {100 * high:+.1f})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
