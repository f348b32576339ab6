"""What to make: validated before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from variegate.emoji.models import DEVICES, DTYPES, OFFLOADS
from variegate.fields import Range, check_fields, shown
from variegate.intervention import Intervention
from variegate.interventions import (
    CADS,
    CNO,
    DAVE,
    SPARKE,
    SPELL,
    STRIDE,
    ContextualRepulsion,
    DiverseFlow,
    FeatureSelfGuidance,
    IntervalGuidance,
    ParticleGuidance,
    PinkNoise,
    SeedVariance,
)
from variegate.selection import SGI

METHODS: Mapping[str, type[Intervention] | type[SGI] | None] = {
    "contextual-repulsion": ContextualRepulsion,
    "cads": CADS,
    "cno": CNO,
    "dave": DAVE,
    "diverse-flow": DiverseFlow,
    "feature-self-guidance": FeatureSelfGuidance,
    "interval-guidance": IntervalGuidance,
    "particle-guidance": ParticleGuidance,
    "pink-noise": PinkNoise,
    "seed-variance": SeedVariance,
    "sgi": SGI,
    "sparke": SPARKE,
    "spell": SPELL,
    "stride": STRIDE,
    "none": None,
}


# What may be asked for at most, of a recipe from elsewhere, too: more is a slip or a trap, and would hang or crash.
MOST_PICTURES = 1_024  # per prompt
MOST_STEPS = 10_000
MOST_GUIDANCE = 1_000
MOST_PIXELS = 16_384  # a side
Seed = Annotated[int, Range(0, 2**62)]  # leaves room for the seeds that follow

_Side = Annotated[int, Range(1, MOST_PIXELS)]


@dataclass(frozen=True)
class Request:
    """A group of n pictures for each prompt; picture i of every group has seed `seed + i`.

    Every value is checked when a request is built, before anything is loaded; see `variegate.fields.check_fields`.
    Numbers of NumPy become Python's, so that a request can be written as JSON.

    Attributes:
        prompts: the prompts, all different.
        n: pictures per prompt, from 1 to 1,024; an integer, as all counts: 2.0 is none.
        model: name of a bundled model, folder of a pipeline, or hub id.
        method: diversity method, one of `METHODS`; "none" is the stock pipeline.
        parameters: keyword arguments of the method; places such as `blocks` also as text, "0,2" or "3:6".
        seed: of the first picture, from 0.
        seeds: of the pictures, all different, in place of `seed` and those that follow it; nothing is left to choose
            for sgi then.
        steps: denoising steps, up to 10,000; None: the model's default.
        guidance: guidance scale, from 0 to 1,000; None: the model's default.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "mps".
        offload: "none", "model" or "sequential": what leaves the accelerator while it is idle.
        compare: also make the stock pipeline's pictures, from the same seeds.
        revision: branch, tag or commit of a hub model.
        negative_prompt: what the pictures should not show, for pipelines that take it.
        height: pixels, up to 16,384; None: the pipeline's default.
        width: as `height`.

    Raises:
        ValueError: if a value is of another type, out of its range or unknown.

    Example:
        >>> Request(("a mythical creature",), n=4, parameters={"strength": 0.8}).intervention.strength
        0.8
    """

    prompts: tuple[str, ...]
    n: Annotated[int, Range(1, MOST_PICTURES)] = 8
    model: str = "emoji-base"
    method: str = "contextual-repulsion"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: Seed = 0
    steps: Annotated[int, Range(1, MOST_STEPS)] | None = None
    guidance: Annotated[float, Range(0, MOST_GUIDANCE)] | None = None
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    compare: bool = True
    revision: str | None = None
    negative_prompt: str | None = None
    height: _Side | None = None
    width: _Side | None = None
    seeds: tuple[Seed, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        check_fields(self)
        for place, prompt in enumerate(self.prompts):
            if not prompt.strip() or prompt in self.prompts[:place]:
                flaw = "given twice" if prompt.strip() else "blank"
                raise ValueError(f"prompts[{place}]={shown(prompt)} is {flaw}; every prompt needs words of its own.")
        choices = {"method": tuple(METHODS), "dtype": DTYPES, "device": DEVICES, "offload": OFFLOADS}
        for name, choice in choices.items():
            value = getattr(self, name)
            if value not in choice:
                raise ValueError(f"{name}={shown(value)} is unknown; use one of {', '.join(choice)}.")
        if self.seeds is not None and len({*self.seeds}) != len(self.seeds):
            raise ValueError(f"seeds={shown(self.seeds)} hold one twice; the pictures would be the same.")
        if self.seeds is not None and len(self.seeds) != self.n:
            raise ValueError(f"seeds={shown(self.seeds)} do not fit n={self.n}; use one number per picture.")
        cls = METHODS[self.method]
        known = [option.name for option in dataclasses.fields(cls)] if cls else []
        for name in self.parameters:
            if name not in known:
                advice = f"use one of {', '.join(known)}" if known else "leave it out"
                label = name if str(name).isidentifier() else shown(name)
                raise ValueError(f"{label} is no parameter of method {self.method!r}; {advice}.")
        made = self.configured  # refuses bad values of parameters
        plain = {name: to_text(getattr(made, name)) for name in self.parameters}
        object.__setattr__(self, "parameters", plain)
        if isinstance(made, SGI):
            made.check(self.n)

    @property
    def intervention(self) -> Intervention | None:
        """The method with its parameters, if it is one that is attached."""
        made = self.configured
        return made if isinstance(made, Intervention) else None

    @property
    def configured(self) -> Intervention | SGI | None:
        """The method with its parameters: one that is attached, or one that chooses among seeds; None for "none"."""
        cls = METHODS[self.method]
        if cls is None:
            return None
        places = {name: from_text(self.parameters[name]) for name in ("blocks", "tokens") if name in self.parameters}
        return cls(**{**self.parameters, **places})


def from_text(place: Any) -> Any:
    """The slice of a text such as 3:6 or the indices of one such as 0,2; anything else as it is."""
    if isinstance(place, str):
        try:
            if ":" in place:
                return slice(*(int(part) if part.strip() else None for part in place.split(":")))
            return tuple(int(part) for part in place.split(","))
        except (ValueError, TypeError):
            return place
    return place


def to_text(place: Any) -> Any:
    """A slice as "3:6" and indices as "0,2"; anything else as it is."""
    if isinstance(place, slice):
        parts = [place.start, place.stop] if place.step is None else [place.start, place.stop, place.step]
        return ":".join("" if part is None else str(part) for part in parts)
    if isinstance(place, Sequence) and not isinstance(place, str):
        return ",".join(map(str, place))
    return place
