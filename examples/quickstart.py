"""Different pictures of one prompt, beside the stock pipeline's, from Python.

python examples/quickstart.py --prompt "an animal" --output pictures
"""

import argparse

import torch

from variegate import ContextualRepulsion, Request, attach, generate
from variegate.emoji.models import call_defaults, load_pipeline


def main() -> None:
    """The two faces of the package: around a pipeline of yours, and as a whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="an animal")
    parser.add_argument("--model", default="emoji-base", help="bundled model, pipeline folder or hub id")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="variegate-out")
    args = parser.parse_args()

    # Two lines around any stock pipeline; without them it is the stock pipeline, bit for bit.
    pipe = load_pipeline(args.model)
    with attach(pipe, ContextualRepulsion()):
        options = call_defaults(args.model) | {"num_inference_steps": args.steps}
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.n)]
        images = pipe(args.prompt, num_images_per_prompt=args.n, generator=generators, **options).images
    print(f"{len(images)} pictures of {images[0].width} x {images[0].height} pixels")

    # The same as files with recipes, next to the stock pipeline's pictures, and measured.
    gallery = generate(Request((args.prompt,), n=args.n, model=args.model, steps=args.steps), pipeline=pipe)
    for row in gallery.groups[0].rows:
        print(f"{row.method}: Vendi {row.vendi:.2f} of {args.n}, mean distance {row.distance:.3f}")
    gallery.save(args.output, overwrite=True)


if __name__ == "__main__":
    main()
