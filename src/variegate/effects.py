"""Whether a method did anything in a run: one that was on and changed nothing is told of once, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from variegate.gradients import applied
from variegate.intervention import GuidanceIntervention, Intervention
from variegate.step import SampleSet, Step


class Effects:
    """What the methods of an attachment have done since the run began.

    Args:
        interventions: those that are on.
        tell: what to do with a sentence about one that has changed nothing.

    Attributes:
        completed: whether a run has come to its end; what an exception broke off needs no telling.
    """

    def __init__(self, interventions: Sequence[Intervention], tell: Callable[[str], None]) -> None:
        self._interventions, self._tell = interventions, tell
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing to tell."""
        self._settled: set[int] = set()  # methods that changed something, or whose reason has been told
        self._opened: set[int] = set()  # methods whose window was open
        self._tried: set[int] = set()  # methods that were given something to edit
        self.completed = False
        self._last = -1  # step
        self._noises: list[float] = []
        self._branches: set[str] = set()
        self._sets: tuple[SampleSet, ...] = ()
        self._latents: Tensor | Sequence[Tensor] | None = None  # of the last call
        self._waiting: set[int] = set()  # methods whose edits in this pass have yet to be read
        self._lost: set[int] = set()  # methods of which some were not

    def settle(self, *interventions: Intervention) -> None:
        """Nothing needs to be told of these in this run."""
        self._settled |= {id(intervention) for intervention in interventions}

    def see(self, step: Step, latents: Tensor | Sequence[Tensor], bare: bool) -> None:
        """Take note of a denoiser call; of a bare denoiser, nothing else says that a run has ended."""
        if bare and step.index == 0 and self._last > 0:
            self.end()
        self._last = step.index
        self._opened |= {id(intervention) for intervention in self._interventions if intervention.active(step)}
        if step.noise is not None:
            self._noises.append(step.noise)
        self._branches |= {samples.branch for samples in step.sets}
        self._sets, self._latents = self._sets or step.sets, latents

    def apply(self, intervention: Intervention, given: Tensor, *rest: Any) -> Tensor:
        """What an intervention makes of a tensor, and a note of it; see `gradients.applied`."""
        edited = applied(intervention, given, *rest)
        self.note(intervention, given, edited)
        return edited

    def note(self, intervention: Intervention, before: Tensor, after: Tensor, *, waits: bool = False) -> None:
        """Take note of an edit; of one that `waits`, not before `read` says that somebody has read it.

        Tensors are compared until a method has changed something, once a run.
        """
        key = id(intervention)
        if key not in self._settled | self._waiting:
            self._tried.add(key)
            if after is not before and not torch.equal(after, before):
                (self._waiting if waits else self._settled).add(key)

    def lose(self, intervention: Intervention) -> None:
        """A block that was to be edited did not run."""
        self._lost.add(id(intervention))

    def read(self, is_read: bool) -> None:
        """Whether the edits of this pass that wait have been read."""
        (self._settled if is_read else self._lost).update(self._waiting)
        self._waiting.clear()

    def end(self) -> None:
        """Tell of every method that was on in a run and changed nothing; begin anew."""
        alike = self.completed and self._are_alike()
        for intervention in self._interventions if self.completed else ():
            name = type(intervention).__name__
            if alike and (intervention.needs_company or getattr(intervention, "shared", False)):
                self._tell(
                    f"{name} could not tell the images of a prompt apart: they start from equal noise, and stay equal; "
                    "give every image a seed of its own."
                )
            elif id(intervention) not in self._settled and not intervention.observes:
                self._tell(f"{name} changed nothing: {self._reason(intervention)}.")
        self.forget()

    def _are_alike(self) -> bool:
        """Whether, of every prompt with several images, these are equal in the last step."""
        latents = self._latents
        groups = [samples.rows for samples in self._sets if len(samples.rows) > 1]
        if latents is None or not groups or max(map(max, groups)) >= len(latents):
            return False
        return all(torch.equal(latents[row], latents[rows[0]]) for rows in groups for row in rows)

    def _reason(self, intervention: Intervention) -> str:
        if self._latents is None:
            return "the pipeline never called its denoiser in the thread that called the pipeline"
        branch = "uncond" if isinstance(intervention, GuidanceIntervention) else intervention.branch
        if branch not in ("both", *self._branches):
            return (
                "the denoiser was never called without the prompt, as in models that have guidance built in; "
                "use another method, or guidance_scale above 1 where the model takes it"
                if branch == "uncond"
                else f"branch={branch!r}, and the denoiser was called for {' and '.join(self._branches)} only"
            )
        if id(intervention) not in self._opened:
            window = f"start={intervention.start} and stop={intervention.stop}"
            return f"the run ended after {self._last + 1} steps, outside of its window, {window}"
        if id(intervention) in self._lost:
            return "while its window was open, a cache skipped its blocks, or those that would have read its edits"
        if id(intervention) not in self._tried:
            return "while its window was open, the denoiser ran without what it edits"
        levels = f"{max(self._noises):.2f} to {min(self._noises):.2f}" if self._noises else "unknown"
        return f"{intervention.idle()} (noise levels of the run: {levels})"
