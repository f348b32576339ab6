"""Mochi: blocks return (video, text); the last one leaves the text as it is. Its time runs from noise to video."""

from variegate.architectures.layout import Architecture, dual, mask

MOCHI = Architecture(
    "MochiTransformer3DModel",
    (dual("transformer_blocks", text=1, attention="attn1"),),
    real=mask("encoder_attention_mask"),
    sign=-1,
)
