"""What a pipeline foresees after a few of its steps: the pictures of a shortened schedule."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

from variegate.emoji.models import quiet


def arguments_of(pipe: Any) -> tuple[dict[str, Any], bool]:
    """What a pipeline's call takes: names and defaults, and whether it takes any other, too.

    A call that hands on whatever it is given, `__call__(self, *args, **kwargs)`, takes what the class below takes.

    Example:
        >>> class Pipeline:
        ...     def __call__(self, prompt, steps=20): ...
        >>> class Logged(Pipeline):
        ...     def __call__(self, *args, log=None, **kwargs): ...
        >>> arguments_of(Logged())
        ({'log': None, 'prompt': None, 'steps': 20}, False)
    """
    found: dict[str, Any] = {}
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__call__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, None if parameter.default is parameter.empty else parameter.default)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, True


def check_scheduler(pipe: Any) -> None:
    """Make sure that the pipeline's steps can be cut short, and that a seed determines its picture.

    Raises:
        ValueError: if not.
    """
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    known = FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, known):
        raise ValueError(
            f"{type(pipe).__name__} has the scheduler {type(scheduler).__name__}, whose steps can't be cut short to "
            f"see a picture early; use {' or '.join(cls.__name__ for cls in known)}."
        )
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            "stochastic_sampling=True of the scheduler draws noise in every step, so a seed does not determine its "
            "picture; use stochastic_sampling=False."
        )


def previews(pipe: Any, prompt: str, seeds: Sequence[int], step: int, **call: Any) -> list[Any]:
    """Pictures as the denoiser foresees them in a step: x0_hat = x_t - t v, decoded by the pipeline.

    The pipeline runs the first steps of its own schedule, the last of them down to noise level 0, where an Euler
    step arrives at x0_hat. Nothing of the pipeline is changed but, for the time of the call, its scheduler.

    Args:
        pipe: stock pipeline with a scheduler that `check_scheduler` lets pass.
        prompt: the prompt.
        seeds: one for each picture.
        step: which one, from 1; the last step of the schedule is the finished picture.
        call: further arguments of the pipeline's call.
    """
    import torch

    stock = pipe.scheduler
    pipe.scheduler = _shortened(stock, step)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    ours = {"prompt": prompt, "num_images_per_prompt": len(seeds), "generator": generators, "output_type": "pil"}
    try:
        with quiet():
            return list(pipe(**{**call, **ours}).images)
    finally:
        pipe.scheduler = stock


def _shortened(scheduler: Any, steps: int) -> Any:
    """A copy that ends after so many steps of the schedule it would have made."""
    import torch

    short = copy.deepcopy(scheduler)
    whole = short.set_timesteps

    @functools.wraps(whole)  # pipelines look at its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        short.timesteps = short.timesteps[:steps]
        short.sigmas = torch.cat([short.sigmas[:steps], short.sigmas[-1:]])

    short.set_timesteps = set_timesteps
    return short
