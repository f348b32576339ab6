"""What an attachment does with one denoiser: which edits follow which module, and what the current call means."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
    ConditionIntervention,
    GuidanceIntervention,
    Intervention,
    Moment,
    PredictionIntervention,
    Site,
    Step,
    TokenIntervention,
)

POOLED = ("pooled_projections", "pooled_embeds")  # what denoisers call the pooled embedding
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class _Edit:
    """One intervention at one module: what a hook reads, kept plain enough to be traced into a graph."""

    def __init__(
        self, part: Part, intervention: TokenIntervention, apply: Callable[[TokenIntervention, Tensor], Tensor]
    ) -> None:
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


class Plan:
    """The interventions on one denoiser.

    Args:
        outer: the denoiser, or what torch.compile made of it.
        architecture: its record; None: that of the table.
        interventions: in the order they act.
        clock: shared by the denoisers of a pipeline.
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
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        self.outer = outer
        self.module: nn.Module = getattr(outer, "_orig_mod", outer)  # torch.compile(model) wraps it
        self.clock, self.seed, self.warn = clock, seed, warn
        self.architecture = architecture or architecture_of(self.module)
        self.parameters = list(inspect.signature(type(self.module).forward).parameters)
        self.interventions = tuple(interventions)
        self.call: Call = {}
        self.step: Step | None = None
        self.conditional: list[Tensor] = []  # predictions of this step's prompts, a tensor for each set
        self.real: Tensor | None = None
        self.edits: list[_Edit] = []
        self.edits_of: dict[nn.Module, list[_Edit]] = defaultdict(list)
        self.blocks = [(layout, block) for layout in self.architecture.blocks for block in layout.of(self.module)]
        _refuse_split_tokens(self.module)
        for intervention in interventions:
            if not isinstance(intervention, TokenIntervention):
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
        last, self.step = self.step, self.clock.tick(self.architecture, self.call)
        if last is None or last.index != self.step.index:
            self.conditional = []
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
        changed = self._conditions()
        if not changed:
            return None
        names = self.parameters[1 : 1 + len(args)]
        return tuple(changed.get(n, value) for n, value in zip(names, args, strict=True)), kwargs | {
            n: value for n, value in changed.items() if n not in names
        }

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
        if not (self._active(PredictionIntervention) or self._active(GuidanceIntervention)):
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
            for rows in self._batches(predicting):
                index = torch.tensor(rows, device=prediction.device)
                prediction[index] = predicting.edit(prediction[index], latents[index], self._moment(rows))
        self._guide(prediction)
        prediction = self.architecture.sign * prediction
        new = list(prediction) if isinstance(first, list) else prediction
        if first is output:
            return new
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(sample=new)

    def _guide(self, prediction: Tensor) -> None:
        """Edit unconditional rows by the conditional ones, which come in the same call or in an earlier one."""
        assert self.step is not None
        conditional = [prediction[list(samples.rows)] for samples in self.step.sets if samples.branch == "cond"]
        self.conditional = conditional or self.conditional
        unconditional = [samples.rows for samples in self.step.sets if samples.branch == "uncond"]
        for guiding in self._active(GuidanceIntervention):
            for rows, other in zip(unconditional, self.conditional, strict=bool(unconditional)):
                old = prediction[list(rows)][None]
                prediction[list(rows)] = guiding.edit(old, other[None], self._moment([rows]))[0]

    def _active(self, kind: type[Any]) -> list[Any]:
        step = self.step
        assert step is not None
        return [i for i in self.interventions if isinstance(i, kind) and i.active(step)]

    def _batches(self, intervention: Intervention) -> Iterator[list[tuple[int, ...]]]:
        """Rows of the sets that an intervention acts on, sets of equal size together."""
        assert self.step is not None
        by_size: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for samples in self.step.sets:
            alone = len(samples.rows) == 1 and intervention.needs_company
            if not alone and intervention.branch in ("both", samples.branch):
                by_size[len(samples.rows)].append(samples.rows)
        yield from by_size.values()

    def _moment(self, rows: Sequence[Sequence[int]]) -> Moment:
        assert self.step is not None
        if self.step.noise is None:
            raise ValueError(
                "The noise level is unknown: attach to the pipeline, whose scheduler tells it, not to its denoiser."
            )
        images = sum(len(samples.rows) for samples in self.step.sets if samples.branch == self.step.sets[0].branch)
        samples = [[row % images for row in group] for group in rows]
        return Moment(self.step.noise, samples, self.seed, self.step.index)

    def _apply(self, intervention: TokenIntervention, tokens: Tensor) -> Tensor:
        assert self.step is not None
        called = sum(len(samples.rows) for samples in self.step.sets)
        if len(tokens) != called:
            raise ValueError(
                f"The denoiser was called with {called} rows, but {len(tokens)} reach its blocks, so their samples "
                "can't be told apart; switch off what splits the batch inside the denoiser, such as FasterCache."
            )
        if intervention.padding or self.real is None or not _is_text(intervention.site):
            return self._edit_tokens(intervention, tokens)
        # Zeros are what the flow leaves alone and does not see. A shorter mask is that of the last tokens: learned
        # ones come first.
        learned = tokens.shape[1] - self.real.shape[1]
        real = functional.pad(self.real.to(tokens.device), (learned, 0), value=True)[..., None]
        return torch.where(real, self._edit_tokens(intervention, tokens * real), tokens)

    def _edit_tokens(self, intervention: TokenIntervention, tokens: Tensor) -> Tensor:
        """Edit `[rows, N, D]` tokens within each sample set."""
        edited = None
        for rows in self._batches(intervention):
            if [row for samples in rows for row in samples] == list(range(len(tokens))):
                return intervention.edit(tokens.reshape(len(rows), -1, *tokens.shape[1:])).flatten(0, 1)
            index = torch.tensor(rows, device=tokens.device)
            edited = tokens.clone() if edited is None else edited
            edited[index] = intervention.edit(tokens[index])
        return tokens if edited is None else edited


def _stacked(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows.clone() if isinstance(rows, Tensor) else torch.stack(list(rows))


def _is_text(site: Site) -> bool:
    return site in ("context", "attention")


def _refuse_split_tokens(denoiser: nn.Module) -> None:
    config = getattr(denoiser, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(denoiser).__name__} runs under context parallelism, which splits the tokens of a sample over "
            "devices; use tensor parallelism, or spread the prompts over the devices."
        )
