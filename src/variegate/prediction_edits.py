"""Edits of what the denoiser predicts: by method, by guidance, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from variegate.call import DenoiserCall
from variegate.effects import Effects
from variegate.intervention import GuidanceIntervention, PredictionIntervention


class PredictionEdits:
    """The prediction and guidance interventions on one denoiser.

    Args:
        call: the denoiser's current call.
        effects: what the interventions have done.
    """

    def __init__(self, call: DenoiserCall, effects: Effects) -> None:
        self._call, self._effects = call, effects

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(isinstance(i, (PredictionIntervention, GuidanceIntervention)) for i in self._call.interventions)

    def __call__(self, output: Any) -> Any:
        """The denoiser's output with its prediction edited; None where it stays as it is."""
        call = self._call
        remembering = [
            i for i in call.interventions if isinstance(i, PredictionIntervention) and i.remembering(call.step)
        ]
        predicting, guiding = call.active(PredictionIntervention), call.active(GuidanceIntervention)
        if not (remembering or predicting or guiding):
            return None
        first = output if isinstance(output, (Tensor, list)) else output[0]
        sign = call.architecture.sign
        prediction = sign * _stacked(first)
        for intervention in predicting:
            prediction = self._edit(intervention, prediction)
        for intervention in remembering:
            self._remember(intervention, prediction)
        if guiding:
            prediction = self._guide(guiding, prediction)
        prediction = sign * prediction
        new = list(prediction) if isinstance(first, list) else prediction
        if first is output:
            return new
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(sample=new)

    def _edit(self, intervention: PredictionIntervention, prediction: Tensor) -> Tensor:
        latents = _stacked(self._call.latents)
        if latents.shape != prediction.shape:
            raise ValueError(
                f"{type(intervention).__name__} needs predictions in the shape of the latents, but "
                f"{self._call.architecture.denoiser} makes {list(prediction.shape)} of {list(latents.shape)}."
            )
        if intervention.shared:
            return self._add(intervention, prediction, latents)
        for rows in self._call.batches(intervention):
            index, moment = torch.tensor(rows, device=prediction.device), self._call.moment(rows, intervention)
            prediction[index] = self._effects.apply(intervention, prediction[index], latents[index], moment)
        return prediction

    def _add(self, intervention: PredictionIntervention, prediction: Tensor, latents: Tensor) -> Tensor:
        """Edit the prompts' predictions, and those of the other branches, here or in a later call, by the same."""
        call, offsets = self._call, self._call.clock.offsets
        shown, given = self._image(prediction), self._image(latents)

        def key(rows: Sequence[int]) -> tuple[int, tuple[int, ...]]:
            return id(intervention), tuple(row % call.images for row in rows)

        for rows in call.batches(intervention, "cond"):
            index = torch.tensor(rows, device=prediction.device)
            old = _wide(shown[index])
            moment = call.moment(rows, intervention)
            if not moment.memory and all(len(group) == 1 for group in rows):
                self._effects.settle(intervention)  # the first picture of a series has nothing to differ from
            added = self._effects.apply(intervention, old, _wide(given[index]), moment) - old
            for group, offset in zip(rows, added, strict=True):
                offsets[key(group)] = offset
        for samples in call.step.sets:
            if intervention.branch in ("both", samples.branch) and key(samples.rows) in offsets:
                index = torch.tensor(samples.rows, device=prediction.device)
                shown[index] = (_wide(shown[index]) + offsets[key(samples.rows)]).to(shown.dtype)
        return self._with_image(prediction, shown)

    def _remember(self, intervention: PredictionIntervention, prediction: Tensor) -> None:
        shown, given = self._image(prediction), self._image(_stacked(self._call.latents))
        for rows in self._call.batches(intervention, "cond"):
            index, moment = torch.tensor(rows, device=prediction.device), self._call.moment(rows, intervention)
            intervention.remember(moment.images(_wide(shown[index]), _wide(given[index])), moment)

    def _guide(self, guiding: Sequence[GuidanceIntervention], prediction: Tensor) -> Tensor:
        """Edit unconditional rows by the conditional ones, which come in the same call or in an earlier one."""
        call, clock = self._call, self._call.clock
        shown = self._image(prediction)
        conditional = [shown[list(samples.rows)] for samples in call.step.sets if samples.branch == "cond"]
        clock.conditional = conditional or clock.conditional
        unconditional = [samples.rows for samples in call.step.sets if samples.branch == "uncond"]
        if not unconditional:
            return prediction
        for intervention in guiding:
            for rows, other in zip(unconditional, clock.conditional, strict=True):
                old = shown[list(rows)][None]
                shown[list(rows)] = self._effects.apply(intervention, old, other[None], call.moment([rows]))[0]
        return self._with_image(prediction, shown)

    def _image(self, values: Tensor) -> Tensor:
        """The image tokens of latents or predictions, where their rows hold text, too."""
        part = self._call.architecture.output
        found = values if part is None else part.get(values, part.locate(self._call.arguments))
        assert found is not None
        return found

    def _with_image(self, prediction: Tensor, shown: Tensor) -> Tensor:
        """The prediction with other image tokens."""
        part = self._call.architecture.output
        return shown if part is None else part.put(prediction, part.locate(self._call.arguments), shown)


def _stacked(rows: Tensor | Sequence[Tensor]) -> Tensor:
    return rows.clone() if isinstance(rows, Tensor) else torch.stack(list(rows))


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: what is added to both branches of guidance must be the same in each."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
