"""Ideogram 4: packed rows of padding, text and image, told apart by an indicator."""

from torch import Tensor

from variegate.architectures.layout import Architecture, Call, Locate, Part, Place, by_row, single

_TEXT, _IMAGE = 3, 2


def _stretch(kind: int) -> Locate:
    def locate(call: Call) -> Place:
        indicator: Tensor = call["indicator"]
        places = [row.nonzero().flatten() for row in indicator == kind]
        return by_row(
            [int(p[0]) if len(p) else 0 for p in places], [int(p[-1] - p[0]) + 1 if len(p) else 0 for p in places]
        )

    return locate


# The unconditional branch is a denoiser of its own that is given no text.
IDEOGRAM4 = Architecture(
    "Ideogram4Transformer2DModel",
    (single("layers", _stretch(_TEXT), _stretch(_IMAGE), attention="attention"),),
    branches=(),
    sign=-1,
    output=Part(tokens=_stretch(_IMAGE)),
)
