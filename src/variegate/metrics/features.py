"""What features are: made of images by a network that states how it saw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from PIL.Image import Image

Extractor = Callable[["Sequence[Image] | Tensor"], Tensor]


@dataclass(frozen=True)
class Features:
    """How features were made. Numbers from features that were made differently can't be compared.

    Attributes:
        network: its name, and a digest of its weights where they are not part of the package.
        resize: what was done to the size of the images.
        normalisation: what was done to their values.

    Example:
        >>> print(Features("some-network", "32 x 32 bilinear", "(v - 127) / 128"))
        some-network, 32 x 32 bilinear, (v - 127) / 128, rows of length 1
    """

    network: str
    resize: str
    normalisation: str

    def __str__(self) -> str:
        return f"{self.network}, {self.resize}, {self.normalisation}, rows of length 1"


@dataclass(frozen=True)
class Network:
    """An extractor: a function of images to features `[N, D]`, float32, each row of length 1.

    Images are a sequence of PIL images of any sizes, or a float tensor `[N, 3, H, W]` in [-1, 1].

    Attributes:
        features: how the features are made.
        forward: maps a few images to `[n, D]`; what it returns is brought to length 1.
        batch_size: images in one pass of the network.
    """

    features: Features
    forward: Callable[[Sequence[Image] | Tensor], Tensor]
    batch_size: int

    @torch.no_grad()
    def __call__(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Features of images.

        Raises:
            ValueError: for no images, and for a tensor of another shape or of integers.
        """
        if len(images) == 0:
            raise ValueError("images is empty; pass at least one image.")
        if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()):
            raise ValueError(
                f"images is a tensor of shape {tuple(images.shape)} and {images.dtype}; "
                "use a float tensor [N, 3, H, W] in [-1, 1], or PIL images."
            )
        starts = range(0, len(images), self.batch_size)
        return torch.cat([normalize(self.forward(images[at : at + self.batch_size]), dim=-1) for at in starts])


def finite(values: Tensor, name: str = "features") -> Tensor:
    """Features or images as they are, once nothing among them is NaN or infinite.

    Raises:
        ValueError: if something is, or if there are none.
    """
    if not values.numel():
        raise ValueError(f"{name} has shape {tuple(values.shape)}, which is empty.")
    if not values.isfinite().all():
        rows = values.reshape(-1, values.shape[-1]) if values.ndim else values[None, None]
        bad = (~rows.isfinite()).any(dim=-1).sum().item()
        raise ValueError(f"{name} has NaN or infinite values, in {bad} of {len(rows)} rows; measure without them.")
    return values


def power_below(size: Tensor) -> Tensor:
    """The power of two below a float64 size, 1 for 0: to divide by it is exact, and keeps squares in range."""
    mantissa, _ = size.frexp()
    return (size / (2 * mantissa)).where(size > 0, 1)


def unit_rows(features: Tensor, name: str = "features") -> Tensor:
    """Rows `[..., D]` at length 1 in float64, however small or large they are.

    Raises:
        ValueError: if a row is zero or not finite.
    """
    rows = finite(features, name).double()
    if not rows.any(dim=-1).all():
        raise ValueError(f"{name} has a row that is zero; every row needs a direction.")
    rows = rows / power_below(rows.abs().amax(dim=-1, keepdim=True))
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths


def to_tensors(images: Sequence[Image] | Tensor) -> list[Tensor]:
    """Each image as float32 `[1, 3, H, W]` in [-1, 1]."""
    if isinstance(images, Tensor):
        return list(images.float()[:, None])
    import numpy as np

    arrays = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
    return [array.permute(2, 0, 1)[None] / 127.5 - 1 for array in arrays]


def digest(network: nn.Module) -> str:
    """Twelve digits that tell a network's weights from others, wherever they came from."""
    found = sha256()
    for name, weight in sorted(network.state_dict().items()):
        found.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
