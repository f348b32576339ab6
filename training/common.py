"""What the training scripts share: batches, the loop, a progress line with a log, checkpoints that survive a kill."""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from captions import Captions
from tokenizer import ids_of
from variegate.files import replacing

SECONDS_BETWEEN_CHECKPOINTS = 60


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a script that learns from captions."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz written by dataset.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, e.g. the bundled one")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device", type=torch.device, default="cpu", help="default cpu; cuda trains in bfloat16")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw captions; worth it on a GPU")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        metavar="MODE",
        help="a third faster, after minutes of compiling; on a GPU reduce-overhead, which replays graphs",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


class Batches(Dataset):
    """Batches of captions and pictures by the number of the step, the same whoever draws them.

    Args:
        captions: what to draw from.
        size: pictures in a batch, `B`.
        seed: of the whole run.
        tokenizers: pairs of a tokenizer and the length `L` it fills.
    """

    def __init__(
        self, captions: Captions, size: int, seed: int, *tokenizers: tuple[PreTrainedTokenizerBase, int]
    ) -> None:
        self.captions, self.size, self.seed, self.tokenizers = captions, size, seed, tokenizers

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        """Rows `[B]`, which of them see the padding of a plain pipeline call `[B]`, and token ids `[B, L]`."""
        rng = random.Random(f"{self.seed} {step}")
        texts, rows = zip(*(self.captions.draw(rng) for _ in range(self.size)), strict=True)
        padded = torch.tensor([rng.random() < 0.3 for _ in rows])
        return torch.tensor(rows), padded, *(ids_of(t, texts, length) for t, length in self.tokenizers)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU; on a CPU only those that are asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def prepare(args: argparse.Namespace) -> None:
    """Seeds, the folder, and how a GPU computes."""
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # With 29 tokens plain products beat the kernels made for long sequences.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def fit(
    args: argparse.Namespace,
    batches: Batches,
    model: nn.Module,
    ema: nn.Module,
    loss_of: Callable[[torch.Generator, Sequence[Tensor]], Tensor],
    decay: float,
    project: Callable[[], None] = lambda: None,
) -> None:
    """Train `model` on `loss_of(generator, batch)` from where the last checkpoint stands; `ema` follows it.

    A line of progress a hundred steps or more apart, a checkpoint a minute, and both at the end. `decay` is the last
    part of the steps, over which the rate comes down; `project` runs after every step.
    """
    trained, averaged = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    start = load_state(args.out / "checkpoint.pt", **parts)
    print(f"{sum(p.numel() for p in trained) / 1e6:.1f} M parameters", flush=True)
    progress = Progress(args.steps, start, args.batch, args.out / "loss.csv", every=max(100, args.steps // 400))
    loader = DataLoader(batches, batch_size=None, sampler=range(start, args.steps), num_workers=args.workers)
    generator, saved = torch.Generator(args.device), time.monotonic()
    for step, batch in enumerate(loader, start + 1):
        generator.manual_seed(args.seed * 1_000_003 + step)
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(generator, [x.to(args.device, non_blocking=True) for x in batch])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step - 1, args.steps, decay)
        optimizer.step()
        optimizer.zero_grad()
        project()
        torch._foreach_lerp_(averaged, trained, 1 - min(0.999, (1 + step) / (10 + step)))
        progress.update(step, loss=loss)
        if step == args.steps or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            atomic_save(args.out / "checkpoint.pt", step, **parts)
            saved = time.monotonic()


def learning_rate(step: int, steps: int, decay: float, warmup: int = 150) -> float:
    """Warm up, hold, and come down linearly over the last part: the end can be moved while it holds."""
    return min(1.0, (step + 1) / warmup, max(0.01, (steps - step) / (decay * steps)))


class Progress:
    """Running means of named losses: one printed line and one CSV row every `every` steps."""

    def __init__(self, total: int, start: int, batch: int, log: Path, every: int = 100) -> None:
        self.total, self.batch, self.log, self.every = total, batch, log, every
        self.sums: dict[str, Tensor] = {}
        self.count, self.since = 0, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        if start == 0:
            log.unlink(missing_ok=True)

    def update(self, step: int, **values: Tensor) -> None:
        """Add the values of one step; print and log when a stretch is complete."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()  # on its device: nothing waits for it
        if step % self.every and step != self.total:
            return
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        rate = self.count * self.batch / (time.monotonic() - self.since)
        left = (self.total - step) * self.batch / rate / 60
        line = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"{step}/{self.total}  {line}  {rate:.0f} img/s  {left:.0f} min left", flush=True)
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "samples", *means, "images_per_second"])
            writer.writerow([step, step * self.batch, *(f"{v:.5f}" for v in means.values()), f"{rate:.1f}"])
        self.sums, self.count, self.since = {}, 0, time.monotonic()


def atomic_save(path: Path, step: int, **parts: Any) -> None:
    """Write the state of every part, complete or not at all."""
    with replacing(path) as partial:
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, partial)


def load_state(path: Path, **parts: Any) -> int:
    """Restore what `atomic_save` wrote into the same parts; the step to go on from, 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
