"""Lumina-Image 2.0. Each row is its own text, without padding, then the image."""

from variegate.architectures.layout import Architecture, Call, Place, by_row, single


def _lengths(call: Call) -> list[int]:
    lengths: list[int] = call["encoder_attention_mask"].sum(1).tolist()
    return lengths


def _text(call: Call) -> Place:
    lengths = _lengths(call)
    return by_row([0] * len(lengths), lengths)


def _image(call: Call) -> Place:
    size = call["self"].config.patch_size
    *_, height, width = call["hidden_states"].shape
    tokens = (height // size) * (width // size)
    lengths = _lengths(call)
    return by_row(lengths, [tokens] * len(lengths))


LUMINA2 = Architecture("Lumina2Transformer2DModel", (single("layers", _text, _image),), branches=(), sign=-1)
