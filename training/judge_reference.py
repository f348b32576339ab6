"""Build the judge's reference: features, names and phrases of every drawing of the domain.

    python training/judge_reference.py --data data/emoji64.npz

Reads the data set of `training/dataset.py`, and writes `reference.safetensors` and `reference.json` into
`variegate.emoji`. Takes half a minute on one CPU core. Run it again whenever the domain, its captions or the
judge's eyes change.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save

from captions import drawings, subject_of
from domain import GENERIC, STYLES
from variegate.emoji import reference
from variegate.emoji.judge import eyes
from variegate.files import replacing

CHUNK = 64


def main() -> None:
    """Extract and write; each file complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="emoji64.npz")
    parser.add_argument("--out", type=Path, default=Path(reference.__file__).parent, help="folder to write to")
    args = parser.parse_args()

    with np.load(args.data) as archive:
        items = drawings({name: archive[name] for name in ("label", "style", "subgroup", "tags")})
        images = torch.from_numpy(archive["images"][[item.row for item in items]]).permute(0, 3, 1, 2)
    extract = eyes()
    features = torch.cat([extract(x / 127.5 - 1) for x in track(images.split(CHUNK), description="features")])

    rows = [json.dumps([item.label, item.style, item.subgroup, subject_of(item)]) for item in items]
    table = (
        f'{{"styles": {json.dumps(STYLES)},\n"phrases": {json.dumps(GENERIC)},\n'
        + '"drawings": [\n' + ",\n".join(rows) + "\n]}\n"
    )  # fmt: skip
    contents = {
        reference.FEATURES: save({"features": features.half()}, {"made of": str(extract.features)}),
        reference.TABLE: table.encode(),
    }
    for name, content in contents.items():
        with replacing(args.out / name) as partial:
            partial.write_bytes(content)
        print(f"{args.out / name}: {len(content) / 1e6:.2f} MB")
    print(f"{len(items)} drawings of {len({item.label for item in items})} emoji in {len(STYLES)} styles")


if __name__ == "__main__":
    main()
