"""Gradients that are recorded through an attachment: passed on as they should be, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from variegate.intervention import Intervention

_FUNCTION = "_gradient_checkpointing_func"  # of diffusers' modules: takes a block and its arguments


def applied(intervention: Intervention, given: Tensor, *rest: Any) -> Tensor:
    """What the edit of an intervention makes of a tensor.

    Args:
        intervention: of any kind; its `edit` is called.
        given: the tensor that it edits.
        rest: its edit's further arguments.

    Raises:
        ValueError: if gradients are being recorded, and the edit has dropped those of the tensor.
    """
    edited: Tensor = intervention.edit(given, *rest)  # type: ignore[attr-defined]  # every kind has one
    lost = torch.is_grad_enabled() and given.requires_grad and not edited.requires_grad
    if lost and not any(edited is other for other in rest):  # which may well have none
        raise ValueError(
            f"{type(intervention).__name__} can't be differentiated, and gradients are being recorded through it; use "
            "torch.no_grad() around the call, or leave it out where a loss is taken."
        )
    return edited


def refuse_backward(module: nn.Module) -> None:
    """Refuse a call in a backward pass, where a checkpoint makes it and nothing tells the step it belongs to.

    Raises:
        ValueError: if there is a backward pass around.
    """
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            f"{type(module).__name__} is run again in a backward pass, by a checkpoint that does not tell the step it "
            "belongs to; use the denoiser's own enable_gradient_checkpointing()."
        )


class Checkpoints:
    """Gradient checkpointing that edits a block in the backward pass, when it runs again, as in the forward pass.

    Args:
        denoiser: of diffusers; others have nothing to wrap.
        remember: gives a context in which edits are those of now.
    """

    def __init__(self, denoiser: nn.Module, remember: Callable[[], Callable[[], AbstractContextManager[None]]]) -> None:
        self._denoiser, self._remember = denoiser, remember

    def wrap(self) -> None:
        """Where blocks are about to be checkpointed, remember the edits; harmless when done twice."""
        for module in self._denoiser.modules() if torch.is_grad_enabled() else ():
            if getattr(module, "gradient_checkpointing", False):
                vars(module)[_FUNCTION] = _Remembering(self, _without(self, vars(module)[_FUNCTION]), self._remember)

    def unwrap(self) -> None:
        """Leave the modules as they were."""
        for module in self._denoiser.modules():
            if isinstance(function := vars(module).get(_FUNCTION), _Remembering):
                vars(module)[_FUNCTION] = _without(self, function)


class _Remembering:
    """In place of a module's function that checkpoints its blocks; one for each attachment, in any order."""

    def __init__(self, owner: Checkpoints, inner: Any, remember: Callable[[], Any]) -> None:
        self.owner, self.inner, self.remember = owner, inner, remember

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        restored = self.remember()

        def run(*args: Any, **kwargs: Any) -> Any:
            with restored():
                return block(*args, **kwargs)

        return self.inner(run, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        """A copied module comes without the attachment."""
        return self.inner


def _without(owner: Checkpoints, function: Any) -> Any:
    """A function that checkpoints, after the link of one attachment is taken out of the chain."""
    if not isinstance(function, _Remembering):
        return function
    function.inner = _without(owner, function.inner)
    return function.inner if function.owner is owner else function
