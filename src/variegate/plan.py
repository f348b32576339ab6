"""What an attachment does with one denoiser: which edits follow which module, and what the current call means."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from variegate import compiled
from variegate.architectures import Architecture, architecture_of, known_architectures
from variegate.architectures.layout import Call, Locate, Part, Place
from variegate.clock import Clock
from variegate.intervention import (
    SITES,
    BlockCall,
    BlockIntervention,
    ConditionIntervention,
    GuidanceIntervention,
    ImageIntervention,
    Intervention,
    PredictionIntervention,
    PreviewIntervention,
    Site,
)
from variegate.noise import Start
from variegate.step import Moment, Step

POOLED = ("pooled_projections", "pooled_embeds")  # what denoisers call the pooled embedding
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
Rerun = Callable[[Tensor], Tensor]  # image tokens of all rows into a block, and those that leave it


class _Edit:
    """One intervention at one module: what a hook reads, kept plain enough to be traced into a graph."""

    def __init__(self, part: Part, intervention: BlockIntervention, apply: Callable[..., Tensor]) -> None:
        self.part, self.intervention = part, intervention
        self.on = False
        self.place: Place = None
        self.apply = functools.partial(apply, intervention)
        self.key = compiled.register(self.apply)

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


class Plan:
    """The interventions on one denoiser.

    Args:
        outer: the denoiser, or what torch.compile made of it.
        architecture: its record; None: that of the table.
        interventions: in the order they act.
        clock: shared by the denoisers of a pipeline.
        start: what the pipeline starts from, likewise.
        seed: of random numbers.
        warn: what to do with a warning.

    Raises:
        ValueError: if the class is unknown, or lacks the site or the blocks that an intervention asks for.
    """

    def __init__(
        self,
        outer: nn.Module,
        architecture: Architecture | None,
        interventions: Sequence[Intervention],
        clock: Clock,
        start: Start,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        self.outer = outer
        self.module: nn.Module = getattr(outer, "_orig_mod", outer)  # torch.compile(model) wraps it
        self.clock, self.start, self.seed, self.warn = clock, start, seed, warn
        self.architecture = architecture or architecture_of(self.module)
        self.parameters = list(inspect.signature(type(self.module).forward).parameters)
        self.interventions = tuple(interventions)
        self.call: Call = {}
        self.step: Step | None = None
        self.real: Tensor | None = None
        self.edits: list[_Edit] = []
        self.edits_of: dict[nn.Module, list[_Edit]] = defaultdict(list)
        self.blocks = [(layout, block) for layout in self.architecture.blocks for block in layout.of(self.module)]
        _refuse_split_tokens(self.module)
        for intervention in interventions:
            if not isinstance(intervention, BlockIntervention):
                continue
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
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                for edit in edits:
                    output = edit(output, functools.partial(self._rerun, module, args, kwargs))
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

    @property
    def edits_predictions(self) -> bool:
        """Whether `end` has anything to do."""
        return any(isinstance(i, (PredictionIntervention, GuidanceIntervention)) for i in self.interventions)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the denoiser runs: read the clock, find the places of the tokens, edit the condition."""
        _refuse_split_tokens(self.module)
        self.call = dict(zip(self.parameters, (self.module, *args), strict=False)) | kwargs
        self.step = self.clock.tick(self.architecture, self.call)
        places: dict[Locate | None, Place] = {}
        for edit in self.edits:
            edit.on = edit.intervention.active(self.step)
            if edit.on and edit.part.tokens not in places:
                places[edit.part.tokens] = edit.part.locate(self.call)
            edit.place = places.get(edit.part.tokens)
        masked = any(edit.on and not edit.intervention.padding for edit in self.edits)
        self.real = self.architecture.real(self.call) if masked and self.architecture.real is not None else None
        if all(len(samples.rows) == 1 for samples in self.step.sets) and any(
            i.needs_company and i.active(self.step) for i in self.interventions
        ):
            self.warn(
                "Every prompt has a single image, so there is nothing to push it away from: the images are those of "
                "the stock pipeline. Ask for more, e.g. num_images_per_prompt=4."
            )
        changed = self._preview(args, kwargs) | self._conditions()
        return self._arguments(args, kwargs, changed) if changed else None

    def _arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the denoiser, some of them changed."""
        names = self.parameters[1 : 1 + len(args)]
        return tuple(changed.get(n, value) for n, value in zip(names, args, strict=True)), kwargs | {
            n: value for n, value in changed.items() if n not in names
        }

    def _preview(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Edit the noise of a run that is about to begin, in the pipeline's own tensor; the denoiser's new latents."""
        previewing = self._active(PreviewIntervention)
        latents, self.start.latents = self.start.latents, None  # a run begins once, whatever calls its first step has
        if not previewing or latents is None:
            return {}
        name = self.architecture.latents
        given, images = self.call[name], len(latents)

        def copies(noise: Tensor) -> Tensor:
            """A copy for each branch, as the denoiser was given."""
            return torch.cat([noise] * max(1, len(given) // images)).to(given)

        if not isinstance(given, Tensor) or not torch.equal(copies(latents), given):
            raise ValueError(
                f"{type(previewing[0]).__name__} needs a denoiser that is given the pipeline's latents as they are, "
                f"but {type(self.clock.pipeline).__name__} changes them first."
            )

        def preview(rows: Sequence[tuple[int, ...]], noise: Tensor) -> Tensor:
            index = torch.tensor(rows, device=noise.device)
            whole = latents.to(noise.dtype).index_put((index % images,), noise)
            new_args, new_kwargs = self._arguments(args, kwargs, {name: copies(whole)})
            output = self.outer.forward(*new_args, **new_kwargs)  # not a call, which would come back here
            first = output if isinstance(output, Tensor) else output[0]
            if first.shape != given.shape:
                raise ValueError(
                    f"{type(previewing[0]).__name__} needs predictions in the shape of the latents, but "
                    f"{self.architecture.denoiser} makes {list(first.shape)} of {list(given.shape)}."
                )
            return self._moment(rows).images(self.architecture.sign * first[index].to(noise.dtype), noise)

        new = latents.clone()
        with self._silent():
            for intervention in previewing:
                for rows in self._batches(intervention):
                    index = torch.tensor(rows, device=latents.device) % images
                    noise = intervention.edit(new[index].float(), functools.partial(preview, rows))
                    new[index] = noise.to(new.dtype)
        latents.copy_(new)
        return {name: copies(new)}

    def _conditions(self) -> dict[str, Any]:
        """The embeddings that interventions have changed, by argument name."""
        changed: dict[str, Any] = {}
        for intervention in self._active(ConditionIntervention):
            for name in (self.architecture.text, *POOLED):
                given = changed.get(name, self.call.get(name))
                if given is not None:
                    new = list(given) if isinstance(given, list) else given.clone()
                    for rows in self._batches(intervention):
                        old = torch.stack([torch.stack([given[row] for row in samples]) for samples in rows])
                        for samples, values in zip(rows, intervention.edit(old, self._moment(rows)), strict=True):
                            for row, value in zip(samples, values, strict=True):
                                new[row] = value
                    changed[name] = new
        return changed

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the denoiser has run: edit its prediction."""
        assert self.step is not None
        ends = self.step.total is not None and self.step.index == self.step.total - 1
        remembering = [i for i in self.interventions if isinstance(i, PredictionIntervention) and i.remembers and ends]
        if not (remembering or self._active(PredictionIntervention) or self._active(GuidanceIntervention)):
            return None
        first = output if isinstance(output, (Tensor, list)) else output[0]
        prediction = self.architecture.sign * _stacked(first)
        for predicting in self._active(PredictionIntervention):
            latents = _stacked(self.call[self.architecture.latents])
            if latents.shape != prediction.shape:
                raise ValueError(
                    f"{type(predicting).__name__} needs predictions in the shape of the latents, but "
                    f"{self.architecture.denoiser} makes {list(prediction.shape)} of {list(latents.shape)}."
                )
            if predicting.shared:
                prediction = self._add(predicting, prediction, latents)
                continue
            for rows in self._batches(predicting):
                index = torch.tensor(rows, device=prediction.device)
                prediction[index] = predicting.edit(prediction[index], latents[index], self._moment(rows, predicting))
        for predicting in remembering:
            shown, given = self._image(prediction), self._image(_stacked(self.call[self.architecture.latents]))
            for rows in self._batches(predicting, "cond"):
                index, moment = torch.tensor(rows, device=prediction.device), self._moment(rows, predicting)
                predicting.remember(moment.images(_wide(shown[index]), _wide(given[index])), moment)
        self._guide(prediction)
        prediction = self.architecture.sign * prediction
        new = list(prediction) if isinstance(first, list) else prediction
        if first is output:
            return new
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(sample=new)

    def _image(self, values: Tensor) -> Tensor:
        """The image tokens of latents or predictions, where their rows hold text, too."""
        part = self.architecture.output
        found = values if part is None else part.get(values, part.locate(self.call))
        assert found is not None
        return found

    def _add(self, predicting: PredictionIntervention, prediction: Tensor, latents: Tensor) -> Tensor:
        """Edit the prompts' predictions, and those of the other branches, here or in a later call, by the same."""
        assert self.step is not None
        images, part = self._images(), self.architecture.output
        shown, given = self._image(prediction), self._image(latents)
        for rows in self._batches(predicting, "cond"):
            index = torch.tensor(rows, device=prediction.device)
            old = _wide(shown[index])
            added = predicting.edit(old, _wide(given[index]), self._moment(rows, predicting)) - old
            for group, offset in zip(rows, added, strict=True):
                self.clock.offsets[id(predicting), tuple(row % images for row in group)] = offset
        for samples in self.step.sets:
            key = id(predicting), tuple(row % images for row in samples.rows)
            if predicting.branch in ("both", samples.branch) and key in self.clock.offsets:
                index = torch.tensor(samples.rows, device=prediction.device)
                shown[index] = (_wide(shown[index]) + self.clock.offsets[key]).to(shown.dtype)
        return shown if part is None else part.put(prediction, part.locate(self.call), shown)

    def _guide(self, prediction: Tensor) -> None:
        """Edit unconditional rows by the conditional ones, which come in the same call or in an earlier one."""
        assert self.step is not None
        conditional = [prediction[list(samples.rows)] for samples in self.step.sets if samples.branch == "cond"]
        self.clock.conditional = conditional or self.clock.conditional
        unconditional = [samples.rows for samples in self.step.sets if samples.branch == "uncond"]
        for guiding in self._active(GuidanceIntervention):
            for rows, other in zip(unconditional, self.clock.conditional, strict=bool(unconditional)):
                old = prediction[list(rows)][None]
                prediction[list(rows)] = guiding.edit(old, other[None], self._moment([rows]))[0]

    def _active(self, kind: type[Any]) -> list[Any]:
        step = self.step
        assert step is not None
        return [i for i in self.interventions if isinstance(i, kind) and i.active(step)]

    def _batches(self, intervention: Intervention, branch: str | None = None) -> Iterator[list[tuple[int, ...]]]:
        """Rows of the sets that an intervention acts on, or of those of one branch, sets of equal size together."""
        assert self.step is not None
        by_size: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for samples in self.step.sets:
            alone = len(samples.rows) == 1 and intervention.needs_company
            if not alone and (branch or intervention.branch) in ("both", samples.branch):
                by_size[len(samples.rows)].append(samples.rows)
        yield from by_size.values()

    def _images(self) -> int:
        """Images of the call: its rows of one branch."""
        assert self.step is not None
        return sum(len(samples.rows) for samples in self.step.sets if samples.branch == self.step.sets[0].branch)

    def _text(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """An embedding of the prompt of every row, `[S, B, C]`: the pooled one, or the mean of its real tokens."""
        pooled = next((self.call[name] for name in POOLED if self.call.get(name) is not None), None)
        real = self.architecture.real(self.call) if pooled is None and self.architecture.real is not None else None

        def of(row: int) -> Tensor:
            if pooled is not None:
                embedding: Tensor = pooled[row].float()
                return embedding
            text = self.call[self.architecture.text][row]
            tokens: Tensor = text.reshape(-1, text.shape[-1]).float()
            if real is None or len(real[row]) > len(tokens):  # the mask is of rows that were filled up
                return tokens.mean(0)
            return tokens[-len(real[row]) :][real[row]].mean(0)

        return torch.stack([torch.stack([of(row) for row in samples]) for samples in rows])

    def _moment(self, rows: Sequence[Sequence[int]], predicting: PredictionIntervention | None = None) -> Moment:
        assert self.step is not None
        if self.step.noise is None:
            raise ValueError(
                "The noise level is unknown: attach to the pipeline, whose scheduler tells it, not to its denoiser."
            )
        images = self._images()
        samples = [[row % images for row in group] for group in rows]
        moment = Moment(
            self.step.noise, samples, self.seed, self.step.index, self.step.next_noise, self.step.prediction_type
        )
        if predicting is not None:
            moment.memory = self.clock.memory[id(predicting)]
            moment.text = self._text(rows) if predicting.reads_text else None
        return moment

    def _apply(self, intervention: BlockIntervention, tokens: Tensor, rerun: Rerun | None = None) -> Tensor:
        assert self.step is not None
        called = sum(len(samples.rows) for samples in self.step.sets)
        if len(tokens) != called:
            raise ValueError(
                f"The denoiser was called with {called} rows, but {len(tokens)} reach its blocks, so their samples "
                "can't be told apart; switch off what splits the batch inside the denoiser, such as FasterCache."
            )
        if intervention.padding or self.real is None or not _is_text(intervention.site):
            return self._edit_tokens(intervention, tokens, rerun)
        # Zeros are what the flow leaves alone and does not see. A shorter mask is that of the last tokens: learned
        # ones come first.
        learned = tokens.shape[1] - self.real.shape[1]
        real = functional.pad(self.real.to(tokens.device), (learned, 0), value=True)[..., None]
        return torch.where(real, self._edit_tokens(intervention, tokens * real, rerun), tokens)

    def _edit_tokens(self, intervention: BlockIntervention, tokens: Tensor, rerun: Rerun | None) -> Tensor:
        """Edit `[rows, N, D]` tokens within each sample set."""
        edited = None
        for rows in self._batches(intervention):
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
            return intervention.edit  # type: ignore[no-any-return]  # of a token intervention

        def rerun_rows(new: Tensor) -> Tensor:
            if rerun is None:
                raise ValueError(
                    f"{type(intervention).__name__} runs a block twice, which can't be done inside a compiled "
                    "denoiser; attach it to one that is not compiled."
                )
            index = torch.tensor(rows, device=tokens.device)
            return rerun(tokens.index_put((index,), new))[index]

        block = BlockCall(self._moment(rows), self.start.size, rerun_rows)
        return functools.partial(intervention.edit, block=block)

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
        with self._silent():
            left = edit.part.get(block.forward(**given), edit.place)  # not a call, which would come back here
        assert left is not None
        return left

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """No edit of tokens acts."""
        on = [edit for edit in self.edits if edit.on]
        for edit in on:
            edit.on = False
        try:
            yield
        finally:
            for edit in on:
                edit.on = True


def _stacked(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows.clone() if isinstance(rows, Tensor) else torch.stack(list(rows))


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: what is added to both branches of guidance must be the same in each."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _is_text(site: Site) -> bool:
    return site in ("context", "attention")


def _refuse_split_tokens(denoiser: nn.Module) -> None:
    config = getattr(denoiser, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(denoiser).__name__} runs under context parallelism, which splits the tokens of a sample over "
            "devices; use tensor parallelism, or spread the prompts over the devices."
        )
