"""Extractors whose networks come from a folder or the hub: DINOv2 and CLIP, by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from variegate.metrics.features import Features, Network, digest

if TYPE_CHECKING:
    from PIL.Image import Image

DINOV2 = "facebook/dinov2-base"
CLIP = "openai/clip-vit-large-patch14"


def dinov2(model: str | Path = DINOV2, *, device: str | torch.device = "cpu", batch_size: int = 16) -> Network:
    """Extractor of DINOv2 features: the class token after the last norm.

    Args:
        model: hub id, or folder with config.json, model.safetensors and preprocessor_config.json.
        device: where the network runs and the features stay.
        batch_size: images in one pass of the network.

    Returns:
        A function of images to features `[N, D]`, D = 768 for the default. Images are resized, cropped and
        normalised as the model's own preprocessor says, by PIL; tensors are rounded to 8 bits for it.

    Raises:
        ValueError: if the model can't be loaded, is of another kind, or lacks weights.

    Reference:
        Oquab et al., arXiv:2304.07193.
    """
    network, prepare, features = _load("dinov2", model, DINOV2, device)

    def forward(images: Sequence[Image] | Tensor) -> Tensor:
        found: Tensor = network(pixel_values=prepare(images)).pooler_output
        return found

    return Network(features, forward, batch_size)


@dataclass(frozen=True)
class Clip(Network):
    """A CLIP extractor of images that knows texts as well.

    Attributes:
        read: maps texts to `[n, D]`.
    """

    read: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features `[N, D]` of texts, each row of length 1; longer ones than the model takes are cut."""
        starts = range(0, len(prompts), self.batch_size)
        return torch.cat([normalize(self.read(prompts[at : at + self.batch_size]), dim=-1) for at in starts])


def clip(model: str | Path = CLIP, *, device: str | torch.device = "cpu", batch_size: int = 16) -> Clip:
    """Extractor of CLIP's projected image features, and of its text features.

    Args:
        model: hub id, or folder with config.json, model.safetensors, preprocessor_config.json and a tokenizer.
        device: where the network runs and the features stay.
        batch_size: images or texts in one pass of the network.

    Returns:
        A function of images to features `[N, D]`, D = 768 for the default, with a method `texts`. Images are
        prepared as for `dinov2`.

    Raises:
        ValueError: if the model can't be loaded, is of another kind, or lacks weights.

    Reference:
        Radford et al., arXiv:2103.00020.
    """
    network, prepare, features = _load("clip", model, CLIP, device)
    with plain_errors("clip", model, CLIP):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)

    def forward(images: Sequence[Image] | Tensor) -> Tensor:
        pooled = network.vision_model(pixel_values=prepare(images)).pooler_output
        found: Tensor = network.visual_projection(pooled)
        return found

    def read(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        found: Tensor = network.text_projection(network.text_model(**tokens).pooler_output)
        return found

    return Clip(features, forward, batch_size, read)


def _load(
    kind: str, model: str | Path, usual: str, device: str | torch.device
) -> tuple[Any, Callable[[Sequence[Image] | Tensor], Tensor], Features]:
    """A network, what prepares images for it, and how its features are made."""
    with plain_errors(kind, model, usual):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        found = AutoConfig.from_pretrained(model).model_type
        if found != kind:
            raise ValueError(f"its kind is {found}")
        network, report = AutoModel.from_pretrained(model, use_safetensors=True, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"it lacks weights, {min(report['missing_keys'])} for one")
        # Not torchvision's, where that is installed: features must not depend on it.
        processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    network.to(device, torch.float32).eval()

    def prepare(images: Sequence[Image] | Tensor) -> Tensor:
        # One by one: pictures are large, and what is made of them is small.
        pictures = _pictures(images) if isinstance(images, Tensor) else (image.convert("RGB") for image in images)
        pixels = [processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures]
        return torch.cat(pixels).to(device)

    return network, prepare, Features(f"{kind} {digest(network)}", *_preparation(processor.to_dict()))


@contextmanager
def plain_errors(kind: str, model: str | Path, usual: str) -> Iterator[None]:
    """Whatever keeps a model from loading, as one sentence that says what would work."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"model={str(model)!r} can't be loaded as {kind} ({reason}). Use a folder or hub id of such a model, "
            f"with model.safetensors; `hf download {usual}` fetches the usual one."
        ) from error


def _preparation(facts: Mapping[str, Any]) -> tuple[str, str]:
    """What an image processor does to sizes and to values, from its configuration."""
    from PIL.Image import Resampling

    resize = "size as it is"
    if facts["do_resize"]:
        size = " ".join(f"{name} {value}" for name, value in facts["size"].items())
        resize = f"{size} {Resampling(facts['resample']).name.lower()}"
    if facts.get("do_center_crop"):
        resize += f" cropped to {facts['crop_size']['height']} x {facts['crop_size']['width']}"
    mean, std = (" ".join(f"{value:g}" for value in facts[f"image_{name}"]) for name in ("mean", "std"))
    return resize, f"mean {mean} std {std}"


def _pictures(images: Tensor) -> list[Image]:
    from PIL.Image import fromarray

    values = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return [fromarray(value.permute(1, 2, 0).contiguous().numpy()) for value in values]
