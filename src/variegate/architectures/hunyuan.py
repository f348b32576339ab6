"""HunyuanImage, HunyuanVideo and Framepack, HunyuanVideo 1.5: blocks return (image, text)."""

import torch
from torch import Tensor

from variegate.architectures.layout import Architecture, Call, dual, mask

_DUAL = dual("transformer_blocks", text=1)
_BLOCKS = (_DUAL, dual("single_transformer_blocks", text=1))


def _sorted(call: Call) -> Tensor:
    """Texts of several encoders are joined with all padding moved to the end."""
    masks = [call.get(f"encoder_attention_mask{suffix}") for suffix in ("", "_2")]
    given = torch.cat([m.bool() for m in masks if m is not None], dim=1)
    return given.sort(dim=1, descending=True, stable=True).values


def _with_image(call: Call) -> Tensor:
    """Embeddings of an image join the texts; all zero, they are padding too."""
    texts, embeddings = _sorted(call), call["image_embeds"]
    image = embeddings.new_full(embeddings.shape[:2], bool((embeddings != 0).any()), dtype=torch.bool)
    return torch.cat([image, texts], dim=1).sort(dim=1, descending=True, stable=True).values


HUNYUAN_IMAGE = Architecture("HunyuanImageTransformer2DModel", _BLOCKS, branches=(), real=_sorted)
HUNYUAN_VIDEO = Architecture(
    "HunyuanVideoTransformer3DModel", _BLOCKS, branches=(), real=mask("encoder_attention_mask")
)
HUNYUAN_VIDEO_FRAMEPACK = Architecture(
    "HunyuanVideoFramepackTransformer3DModel", _BLOCKS, branches=(), real=mask("encoder_attention_mask")
)
HUNYUAN_VIDEO_15 = Architecture("HunyuanVideo15Transformer3DModel", (_DUAL,), branches=(), real=_with_image)
