"""The noise a pipeline starts from: caught where the pipeline draws it, laid out as pictures, given a colour."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from variegate.effects import Effects
from variegate.intervention import (
    ImageIntervention,
    Intervention,
    NoiseIntervention,
    PreviewIntervention,
    StartIntervention,
)
from variegate.pipeline_calls import Shadow


class Start:
    """What a run of a pipeline starts from: drawn by the pipeline, edited here.

    Edits take the place of the pipeline's `prepare_latents`, the one thing that an attachment does to a pipeline and
    no torch hook can: noise that is edited at the denoiser's door is still the old one in the pipeline's loop, and no
    prediction makes up for that with every scheduler.

    Args:
        pipeline: a diffusers pipeline; None for a bare denoiser.
        interventions: those that are attached.
        effects: what they have done.

    Attributes:
        size: height and width of the pictures, in pixels; None where that is not known, and for videos.
        latents: the pipeline's own tensor, from where it is drawn to the denoiser's first call, for edits that want to
            preview it.

    Raises:
        ValueError: if an intervention edits noise, and there is none or it can't be told.
    """

    def __init__(self, pipeline: Any | None, interventions: Sequence[Intervention], effects: Effects) -> None:
        self._effects = effects
        self.size: tuple[int, int] | None = None
        self.latents: Tensor | None = None
        self.edits = [i for i in interventions if isinstance(i, NoiseIntervention)]
        self.previews = any(isinstance(i, PreviewIntervention) for i in interventions)
        starting = next((i for i in interventions if isinstance(i, StartIntervention)), None)
        self._draw: _Draw | None = None
        if starting is None and not any(isinstance(i, ImageIntervention) for i in interventions):
            return
        method = getattr(type(pipeline), "prepare_latents", None)
        known = inspect.signature(method).parameters if method is not None else {}
        if starting is not None:
            name = type(starting).__name__
            if pipeline is None:
                raise ValueError(f"{name} edits the noise a pipeline starts from: attach it to one, not its denoiser.")
            if not {"height", "width"} <= set(known) or {"timestep", "latent_timestep"} & set(known):
                raise ValueError(
                    f"{name} edits the noise a pipeline starts from, but {type(pipeline).__name__} starts from more "
                    "than noise, or does not draw it in a prepare_latents; use a text-to-image pipeline that does."
                )
        if method is not None:
            self._draw = _Draw.of(pipeline)
            self._draw.starts.append(self)

    def remove(self) -> None:
        """Give the pipeline its method back; harmless when done twice."""
        if self._draw is not None:
            self._draw.remove(self)
        self._draw, self.latents = None, None

    def edit(self, latents: Tensor, given: Mapping[str, Any]) -> Tensor:
        """What the pipeline is to have in place of the latents it has drawn.

        Args:
            latents: as `prepare_latents` returns them.
            given: the arguments it was called with.
        """
        height, width = given.get("height"), given.get("width")
        self.size = (height, width) if height and width and "num_frames" not in given else None
        if self.edits:
            noise, pack = unpack(latents, given)
            for intervention in self.edits:
                noise = self._effects.apply(intervention, noise)
            latents = pack(noise)
        if self.previews:
            self.latents = latents = latents.clone()  # they may be the caller's
        return latents


class _Draw(Shadow):
    """In place of a pipeline's `prepare_latents`: one for all attachments, so that these may go in any order."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.shadowed = pipeline, vars(pipeline).get("prepare_latents")
        self.method = pipeline.prepare_latents
        self.starts: list[Start] = []
        functools.update_wrapper(self, self.method)

    @classmethod
    def of(cls, pipeline: Any) -> _Draw:
        """That of a pipeline, or a new one."""
        found = vars(pipeline).get("prepare_latents")
        if not isinstance(found, cls):
            pipeline.prepare_latents = found = cls(pipeline)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, its first tensor edited."""
        returned = self.method(*args, **kwargs)
        # By the signature of the class: somebody's own method before this one may take anything.
        given = inspect.signature(type(self.pipeline).prepare_latents).bind(self.pipeline, *args, **kwargs).arguments
        latents, rest = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
        for start in self.starts:
            latents = start.edit(latents, given)
        return latents if rest is None else (latents, *rest)

    def remove(self, start: Start) -> None:
        """Take one out; with the last one the pipeline is as it was."""
        self.starts.remove(start)
        if self.starts or vars(self.pipeline).get("prepare_latents") is not self:
            return
        del self.pipeline.prepare_latents
        if self.shadowed is not None:
            self.pipeline.prepare_latents = self.shadowed


def grid(tokens: int, height: float, width: float) -> tuple[int, int]:
    """Rows and columns of picture tokens that lie row by row.

    Args:
        tokens: how many there are.
        height: of the picture.
        width: of the picture, in the same unit.

    Raises:
        ValueError: if so many tokens are no grid of this shape.

    Example:
        >>> grid(24, 512, 768)
        (4, 6)
    """
    rows = round(math.sqrt(tokens * height / width))
    columns = tokens // max(rows, 1)
    if rows * columns != tokens or not _fits(rows, columns, height, width):
        raise ValueError(f"{tokens} tokens are no grid in the shape of a picture of {height} x {width}.")
    return rows, columns


def unpack(latents: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Latents as pictures, and the way back.

    Args:
        latents: `[B, C, ..., H, W]`, or packed `[B, H/p * W/p, C p p]` with channels in the order (C, p, p).
        given: the arguments of `prepare_latents` that they were drawn by.

    Returns:
        `[B, C, ..., H, W]`, and a function that packs such pictures again.

    Raises:
        ValueError: if their layout can't be told.
    """
    height, width = given.get("height"), given.get("width")
    channels = next((value for name, value in given.items() if "channels" in name), None)
    if height and width and latents.ndim > 3:
        rows, columns = latents.shape[-2:]
        if _fits(rows, columns, height, width):
            return latents, lambda pictures: pictures
    elif height and width and channels and latents.ndim == 3 and "num_frames" not in given:
        batch, tokens, depth = latents.shape
        rows, columns = grid(tokens, height, width)
        patch = math.isqrt(depth // channels)
        if channels * patch**2 == depth:
            shape = (batch, rows, columns, channels, patch, patch)
            pictures = latents.reshape(shape).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            shape = (batch, channels, rows, patch, columns, patch)
            return pictures, lambda new: new.reshape(shape).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    raise ValueError(
        f"Latents of the shape {list(latents.shape)} are neither pictures nor packed ones of {height} x {width}, "
        "so their noise can't be edited."
    )


def _fits(rows: int, columns: int, height: float, width: float) -> bool:
    """Whether square tokens of some size fill a picture in that many whole rows and columns."""
    return height * columns < width * (rows + 1) and width * rows < height * (columns + 1)


def coloured(white: Tensor, exponent: float) -> Tensor:
    """Noise whose power falls with spatial frequency f as 1 / f^exponent, made of white noise.

    Frequency 0, at which that has no value, is treated as the lowest other one. Each channel keeps its phases.

    Args:
        white: `[..., H, W]`, float32 or float64.
        exponent: 0 is white, 1 pink, 2 brown.

    Returns:
        The same shape and dtype, in no particular scale.

    Example:
        >>> coloured(torch.ones(2, 2), 0.0)
        tensor([[1., 1.],
                [1., 1.]])
    """
    rows, columns = white.shape[-2:]
    down, across = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (rows, columns))
    frequencies = torch.hypot(down[:, None], across)
    gain = frequencies.clamp_min(1 / max(rows, columns)) ** (-exponent / 2)
    filtered: Tensor = torch.fft.ifft2(torch.fft.fft2(white) * gain.to(white)).real
    return filtered
