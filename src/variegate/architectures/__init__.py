"""Where the text tokens are: one record per denoiser class, found by class name, so diffusers is not imported.

A new model is one `Architecture` in a file of its own here and one entry in `_BUNDLED`; a model of your own is one
call of `register_architecture`.
"""

from __future__ import annotations

from torch import nn

from variegate.architectures.flux import FLUX
from variegate.architectures.layout import Architecture, Blocks, Element, Part, Span
from variegate.architectures.no_context import NO_CONTEXT
from variegate.architectures.sd3 import SD3

__all__ = [
    "Architecture",
    "Blocks",
    "Element",
    "Part",
    "Span",
    "architecture_of",
    "known_architectures",
    "register_architecture",
]

_BUNDLED = (SD3, FLUX)
_REGISTERED: dict[str, Architecture] = {architecture.denoiser: architecture for architecture in _BUNDLED}


def register_architecture(architecture: Architecture) -> None:
    """Make a denoiser class known, or replace what is known of it.

    Args:
        architecture: the record; it serves the class named in `denoiser` and classes derived from it.

    Example:
        >>> register_architecture(
        ...     Architecture("MyTransformer", (Blocks("blocks", text=Element(0), image=Element(1)),))
        ... )
        >>> "MyTransformer" in known_architectures()
        True
    """
    _REGISTERED[architecture.denoiser] = architecture


def known_architectures() -> tuple[str, ...]:
    """Names of the denoiser classes that have a contextual space we know, sorted."""
    return tuple(sorted(_REGISTERED))


def architecture_of(denoiser: nn.Module) -> Architecture:
    """The record of a denoiser's class or of the nearest class it derives from.

    Raises:
        ValueError: if the class has no contextual space, or is unknown.
    """
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    for name in names:
        if name in _REGISTERED:
            return _REGISTERED[name]
        if name in NO_CONTEXT:
            raise ValueError(
                f"{name} has no contextual space: {NO_CONTEXT[name]}, so its text tokens are equal for all images of a "
                f"prompt and can't be pushed apart. Use a pipeline of {', '.join(known_architectures())}."
            )
    raise ValueError(
        f"{names[0]} is not a known denoiser; known are {', '.join(known_architectures())}. Describe another one with "
        "variegate.register_architecture(Architecture(...))."
    )
