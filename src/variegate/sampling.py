"""What decides a pipeline's pictures besides its weights and seeds: its scheduler, its adapters, and stray noise."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

UNTOLD = "not told"


def scheduler_of(pipeline: Any) -> dict[str, str] | None:
    """Class of a pipeline's scheduler, and a digest of what is not a default of its configuration; None without one.

    Example:
        >>> from variegate.emoji import load_pipeline
        >>> scheduler_of(load_pipeline("emoji-base"))["class"]
        'FlowMatchEulerDiscreteScheduler'
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return None
    # Defaults are left out, so that a release of diffusers that adds some does not look like another scheduler.
    defaults = inspect.signature(type(scheduler).__init__).parameters
    config = {
        name: value
        for name, value in getattr(scheduler, "config", {}).items()
        if not name.startswith("_") and (name not in defaults or defaults[name].default != value)
    }
    config["_shift"] = vars(scheduler).get("_shift")  # `set_shift` does not write it into the configuration
    text = json.dumps(config, sort_keys=True, default=str)
    return {"class": type(scheduler).__name__, "digest": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def adapters_of(pipeline: Any) -> list[dict[str, Any]]:
    """The active adapters (LoRA and others of PEFT) of a pipeline's models, merged ones too.

    Returns:
        For each model and adapter: `model`, its part in the pipeline; `name`; `scales`, the different factors that its
        layers have; `digest` of its weights, None where they are off to the disk.
    """
    from torch import nn

    found = []
    for part, model in getattr(pipeline, "components", {}).items():
        if isinstance(model, nn.Module):
            scales: dict[str, set[float]] = {}
            weights: dict[str, Any] = {}
            for place, layer in model.named_modules():
                for name in _active(layer):
                    scale = getattr(layer, "scaling", {}).get(name, 1.0)
                    scales.setdefault(name, set()).add(round(float(scale), 6))
                    digest = weights.setdefault(name, hashlib.blake2b(digest_size=8))
                    weights[name] = digest and _updated(digest, place, layer, name)
            found += [
                {"model": part, "name": name, "scales": sorted(scales[name]), "digest": digest and digest.hexdigest()}
                for name, digest in sorted(weights.items())
            ]
    return found


def _active(layer: Any) -> list[str]:
    """Names of the adapters of a layer of PEFT that act; none of any other module."""
    if not hasattr(layer, "adapter_layer_names") or not hasattr(layer, "merged_adapters"):
        return []
    acting = [] if layer.disable_adapters else layer.active_adapters
    return [name for name in dict.fromkeys([*acting, *layer.merged_adapters]) if _weights(layer, name)]


def _weights(layer: Any, name: str) -> list[tuple[str, Any]]:
    """Kind and tensor of an adapter's weights in a layer."""
    from torch import nn

    found = []
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and name in held:
            one = held[name]
            tensors = one.named_parameters() if isinstance(one, nn.Module) else [("", one)]
            found += [(f"{kind}.{inner}", tensor) for inner, tensor in tensors]
    return found


def _updated(digest: Any, place: str, layer: Any, name: str) -> Any | None:
    """The digest with an adapter's weights in a layer; None if they can't be seen."""
    import torch

    for kind, tensor in _weights(layer, name):
        if tensor.is_meta:
            return None
        digest.update(f"{place}.{kind} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest


@contextmanager
def seeded(pipeline: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Let samplers that draw noise in their steps without the pictures' generators draw the same for the same seeds.

    Many pipelines give their generators to the first noise alone, so that a stochastic scheduler draws the noise of its
    steps from PyTorch's global generators. They are seeded for the time of the call, by a digest of all seeds (a seed
    itself would repeat the first noise of its picture), and afterwards are as they were.

    Args:
        pipeline: its device's generator and the CPU's are seeded.
        seeds: of the pictures of the call.
    """
    import torch

    device: Any = getattr(pipeline, "_execution_device", None) or pipeline.device
    module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    # Of several devices of a kind, that of the pipeline; a kind without several has nothing to choose.
    there = nullcontext() if not hasattr(module, "device") else module.device(device.index)
    text = f"steps of {list(seeds)}"
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    with there:
        before, before_there = torch.get_rng_state(), None if module is None else module.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed devices that are not restored
            if module is not None:
                module.manual_seed(seed)
            yield
        finally:
            torch.set_rng_state(before)
            if module is not None:
                module.set_rng_state(before_there)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What of scheduler, adapters, dtype and device is not the same in two recipes, each in words: then, now.

    What one of them leaves open is no difference; a scheduler and adapters that it does not tell, as those of variegate
    0.1.0, are `UNTOLD`.
    """
    found = {}
    for name, words in (("scheduler", _scheduler), ("adapters", _adapters), ("dtype", str), ("device", str)):
        if name in now:
            was, is_now = words(then[name]) if name in then else UNTOLD, words(now[name])
            if was != is_now and "auto" not in (was, is_now):
                found[name] = was, is_now
    return found


def _scheduler(fact: Mapping[str, str] | None) -> str:
    return "none" if fact is None else f"{fact['class']} ({fact['digest']})"


def _adapters(facts: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{fact['name']} on {fact['model']}, scale {' to '.join(f'{s:g}' for s in fact['scales'])} ({fact['digest']})"
        for fact in facts
    ) or "none"  # fmt: skip
