"""An 8 x 8 sheet of unselected pictures: eight prompts, seeds 0 to 7.

python training/sheet.py src/variegate/emoji/emoji-base --out docs/emoji-base.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import prompts
from variegate import Request, generate


def main() -> None:
    """Generate with the stock pipeline and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled model or pipeline folder")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    generate(Request(prompts.SHEET, model=args.model, method="none")).sheet().save(args.out)


if __name__ == "__main__":
    main()
