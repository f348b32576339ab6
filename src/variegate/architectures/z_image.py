"""Z-Image. Its refiners see only the image or only the text; in the layers that follow, the image comes first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from variegate.architectures.layout import Architecture, Call, Place, by_row, single

_MULTIPLE = 32  # both stretches are filled up to it with learned tokens


def _filled(length: int) -> int:
    return length + -length % _MULTIPLE


def _captions(call: Call) -> list[Sequence[Tensor]]:
    """The captions of each row: one, or in omni mode one for each image and one more."""
    return [row if isinstance(row, list) else [row] for row in call["cap_feats"]]


def _text_lengths(call: Call) -> list[int]:
    return [sum(_filled(len(caption)) for caption in row) for row in _captions(call)]


def _image_lengths(call: Call) -> list[int]:
    size, frames = call.get("patch_size", 2), call.get("f_patch_size", 1)

    def length(image: Tensor | None) -> int:
        if image is None:
            return _MULTIPLE
        _, f, h, w = image.shape
        return _filled((f // frames) * (h // size) * (w // size))

    return [sum(length(x) for x in row) if isinstance(row, list) else length(row) for row in call["x"]]


def _omni(call: Call) -> bool:
    return isinstance(call["x"][0], list)


def _text(call: Call) -> Place:
    lengths = _text_lengths(call)
    return by_row([0] * len(lengths) if _omni(call) else _image_lengths(call), lengths)


def _image(call: Call) -> Place:
    lengths = _image_lengths(call)
    return by_row(_text_lengths(call) if _omni(call) else [0] * len(lengths), lengths)


def _real(call: Call) -> Tensor:
    rows = [
        torch.cat([torch.arange(_filled(len(caption))) < len(caption) for caption in row]) for row in _captions(call)
    ]
    return pad_sequence(rows, batch_first=True)


Z_IMAGE = Architecture(
    "ZImageTransformer2DModel",
    (single("layers", _text, _image, attention="attention"),),
    branches=("cond", "uncond"),
    latents="x",
    text="cap_feats",
    real=_real,
    sign=-1,
)
