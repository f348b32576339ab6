"""Motif-Video: blocks return (video, text); the decoder blocks at the end get video in place of text."""

from variegate.architectures.layout import Architecture, dual, mask

MOTIF_VIDEO = Architecture(
    "MotifVideoTransformer3DModel",
    (
        dual("transformer_blocks", text=1),
        dual(
            "single_transformer_blocks",
            text=1,
            stop=lambda model: len(model.single_transformer_blocks) - model.num_decoder_layers,
        ),
    ),
    branches=(),
    real=mask("encoder_attention_mask"),
)
