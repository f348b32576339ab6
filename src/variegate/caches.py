"""diffusers' caches, which answer for blocks and take note of every run: out of the way for a run of our own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# First block cache, MagCache, TaylorSeer, FasterCache, pyramid attention broadcast and whatever else is in a file of
# such a name; other hooks in the same registries, such as those that move weights, go on.
_CACHES = re.compile(r"diffusers\.hooks\.(\w+_cache|pyramid_attention_broadcast)")


@contextmanager
def uncached(module: nn.Module) -> Iterator[None]:
    """The module and its parts run without caches, which neither answer nor take note.

    Args:
        module: a denoiser or a block of one.
    """
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
    chains = [hook.fn_ref for hook in hooks if _CACHES.fullmatch(type(hook).__module__)]
    before = [dict(vars(chain)) for chain in chains]
    try:
        for chain in chains:
            chain.pre_forward, chain.post_forward = _arguments, _output
            chain.forward = chain.original_forward or chain.forward
        yield
    finally:
        for chain, values in zip(chains, before, strict=True):
            vars(chain).update(values)


def _arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _output(module: nn.Module, output: Any) -> Any:
    return output
