"""An edit as one opaque operator, so that a compiled graph is not broken where an attachment acts.

No `from __future__ import annotations` here: torch reads the operator's signature from the annotations.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

# Weakly: hooks hold their edits, and both end with the module they are on.
_EDITS: weakref.WeakValueDictionary[int, Callable[[Tensor], Tensor]] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(edit: Callable[[Tensor], Tensor]) -> int:
    """Give an edit, which the caller keeps, a key by which a compiled graph finds it."""
    key = next(_KEYS)
    _EDITS[key] = edit
    return key


def forget(key: int) -> None:
    """Drop an edit."""
    _EDITS.pop(key, None)


@torch.library.custom_op("variegate::edit", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def edit(tokens: Tensor, key: int) -> Tensor:
    """What the edit of `key` makes of the tokens; always a new tensor, as an operator must."""
    edited = _EDITS[key](tokens)
    return edited.clone() if edited is tokens else edited.contiguous()


def _refuse(*args: object, **kwargs: object) -> None:
    raise ValueError(
        "Gradients are being recorded through an attachment inside a compiled denoiser, which does not pass them on; "
        "use torch.no_grad() around the call, or a denoiser that is not compiled."
    )


edit.register_autograd(_refuse, setup_context=_refuse)


@edit.register_fake
def _(tokens: Tensor, key: int) -> Tensor:
    return tokens.new_empty(tokens.shape)
