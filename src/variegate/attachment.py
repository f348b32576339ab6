"""Attach interventions to a pipeline or a denoiser: the only code that touches hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

from variegate.architectures import Architecture
from variegate.clock import Clock
from variegate.compiled import Mark
from variegate.effects import Effects
from variegate.gradients import refuse_backward
from variegate.intervention import KINDS, Intervention
from variegate.noise import Start
from variegate.pipeline_calls import caller_of, is_called, leave, listen
from variegate.plan import Plan

_LIVING: weakref.WeakSet[Attachment] = weakref.WeakSet()  # not those whose pipelines are gone

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
        A handle and context manager; nothing of it is left on the pipeline after `remove()`, the `with` block, or
        `detach(target)`. Without a handle it stays in force as long as the pipeline lives.

    It acts on calls of this pipeline alone, not on those of others that share its denoiser. A method that was on in
    such a call and changed nothing is told of by a `UserWarning`.

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


class Hook:
    """A hook on a block; copies and pickles of the block come with one that does nothing, as `Plan`'s do."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """See `nn.Module.register_forward_hook`."""
        return self._function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., Any]]]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What a hook does in a copy."""


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
        self.target, self._architecture, self._seed = target, architecture, seed
        self.interventions = tuple(i for i in interventions if i.enabled and i.stop != 0)
        self._handles: list[RemovableHandle | Mark] = []
        self._plans: list[Plan] = []
        self._start: Start | None = None
        self._warnings: set[str] = set()
        self._called = self._strayed = False
        self._effects = Effects(self.interventions, self._warn_once)
        pipeline = None if isinstance(target, nn.Module) else target
        # What can't be called tells of no calls; it is taken for a holder of denoisers that are called by themselves.
        self._listens = pipeline is not None and callable(pipeline)
        self._clock = Clock(pipeline, groups)
        for twin in _attached_to(target):
            for name in {type(i).__name__ for i in twin.interventions} & {type(i).__name__ for i in self.interventions}:
                self._warn_once(
                    f"{name} is attached to this {type(target).__name__} already, and now acts twice; call "
                    "variegate.detach(pipe) first to take off what is there."
                )
        try:
            self._start = Start(pipeline, self.interventions, self._effects)
            self._follow()
            if self._listens:
                listen(pipeline, self)
        except BaseException:
            self.remove()
            raise
        _LIVING.add(self)

    def _follow(self) -> None:
        """Put hooks on the denoisers that the target has now, and on no others."""
        denoisers = denoisers_of(self.target)
        fitting = [plan.fits(denoiser) for plan, denoiser in zip(self._plans, denoisers, strict=False)]
        if all(fitting) and len(fitting) == len(denoisers) == len(self._plans):
            return
        self._unhook()
        for denoiser in denoisers:
            assert self._start is not None
            self._plans.append(
                Plan(
                    denoiser,
                    self._architecture,
                    self.interventions,
                    self._clock,
                    self._start,
                    self._seed,
                    self._effects,
                    self._warn_once,
                    self._is_here,
                    self._stray,
                )
            )
        for plan in self._plans:
            self._handles += plan.marks()
            for module, hook in plan.tokens.hooks():
                self._handles.append(module.register_forward_hook(Hook(hook), with_kwargs=True))
            if plan.predictions or not self._listens:
                self._handles.append(plan.outer.register_forward_hook(plan.end))
            # The prompts are read before any attachment edits them, whichever came first.
            self._handles.append(plan.outer.register_forward_pre_hook(plan.see, with_kwargs=True, prepend=True))
            self._handles.append(plan.outer.register_forward_pre_hook(plan.begin, with_kwargs=True))

    def _unhook(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._plans:
            self._plans.pop().tokens.forget()

    def _is_here(self) -> bool:
        """Whether this thread is inside a call of the target; one that calls a bare denoiser always is."""
        return not self._listens or is_called(self.target)

    def _stray(self, denoiser: nn.Module) -> None:
        """The denoiser is called, and not by its pipeline.

        Raises:
            ValueError: if a checkpoint around it runs it again in a backward pass: whose call that is nothing tells.
        """
        refuse_backward(denoiser)
        if caller_of(denoiser) is not None:
            self._strayed = True
        else:
            self._warn_once(
                f"The {type(denoiser).__name__} was called outside of any call of the {type(self.target).__name__}, "
                "and what is attached to that did nothing; for a loop of your own attach to the denoiser itself."
            )

    def begin_call(self) -> None:
        """The pipeline is about to run, with whatever denoisers it has now."""
        self._effects.forget()
        self._follow()

    def end_call(self, finished: bool) -> None:
        """The pipeline has run, to its end or until an exception."""
        self._called = True
        self._effects.completed = finished and not getattr(self.target, "interrupt", False)
        self._effects.end()

    def remove(self) -> None:
        """Take every hook off again; harmless when done twice."""
        self._unhook()
        if self._listens:
            leave(self.target, self)
        if self._start is not None:
            self._start.remove()
        _LIVING.discard(self)
        if self._strayed and not self._called:
            self._warn_once(
                f"The {type(self.target).__name__} was never called while something was attached to it, but another "
                "pipeline with the same denoiser was; attach to the one that is called."
            )
        self._effects.end()  # of a bare denoiser, whose last run nothing else has ended

    def __reduce__(self) -> NoReturn:
        raise TypeError("An attachment can't be copied or pickled; copy the pipeline, and attach to the copy.")

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._effects.forget()
        self.remove()

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


def detach(target: Any) -> None:
    """Take off everything that is attached to a pipeline or a bare denoiser, whoever holds the handles.

    Example:
        >>> from variegate import ContextualRepulsion, attach, detach
        >>> from variegate.emoji import load_pipeline
        >>> pipe = load_pipeline("emoji-base")
        >>> _ = attach(pipe, ContextualRepulsion())  # in force from here on
        >>> detach(pipe)
    """
    for attachment in _attached_to(target):
        attachment.remove()


def _attached_to(target: Any) -> list[Attachment]:
    return [attachment for attachment in _LIVING if attachment.target is target]


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
