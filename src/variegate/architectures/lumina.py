"""Lumina-Image 2.0. Each row is its own text, without padding, then the image."""

from variegate.architectures.layout import Architecture, Call, Place, single


def _lengths(call: Call) -> list[int]:
    lengths: list[int] = call["encoder_attention_mask"].sum(1).tolist()
    return lengths


def _text(call: Call) -> Place:
    lengths = _lengths(call)
    return slice(lengths[0]) if len(set(lengths)) == 1 else [slice(0, length) for length in lengths]


def _image(call: Call) -> Place:
    size = call["self"].config.patch_size
    *_, height, width = call["hidden_states"].shape
    tokens = (height // size) * (width // size)
    lengths = _lengths(call)
    found = [slice(length, length + tokens) for length in lengths]
    return found[0] if len(set(lengths)) == 1 else found


LUMINA2 = Architecture("Lumina2Transformer2DModel", (single("layers", _text, _image),), branches=(), sign=-1)
