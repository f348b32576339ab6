"""The default extractor, EfficientNet-Lite0, which needs no download."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from variegate.metrics.features import Features, Network, to_tensors

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 128
WEIGHTS = "efficientnet_lite0.safetensors"
# Expansion, kernel, stride of the first block, output channels, number of blocks.
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip


class Convolution(nn.Conv2d):
    """A convolution padded as the weights were trained: at stride 2 the odd row and column lie at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - stride) // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        return super().forward(pad(x, (0, 1, 0, 1)) if self.stride == (2, 2) else x)


class Block(nn.Module):
    """Widen, filter each channel, narrow; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [] if expansion == 1 else [Convolution(inputs, hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(
            *widen,
            Convolution(hidden, hidden, kernel, stride, groups=hidden),
            nn.ReLU6(inplace=True),
            Convolution(hidden, outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The image network EfficientNet-Lite0 up to its pooled features, for inference.

    Reference:
        Tan & Le, arXiv:1905.11946, table 1; the Lite variant has no squeeze-and-excitation, and ReLU6 for
        swish. *Deviation*: batch normalisation is folded into the convolutions, and there is no classifier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, 32, kernel=3, stride=2), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential()
        channels = 32
        for expansion, kernel, stride, outputs, count in STAGES:
            for index in range(count):
                self.blocks.append(Block(channels, outputs, expansion, kernel, stride if index == 0 else 1))
                channels = outputs
        self.head = nn.Sequential(Convolution(channels, 1280), nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map images to features.

        Args:
            x: `[N, 3, H, W]`, RGB in [-127/128, 1]; H and W are multiples of 32.

        Returns:
            `[N, 1280]`, in [0, 6].
        """
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y.mean(dim=(2, 3))


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Images `[N, C, H, W]` convolved with a Gaussian of some pixels' deviation; the border goes on outside."""
    reach = int(3 * deviation + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / deviation) ** 2)
    taps /= taps.sum()
    x = pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
    return conv2d(conv2d(x, taps[None, None, None]), taps[None, None, :, None]).reshape(images.shape)


@functools.cache  # one for all extractors, whatever they blur
def _network(device: str | torch.device) -> EfficientNetLite0:
    from safetensors.torch import load

    weights = load(resources.files(__package__).joinpath(WEIGHTS).read_bytes())
    # On the meta device nothing is initialised, so that the global random state stays as it was.
    with torch.device("meta"):
        network = EfficientNetLite0()
    network.load_state_dict({name: w.to(device, torch.float32) for name, w in weights.items()}, assign=True)
    return network


@functools.cache  # everything that measures asks for it, once for every group
def efficientnet_lite0(*, blur: float = 0, device: str | torch.device = "cpu", batch_size: int = 64) -> Network:
    """Extractor of ImageNet features, small enough to be part of the package.

    The network is EfficientNet-Lite0 with weights trained on ImageNet; the features are its last layer,
    averaged over places. Images are resized to 128 x 128 (bilinear, antialiased, whatever their aspect
    ratio), and 8-bit values v become (v - 127) / 128, as in its training.

    Args:
        blur: standard deviation of a Gaussian blur of the resized images, in their pixels: what is finer is not
            seen. 0: none.
        device: where the network runs and the features stay.
        batch_size: images in one pass of the network.

    Returns:
        A function of images to features `[N, 1280]`.

    Raises:
        ValueError: if `blur` is negative.

    Example:
        >>> from PIL import Image
        >>> extract = efficientnet_lite0()
        >>> red, green = extract([Image.new("RGB", (64, 64), colour) for colour in ("red", "green")])
        >>> red.shape, bool(red @ green < 0.9)
        (torch.Size([1280]), True)
    """
    if not blur >= 0:
        raise ValueError(f"blur={blur} is no deviation; use 0 for none, or some pixels.")
    network = _network(device)

    def forward(images: Sequence[Image] | Tensor) -> Tensor:
        # One by one: pictures are large, and what is made of them is small.
        each = (to_tensors(images[at : at + 1])[0] for at in range(len(images)))
        resized = [interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True) for x in each]
        x = torch.cat(resized).to(device)
        features: Tensor = network((127.5 * (blurred(x, blur) if blur else x) + 0.5) / 128)
        return features

    resize = f"{SIZE} x {SIZE} bilinear antialiased" + (f", blurred by {blur:g} px" if blur else "")
    seen = Features("efficientnet-lite0", resize, "(v - 127) / 128")
    return Network(seen, forward, batch_size)
