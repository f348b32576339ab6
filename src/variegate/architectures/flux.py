"""Flux.1: dev, schnell, Kontext, Fill, Control and ControlNet variants."""

from variegate.architectures.layout import Architecture, Blocks, Call, Element, Span


def _text(call: Call) -> slice:
    return slice(call["encoder_hidden_states"].shape[1])


FLUX = Architecture(
    denoiser="FluxTransformer2DModel",
    # A block returns (text, image); the attention of a dual-stream block (image, text), that of a single-stream
    # block one sequence, text first.
    blocks=(
        Blocks("transformer_blocks", text=Element(0), image=Element(1)),
        Blocks("single_transformer_blocks", text=Element(0), image=Element(1), attention_text=Span(_text)),
    ),
    branches=(),  # true CFG is a second call
)
