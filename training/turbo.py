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

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from captions import Captions, drawings
from common import Batches, arguments, autocast, fit, prepare
from tokenizer import MAX_LENGTH, ids_of
from transformer import MaskedAttention, TextToImage, guided, load_parts, load_weights

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

    def __init__(self, teacher: TextToImage, guidance: float, empty: Tensor, capacity: int) -> None:
        self.teacher, self.guidance, self.empty, self.capacity = teacher, guidance, empty, capacity
        self.points = torch.empty(0, NODES + 1, 16, 8, 8, device=empty.device)
        self.ids = torch.empty(0, MAX_LENGTH, dtype=torch.long, device=empty.device)

    @torch.no_grad()
    def extend(self, ids: Tensor, generator: torch.Generator) -> None:
        """Follow the teacher from fresh noise for prompts `[B, 12]`."""
        x = torch.randn(len(ids), 16, 8, 8, generator=generator, device=ids.device)
        points, steps = [x], NODES * SUBSTEPS
        scale = torch.full((len(ids),), self.guidance, device=ids.device)
        for step in range(steps):
            t = torch.full((len(ids),), 1 - step / steps, device=ids.device)
            x = x - guided(self.teacher, x, t, ids, self.empty, scale) / steps
            if (step + 1) % SUBSTEPS == 0:
                points.append(x)
        self.points = torch.cat([self.points, torch.stack(points, dim=1)])[-self.capacity :]
        self.ids = torch.cat([self.ids, ids])[-self.capacity :]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Points `[B, 16, 8, 8]`, their times `[B]`, the velocities that lead to the next points, and token ids."""
        row = torch.randint(len(self.points), (count,), generator=generator, device=self.ids.device)
        node = torch.randint(NODES, (count,), generator=generator, device=self.ids.device)
        here, there = self.points[row, node], self.points[row, node + 1]
        return here, 1 - node / NODES, NODES * (here - there), self.ids[row]


def main() -> None:
    """Distil; kill it and go on at any time."""
    parser = arguments(__doc__, steps=2600, lr=6e-4)
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"))
    parser.add_argument("--reuse", type=int, default=4, help="how often a point is learnt from, on average")
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()

    prepare(args)
    captions = Captions(drawings(np.load(args.data)))
    tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")
    teacher = load_weights(args.teacher, tokenizer).requires_grad_(False).to(args.device)
    student = copy.deepcopy(teacher)  # its text encoders stay the teacher's
    if args.init:
        load_parts(student, args.init, "transformer")
    student.transformer.set_attn_processor(MaskedAttention())
    ema = copy.deepcopy(student.transformer)
    student.transformer.requires_grad_(True)
    if args.compile:
        teacher.compile(mode=args.compile)
        student.compile(mode=args.compile)
    paths = Paths(teacher, args.guidance, ids_of(tokenizer, [""]).to(args.device), 64 * args.batch)
    turns = 0

    def loss_of(generator: torch.Generator, batch: Sequence[Tensor]) -> Tensor:
        nonlocal turns
        _, padded, ids = batch
        # A ring that is young, at the start or after a kill, grows with every step.
        if turns % (NODES * args.reuse) == 0 or len(paths.ids) < 4 * args.batch:
            paths.extend(ids, generator)
        turns += 1
        points, t, velocity, ids = paths.draw(args.batch, generator)
        with autocast(args.device):
            predicted = student(points, t, ids, padded)
        return F.mse_loss(predicted.float(), velocity)

    batches = Batches(captions, args.batch, args.seed, (tokenizer, MAX_LENGTH))
    fit(args, batches, student.transformer, ema, loss_of, decay=0.5)


if __name__ == "__main__":
    main()
