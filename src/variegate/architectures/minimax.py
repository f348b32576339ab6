"""MiniMax-H3: text, video and audio packed into one sequence by index."""

from variegate.architectures.layout import Architecture, Call, single


def _stretch(call: Call, *names: str) -> slice:
    return slice(min(int(call[name][0]) for name in names), max(int(call[name][-1]) for name in names) + 1)


def _text(call: Call) -> slice:
    return _stretch(call, "text_indices")


def _image(call: Call) -> slice:
    return _stretch(call, "video_indices", "audio_indices")


MINIMAX_H3 = Architecture("MiniMaxH3Transformer3DModel", (single("transformer_blocks", _text, _image),), branches=())
