"""Distil emoji-turbo: four steps without guidance that go where emoji-base goes in twenty with it.

    python training/turbo.py --data data/emoji64.npz --out runs/turbo

Trajectory distillation: the teacher, guided, draws its deterministic path from noise to image in twenty Euler steps;
the student, which starts as the teacher, learns the chords between every fifth point, which are the velocities its own
four Euler steps need. Progressive distillation (arXiv 2202.00512) without its intermediate students: the paths are
so short that one stage does it, and each is computed once and learnt from several times. Regression on the teacher's
own paths needs no second network beside it, as distribution matching does, and two cores have no time for one.

Prompts are drawn from the skewed captions of the teacher's own training. Kill it at any time: the same command goes on
from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from captions import Captions, drawings
from common import Progress, atomic_save, load_state
from tokenizer import MAX_LENGTH, ids_of
from transformer import PADDING, PaddedAttention, TextToImage, guided, learning_rate, load_weights

NODES = 4  # steps of the student
SUBSTEPS = 5  # steps of the teacher between two of the student's


class Paths:
    """The teacher's paths, newest first out last: a ring of the points at which the student steps.

    Args:
        teacher: predicts velocities; frozen.
        guidance: scale of classifier-free guidance.
        empty: token ids of the empty prompt, `[1, 12]`.
        capacity: paths that are kept.
    """

    def __init__(self, teacher: TextToImage, guidance: float, empty: torch.Tensor, capacity: int = 4096) -> None:
        self.teacher, self.guidance, self.empty, self.capacity = teacher, guidance, empty, capacity
        self.points = torch.empty(0, NODES + 1, 16, 8, 8)
        self.ids = torch.empty(0, MAX_LENGTH, dtype=torch.long)

    @torch.no_grad()
    def extend(self, ids: torch.Tensor, generator: torch.Generator) -> None:
        """Follow the teacher from fresh noise for prompts `[B, 12]`."""
        x = torch.randn(len(ids), 16, 8, 8, generator=generator)
        points, steps = [x], NODES * SUBSTEPS
        scale = torch.full((len(ids),), self.guidance)
        for step in range(steps):
            t = torch.full((len(ids),), 1 - step / steps)
            x = x - guided(self.teacher, x, t, ids, self.empty, scale) / steps
            if (step + 1) % SUBSTEPS == 0:
                points.append(x)
        self.points = torch.cat([self.points, torch.stack(points, dim=1)])[-self.capacity :]
        self.ids = torch.cat([self.ids, ids])[-self.capacity :]

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Points `[B, 16, 8, 8]`, their times `[B]`, the velocities that lead to the next points, and token ids."""
        row = torch.randint(len(self.points), (count,), generator=generator)
        node = torch.randint(NODES, (count,), generator=generator)
        here, there = self.points[row, node], self.points[row, node + 1]
        return here, 1 - node / NODES, NODES * (here - there), self.ids[row]


def main() -> None:
    """Distil, report a line every 100 steps, save a checkpoint every 200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz written by dataset.py")
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, e.g. the bundled one")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--reuse", type=int, default=4, help="how often a point is learnt from, on average")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    captions = Captions(drawings(np.load(args.data)))
    tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")

    teacher = load_weights(args.teacher, tokenizer).requires_grad_(False)
    teacher.transformer.set_attn_processor(PaddedAttention())
    student = load_weights(args.init or args.teacher, tokenizer)
    student.requires_grad_(False)
    student.transformer.set_attn_processor(PaddedAttention())
    student.transformer.requires_grad_(True)
    ema = copy.deepcopy(student).requires_grad_(False)
    trained = list(student.transformer.parameters())
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"ema": ema.transformer, "model": student.transformer, "optimizer": optimizer}
    step = load_state(args.out / "checkpoint.pt", **parts)

    paths = Paths(teacher, args.guidance, ids_of(tokenizer, [""]))
    progress = Progress(args.steps, step, args.batch, args.out / "loss.csv")
    every = NODES * args.reuse
    while step < args.steps:
        rng = random.Random(f"{args.seed} {step}")
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        # A ring that is young, at the start or after a kill, is filled before anything is learnt from it.
        while step % every == 0 or len(paths.ids) < 4 * args.batch:
            texts = [captions.draw(rng)[0] for _ in range(args.batch)]
            paths.extend(ids_of(tokenizer, texts), generator)
            if len(paths.ids) >= 4 * args.batch:
                break
        points, t, velocity, ids = paths.draw(args.batch, generator)
        padding = PADDING if rng.random() < 0.3 else 1
        loss = F.mse_loss(student(points, t, ids, padding), velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps, decay=0.5)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_(list(ema.transformer.parameters()), trained, 1 - min(0.999, (1 + step) / (10 + step)))
        progress.update(step, loss=loss)
        if step % 200 == 0 or step == args.steps:
            atomic_save(args.out / "checkpoint.pt", step, **parts)


if __name__ == "__main__":
    main()
