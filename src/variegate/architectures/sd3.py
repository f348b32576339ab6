"""Stable Diffusion 3 and 3.5."""

from variegate.architectures.layout import Architecture, dual

SD3 = Architecture("SD3Transformer2DModel", (dual("transformer_blocks"),))  # its last block returns no text
