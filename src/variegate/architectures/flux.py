"""Flux and the models built like it: dual-stream blocks, then single-stream ones."""

from torch import Tensor

from variegate.architectures.layout import Architecture, Call, dual, leading, single, split, text_length

_TEXT, _IMAGE = leading(text_length)
_FLUX = (dual("transformer_blocks"), split("single_transformer_blocks", _TEXT))
_JOINT = (dual("transformer_blocks"), single("single_transformer_blocks", _TEXT, _IMAGE))


def _chroma(call: Call) -> Tensor | None:
    both = call.get("attention_mask")
    return None if both is None else both[:, : text_length(call)].bool()


# True guidance is a call of its own in all of them but Bria.
FLUX = Architecture("FluxTransformer2DModel", _FLUX, branches=())
FLUX2 = Architecture("Flux2Transformer2DModel", _JOINT, branches=())
# Its text-only blocks see no image.
FLUX3 = Architecture("Flux3Transformer2DModel", _FLUX[1:], branches=())
CHROMA = Architecture("ChromaTransformer2DModel", _JOINT, branches=(), real=_chroma)
OVIS = Architecture("OvisImageTransformer2DModel", _FLUX, branches=())
LONGCAT = Architecture("LongCatImageTransformer2DModel", _FLUX, branches=())
BRIA = Architecture("BriaTransformer2DModel", _FLUX)
