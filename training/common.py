"""What the training scripts share: a progress line with a log, and checkpoints that survive a kill."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch

from variegate.files import replacing


class Progress:
    """Running means of named losses: one printed line and one CSV row every `every` steps."""

    def __init__(self, total: int, start: int, batch: int, log: Path, every: int = 100) -> None:
        self.total, self.batch, self.log, self.every = total, batch, log, every
        self.sums: dict[str, float] = {}
        self.count, self.since = 0, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        if start == 0:
            log.unlink(missing_ok=True)

    def update(self, step: int, **values: torch.Tensor) -> None:
        """Add the values of one step; print and log when a stretch is complete."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        if step % self.every and step != self.total:
            return
        seconds = time.monotonic() - self.since
        rate = self.count * self.batch / seconds
        means = {name: total / self.count for name, total in self.sums.items()}
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
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
