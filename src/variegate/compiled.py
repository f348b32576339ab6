"""What acts inside a compiled graph: an edit as one opaque operator, and modules that no graph made without it fits.

No `from __future__ import annotations` here: torch reads the operator's signature from the annotations.
"""

import itertools
from collections.abc import Callable
from types import MethodType
from typing import Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn


class Edit(Protocol):
    """What edits tokens."""

    @property
    def apply(self) -> Callable[[Tensor], Tensor]:
        """The tokens, edited."""


_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # older torch has no such tag
_EDITS: WeakValueDictionary[int, Edit] = WeakValueDictionary()  # weak: hooks hold them, and pipelines hold the hooks
_KEYS = itertools.count()
_MARKS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many marks a module has


def register(edit: Edit) -> Tensor:
    """Give an edit the key by which a graph finds it: a tensor, so that blocks share a graph and yet are told apart."""
    key = next(_KEYS)
    _EDITS[key] = edit
    return torch.tensor(key, device="cpu")


@torch.library.custom_op("variegate::edit", mutates_args=(), tags=_TAGS)
def edit(tokens: Tensor, key: Tensor) -> Tensor:
    """What the edit of `key` makes of the tokens; always a new tensor, as an operator must."""
    edited = _EDITS[int(key)].apply(tokens)
    return edited.clone() if edited is tokens else edited.contiguous()


def _refuse(*args: object, **kwargs: object) -> None:
    raise ValueError(
        "Gradients are being recorded through an attachment inside a compiled denoiser, which does not pass them on; "
        "use torch.no_grad() around the call, or a denoiser that is not compiled."
    )


edit.register_autograd(_refuse, setup_context=_refuse)


@edit.register_fake
def _(tokens: Tensor, key: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape)


class Mark:
    """Until it is removed, graphs made while a module had no hooks don't fit it.

    Dynamo finds the graph for a module by its class and attributes, and leaves out whether it has hooks: a graph made
    before they came, or for the same block of another pipeline, would go on without them. It does look at whether a
    module has a `forward` of its own, so that is what the mark is; it is the one of the class, and nothing is computed
    otherwise. Graphs with hooks need no mark: they fit only modules with as many hooks of the same kind.

    Attributes:
        tells: whether it tells. It doesn't where something else has put a `forward` there before.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.tells = module in _MARKS or "forward" not in vars(module)
        if self.tells:
            _MARKS[module] = _MARKS.get(module, 0) + 1
            module.forward = module.forward

    def remove(self) -> None:
        """Take it off, with the module's last mark; harmless when done twice."""
        if not self.tells:
            return
        self.tells = False
        _MARKS[self._module] -= 1
        if not _MARKS[self._module]:
            del _MARKS[self._module]
            if vars(self._module).get("forward") == MethodType(type(self._module).forward, self._module):
                del self._module.forward  # what has been put over it meanwhile stays, and calls it
