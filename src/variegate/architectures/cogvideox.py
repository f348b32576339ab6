"""CogVideoX, ConsisID and EasyAnimate: blocks return (video, text)."""

from variegate.architectures.layout import Architecture, dual

_BLOCKS = (dual("transformer_blocks", text=1, attention="attn1"),)

COGVIDEOX = Architecture("CogVideoXTransformer3DModel", _BLOCKS)
CONSISID = Architecture("ConsisIDTransformer3DModel", _BLOCKS)
EASY_ANIMATE = Architecture("EasyAnimateTransformer3DModel", _BLOCKS)
