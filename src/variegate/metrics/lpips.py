"""Diversity of a set of images as people see it: mean pairwise LPIPS."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from variegate.metrics.features import digest, finite

VGG16 = "timm/vgg16.tv_in1k"
HEADS = "lpips_vgg.safetensors"
CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 halves the size
LAYERS = (3, 8, 15, 22, 29)  # the last ReLU at each size
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS:
    """Learned perceptual distance of images, by VGG16 trained on ImageNet.

    Args:
        model: hub id, or folder that has model.safetensors with VGG16's convolutions as features.0.weight and so on,
            torchvision's and timm's names; the default is a download of 550 MB.
        device: where the network runs.

    Attributes:
        features: the network, and a digest that tells weights apart.

    Raises:
        ValueError: if the weights can't be loaded.

    Reference:
        Zhang et al., arXiv:1801.03924, eq. 1, as their code has it: weights times squared differences. The weights
        are theirs of version 0.1, from weights/v0.1/vgg.pth of lpips 0.1.4, and in the package.
    """

    def __init__(self, model: str | Path = VGG16, *, device: str | torch.device = "cpu") -> None:
        from safetensors.torch import load

        weights = _weights(model)
        layers: list[nn.Module] = []
        inputs = 3
        with torch.device("meta"):
            for outputs in CHANNELS:
                if outputs:
                    layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                    inputs = outputs
                else:
                    layers.append(nn.MaxPool2d(2))
        self.network = nn.Sequential(*layers)
        try:
            self.network.load_state_dict(
                {name: w.to(device, torch.float32) for name, w in weights.items()}, assign=True
            )
        except RuntimeError as error:
            raise ValueError(f"model={str(model)!r} does not have the convolutions of VGG16; use {VGG16}.") from error
        heads = load(resources.files(__package__).joinpath(HEADS).read_bytes())
        self.heads = [heads[f"lin{place}"].to(device) for place in range(len(LAYERS))]
        self.shift, self.scale = (torch.tensor(value, device=device)[:, None, None] for value in (SHIFT, SCALE))
        self.features = f"vgg16 {digest(self.network)}"

    @torch.no_grad()
    def mean_pairwise(self, images: Tensor) -> Tensor:
        """Mean LPIPS of two images of a set: 0 when all are equal.

        LPIPS is a weighted squared distance of unit features, averaged over places and summed over five layers. So
        its mean over all pairs is twice the variance of these features, and takes N passes of the network, no pairs.

        Args:
            images: `[N, 3, H, W]`, N at least 2, H and W at least 16, in [-1, 1].

        Returns:
            `[]`, float32, at least 0, seldom above 1.

        Raises:
            ValueError: for another shape, and for values that are not finite.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2 or min(images.shape[2:]) < 16:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; use [N, 3, H, W], N at least 2, sides at least 16."
            )
        x = (finite(images, "images").to(self.shift) - self.shift) / self.scale
        heads, total = iter(self.heads), x.new_zeros(())
        for place, layer in enumerate(self.network):
            x = layer(x)
            if place in LAYERS:
                total += 2 * next(heads) @ normalize(x, dim=1).var(dim=0).mean(dim=(1, 2))
        return total


def _weights(model: str | Path) -> dict[str, Tensor]:
    """VGG16's convolutions by their place in it; its classifier, nine tenths of the file, is left there."""
    from huggingface_hub import hf_hub_download
    from safetensors import SafetensorError, safe_open

    try:
        name = "model.safetensors"
        file = Path(model, name) if Path(model).is_dir() else hf_hub_download(str(model), name)
        with safe_open(file, "pt") as weights:  # SIM118: the handle is no mapping, it can't be iterated over
            names = [name for name in weights.keys() if name.startswith("features.")]  # noqa: SIM118
            return {name.removeprefix("features."): weights.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model={str(model)!r} can't be loaded: it is no folder with model.safetensors, and no hub model within "
            f"reach. `hf download {VGG16} model.safetensors` fetches the usual one."
        ) from error
