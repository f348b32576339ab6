"""The bundled checkpoints, and the loader of every pipeline: bundled, from a folder or from the hub."""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
OFFLOADS = ("none", "model", "sequential")
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
LICENCES = "MIT, Apache-2.0 and CC-BY-4.0"  # of the artwork behind the bundled models

# What a bundled model was made for: arguments of its pipeline's call.
_CALL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # Its T5 says nothing, in as many tokens as it is asked for: one is enough.
    "emoji-base": {"num_inference_steps": 20, "guidance_scale": 4.0, "max_sequence_length": 1},
    # Guidance is in its weights: above 1 the pipeline would guide a second time.
    "emoji-turbo": {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 1},
    # A Flux pipeline makes 1024 x 1024 pixels unless told; its text encoder reads 16 tokens or any number.
    "emoji-dev": {
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "height": 64,
        "width": 64,
    },
}

_LOADING = threading.Lock()  # filters of warnings are the process's
_LOUDNESS = threading.Lock()
_before: list[tuple[int, bool]] = []  # of each library, when the first one came into `quiet`
_inside: list[None] = []  # one for each that is in there


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline on disk.

    Attributes:
        name: bundled name, hub id, or name of the folder.
        folder: where it is.
        revision: commit on the hub; None for other checkpoints.
    """

    name: str
    folder: Path
    revision: str | None = None


@dataclass(frozen=True)
class Description:
    """What a bundled model is.

    Attributes:
        name: of the model.
        pipeline: class of its pipeline in diffusers.
        parameters: how many its denoiser has.
        bytes: of its folder.
        steps: it was made for.
        guidance: how it is guided: in two passes, by a number it reads, or not at all.
    """

    name: str
    pipeline: str
    parameters: int
    bytes: int
    steps: int
    guidance: str


def bundled_models() -> dict[str, Path]:
    """Name and folder of every checkpoint in the package.

    Example:
        >>> sorted(bundled_models())
        ['emoji-base', 'emoji-dev', 'emoji-turbo']
    """
    folder = Path(str(resources.files(__package__)))
    return {index.parent.name: index.parent for index in sorted(folder.glob("*/model_index.json"))}


def describe(name: str) -> Description:
    """What a bundled model is, read from its folder.

    Raises:
        ValueError: if there is none of this name.

    Example:
        >>> describe("emoji-base").pipeline
        'StableDiffusion3Pipeline'
    """
    from safetensors import safe_open

    if name not in bundled_models():
        raise ValueError(f"model={name!r} is not bundled; use one of {', '.join(bundled_models())}.")
    folder = bundled_models()[name]
    parameters = 0
    for file in (folder / "transformer").glob("*.safetensors"):
        with safe_open(file, "numpy") as weights:  # SIM118: the handle is no mapping, it can't be iterated over
            parameters += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    config = json.loads((folder / "transformer" / "config.json").read_text())
    call = call_defaults(name)
    scale = call["guidance_scale"]
    guidance = f"{scale:g}, " + ("distilled" if config.get("guidance_embeds") else "two passes") if scale else "none"
    return Description(
        name=name,
        pipeline=json.loads((folder / "model_index.json").read_text())["_class_name"],
        parameters=parameters,
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        steps=call["num_inference_steps"],
        guidance=guidance,
    )


def call_defaults(name: str) -> dict[str, Any]:
    """Arguments that a bundled model's pipeline is to be called with; none for other models.

    Example:
        >>> call_defaults("emoji-base")["guidance_scale"]
        4.0
    """
    return dict(_CALL_DEFAULTS.get(name, {}))


def locate(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint; one on the hub is downloaded, safetensors only, unless it is in the cache.

    Args:
        model: name of a bundled model, folder with a `model_index.json`, or hub id "owner/name".
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: if there is no such model, or `revision` is given for one that is not on the hub.
    """
    name, folder, bundled = str(model), Path(model), bundled_models()
    on_disk = bundled.get(name) or (folder if folder.is_dir() else None)
    if on_disk is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r}: only models on the hub have revisions; leave it out for {name}.")
        if not (on_disk / "model_index.json").is_file():
            raise ValueError(f"model={name!r} is a folder without model_index.json, so not a diffusers pipeline.")
        return Checkpoint(on_disk.resolve().name, on_disk)
    choices = f"a bundled model ({', '.join(bundled)}), a folder"
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"model={name!r} is unknown; use {choices}, or a hub id such as owner/name.")
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"model={name!r} is neither {choices}, nor to be had from the hub: {_first_line(error)}"
        ) from error
    return Checkpoint(name, snapshot, snapshot.name)


def pick_device(device: str) -> str:
    """The device that a name of `DEVICES` means here; "auto" is the accelerator if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, present in available.items() if present)
    if not available.get(device):
        present = ", ".join(name for name in available if available[name])
        raise ValueError(f"device={device!r} is not available; use auto or one of: {present}.")
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """The dtype that a name of `DTYPES` means: "auto" is float32 on the CPU, bfloat16 on an accelerator."""
    import torch

    if dtype != "auto":
        return dtype
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        return "float16"
    return "float32" if device == "cpu" else "bfloat16"


def load_pipeline(
    model: str | Path = "emoji-base",
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    revision: str | None = None,
) -> Any:
    """Load a diffusers text-to-image pipeline, without progress bars and library chatter.

    Weights are read from safetensors only, and no code of a checkpoint is run.

    Args:
        model: see `locate`.
        dtype: of `DTYPES`; see `pick_dtype`.
        device: of `DEVICES`; see `pick_device`.
        offload: "none"; "model" keeps only the model at work on the accelerator, "sequential" (slow) only its
            layer at work.
        revision: see `locate`.

    Returns:
        The pipeline, of the class its checkpoint names.

    Raises:
        ValueError: if there is no such model or device, the checkpoint can't be loaded, or there is no
            accelerator to offload from.

    Example:
        >>> type(load_pipeline("emoji-base")).__name__
        'StableDiffusion3Pipeline'
    """
    import torch

    for name, value, known in (("dtype", dtype, DTYPES), ("offload", offload, OFFLOADS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
    place = pick_device(device)
    if offload != "none" and place == "cpu":
        raise ValueError(
            f"offload={offload!r} moves weights off an accelerator, and there is none; use offload='none'."
        )
    folder = locate(model, revision).folder
    with _LOADING, quiet(), warnings.catch_warnings():
        # New diffusers call it `dtype`, and old ones know only `torch_dtype`.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=getattr(torch, pick_dtype(dtype, place)), use_safetensors=True
            )
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise ValueError(f"model={str(model)!r} can't be loaded: {_first_line(error)}") from error
        pipe.set_progress_bar_config(disable=True)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=place)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=place)
        else:
            pipe.to(place)
    return pipe


def fewest_steps(pipe: Any) -> int:
    """In how many steps a pipeline can run at least: a scheduler with `shift_terminal` stretches two or more.

    Example:
        >>> fewest_steps(load_pipeline("emoji-base")), fewest_steps(load_pipeline("emoji-turbo"))
        (1, 2)
    """
    return 2 if getattr(getattr(pipe, "scheduler", None), "config", {}).get("shift_terminal") else 1


def check_steps(pipe: Any, steps: int) -> None:
    """Refuse a run of fewer steps.

    Raises:
        ValueError: one sentence, in place of the scheduler's IndexError.
    """
    if steps < fewest_steps(pipe):
        raise ValueError(f"steps={steps} is too few: the scheduler stretches its steps to a last one; use 2 or more.")


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only, and no progress bars, from diffusers and transformers, until the last one inside has left.

    Their loudness is the process's, so threads that are in here at once share one memory of what it was.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    with _LOUDNESS:
        if not _inside:
            _before[:] = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
        _inside.append(None)
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
    try:
        yield
    finally:
        with _LOUDNESS:
            _inside.pop()
            for logger, (verbosity, bar) in zip(loggers, _before, strict=True) if not _inside else ():
                logger.set_verbosity(verbosity)
                if bar:
                    logger.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
