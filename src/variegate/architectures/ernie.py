"""ERNIE-Image: one joint sequence, image first; its blocks, though not their attention, have the rows in axis 1."""

import torch
from torch import Tensor

from variegate.architectures.layout import Architecture, Blocks, Call, Part


def _length(call: Call) -> int:
    return int(call["text_bth"].shape[1])


def _text(call: Call) -> slice:
    return slice(-_length(call), None)


def _image(call: Call) -> slice:
    return slice(-_length(call))


def _real(call: Call) -> Tensor:
    lengths: Tensor = call["text_lens"]
    return torch.arange(_length(call), device=lengths.device) < lengths[:, None]


ERNIE_IMAGE = Architecture(
    "ErnieImageTransformer2DModel",
    (
        Blocks(
            "layers.*",
            context=Part(tokens=_text, batch=1),
            image=Part(tokens=_image, batch=1),
            attention=Part(tokens=_text, module="self_attention"),
        ),
    ),
    text="text_bth",
    real=_real,
)
