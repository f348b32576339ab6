"""Attach interventions to a pipeline or a denoiser: the only code that touches hooks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from variegate.architectures import Architecture
from variegate.clock import Clock
from variegate.intervention import KINDS, Intervention
from variegate.noise import Start
from variegate.plan import Plan

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")


def attach(
    target: Any, *interventions: Intervention, groups: Sequence[int | str] | None = None, seed: int = 0
) -> Attachment:
    """Let interventions act on every generation of a stock pipeline until they are removed.

    Args:
        target: a diffusers pipeline, or a bare denoiser such as its transformer; compiled or wrapped ones too, see
            docs/compatibility.md.
        interventions: act in this order where they meet at the same place.
        groups: a label per image of the batch, prompt by prompt; images with equal labels are pushed apart. None:
            those with the same prompt.
        seed: of the random numbers of methods that draw some; every image of a batch has a stream of its own.

    Returns:
        A handle and context manager; nothing of it is left on the pipeline after `remove()` or the `with` block.

    Raises:
        ValueError: if the target lacks the site or the blocks that an intervention asks for.
        TypeError: if an argument is not an `Intervention`, or of no kind that acts.

    Example:
        >>> from variegate import ContextualRepulsion, attach
        >>> from variegate.emoji import load_pipeline
        >>> pipe = load_pipeline("emoji-base")
        >>> with attach(pipe, ContextualRepulsion()):
        ...     images = pipe("an animal", num_images_per_prompt=4, num_inference_steps=8).images
        >>> len(images)
        4
    """
    return Attachment(target, interventions, groups, seed)


class Attachment:
    """Interventions at work on a pipeline. Made by `attach`; `architecture` takes the place of the table's record."""

    def __init__(
        self,
        target: Any,
        interventions: Sequence[Intervention],
        groups: Sequence[int | str] | None = None,
        seed: int = 0,
        architecture: Architecture | None = None,
    ) -> None:
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"attach takes interventions such as ContextualRepulsion(), not {type(intervention).__name__}."
                )
            if not isinstance(intervention, KINDS):
                raise TypeError(
                    f"{type(intervention).__name__} derives from no kind of intervention that acts, so nothing would "
                    f"call its edit; derive it from one of {', '.join(kind.__name__ for kind in KINDS)}."
                )
        self._handles: list[RemovableHandle] = []
        self._plans: list[Plan] = []
        self._start: Start | None = None
        self._warnings: set[str] = set()
        enabled = [intervention for intervention in interventions if intervention.enabled]
        pipeline = None if isinstance(target, nn.Module) else target
        clock = Clock(pipeline, groups)
        try:
            denoisers = denoisers_of(target)
            self._start = Start(pipeline, enabled)
            for denoiser in denoisers:
                self._plans.append(Plan(denoiser, architecture, enabled, clock, self._start, seed, self._warn_once))
            for plan in self._plans:
                for module, hook in plan.tokens.hooks():
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                if plan.predictions:
                    self._handles.append(plan.outer.register_forward_hook(plan.end))
                self._handles.append(plan.outer.register_forward_pre_hook(plan.begin, with_kwargs=True))
            if any(plan.is_compiled() for plan in self._plans):
                torch.compiler.reset()  # graphs made without the hooks would go on without them
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off again; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._plans:
            self._plans.pop().tokens.forget()
        if self._start is not None:
            self._start.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


def denoisers_of(target: Any) -> list[nn.Module]:
    """The transformers or U-Nets of a pipeline; of a bare denoiser, itself.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(target, nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in DENOISERS]
    denoisers = [module for module in found if isinstance(module, nn.Module)]
    if not denoisers:
        raise ValueError(
            f"{type(target).__name__} has no denoiser to attach to (looked for {', '.join(DENOISERS)}); "
            "pass a diffusers pipeline or its transformer."
        )
    return denoisers
