"""Stable Diffusion 3 and 3.5."""

from variegate.architectures.layout import Architecture, Blocks, Element

SD3 = Architecture(
    denoiser="SD3Transformer2DModel",
    # A block returns (text, image), its attention (image, text); the last block returns no text.
    blocks=(Blocks("transformer_blocks", text=Element(0), image=Element(1)),),
)
