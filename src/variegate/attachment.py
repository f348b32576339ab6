"""Attach interventions to a pipeline or a denoiser: the only code that touches hooks."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from variegate.architectures import Blocks, Part, architecture_of
from variegate.architectures.layout import Call
from variegate.clock import Clock
from variegate.intervention import Intervention, SampleSet, Step

DENOISERS = ("transformer", "transformer_2", "unet")


def attach(target: Any, *interventions: Intervention, groups: Sequence[int | str] | None = None) -> Attachment:
    """Let interventions act on every generation of a stock pipeline until they are removed.

    Args:
        target: a diffusers pipeline, or a bare denoiser such as its transformer.
        interventions: act in this order where they meet at the same place.
        groups: a label per image of the batch, prompt by prompt; images with equal labels are pushed apart. None:
            those with the same prompt.

    Returns:
        A handle and context manager; nothing of it is left on the pipeline after `remove()` or the `with` block.

    Raises:
        ValueError: if the target has no known contextual space, or an intervention asks for blocks it lacks.
        TypeError: if an argument is not an `Intervention`.

    Example:
        >>> from variegate import ContextualRepulsion, attach
        >>> from variegate.emoji import load_pipeline
        >>> pipe = load_pipeline("emoji-base")
        >>> with attach(pipe, ContextualRepulsion()):
        ...     images = pipe("an animal", num_images_per_prompt=4, num_inference_steps=8).images
        >>> len(images)
        4
    """
    return Attachment(target, interventions, groups)


class Attachment:
    """Interventions at work on a pipeline. Made by `attach`."""

    def __init__(self, target: Any, interventions: Sequence[Intervention], groups: Sequence[int | str] | None) -> None:
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"attach takes interventions such as ContextualRepulsion(), not {type(intervention).__name__}."
                )
        self._handles: list[RemovableHandle] = []
        self._warned = False
        enabled = [intervention for intervention in interventions if intervention.enabled]
        pipeline = None if isinstance(target, nn.Module) else target
        plans = [_Denoiser(denoiser, enabled, pipeline, groups, self._warn_once) for denoiser in _denoisers(target)]
        try:
            for plan in plans:
                for module, hook in plan.hooks():
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                self._handles.append(plan.module.register_forward_pre_hook(plan.begin, with_kwargs=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off again; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, UserWarning, stacklevel=2)


def _denoisers(target: Any) -> list[nn.Module]:
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


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class _Denoiser:
    """One denoiser's plan: its clock, and which edits follow which module."""

    def __init__(
        self,
        module: nn.Module,
        interventions: Sequence[Intervention],
        pipeline: Any | None,
        groups: Sequence[int | str] | None,
        warn: Callable[[str], None],
    ) -> None:
        self.module = module
        architecture = architecture_of(module)
        self.clock = Clock(architecture, pipeline, groups)
        self.warn = warn
        self.parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.call: Call = {}
        self.step: Step | None = None
        self.active: list[Intervention] = []
        self.edits: dict[nn.Module, list[tuple[Part, Intervention]]] = defaultdict(list)
        blocks = [(layout, block) for layout in architecture.blocks for block in getattr(module, layout.name)]
        for intervention in interventions:
            chosen = intervention.select(len(blocks))
            for place, (layout, block) in enumerate(blocks):
                # Nobody reads the text that leaves the last block.
                if place in chosen and (place < len(blocks) - 1 or intervention.site == "image"):
                    where, part = _site(intervention, layout, block)
                    self.edits[where].append((part, intervention))
        self.interventions = list(interventions)

    def hooks(self) -> list[tuple[nn.Module, Hook]]:
        """A hook per module that is edited."""
        return [(module, self._hook(edits)) for module, edits in self.edits.items()]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the denoiser runs: read the clock."""
        self.call = dict(zip(self.parameters, args, strict=False)) | kwargs
        self.step = self.clock.tick(self.call)
        self.active = [i for i in self.interventions if i.active(self.step)]
        if self.active and all(len(samples.rows) == 1 for samples in self.step.sets):
            self.warn(
                "Every prompt has a single image, so there is nothing to push it away from: the images are those of "
                "the stock pipeline. Ask for more, e.g. num_images_per_prompt=4."
            )

    def _hook(self, edits: list[tuple[Part, Intervention]]) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            assert self.step is not None
            edited = output
            for part, intervention in edits:
                tokens = part.get(edited, self.call) if intervention in self.active else None
                if tokens is not None:
                    edited = part.put(edited, self.call, _apply(intervention, tokens, self.step.sets))
            return None if edited is output else edited

        return hook


def _site(intervention: Intervention, layout: Blocks, block: nn.Module) -> tuple[nn.Module, Part]:
    if intervention.site == "attention":
        return block.get_submodule(layout.attention), layout.attention_text
    return block, layout.text if intervention.site == "context" else layout.image


def _apply(intervention: Intervention, tokens: Tensor, sets: Sequence[SampleSet]) -> Tensor:
    """Edit `[rows, N, D]` tokens within each sample set; sets of equal size together."""
    by_size: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for samples in sets:
        if len(samples.rows) > 1 and intervention.branch in ("both", samples.branch):
            by_size[len(samples.rows)].append(samples.rows)
    edited = None
    for rows in by_size.values():
        if [row for samples in rows for row in samples] == list(range(len(tokens))):
            return intervention.edit(tokens.reshape(len(rows), -1, *tokens.shape[1:])).flatten(0, 1)
        index = torch.tensor(rows, device=tokens.device)
        edited = tokens.clone() if edited is None else edited
        edited[index] = intervention.edit(tokens[index])
    return tokens if edited is None else edited
