"""Every method on one prompt and the same seeds, on one sheet.

python examples/compare_methods.py --prompt "an animal" --output methods.png
"""

import argparse
from pathlib import Path

from variegate import Gallery, Request, generate
from variegate.emoji.models import load_pipeline
from variegate.gallery import Group
from variegate.request import METHODS


def main() -> None:
    """A row for each method with its default settings, the stock pipeline's last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="an animal")
    parser.add_argument("--model", default="emoji-base", help="bundled model, pipeline folder or hub id")
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", default="methods.png")
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    groups = []
    for name, method in METHODS.items():
        parameters = {"candidates": 4 * args.n} if name == "sgi" else {}
        request = Request(
            (args.prompt,), args.n, args.model, name, parameters=parameters, steps=args.steps, compare=False
        )
        gallery = generate(request, pipeline=pipe)
        (row,) = gallery.groups[0].rows
        about = method.__doc__.splitlines()[0] if method else args.prompt
        groups.append(Group(about, row, None))
        print(f"{name}: Vendi {row.vendi:.2f} of {args.n}, mean distance {row.distance:.3f}")
    Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    Gallery(tuple(groups), gallery.settings).sheet().save(args.output)


if __name__ == "__main__":
    main()
