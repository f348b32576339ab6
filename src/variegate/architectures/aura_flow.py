"""AuraFlow. Learned register tokens come before the text and take part in it."""

from variegate.architectures.layout import Architecture, Call, dual, leading, single, text_length


def _length(call: Call) -> int:
    return text_length(call) + int(call["self"].register_tokens.shape[1])


AURA_FLOW = Architecture(
    "AuraFlowTransformer2DModel",
    (dual("joint_transformer_blocks"), single("single_transformer_blocks", *leading(_length))),
)
