"""What repulsion adds to the time of a generation: stock and repelled runs in turn, medians, one ratio.

python benchmarks/overhead.py                       # emoji-base, 20 steps, 8 images
python benchmarks/overhead.py --model FOLDER --steps 28 --strength 1.0
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track

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
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(args.model), "num_inference_steps": args.steps, "num_images_per_prompt": args.n}
    repulsion = ContextualRepulsion(strength=args.strength, blocks=args.blocks, inner_steps=args.inner_steps)

    def generate() -> float:
        generators = [torch.Generator().manual_seed(i) for i in range(args.n)]
        began = time.perf_counter()
        pipe(args.prompt, generator=generators, **call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    generate()
    pairs = []
    for _ in track(range(args.repeats), description="pairs"):
        stock = generate()
        with attach(pipe, repulsion):
            pairs.append((stock, generate()))
    result: dict[str, Any] = {
        "model": args.model,
        "images": args.n,
        "steps": args.steps,
        "stock_seconds": median(stock for stock, _ in pairs),
        "repelled_seconds": median(repelled for _, repelled in pairs),
        # The median of the pairs' ratios: what drifts between pairs cancels.
        "added": median(repelled / stock for stock, repelled in pairs) - 1,
    }
    print(
        f"{args.model}, {args.n} images, {args.steps} steps: stock {result['stock_seconds']:.3f} s, "
        f"repelled {result['repelled_seconds']:.3f} s, added {100 * result['added']:+.1f} % (median of {args.repeats})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
