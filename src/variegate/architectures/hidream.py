"""HiDream-I1. Before each block the last stretch of the text is replaced by another layer of its language model."""

from variegate.architectures.layout import Architecture, Blocks, Call, Part, single


def _replaced(call: Call) -> int:
    return int(call["encoder_hidden_states_llama3"].shape[2])


def _kept(call: Call) -> int:
    return int(call["encoder_hidden_states_t5"].shape[1]) + _replaced(call)


def _text(call: Call) -> slice:
    return slice(-_kept(call) - _replaced(call), -_replaced(call))


def _image(call: Call) -> slice:
    return slice(-_kept(call) - _replaced(call))


HIDREAM = Architecture(
    "HiDreamImageTransformer2DModel",
    (
        Blocks(
            "double_stream_blocks.*",
            context=Part(1, tokens=lambda call: slice(_kept(call))),
            image=Part(0),
            attention=Part(1, tokens=lambda call: slice(_kept(call)), module="block.attn1"),
        ),
        single("single_stream_blocks", _text, _image, attention="block.attn1"),
    ),
    text="encoder_hidden_states_t5",
    sign=-1,
)
