"""What repulsion costs at real size: whole forward passes of Flux-dev and SD3.5-Large with random weights.

Cost does not depend on the weights. In every round the transformer runs once as it is, once with the Gram flow, once
with the per-step closed form and once with the autograd loop of eq. 2 in the same hooks, with the paper's settings
(arXiv 2603.28762: groups of 4, all blocks, M=50 in the first of 20 steps on Flux, M=100 in the first 4 of 28 on
SD3.5-Large). The share is the time added in the window's steps over the time of all steps of the stock transformer.

    python benchmarks/overhead_gpu.py                      # a CUDA device: full size, 512 and 1024 pixels, bfloat16
    python benchmarks/overhead_gpu.py --reduced            # the default without one: an eighth of the width, few blocks
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from gram_flow import autograd_loop, closed_form_loop
from variegate import ContextualRepulsion, TokenIntervention, attach

SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Loop(TokenIntervention):
    """The paper's iteration, step by step on the tokens."""

    loop: Callable[[Tensor, float, int], Tensor]
    eta: float
    inner_steps: int

    def edit(self, tokens: Tensor) -> Tensor:
        """Each set by itself, in float32."""
        with torch.enable_grad():
            moved = [self.loop(samples.float(), self.eta, self.inner_steps) for samples in tokens]
        return torch.stack(moved).to(tokens.dtype)


@dataclass(frozen=True)
class Case:
    """A transformer, what its forward takes at a size, and the paper's settings."""

    name: str
    build: Callable[[bool], nn.Module]
    call: Callable[[nn.Module, int, Any], dict[str, Any]]
    settings: ContextualRepulsion
    steps: int


def flux(reduced: bool) -> nn.Module:
    """FluxTransformer2DModel of Flux-dev."""
    heads, dual, single = (3, 2, 4) if reduced else (24, 19, 38)
    return FluxTransformer2DModel(
        num_layers=dual, num_single_layers=single, num_attention_heads=heads, guidance_embeds=True
    )


def flux_call(model: nn.Module, pixels: int, place: Any) -> dict[str, Any]:
    """B=4, 512 text tokens; guidance is distilled, so there is one branch."""
    side = pixels // 16
    text = torch.randn(1, 512, model.config.joint_attention_dim).expand(SAMPLES, -1, -1)
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(side), torch.arange(side), indexing="ij"), -1)
    return {
        "hidden_states": torch.randn(SAMPLES, side * side, model.config.in_channels).to(place),
        "encoder_hidden_states": text.to(place),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim).expand(SAMPLES, -1).to(place),
        "timestep": torch.ones(SAMPLES).to(place),
        "guidance": torch.full((SAMPLES,), 3.5).to(place),
        "img_ids": ids.reshape(-1, 3).float().to(place),
        "txt_ids": torch.zeros(512, 3).to(place),
    }


def sd3(reduced: bool) -> nn.Module:
    """SD3Transformer2DModel of SD3.5-Large."""
    heads, layers = (5, 6) if reduced else (38, 38)
    return SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
        out_channels=16,
    )


def sd3_call(model: nn.Module, pixels: int, place: Any) -> dict[str, Any]:
    """B=4, both guidance branches in one batch, 333 text tokens."""
    latents = torch.randn(SAMPLES, 16, pixels // 8, pixels // 8).repeat(2, 1, 1, 1)
    text = torch.randn(2, 333, model.config.joint_attention_dim).repeat_interleave(SAMPLES, 0)
    return {
        "hidden_states": latents.to(place),
        "encoder_hidden_states": text.to(place),
        "pooled_projections": torch.randn(2 * SAMPLES, model.config.pooled_projection_dim).to(place),
        "timestep": torch.full((2 * SAMPLES,), 1000.0).to(place),
    }


CASES = (
    Case("Flux-dev", flux, flux_call, ContextualRepulsion.paper("flux-dev", eta=1e8), 20),
    Case("SD3.5-Large", sd3, sd3_call, ContextualRepulsion.paper("sd3.5-large", eta=5e5), 28),
)


def measure(case: Case, model: nn.Module, pixels: int, repeats: int, place: Any) -> dict[str, Any]:
    """Median seconds of a forward pass for each contender, and the share of a generation."""
    call, settings = case.call(model, pixels, place), case.settings
    loops = {"closed form": closed_form_loop, "autograd": autograd_loop}
    contenders: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "stock": nullcontext,
        "Gram flow": lambda: attach(model, settings),
    } | {
        name: lambda loop=loop: attach(model, Loop(loop=loop, eta=settings.eta, inner_steps=settings.inner_steps))
        for name, loop in loops.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            with contender():
                synchronize()
                began = time.perf_counter()
                model(**call, return_dict=False)
                synchronize()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - began)
    seconds = {name: median(found) for name, found in times.items()}
    window = settings.stop / case.steps
    shares = {name: window * (value / seconds["stock"] - 1) for name, value in seconds.items() if name != "stock"}
    return {
        "model": case.name,
        "pixels": pixels,
        "inner_steps": settings.inner_steps,
        "seconds": seconds,
        "share": shares,
    }


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    """Measure every case at every size, and print a row for each contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="an eighth of the width, few blocks, 256 pixels")
    parser.add_argument("--pixels", type=int, nargs="*", help="default: 512 and 1024, reduced: 256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    reduced = args.reduced or not gpu
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    place = torch.empty(0, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, {'reduced' if reduced else 'full'} size, torch {torch.__version__}\n")
    print("| model | pixels | transformer | ms a pass | added | share of a generation |\n|---|---|---|---|---|---|")
    results = []
    for case in CASES:
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model = case.build(reduced).eval()
            torch.set_default_dtype(torch.float32)
        for pixels in args.pixels or ([256] if reduced else [512, 1024]):
            result = measure(case, model, pixels, args.repeats, place)
            results.append(result)
            stock = result["seconds"]["stock"]
            for contender, seconds in result["seconds"].items():
                share = result["share"].get(contender, 0.0)
                print(
                    f"| {case.name} | {pixels} | {contender} | {1e3 * seconds:.1f} "
                    f"| {100 * (seconds / stock - 1):+.1f} % | {100 * share:+.2f} % |",
                    flush=True,
                )
        del model
    if args.json:
        args.json.write_text(json.dumps({"device": name, "dtype": str(dtype), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
