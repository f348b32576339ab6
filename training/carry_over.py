"""Start a distilled model anew from a better teacher: the new teacher's weights, and what distillation had changed.

    python training/carry_over.py --old runs/old/emoji-base --student runs/old/emoji-turbo --out runs/turbo-init
    python training/turbo.py --data data/emoji64.npz --out runs/turbo --init runs/turbo-init --steps 1200 --lr 4e-4

The old teacher is the one that the student learnt from, from whose weights it started. What training adds to weights
can be added to others that descend from the same (task arithmetic, arXiv 2212.04089), so most of the old distillation
need not be done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import nn


@torch.no_grad()
def carry_over(teacher: nn.Module, student: nn.Module, old: nn.Module) -> None:
    """Add to the weights of a teacher what its student has more than the teacher it learnt from."""
    learnt, before = student.state_dict(), old.state_dict()
    teacher.load_state_dict({name: value + learnt[name] - before[name] for name, value in teacher.state_dict().items()})


def main() -> None:
    """Write the transformer that `--init` of turbo.py starts from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="folder of the teacher that the student learnt from")
    parser.add_argument("--student", type=Path, required=True, help="folder of what it learnt")
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"), help="the new one")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds its transformer")
    args = parser.parse_args()

    teacher, student, old = (
        SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
        for folder in (args.teacher, args.student, args.old)
    )
    carry_over(teacher, student, old)
    teacher.save_pretrained(args.out / "transformer")


if __name__ == "__main__":
    main()
