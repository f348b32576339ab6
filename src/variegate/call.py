"""What the current call of a denoiser means: its arguments, its step, and which of its rows belong together."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from variegate.architectures import Architecture, architecture_of
from variegate.architectures.layout import Call
from variegate.clock import Clock
from variegate.intervention import Intervention, PredictionIntervention
from variegate.step import Moment, Step

POOLED = ("pooled_projections", "pooled_embeds")  # what denoisers call the pooled embedding


class DenoiserCall:
    """One call after another, as the interventions see it.

    Args:
        denoiser: not compiled, or what has been compiled.
        architecture: its record; None: that of the table.
        interventions: in the order they act.
        clock: shared by the denoisers of a pipeline.
        seed: of random numbers.

    Attributes:
        arguments: of the current call, by name.
        step: that the current call belongs to.

    Raises:
        ValueError: if the class is unknown.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        architecture: Architecture | None,
        interventions: Sequence[Intervention],
        clock: Clock,
        seed: int,
    ) -> None:
        self.denoiser, self.clock, self.seed = denoiser, clock, seed
        self.architecture = architecture or architecture_of(denoiser)
        self.interventions = tuple(interventions)
        self.arguments: Call = {}
        self._given: Any = None
        self._parameters = list(inspect.signature(type(denoiser).forward).parameters)
        self._step: Step | None = None

    def note_prompts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of the prompts of a call before any attachment edits them: they tell which rows belong together."""
        self._given = self._named(args, kwargs)[self.architecture.text]

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of a call that is about to run."""
        self.arguments = self._named(args, kwargs)
        given, self._given = self._given, None
        self._step = self.clock.tick(self.architecture, self.arguments, given, self._awake)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Arguments by name; embeddings of a single row, which all images share, as a row for each of them."""
        named = {**dict(zip(self._parameters, (self.denoiser, *args), strict=False)), **kwargs}
        rows = len(named[self.architecture.latents])
        for name in (self.architecture.text, *POOLED):
            embeddings = named.get(name)
            if embeddings is not None and len(embeddings) == 1 < rows:
                shared = isinstance(embeddings, Tensor)
                named[name] = embeddings.expand(rows, *embeddings.shape[1:]) if shared else [*embeddings] * rows
        return named

    def _awake(self, step: Step) -> bool:
        return any(intervention.awake(step) for intervention in self.interventions)

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the denoiser, some of them changed."""
        names = self._parameters[1 : 1 + len(args)]
        return tuple(changed.get(n, value) for n, value in zip(names, args, strict=True)), kwargs | {
            n: value for n, value in changed.items() if n not in names
        }

    @contextmanager
    def within(self, step: Step) -> Iterator[None]:
        """This step is the current one, as it was when the denoiser ran."""
        now, self._step = self._step, step
        try:
            yield
        finally:
            self._step = now

    @property
    def step(self) -> Step:
        """See the class."""
        assert self._step is not None
        return self._step

    @property
    def latents(self) -> Any:
        """What is to be denoised."""
        return self.arguments[self.architecture.latents]

    @property
    def images(self) -> int:
        """Images of the call: its rows of one branch."""
        return sum(len(samples.rows) for samples in self.step.sets if samples.branch == self.step.sets[0].branch)

    def active(self, kind: type[Any]) -> list[Any]:
        """Interventions of a kind whose window is open."""
        return [i for i in self.interventions if isinstance(i, kind) and i.active(self.step)]

    def batches(self, intervention: Intervention, branch: str | None = None) -> Iterator[list[tuple[int, ...]]]:
        """Rows of the sets that an intervention acts on, or of those of one branch, sets of equal size together."""
        by_size: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for samples in self.step.sets:
            alone = len(samples.rows) == 1 and intervention.needs_company
            if not alone and (branch or intervention.branch) in ("both", samples.branch):
                by_size[len(samples.rows)].append(samples.rows)
        yield from by_size.values()

    def moment(self, rows: Sequence[Sequence[int]], predicting: PredictionIntervention | None = None) -> Moment:
        """What an edit of these rows may know.

        Raises:
            ValueError: if the noise level is unknown, since the attachment is to a bare denoiser.
        """
        if self.step.noise is None:
            raise ValueError(
                "The noise level is unknown: attach to the pipeline, whose scheduler tells it, not to its denoiser."
            )
        samples = [[row % self.images for row in group] for group in rows]
        moment = Moment(
            self.step.noise, samples, self.seed, self.step.index, self.step.next_noise, self.step.prediction_type
        )
        if predicting is not None:
            moment.memory = self.clock.memory[id(predicting)]
            moment.text = self._text(rows) if predicting.reads_text else None
        return moment

    def _text(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """An embedding of the prompt of every row, `[S, B, C]`: the pooled one, or the mean of its real tokens."""
        pooled = next((self.arguments[name] for name in POOLED if self.arguments.get(name) is not None), None)
        mask_of = self.architecture.real if pooled is None else None
        real = mask_of(self.arguments) if mask_of is not None else None

        def of(row: int) -> Tensor:
            if pooled is not None:
                embedding: Tensor = pooled[row].float()
                return embedding
            text = self.arguments[self.architecture.text][row]
            tokens: Tensor = text.reshape(-1, text.shape[-1]).float()
            if real is None or len(real[row]) > len(tokens):  # the mask is of rows that were filled up
                return tokens.mean(0)
            return tokens[-len(real[row]) :][real[row]].mean(0)

        return torch.stack([torch.stack([of(row) for row in samples]) for samples in rows])
