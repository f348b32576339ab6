"""Attach interventions to a pipeline or a denoiser: the only code that touches hooks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from variegate import compiled
from variegate.architectures import Architecture, architecture_of, known_architectures
from variegate.architectures.layout import Call, Locate, Part, Place
from variegate.clock import Clock
from variegate.intervention import SITES, Intervention, SampleSet, Site

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")


def attach(target: Any, *interventions: Intervention, groups: Sequence[int | str] | None = None) -> Attachment:
    """Let interventions act on every generation of a stock pipeline until they are removed.

    Args:
        target: a diffusers pipeline, or a bare denoiser such as its transformer; compiled ones too, see
            docs/compatibility.md.
        interventions: act in this order where they meet at the same place.
        groups: a label per image of the batch, prompt by prompt; images with equal labels are pushed apart. None:
            those with the same prompt.

    Returns:
        A handle and context manager; nothing of it is left on the pipeline after `remove()` or the `with` block.

    Raises:
        ValueError: if the target lacks the site or the blocks that an intervention asks for.
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
    """Interventions at work on a pipeline. Made by `attach`; `architecture` takes the place of the table's record."""

    def __init__(
        self,
        target: Any,
        interventions: Sequence[Intervention],
        groups: Sequence[int | str] | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"attach takes interventions such as ContextualRepulsion(), not {type(intervention).__name__}."
                )
        self._handles: list[RemovableHandle] = []
        self._plans: list[_Denoiser] = []
        self._warned = False
        self._compiled = False
        enabled = [intervention for intervention in interventions if intervention.enabled]
        clock = Clock(None if isinstance(target, nn.Module) else target, groups)
        try:
            for denoiser in _denoisers(target):
                self._plans.append(_Denoiser(denoiser, architecture, enabled, clock, self._warn_once))
            for plan in self._plans:
                for module, hook in plan.hooks():
                    self._handles.append(module.register_forward_hook(hook))
                self._handles.append(plan.outer.register_forward_pre_hook(plan.begin, with_kwargs=True))
            self._compiled = any(plan.is_compiled() for plan in self._plans)
            if self._compiled:
                torch.compiler.reset()  # graphs made without the hooks would go on without them
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off again; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._plans:
            self._plans.pop().forget()
        if self._compiled:
            self._compiled = False
            torch.compiler.reset()

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


Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class _Edit:
    """One intervention at one module: what a hook reads, kept plain enough to be traced into a graph."""

    def __init__(self, part: Part, intervention: Intervention, apply: Callable[[Intervention, Tensor], Tensor]) -> None:
        self.part, self.intervention = part, intervention
        self.on = False
        self.place: Place = None
        self.apply = functools.partial(apply, intervention)
        self.key = compiled.register(self.apply)

    def __call__(self, output: Any) -> Any:
        """The module's output, edited."""
        tokens = self.part.get(output, self.place) if self.on else None
        if tokens is None:
            return output
        edited = compiled.edit(tokens, self.key) if torch.compiler.is_compiling() else self.apply(tokens)
        return output if edited is tokens else self.part.put(output, self.place, edited)


class _Denoiser:
    """One denoiser's plan: which edits follow which module, and what the current call means to them."""

    def __init__(
        self,
        outer: nn.Module,
        architecture: Architecture | None,
        interventions: Sequence[Intervention],
        clock: Clock,
        warn: Callable[[str], None],
    ) -> None:
        self.outer = outer
        self.module: nn.Module = getattr(outer, "_orig_mod", outer)  # torch.compile(model) wraps it
        self.clock, self.warn = clock, warn
        self.architecture = architecture or architecture_of(self.module)
        self.parameters = list(inspect.signature(type(self.module).forward).parameters)
        self.sets: tuple[SampleSet, ...] = ()
        self.rows = 0
        self.real: Tensor | None = None
        self.edits: list[_Edit] = []
        self.edits_of: dict[nn.Module, list[_Edit]] = defaultdict(list)
        self.blocks = [(layout, block) for layout in self.architecture.blocks for block in layout.of(self.module)]
        _refuse_split_tokens(self.module)
        for intervention in interventions:
            self._check_site(intervention.site)
            chosen = intervention.select(len(self.blocks))
            unread = len(self.blocks) - 1 if intervention.skips_last and _is_text(intervention.site) else None
            for index, (layout, block) in enumerate(self.blocks):
                part: Part | None = getattr(layout, intervention.site)
                if part is not None and index in chosen and index != unread:
                    self.edits.append(_Edit(part, intervention, self._apply))
                    self.edits_of[block.get_submodule(part.module)].append(self.edits[-1])

    def _check_site(self, site: Site) -> None:
        has = [name for name in SITES if any(getattr(layout, name) for layout, _ in self.blocks)]
        if site in has:
            return
        name, why = self.architecture.denoiser, self.architecture.no_context
        if _is_text(site) and why:
            advice = (
                'Use site="cross_attention", which pushes apart what the text contributes to the image'
                if "cross_attention" in has
                else 'Use site="image"'
                if has
                else f"Use a pipeline of {', '.join(known_architectures())}"
            )
            raise ValueError(
                f"{name} has no contextual space: {why}, so its text tokens are equal for all images of a prompt and "
                f"can't be pushed apart. {advice}."
            )
        raise ValueError(
            f"site={site!r} does not exist in {name}; use {' or '.join(map(repr, has)) or 'another model'}."
        )

    def hooks(self) -> list[tuple[nn.Module, Hook]]:
        """A hook per module that is edited."""

        def hook_of(edits: list[_Edit]) -> Hook:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                for edit in edits:
                    output = edit(output)
                return output

            return hook

        return [(module, hook_of(edits)) for module, edits in self.edits_of.items()]

    def forget(self) -> None:
        """Drop the edits from the register of compiled graphs."""
        for edit in self.edits:
            compiled.forget(edit.key)

    def is_compiled(self) -> bool:
        """Whether the denoiser or one of its modules is compiled."""
        return any(
            module._compiled_call_impl is not None  # module.compile()
            or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(module), or of module.forward
            for module in self.outer.modules()
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the denoiser runs: read the clock, and find the places of the tokens."""
        _refuse_split_tokens(self.module)
        call: Call = dict(zip(self.parameters, (self.module, *args), strict=False)) | kwargs
        step = self.clock.tick(self.architecture, call)
        self.sets = step.sets
        self.rows = sum(len(samples.rows) for samples in step.sets)
        places: dict[Locate | None, Place] = {}
        for edit in self.edits:
            edit.on = edit.intervention.active(step)
            if edit.on and edit.part.tokens not in places:
                places[edit.part.tokens] = edit.part.locate(call)
            edit.place = places.get(edit.part.tokens)
        masked = any(edit.on and not edit.intervention.padding for edit in self.edits)
        self.real = self.architecture.real(call) if masked and self.architecture.real is not None else None
        if any(edit.on for edit in self.edits) and all(len(samples.rows) == 1 for samples in step.sets):
            self.warn(
                "Every prompt has a single image, so there is nothing to push it away from: the images are those of "
                "the stock pipeline. Ask for more, e.g. num_images_per_prompt=4."
            )

    def _apply(self, intervention: Intervention, tokens: Tensor) -> Tensor:
        if len(tokens) != self.rows:
            raise ValueError(
                f"The denoiser was called with {self.rows} rows, but {len(tokens)} reach its blocks, so their samples "
                "can't be told apart; switch off what splits the batch inside the denoiser, such as FasterCache."
            )
        if intervention.padding or self.real is None or not _is_text(intervention.site):
            return _edit_sets(intervention, tokens, self.sets)
        # Zeros are what the flow leaves alone and does not see. A shorter mask is that of the last tokens: learned
        # ones come first.
        real = functional.pad(self.real.to(tokens.device), (tokens.shape[1] - self.real.shape[1], 0), value=True)[
            ..., None
        ]
        return torch.where(real, _edit_sets(intervention, tokens * real, self.sets), tokens)


def _is_text(site: Site) -> bool:
    return site in ("context", "attention")


def _refuse_split_tokens(denoiser: nn.Module) -> None:
    config = getattr(denoiser, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(denoiser).__name__} runs under context parallelism, which splits the tokens of a sample over "
            "devices; use tensor parallelism, or spread the prompts over the devices."
        )


def _edit_sets(intervention: Intervention, tokens: Tensor, sets: Sequence[SampleSet]) -> Tensor:
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
