"""Where the text tokens are: one record per denoiser class, found by class name, so diffusers is not imported.

A new model is one `Architecture` in a file of its family here and one entry in `_BUNDLED`; a model of your own is one
call of `register_architecture`. `variegate.check_layout` tells whether a record is right.
"""

from __future__ import annotations

from torch import nn

from variegate.architectures.aura_flow import AURA_FLOW
from variegate.architectures.cogvideox import COGVIDEOX, CONSISID, EASY_ANIMATE
from variegate.architectures.cogview import COGVIEW3, COGVIEW4, GLM_IMAGE
from variegate.architectures.cross_attention import CROSS_ATTENTION, IMAGE_ONLY, NO_SITE
from variegate.architectures.ernie import ERNIE_IMAGE
from variegate.architectures.fibo import FIBO, FIBO2
from variegate.architectures.flux import BRIA, CHROMA, FLUX, FLUX2, FLUX3, LONGCAT, OVIS
from variegate.architectures.hidream import HIDREAM
from variegate.architectures.hunyuan import (
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
)
from variegate.architectures.ideogram import IDEOGRAM4
from variegate.architectures.joy import JOY_IMAGE_EDIT, JOY_IMAGE_EDIT_PLUS
from variegate.architectures.krea import KREA2
from variegate.architectures.layout import Architecture, Blocks, Part, dual, leading, single, split
from variegate.architectures.lumina import LUMINA2
from variegate.architectures.minimax import MINIMAX_H3
from variegate.architectures.mochi import MOCHI
from variegate.architectures.motif import MOTIF_VIDEO
from variegate.architectures.qwen import QWEN_IMAGE
from variegate.architectures.sd3 import SD3
from variegate.architectures.z_image import Z_IMAGE

__all__ = [
    "Architecture",
    "Blocks",
    "Part",
    "architecture_of",
    "dual",
    "known_architectures",
    "leading",
    "register_architecture",
    "single",
    "split",
]

_BUNDLED = (
    AURA_FLOW,
    BRIA,
    CHROMA,
    COGVIDEOX,
    COGVIEW3,
    COGVIEW4,
    CONSISID,
    EASY_ANIMATE,
    ERNIE_IMAGE,
    FIBO,
    FIBO2,
    FLUX,
    FLUX2,
    FLUX3,
    GLM_IMAGE,
    HIDREAM,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
    IDEOGRAM4,
    JOY_IMAGE_EDIT,
    JOY_IMAGE_EDIT_PLUS,
    KREA2,
    LONGCAT,
    LUMINA2,
    MINIMAX_H3,
    MOCHI,
    MOTIF_VIDEO,
    OVIS,
    QWEN_IMAGE,
    SD3,
    Z_IMAGE,
    *CROSS_ATTENTION,
    *IMAGE_ONLY,
    *NO_SITE,
)
_REGISTERED: dict[str, Architecture] = {architecture.denoiser: architecture for architecture in _BUNDLED}


def register_architecture(architecture: Architecture) -> None:
    """Make a denoiser class known, or replace what is known of it.

    Args:
        architecture: the record; it serves the class named in `denoiser` and classes derived from it.

    Example:
        >>> register_architecture(Architecture("MyTransformer", (dual("blocks"),)))
        >>> "MyTransformer" in known_architectures()
        True
    """
    _REGISTERED[architecture.denoiser] = architecture


def known_architectures(site: str = "context") -> tuple[str, ...]:
    """Names of the denoiser classes that have a site, sorted.

    Args:
        site: "context", "attention", "image" or "cross_attention".

    Example:
        >>> "SD3Transformer2DModel" in known_architectures()
        True
        >>> "UNet2DConditionModel" in known_architectures("cross_attention")
        True
    """
    return tuple(sorted(name for name, record in _REGISTERED.items() if any(getattr(b, site) for b in record.blocks)))


def architecture_of(denoiser: nn.Module) -> Architecture:
    """The record of a denoiser's class or of the nearest class it derives from.

    Raises:
        ValueError: if the class is unknown.
    """
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    for name in names:
        if name in _REGISTERED:
            return _REGISTERED[name]
    lists = [name for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
    raise ValueError(
        f"{names[0]} is not a known denoiser (its lists of modules: {', '.join(lists) or 'none'}); known are "
        f"{', '.join(known_architectures())}. Describe another one with "
        "variegate.register_architecture(variegate.Architecture(...)), and see whether the description is right with "
        "variegate.check_layout."
    )
