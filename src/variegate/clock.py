"""Which step, guidance branch and prompt group a denoiser call belongs to; reads, never writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from variegate.architectures import Architecture
from variegate.architectures.layout import Call
from variegate.intervention import SampleSet, Step

Rows = Tensor | Sequence[Tensor]
TIMESTEPS = ("timestep", "timesteps", "t")  # what denoisers call it


class Clock:
    """Turns the calls of a pipeline's denoisers into `Step`s.

    A run is new when the scheduler has a new `timesteps` object (`set_timesteps` makes one); for a bare denoiser, when
    its timestep turns back. A step is new when `scheduler.step_index` or the timestep changes. Rows are branch by
    branch, prompt by prompt, sample by sample, as in every diffusers pipeline. The first call of a step is that of
    the prompt, and so is every other one with the same text.

    Args:
        pipeline: the pipeline around the denoisers, or None for a bare one.
        groups: a label per image of the batch; images with equal labels are samples of one prompt. None: images
            with bit-equal text embeddings are.
    """

    def __init__(self, pipeline: Any | None, groups: Sequence[int | str] | None) -> None:
        self.pipeline = pipeline
        self.labels = groups
        self._timesteps: Any = None
        self._key: tuple[Any, float] | None = None
        self._rising: bool | None = None
        self._index = -1
        self._first: Rows | None = None  # text of the step's first call
        self._batched = False  # did that call hold all branches?
        self._batch = 0  # rows of the run's calls that hold all branches
        self._groups: dict[int, list[list[int]]] = {}

    def tick(self, architecture: Architecture, call: Call) -> Step:
        """The step of a call about to run.

        Args:
            architecture: of the denoiser that is called.
            call: the denoiser's arguments by name.

        Raises:
            ValueError: if `groups` does not fit the batch.
        """
        timestep = next(call[name] for name in TIMESTEPS if call.get(name) is not None)
        now = float(torch.as_tensor(timestep).flatten()[0])
        scheduler = getattr(self.pipeline, "scheduler", None)
        key = (getattr(scheduler, "step_index", None), now)
        if self._new_run(scheduler, now):
            self._key, self._index, self._batch, self._groups = None, -1, 0, {}
        if key != self._key:
            self._index += 1
            self._first, self._batched = None, False
        self._key = key
        sets = self._sets(architecture, call[architecture.latents], call[architecture.text])
        return Step(self._index, self._total(), sets)

    def _new_run(self, scheduler: Any, now: float) -> bool:
        if scheduler is not None:
            old, self._timesteps = self._timesteps, scheduler.timesteps
            return old is not self._timesteps
        if self._key is None:
            return True
        moved = now - self._key[1]
        if moved == 0:
            return False
        if self._rising is None:
            self._rising = moved > 0
        return self._rising != (moved > 0)

    def _total(self) -> int | None:
        if self.pipeline is None:
            return None
        count = getattr(self.pipeline, "num_timesteps", None)
        return int(count if count is not None else len(self._timesteps))

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
        batched = self._shared(architecture)
        rows, copies = len(latents), max(1, len(batched))
        images = rows // copies
        if (
            copies > 1
            and rows % copies == 0
            and rows >= self._batch  # a smaller call, in a run with guidance, is that of the prompt alone
            and not (self.pipeline is None and self.labels is not None and len(self.labels) == rows)
            and all(_equal(latents[:images], latents[k * images : (k + 1) * images]) for k in range(1, copies))
        ):
            self._batched, self._batch = True, rows
            return batched
        if self._first is None or self._batched or _equal(self._first, text):
            self._first = text if self._first is None else self._first
            return ("cond",)
        return ("uncond",)

    def _shared(self, architecture: Architecture) -> tuple[str, ...]:
        """The branches that share a batch, as far as the pipeline tells."""
        shared = architecture.branches if getattr(self.pipeline, "do_classifier_free_guidance", True) else ()
        if getattr(self.pipeline, "do_perturbed_attention_guidance", False):
            shared = (*(shared or ("cond",)), "perturbed")
        return shared

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


def _equal(one: Any, other: Any) -> bool:
    """Bit-equality of tensors, or of lists of them."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return False
