"""Qwen-Image, its Edit and Layered variants. In Edit, the text tokens include those of the images to edit."""

from variegate.architectures.layout import Architecture, dual, mask

QWEN_IMAGE = Architecture(
    "QwenImageTransformer2DModel",
    (dual("transformer_blocks"),),
    branches=(),
    real=mask("encoder_hidden_states_mask"),
)
