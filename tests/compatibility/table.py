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
- **stock**: the pipeline that is called is another than the one attached to, and is left alone; a warning says so.
- **refused**: a `ValueError` of one sentence, from `attach` or from the first run.

| what | attach first | attach second | note |
|---|---|---|---|
"""
TAIL = """
diffusers' own fast pipeline tests, with an attachment of strength 0 around every call
(`DIFFUSERS_CHECKOUT=... python tests/compatibility/diffusers_suite.py`, on diffusers 0.40.0.dev0 at 58eb52c0: Stable
Diffusion 3 and its image-to-image and inpainting pipelines, Flux and its image-to-image pipeline, Qwen-Image): 179 of
277 pass plain, the same 179 attached, in 278 attached calls. The others are skipped, or expect numbers of tokenizers
from the hub.

Not tested:

| what | why |
|---|---|
"""
END = """
Wrappers: `torch.compile(...)`, peft's `get_peft_model(...)` and `DistributedDataParallel(...)` of a denoiser are
attached to and checked as the denoiser itself.

Caches: the previews of CNO and the second run of a block in Feature Self-Guidance go around diffusers' caches and leave
them as they were.

## Gradients

A loss can be taken through an attached denoiser.

- Contextual repulsion and Feature Self-Guidance pass gradients through the product W C with W held constant, which is
  not the derivative of the whole edit.
- CADS, DAVE, interval guidance, particle guidance, pink noise, seed variance, SPARKE, SPELL and STRIDE have those of
  their equations; their random numbers, and images that are remembered of earlier calls, are constants.
- DiverseFlow and CNO, which follow gradients themselves, are refused while gradients are being recorded through them,
  and so is a method of your own whose result has lost them. Inside a compiled denoiser, those at work on tokens are
  refused too.
- Gradient checkpointing: blocks that run again in the backward pass are edited as in the step they belong to, after the
  `with` block, too. A checkpoint that is not the denoiser's own `enable_gradient_checkpointing()`, such as one around
  all of it, is refused in the backward pass.

Under `torch.no_grad()`, as in a pipeline's call, nothing is refused.
"""


def page() -> str:
    """The whole page."""
    rows = ""
    for case in CASES:
        outcomes = [judge(case, order) for order in ORDERS]
        cells = " | ".join(cell for cell, _ in outcomes)
        notes = ". ".join(dict.fromkeys(note.rstrip(".") for _, note in outcomes))
        rows += f"| {case.what} | {cells} | {notes} |\n"
    return HEAD + rows + TAIL + "".join(f"| {what} | {why} |\n" for what, why in UNTESTED.items()) + END


if __name__ == "__main__":
    text = page()
    print(text)
    PAGE.write_text(text)
