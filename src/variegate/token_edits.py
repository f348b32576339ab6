"""Edits of tokens on their way through the denoiser: the hooks on its blocks."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from variegate import compiled
from variegate.architectures import Architecture, known_architectures
from variegate.architectures.layout import Blocks, Locate, Part, Place
from variegate.caches import uncached
from variegate.call import DenoiserCall
from variegate.effects import Effects
from variegate.gradients import Checkpoints, applied, refuse_backward
from variegate.intervention import SITES, BlockCall, BlockIntervention, ImageIntervention, Site
from variegate.noise import Start

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
Rerun = Callable[[Tensor], Tensor]  # image tokens of all rows into a block, and those that leave it


class _Edit:
    """One intervention at one module: what a hook reads, kept plain enough to be traced into a graph.

    Args:
        part: where its tokens are in what the module returns.
        whole: the intervention.
        intervention: its share of this module.
        apply: what edits the tokens of all rows.
    """

    def __init__(
        self, part: Part, whole: BlockIntervention, intervention: BlockIntervention, apply: Callable[..., Tensor]
    ) -> None:
        self.part, self.whole, self.intervention = part, whole, intervention
        self.on = False
        self.place: Place = None
        self.apply = functools.partial(apply, self)
        self.key = compiled.register(self)

    def __call__(self, output: Any, run: Callable[[_Edit, Tensor], Tensor]) -> Any:
        """The module's output, edited; `run` is the module with other image tokens."""
        tokens = self.part.get(output, self.place) if self.on else None
        if tokens is None:
            return output
        if torch.compiler.is_compiling():
            edited = compiled.edit(tokens, self.key)
        else:
            edited = self.apply(tokens, functools.partial(run, self))
        return output if edited is tokens else self.part.put(output, self.place, edited)


class TokenEdits:
    """The block interventions on one denoiser.

    Args:
        call: the denoiser's current call.
        start: what the pipeline starts from.
        effects: what the interventions have done.
        here: whether the denoiser is called for the target of the attachment.

    Attributes:
        blocks: of the denoiser, in order.

    Raises:
        ValueError: if the denoiser lacks the site or the blocks that an intervention asks for.
    """

    def __init__(self, call: DenoiserCall, start: Start, effects: Effects, here: Callable[[], bool]) -> None:
        self._call, self._start, self._effects, self._here = call, start, effects, here
        self._checkpoints = Checkpoints(call.denoiser, self._remember)
        self._forgotten = False
        self._again = False  # a block runs again in a backward pass, and its edits are those of the call it belongs to
        self._real: Tensor | None = None
        self._waits = False
        self._edits: list[_Edit] = []
        self._edits_of: dict[nn.Module, list[_Edit]] = defaultdict(list)
        self.blocks = blocks_of(call)
        for intervention in call.interventions:
            if not isinstance(intervention, BlockIntervention):
                continue
            _check_site(intervention.site, call.architecture, [layout for layout, _ in self.blocks])
            chosen = intervention.select(len(self.blocks))
            unread = len(self.blocks) - 1 if intervention.skips_last and _is_text(intervention.site) else None
            places = [
                (part, block.get_submodule(part.module))
                for index, (layout, block) in enumerate(self.blocks)
                if (part := getattr(layout, intervention.site)) is not None and index in chosen and index != unread
            ]
            share = intervention.split(len(places)) if places else intervention
            for part, module in places:
                self._edits.append(_Edit(part, intervention, share, self._apply))
                self._edits_of[module].append(self._edits[-1])

    def hooks(self) -> list[tuple[nn.Module, Hook]]:
        """A hook per module that is edited."""

        def hook_of(edits: list[_Edit]) -> Hook:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                for edit in edits:
                    if not torch.compiler.is_compiling() and edit.on and _is_skipped(args, kwargs, output):
                        self._effects.lose(edit.whole)
                    else:
                        output = edit(output, functools.partial(self._rerun, module, args, kwargs))
                return output

            return hook

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._waits:
                self._effects.read(not _is_skipped(args, kwargs, output))

        found = [(module, hook_of(edits)) for module, edits in self._edits_of.items()]
        return [*found, (self.blocks[-1][1], read)] if found else []

    def forget(self) -> None:
        """Drop what remembers the edits for a backward pass."""
        self._checkpoints.unwrap()
        self._forgotten = True

    def begin(self) -> None:
        """Before the denoiser runs: which edits act, and where their tokens are."""
        self._checkpoints.wrap()
        places: dict[Locate | None, Place] = {}
        for edit in self._edits:
            edit.on = edit.intervention.active(self._call.step)
            if edit.on and edit.part.tokens not in places:
                places[edit.part.tokens] = edit.part.locate(self._call.arguments)
            edit.place = places.get(edit.part.tokens)
        mask_of = self._call.architecture.real
        masked = any(edit.on and not edit.intervention.padding for edit in self._edits)
        self._real = mask_of(self._call.arguments) if masked and mask_of is not None else None
        # A cache that skips blocks skips the last one: text that has been edited is not read any more.
        self._waits = bool(getattr(self._call.denoiser, "is_cache_enabled", False))

    def _remember(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which the edits are those of now, for a block that runs again in a backward pass."""
        step, real, states = self._call.step, self._real, [(edit, edit.on, edit.place) for edit in self._edits]

        @contextmanager
        def restored() -> Iterator[None]:
            now = self._real, [(edit, edit.on, edit.place) for edit in self._edits], self._again
            gone = self.hooks() if self._forgotten else []  # the attachment was removed before the backward pass
            handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in gone]
            try:
                self._set(real, states, True)
                with self._call.within(step):
                    yield
            finally:
                self._set(*now)
                for handle in handles:
                    handle.remove()

        return restored

    def _set(self, real: Tensor | None, states: Sequence[tuple[_Edit, bool, Place]], again: bool) -> None:
        self._real, self._again = real, again
        for edit, on, place in states:
            edit.on, edit.place = on, place

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No edit of tokens acts."""
        on = [edit for edit in self._edits if edit.on]
        for edit in on:
            edit.on = False
        try:
            yield
        finally:
            for edit in on:
                edit.on = True

    def _apply(self, edit: _Edit, tokens: Tensor, rerun: Rerun | None = None) -> Tensor:
        if not self._again:
            if not self._here():
                return tokens
            refuse_backward(self._call.denoiser)
        edited = self._of_text(edit.intervention, tokens, rerun)
        self._effects.note(edit.whole, tokens, edited, waits=self._waits and _is_text(edit.intervention.site))
        return edited

    def _of_text(self, intervention: BlockIntervention, tokens: Tensor, rerun: Rerun | None) -> Tensor:
        """The tokens, edited; of text, padding is left out where it is to be."""
        called = sum(len(samples.rows) for samples in self._call.step.sets)
        if len(tokens) != called:
            raise ValueError(
                f"The denoiser was called with {called} rows, but {len(tokens)} reach its blocks, so their samples "
                "can't be told apart; switch off what splits the batch inside the denoiser, such as FasterCache."
            )
        if intervention.padding or self._real is None or not _is_text(intervention.site):
            return self._edit_tokens(intervention, tokens, rerun)
        # Zeros are what the flow leaves alone and does not see. A shorter mask is that of the last tokens: learned
        # ones come first.
        learned = tokens.shape[1] - self._real.shape[1]
        real = functional.pad(self._real.to(tokens.device), (learned, 0), value=True)[..., None]
        return torch.where(real, self._edit_tokens(intervention, tokens * real, rerun), tokens)

    def _edit_tokens(self, intervention: BlockIntervention, tokens: Tensor, rerun: Rerun | None) -> Tensor:
        """Edit `[rows, N, D]` tokens within each sample set."""
        edited = None
        for rows in self._call.batches(intervention):
            edit = self._edit_of(intervention, tokens, rows, rerun)
            if [row for samples in rows for row in samples] == list(range(len(tokens))):
                return edit(tokens.reshape(len(rows), -1, *tokens.shape[1:])).flatten(0, 1)
            index = torch.tensor(rows, device=tokens.device)
            edited = tokens.clone() if edited is None else edited
            edited[index] = edit(tokens[index])
        return tokens if edited is None else edited

    def _edit_of(
        self, intervention: Any, tokens: Tensor, rows: Sequence[Sequence[int]], rerun: Rerun | None
    ) -> Callable[[Tensor], Tensor]:
        """The edit as a function of the tokens `[S, B, N, D]` of these rows."""
        if not isinstance(intervention, ImageIntervention):
            return functools.partial(applied, intervention)

        def rerun_rows(new: Tensor) -> Tensor:
            if rerun is None:
                raise ValueError(
                    f"{type(intervention).__name__} runs a block twice, which can't be done inside a compiled "
                    "denoiser; attach it to one that is not compiled."
                )
            index = torch.tensor(rows, device=tokens.device)
            return rerun(tokens.index_put((index,), new))[index]

        block = BlockCall(self._call.moment(rows), self._start.size, rerun_rows)
        return lambda new: applied(intervention, new, block)

    def _rerun(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], edit: _Edit, tokens: Tensor
    ) -> Tensor:
        """Image tokens that leave a block if these, `[rows, N, D]`, enter it."""
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        # What enters a block comes first, and lies as what leaves it: the image alone, or behind or before the text.
        entry = replace(edit.part, element=None)
        old = entry.get(given[names[0]], edit.place)
        if old is None or old.shape != tokens.shape:
            raise ValueError(
                f"{type(block).__name__} is not given image tokens as it returns them; choose another block."
            )
        given[names[0]] = entry.put(given[names[0]], edit.place, tokens)
        with self.silent(), uncached(block):
            left = edit.part.get(block.forward(**given), edit.place)  # not a call, which would come back here
        assert left is not None
        return left


def blocks_of(call: DenoiserCall) -> list[tuple[Blocks, nn.Module]]:
    """The blocks that a denoiser has now, in order, each with its layout."""
    return [(layout, block) for layout in call.architecture.blocks for block in layout.of(call.denoiser)]


def _is_skipped(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether a block returned what it was given, as where a cache of diffusers skips it."""
    given = [*args, *kwargs.values()]
    left = output if isinstance(output, tuple) else (output,)
    return all(any(one is other for other in given) for one in left)


def _is_text(site: Site) -> bool:
    return site in ("context", "attention")


def _check_site(site: Site, architecture: Architecture, layouts: Sequence[Blocks]) -> None:
    has = [name for name in SITES if any(getattr(layout, name) for layout in layouts)]
    if site in has:
        return
    name, why = architecture.denoiser, architecture.no_context
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
    raise ValueError(f"site={site!r} does not exist in {name}; use {' or '.join(map(repr, has)) or 'another model'}.")
