"""Ideogram 4: packed rows of padding, text and image, told apart by an indicator."""

from torch import Tensor

from variegate.architectures.layout import Architecture, Call, Locate, Part, Place, single

_TEXT, _IMAGE = 3, 2


def _stretch(kind: int) -> Locate:
    def locate(call: Call) -> Place:
        indicator: Tensor = call["indicator"]
        places = [row.nonzero().flatten() for row in indicator == kind]
        found = [slice(int(p[0]), int(p[-1]) + 1) if len(p) else slice(0, 0) for p in places]
        return found[0] if all(stretch == found[0] for stretch in found) else found

    return locate


# The unconditional branch is a denoiser of its own that is given no text.
IDEOGRAM4 = Architecture(
    "Ideogram4Transformer2DModel",
    (single("layers", _stretch(_TEXT), _stretch(_IMAGE), attention="attention"),),
    branches=(),
    sign=-1,
    output=Part(tokens=_stretch(_IMAGE)),
)
