"""Check the judge on drawings whose truth is known but which are not in its reference.

    python training/judge_check.py --data data/emoji64.npz

Prints the table of docs/judge.md, and the pairs of emoji that a style draws almost alike. Takes three minutes
on one CPU core; `--every 1` takes all drawings for the renderings instead of a part, `--blur` other eyes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import track
from torch import Tensor

from autoencoder import latents_of
from captions import drawings
from domain import GENERIC, LICENSED_STYLES, STYLES
from variegate.emoji.judge import BLUR, Judge
from variegate.emoji.models import bundled_models
from variegate.metrics import efficientnet_lite0

OUTSIDE = [style for style in LICENSED_STYLES if style not in STYLES]
NOISES = (0.0, 0.25, 0.5)  # in latents, as shares of their deviation; a sampler's are about the second off
STRANGERS = 300  # pictures of no emoji of the domain, for each line of them
ALIKE = 0.98


def smaller(image: Image.Image) -> Image.Image:
    """The drawing at 48 x 48 pixels, in the middle of a white square of 64."""
    square = Image.new("RGB", (64, 64), "white")
    square.paste(image.resize((48, 48), Image.Resampling.LANCZOS), (8, 8))
    return square


def coarser(image: Image.Image) -> Image.Image:
    """The drawing sampled at 48 x 48 pixels, and enlarged again."""
    return image.resize((48, 48), Image.Resampling.LANCZOS).resize((64, 64), Image.Resampling.BICUBIC)


def shifted(x: int, y: int) -> Callable[[Image.Image], Image.Image]:
    """The drawing moved by some pixels; white comes in."""

    def shift(image: Image.Image) -> Image.Image:
        ground = Image.new("RGB", (64, 64), "white")
        ground.paste(image, (x, y))
        return ground

    return shift


def blurred(image: Image.Image) -> Image.Image:
    """The drawing, blurred by a Gaussian of one pixel."""
    return image.filter(ImageFilter.GaussianBlur(1))


def jpeg(image: Image.Image) -> Image.Image:
    """The drawing as JPEG of quality 50."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


RENDERINGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "48 px, centred on 64": smaller,
    "48 px, enlarged to 64": coarser,
    "shifted by (2, 2) px": shifted(2, 2),
    "shifted by (-4, 3) px": shifted(-4, 3),
    "blurred, 1 px": blurred,
    "JPEG, quality 50": jpeg,
}


@torch.no_grad()
def decoded(pictures: Sequence[Image.Image]) -> dict[float, list[Image.Image]]:
    """The drawings, through emoji-base's autoencoder, by the noise in their latents."""
    vae = AutoencoderKL.from_pretrained(bundled_models()["emoji-base"] / "vae", torch_dtype=torch.float32)
    latents = latents_of(vae, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    unit = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) / vae.config.scaling_factor
    return {
        noise: [
            image
            for some in (latents + noise * unit).split(64)
            for image in VaeImageProcessor().postprocess(vae.decode(some, return_dict=False)[0])
        ]
        for noise in NOISES
    }


class Check:
    """The judge, its reference as arrays, and one line of the table at a time."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        known = judge.reference.drawings
        self.labels = np.array([drawing.label for drawing in known])
        self.styles = np.array([drawing.style for drawing in known])
        self.phrases = np.array([GENERIC[drawing.subgroup][-1] for drawing in known])
        self.phrase_of = dict(zip(self.labels, self.phrases, strict=True))

    def extract(self, name: str, images: Sequence[Image.Image]) -> Tensor:
        """Features, with a bar."""
        starts = track(range(0, len(images), 64), description=name, console=Console(stderr=True))
        return torch.cat([self.judge.extract(images[start : start + 64]) for start in starts])

    def similarity(self, features: Tensor) -> Tensor:
        """Cosine of each picture and each drawing of the reference."""
        return features @ self.judge.reference.features.T

    def line(
        self,
        name: str,
        similarity: Tensor,
        labels: np.ndarray | None = None,
        styles: np.ndarray | None = None,
    ) -> None:
        """Print how often the nearest drawing has the true label, style and widest phrase."""
        value, nearest = (part.numpy() for part in similarity.max(dim=1))
        cells = [name, str(len(value)), "", "", "", f"{value.mean():.3f}"]
        if labels is not None:
            cells[2] = f"{(self.labels[nearest] == labels).mean():.1%}"
            cells[4] = f"{(self.phrases[nearest] == [self.phrase_of[label] for label in labels]).mean():.1%}"
        if styles is not None:
            cells[3] = f"{(self.styles[nearest] == styles).mean():.1%}"
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the table, then the near doubles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="emoji64.npz")
    parser.add_argument("--every", type=int, default=4, help="change and judge every n-th drawing")
    parser.add_argument("--blur", type=float, default=BLUR, help="of the eyes, in pixels of the 128 they see")
    args = parser.parse_args()
    with np.load(args.data) as archive:
        data = {name: archive[name] for name in archive}
    rows = [item.row for item in drawings(data)]
    pictures = {row: Image.fromarray(data["images"][row]) for row in range(len(data["images"]))}
    judge = Judge.load()
    if args.blur != BLUR:
        extract = efficientnet_lite0(blur=args.blur)
        features = extract([pictures[row] for row in rows])
        judge = Judge(dataclasses.replace(judge.reference, features=features), extract)
    check = Check(judge)

    print("| pictures | number | label | style | generic phrase | similarity |")
    print("|---|---|---|---|---|---|")
    part = [pictures[row] for row in rows[:: args.every]]
    changed = {name: [change(picture) for picture in part] for name, change in RENDERINGS.items()}
    changed |= {f"through the autoencoder, noise {noise:g}": images for noise, images in decoded(part).items()}
    for name, images in changed.items():
        similarity = check.similarity(check.extract(name, images))
        check.line(name, similarity, check.labels[:: args.every], check.styles[:: args.every])

    among = check.similarity(check.judge.reference.features)
    check.line("the drawing itself left out", among.clone().fill_diagonal_(-1), check.labels, check.styles)
    elsewhere = among.masked_fill(torch.from_numpy(check.styles[:, None] == check.styles), -1)
    check.line("its whole style left out", elsewhere, check.labels)
    for style in STYLES:
        chosen = check.styles == style
        check.line(f"- {style}", elsewhere[chosen], check.labels[chosen])

    label_of = dict(zip(data["hexcode"][rows], check.labels, strict=True))
    for style in OUTSIDE:
        found = [r for r in np.flatnonzero(data["style"] == style) if data["hexcode"][r] in label_of]
        labels = np.array([label_of[data["hexcode"][row]] for row in found])
        features = check.extract(style, [pictures[row] for row in found])
        check.line(f"new style: {style}", check.similarity(features), labels)

    foreign = ~np.isin(data["subgroup"], list(GENERIC)) & np.isin(data["style"], list(STYLES))
    strangers = np.random.default_rng(0).permutation(np.flatnonzero(foreign))[:STRANGERS]
    features = check.extract("strangers", [pictures[row] for row in strangers])
    check.line("other emoji, known styles", check.similarity(features))

    some = np.random.default_rng(1).permutation(rows)[:STRANGERS]
    failures = {
        "failure: blurred, 4 px": [pictures[row].filter(ImageFilter.GaussianBlur(4)) for row in some],
        "failure: two drawings, averaged": [
            Image.blend(pictures[row], pictures[other], 0.5) for row, other in zip(some, np.roll(some, 1), strict=True)
        ],
    }
    for name, images in failures.items():
        check.line(name, check.similarity(check.extract(name, images)))

    alike = among.triu(1).masked_fill(torch.from_numpy(check.styles[:, None] != check.styles), -1) > ALIKE
    print(f"\nWithin one style, more similar than {ALIKE}:")
    for i, j in alike.nonzero().tolist():
        print(f"{among[i, j]:.3f} {check.styles[i]}: {check.labels[i]}, {check.labels[j]}")


if __name__ == "__main__":
    main()
