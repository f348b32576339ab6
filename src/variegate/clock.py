"""Which step, guidance branch and prompt group a denoiser call belongs to; reads, never writes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variegate.architectures import Architecture
from variegate.architectures.layout import Call
from variegate.step import SampleSet, Step

Rows = Tensor | Sequence[Tensor]
TIMESTEPS = ("timestep", "timesteps", "t")  # what denoisers call it
_SEEDS_OR_BRANCHES = (
    "Rows of a batch have equal latents, and nothing tells whether they are guidance branches or images with equal "
    "seeds; attach to the pipeline instead of its denoiser, or pass groups=[...] with one label per image, prompt by "
    "prompt."
)


class Clock:
    """Turns the calls of a pipeline's denoisers into `Step`s.

    A run is new when the scheduler has a new `timesteps` object (`set_timesteps` makes one); for a bare denoiser, when
    its timestep turns back. A step is new when `scheduler.step_index` or the timestep changes, or the latents, where
    there is no `step_index`. Rows are branch by branch, prompt by prompt, sample by sample, as in every diffusers
    pipeline. A step's first call of one branch is that of the prompt, and so is every other one with the same text.

    Args:
        pipeline: the pipeline around the denoisers, or None for a bare one.
        groups: a label per image of the batch; images with equal labels are samples of one prompt. None: images
            with bit-equal text embeddings are. They settle, too, whether equal latents in a batch are guidance branches
            or images with equal seeds, which a bare denoiser and a pipeline without `do_classifier_free_guidance`
            don't tell.
    """

    def __init__(self, pipeline: Any | None, groups: Sequence[int | str] | None) -> None:
        self.pipeline = pipeline
        self.labels = groups
        self._timesteps: Any = None
        self._key: tuple[Any, float] | None = None
        self._rising: bool | None = None
        self._index = -1
        self._latents: Rows = ()  # of the step's first call
        self._first: Rows | None = None  # text of the step's first call of one branch
        self._batch = 0  # rows of the run's calls that hold all branches
        self._groups: dict[int, list[list[int]]] = {}
        # What interventions keep, by their identity; the predictions of this step's prompts, a tensor for each set; and
        # what interventions have added in this step to the predictions of a set of samples: here, because the denoisers
        # of a pipeline share it as they share the clock.
        self.memory: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.conditional: list[Tensor] = []
        self.offsets: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def tick(self, architecture: Architecture, call: Call, text: Rows, awake: Callable[[Step], bool]) -> Step:
        """The step of a call about to run.

        Args:
            architecture: of the denoiser that is called.
            call: the denoiser's arguments by name.
            text: the prompts' embeddings as the pipeline gave them, before anybody edited them.
            awake: whether anything happens in a step. If not, all but the first come without sets and noise: to compare
                the rows of a batch makes a GPU wait.

        Raises:
            ValueError: if `groups` does not fit the batch, or only they can tell its branches.
        """
        timestep = next(call[name] for name in TIMESTEPS if call.get(name) is not None)
        now = float(torch.as_tensor(timestep).flatten()[0])
        scheduler = getattr(self.pipeline, "scheduler", None)
        latents = call[architecture.latents]
        key = (getattr(scheduler, "step_index", None), now)
        if self._new_run(scheduler, now, latents):
            self._key, self._index, self._batch, self._groups = None, -1, 0, {}
        # Schedulers of higher order ask twice for one timestep.
        if key != self._key or (not hasattr(scheduler, "step_index") and self._moved(latents)):
            self._index += 1
            self._latents, self._first = latents, None
            self.conditional, self.offsets = [], {}
        self._key = key
        step = Step(self._index, self._total())
        if step.index > 0 and not awake(step):
            return step
        return replace(
            step,
            sets=self._sets(architecture, latents, text),
            noise=self._noise(now),
            next_noise=self._next_noise(),
            prediction_type=self._prediction_type(),
        )

    def _moved(self, latents: Rows) -> bool:
        """Whether latents are others than those of the step's first call; the batches of its calls may differ."""
        rows = min(len(latents), len(self._latents))
        return not _equal(latents[:rows], self._latents[:rows])

    def _new_run(self, scheduler: Any, now: float, latents: Rows) -> bool:
        if scheduler is not None:
            old, self._timesteps = self._timesteps, scheduler.timesteps
            return old is not self._timesteps
        if self._key is None:
            return True
        moved = now - self._key[1]
        if moved == 0:  # the first timestep is never asked for twice, so the run before had one step
            return self._index == 0 and self._moved(latents)
        if self._rising is None:
            self._rising = moved > 0
        return self._rising != (moved > 0)

    def _total(self) -> int | None:
        if self.pipeline is None:
            return None
        # What the pipeline counted may be of a run before.
        count = getattr(self.pipeline, "num_timesteps", None) or math.inf
        return int(min(count, len(self._timesteps)))

    def _noise(self, now: float, ahead: int = 0) -> float | None:
        """Noise level of the step, from the scheduler's sigma or its cumulative alpha, or of one ahead."""
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        if getattr(scheduler, "sigmas", None) is not None:
            index = getattr(scheduler, "step_index", None)
            index = (index if index is not None else getattr(scheduler, "begin_index", None) or 0) + ahead
            if index >= len(scheduler.sigmas):
                return 0.0
            sigma = float(scheduler.sigmas[index])
            if getattr(scheduler, "config", {}).get("invert_sigmas"):  # from 0 up to 1, which is the image
                return 1 - sigma
            return sigma if self._is_flow(scheduler) else sigma / (1 + sigma)
        if getattr(scheduler, "alphas_cumprod", None) is not None:
            alpha = float(scheduler.alphas_cumprod[int(now)])
            return math.sqrt(1 - alpha) / (math.sqrt(1 - alpha) + math.sqrt(alpha))
        return None

    def _next_noise(self) -> float:
        total = self._total()
        if total is None or self._index + 1 >= total:
            return 0.0
        return self._noise(float(self._timesteps[self._index + 1]), ahead=1) or 0.0

    def _prediction_type(self) -> str | None:
        """In the words of diffusers; None, too, for EDM schedulers, which scale predictions by a rule of their own."""
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        if getattr(scheduler, "sigmas", None) is not None and self._is_flow(scheduler):
            return "flow_prediction"
        config = getattr(scheduler, "config", {})
        return None if "sigma_data" in config else config.get("prediction_type")

    @staticmethod
    def _is_flow(scheduler: Any) -> bool:
        return float(scheduler.sigmas.max()) <= 1  # flow matching ends there

    def _sets(self, architecture: Architecture, latents: Rows, text: Rows) -> tuple[SampleSet, ...]:
        branches = self._branches(architecture, latents, text)
        images = len(latents) // len(branches)
        if images not in self._groups:
            first = branches.index("cond") * images if "cond" in branches else 0
            self._groups[images] = self._group(text[first : first + images])
        return tuple(
            SampleSet(branch, tuple(place * images + row for row in group))
            for place, branch in enumerate(branches)
            for group in self._groups[images]
        )

    def _branches(self, architecture: Architecture, latents: Rows, text: Rows) -> tuple[str, ...]:
        """Names of the branches in this call: guidance copies of the latents are bit-equal."""
        rows = len(latents)
        guided = getattr(self.pipeline, "do_classifier_free_guidance", None)
        told = guided is None and self.labels is not None and len(self.labels) == rows  # one label per row: no copies
        shared = [] if told else self._shared(architecture, guided)
        for batched in shared:
            images = rows // len(batched)
            if rows % len(batched) or rows < self._batch:  # a smaller call, in a run with guidance: the prompt alone
                continue
            if _equal(latents[:-images], latents[images:]):
                one = "perturbed" not in batched and _equal(text[:images], text[images:])
                if one and guided is None and self.labels is None:
                    raise ValueError(_SEEDS_OR_BRANCHES)
                self._batch = rows
                return batched
        if guided is None and (rows == self._batch or (shared and self.labels is None and _repeats(latents))):
            raise ValueError(_SEEDS_OR_BRANCHES)
        if guided and shared and not self._batch and rows > 1:
            raise ValueError(
                f"{type(self.pipeline).__name__} has guidance branches in its batch, but not as equal copies of the "
                "latents, so its rows can't be told apart; call it without guidance, e.g. guidance_scale=1.0."
            )
        if self._first is None or _equal(self._first, text):
            self._first = text if self._first is None else self._first
            return ("cond",)
        return ("uncond",)

    def _shared(self, architecture: Architecture, guided: bool | None) -> list[tuple[str, ...]]:
        """The branches that may share a batch, as far as the pipeline tells."""
        every = [architecture.branches] if guided else [()] if guided is False else [architecture.branches, ()]
        if getattr(self.pipeline, "do_perturbed_attention_guidance", False):
            every = [(*(branches or ("cond",)), "perturbed") for branches in every]
        return [branches for branches in every if branches]

    def _group(self, text: Rows) -> list[list[int]]:
        if self.labels is not None:
            if len(self.labels) != len(text):
                raise ValueError(
                    f"groups has {len(self.labels)} labels, but the pipeline makes {len(text)} images at a time; "
                    "give one label per image, prompt by prompt."
                )
            rows_of: dict[int | str, list[int]] = {}
            for row, label in enumerate(self.labels):
                rows_of.setdefault(label, []).append(row)
            return list(rows_of.values())
        groups: list[list[int]] = []
        for row in range(len(text)):
            for group in groups:
                if _equal(text[group[0]], text[row]):
                    group.append(row)
                    break
            else:
                groups.append([row])
        return groups


def _repeats(rows: Rows) -> bool:
    """Whether a batch consists of equal parts."""
    count = len(rows)
    return any(count % part == 0 and _equal(rows[:-part], rows[part:]) for part in range(1, count // 2 + 1))


def _equal(one: Any, other: Any) -> bool:
    """Bit-equality of tensors, or of lists of them."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return False
