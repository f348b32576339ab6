"""Krea 2: one joint sequence, text first."""

from variegate.architectures.layout import Architecture, leading, mask, single, text_length

KREA2 = Architecture(
    "Krea2Transformer2DModel",
    (single("transformer_blocks", *leading(text_length)),),
    branches=(),
    real=mask("encoder_attention_mask"),
)
