"""The table of architectures as a page: what is known of every denoiser class, and whether it is right.

python tests/architectures/matrix.py            # writes docs/architectures.md
"""

from __future__ import annotations

from pathlib import Path

from denoisers import CALLS, tiny

from variegate.architectures import _BUNDLED, architecture_of
from variegate.check import check_layout
from variegate.intervention import SITES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

Every denoiser class that variegate knows, as `make matrix` finds it on a tiny model of the real class with the
installed diffusers. *context* and *attention* are sites of text tokens, *image* of image tokens, *cross_attention* of
what the text contributes to the image tokens where it never reads them. A tick: the oracles of `variegate.check_layout`
agree with the record. *Guidance* is how the branches of classifier-free guidance reach the denoiser.

| denoiser | context | attention | image | cross_attention | guidance |
|---|---|---|---|---|---|
"""
TAIL = """
Known by the record of a class with the same blocks, not run here: {derived}.
"""


def row(name: str) -> str:
    """A line of the table; raises if an oracle disagrees."""
    model = tiny(name)
    record = architecture_of(model)
    cells = []
    for site in SITES:
        has = any(getattr(blocks, site) for blocks in record.blocks)
        cells.append(("✓" if check_layout(model, CALLS[name](), site).passed else "WRONG") if has else "")
    guidance = f"one batch, {' then '.join(record.branches)}" if record.branches else "a call each"
    return f"| `{name}` | {' | '.join(cells)} | {guidance} |\n"


def page() -> str:
    """The whole page."""
    rows = "".join(row(name) for name in sorted(CALLS))
    derived = sorted({record.denoiser for record in _BUNDLED if record.blocks} - set(CALLS))
    return HEAD + rows + TAIL.format(derived=", ".join(f"`{name}`" for name in derived))


if __name__ == "__main__":
    text = page()
    print(text)
    PAGE.write_text(text)
