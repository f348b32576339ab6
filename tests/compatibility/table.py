"""The cases as a page.

PYTHONPATH=tests:tests/architectures python tests/compatibility/table.py        # writes docs/compatibility.md
"""

from __future__ import annotations

from pathlib import Path

from cases import CASES, ORDERS, UNTESTED, judge

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEAD = """# Compatibility

What people do to pipelines, done to tiny pipelines of the real classes before and after `attach` by
`tests/compatibility`, which also writes this page. Nothing is left of an attachment after its `with` block, whatever
was done before, between or during. Where something is compiled, another pipeline of the class has been compiled and run
before, and runs again during the attachment: its images stay as they were.

- **same**: the images are those of the untouched pipeline with the same attachment, within 1e-3; after detaching, those
  of the stock pipeline.
- **own**: it changes the images by itself. Both orders agree, an attachment that is off leaves exactly what it makes
  alone, and one that is on changes it.
- **refused**: a `ValueError` of one sentence, from `attach` or from the first run.

| what | attach first | attach second | note |
|---|---|---|---|
"""
TAIL = """
Not tested:

| what | why |
|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = ""
    for case in CASES:
        outcomes = [judge(case, order) for order in ORDERS]
        cells = " | ".join(cell for cell, _ in outcomes)
        notes = ". ".join(dict.fromkeys(note.rstrip(".") for _, note in outcomes))
        rows += f"| {case.what} | {cells} | {notes} |\n"
    return HEAD + rows + TAIL + "".join(f"| {what} | {why} |\n" for what, why in UNTESTED.items())


if __name__ == "__main__":
    text = page()
    print(text)
    PAGE.write_text(text)
