"""CogView 3 Plus, CogView 4 and GLM-Image: blocks return (image, text)."""

from variegate.architectures.layout import Architecture, dual

_BLOCKS = (dual("transformer_blocks", text=1, attention="attn1"),)

COGVIEW3 = Architecture("CogView3PlusTransformer2DModel", _BLOCKS)
COGVIEW4 = Architecture("CogView4Transformer2DModel", _BLOCKS, branches=())
GLM_IMAGE = Architecture("GlmImageTransformer2DModel", _BLOCKS, branches=())
