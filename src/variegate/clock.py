"""Which step, guidance branch and prompt group a denoiser call belongs to; reads, never writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from variegate.architectures import Architecture
from variegate.architectures.layout import Call
from variegate.intervention import SampleSet, Step


class Clock:
    """Turns the denoiser calls of a pipeline into `Step`s.

    A run is new when the scheduler has a new `timesteps` object (`set_timesteps` makes one). A step is new when
    `scheduler.step_index` changes, or, where a scheduler has none, when the timestep does. Rows are branch by
    branch, prompt by prompt, sample by sample, as in every diffusers pipeline.

    Args:
        architecture: of the denoiser whose calls are seen.
        pipeline: the pipeline around it, or None for a bare denoiser, whose steps are then told by falling
            timesteps.
        groups: a label per image of the batch; images with equal labels are samples of one prompt. None: images
            with bit-equal text embeddings are.
    """

    def __init__(self, architecture: Architecture, pipeline: Any | None, groups: Sequence[int | str] | None) -> None:
        self.architecture = architecture
        self.pipeline = pipeline
        self.labels = groups
        self._timesteps: Any = None
        self._key: Any = None
        self._index = -1
        self._calls = 0
        self._batched = False
        self._groups: dict[int, list[list[int]]] = {}

    def tick(self, call: Call) -> Step:
        """The step of a call about to run.

        Args:
            call: the denoiser's arguments by name.

        Raises:
            ValueError: if `groups` does not fit the batch.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        timestep = float(torch.as_tensor(call["timestep"]).flatten()[0])
        if scheduler is not None:
            new_run = scheduler.timesteps is not self._timesteps
            self._timesteps = scheduler.timesteps
            key = scheduler.step_index if hasattr(scheduler, "step_index") else timestep
        else:
            new_run = self._key is None or timestep > self._key
            key = timestep
        if new_run:
            self._index, self._groups = -1, {}
        if new_run or key != self._key:
            self._index += 1
            self._calls, self._batched = 0, False
        self._key = key
        sets = self._sets(call[self.architecture.latents], call[self.architecture.text])
        self._calls += 1
        return Step(self._index, self._total(), sets)

    def _total(self) -> int | None:
        if self.pipeline is None:
            return None
        count = getattr(self.pipeline, "num_timesteps", None)
        return int(count if count is not None else len(self._timesteps))

    def _sets(self, latents: Tensor, text: Tensor) -> tuple[SampleSet, ...]:
        branches = self._branches(latents)
        images = len(latents) // len(branches)
        if images not in self._groups:
            first = branches.index("cond") * images if "cond" in branches else 0
            self._groups[images] = self._group(text[first : first + images])
        return tuple(
            SampleSet(branch, tuple(place * images + row for row in group))
            for place, branch in enumerate(branches)
            for group in self._groups[images]
        )

    def _branches(self, latents: Tensor) -> tuple[str, ...]:
        """Names of the branches in this call: guidance copies of the latents are bit-equal."""
        batched = self.architecture.branches
        copies = len(batched)
        if (
            copies > 1
            and getattr(self.pipeline, "do_classifier_free_guidance", True)
            and len(latents) % copies == 0
            and all(torch.equal(latents[: len(latents) // copies], part) for part in latents.chunk(copies)[1:])
        ):
            self._batched = True
            return batched
        return ("cond" if self._calls == 0 or self._batched else "uncond",)

    def _group(self, text: Tensor) -> list[list[int]]:
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
                if torch.equal(text[group[0]], text[row]):
                    group.append(row)
                    break
            else:
                groups.append([row])
        return groups
