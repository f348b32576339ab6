"""What the Gram flow costs: against gradient steps on the tokens, and against the memory of this machine.

Every round runs each contender once, so that a slow moment of the machine slows all of them, and each after an
untimed floor, so that all find the caches and the allocator alike; the table shows medians. The floor is the
least that any method of this kind does: one read of the tokens, then one read and one write of them. Peak extra
memory is the high-water mark of torch's allocator during one call, output included, from the profiler's record of
every allocation and release; the B x B matrices, in numpy, are a few kilobytes.

    python benchmarks/gram_flow.py --repeats 5 --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from variegate.gram import gram_flow
from variegate.objectives import Vendi


def autograd_loop(tokens: Tensor, eta: float, steps: int) -> Tensor:
    """Eq. 2 of arXiv:2603.28762 as written: differentiate the entropy, step, repeat."""
    rows = tokens.flatten(1)
    for _ in range(steps):
        variable = rows.detach().requires_grad_()
        directions = variable / variable.norm(dim=1, keepdim=True)
        shares = torch.linalg.eigvalsh(directions @ directions.T / len(rows)).clamp_min(1e-12)
        (gradient,) = torch.autograd.grad(-(shares * shares.log()).sum(), variable)
        rows = rows + eta / steps * gradient
    return rows.view_as(tokens)


def closed_form_loop(tokens: Tensor, eta: float, steps: int) -> Tensor:
    """The same steps by the closed form of the gradient, on the tokens."""
    rows = tokens.flatten(1)
    for _ in range(steps):
        norms = rows.norm(dim=1, keepdim=True)
        directions = rows / norms
        kernel = directions @ directions.T
        eigenvalues, vectors = torch.linalg.eigh(kernel / len(rows))
        slope = (vectors * eigenvalues.clamp_min(1e-12).log()) @ vectors.T / -len(rows)
        slope.fill_diagonal_(0)
        gradient = 2 * (slope @ directions - (slope * kernel).sum(1, keepdim=True) * directions) / norms
        rows = rows + eta / steps * gradient
    return rows.view_as(tokens)


def floor(tokens: Tensor) -> Tensor:
    """One read, then one read and one write."""
    tokens.sum()
    return tokens + 1


def seconds(run: Callable[[], Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_extra_bytes(run: Callable[[], Tensor]) -> int:
    """High-water mark of torch's CPU allocator over one call, above where it began."""
    run()  # what the first call alone allocates is not its cost
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    del result
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    """Measure, print the table, and say whether each target holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="B")
    parser.add_argument("--tokens", type=int, default=512, help="N")
    parser.add_argument("--channels", type=int, default=3072, help="D")
    parser.add_argument("--spread", type=float, default=0.3, help="how much samples differ, of their norm")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.tokens, arguments.channels)
    tokens = torch.randn(shape[1:], generator=generator)
    tokens = 3 * (tokens + arguments.spread * torch.randn(shape, generator=generator))
    eta = arguments.strength * tokens.flatten(1).square().sum(1).mean().item()

    def flow(steps: int) -> Callable[[], Tensor]:
        return lambda: gram_flow(tokens, Vendi(), eta=eta, inner_steps=steps)

    contenders = {
        "floor": lambda: floor(tokens),
        "Gram flow, M=1": flow(1),
        "Gram flow, M=50": flow(50),
        "Gram flow, M=1000": flow(1000),
        "closed form, M=50": lambda: closed_form_loop(tokens, eta, 50),
        "autograd, M=50": lambda: autograd_loop(tokens, eta, 50),
    }
    for run in (*contenders.values(),)[:4]:
        run()
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            floor(tokens)
            rounds[name].append(seconds(run))
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    memory = peak_extra_bytes(flow(50)) / tokens.nbytes

    flow_50 = medians["Gram flow, M=50"]
    targets = [
        ("autograd / flow, M=50", medians["autograd, M=50"] / flow_50, ">=", 60.0),
        ("closed form / flow, M=50", medians["closed form, M=50"] / flow_50, ">=", 25.0),
        ("flow, M=50 / floor", flow_50 / medians["floor"], "<=", 2.0),
        ("flow, M=1000 / M=1", medians["Gram flow, M=1000"] / medians["Gram flow, M=1"], "<=", 3.0),
        ("peak extra memory / tokens", memory, "<=", 1.5),
    ]
    print(f"{' x '.join(map(str, shape))} float32, spread {arguments.spread}, strength {arguments.strength},")
    print(f"{arguments.threads} threads, torch {torch.__version__}, median of {arguments.repeats}\n")
    for name, median in medians.items():
        print(f"{name:<28}{1e3 * median:10.1f} ms{median / medians['floor']:10.1f} x floor")
    print()
    for name, ratio, sign, bound in targets:
        holds = ratio >= bound if sign == ">=" else ratio <= bound
        print(f"{name:<28}{ratio:10.2f}   target {sign} {bound:<6g}{'holds' if holds else 'MISSED'}")
    if arguments.json:
        record = {
            "shape": shape,
            "spread": arguments.spread,
            "strength": arguments.strength,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "processor": platform.machine(),
            "seconds": rounds,
            "ratios": {name: ratio for name, ratio, _, _ in targets},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
