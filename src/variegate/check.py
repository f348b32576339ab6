"""Whether a denoiser's record in the table is right: the oracles that found every mistake in ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from variegate.architectures import Architecture, Part, architecture_of
from variegate.architectures.layout import Call, unwrapped
from variegate.attachment import Attachment, denoisers_of
from variegate.emoji.models import fewest_steps
from variegate.intervention import SITES, Site, TokenIntervention

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """One oracle's verdict."""

    claim: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class LayoutReport:
    """What `check_layout` found.

    Attributes:
        denoiser: class name.
        site: the site that was checked.
        checks: the oracles, in order.
    """

    denoiser: str
    site: Site
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every oracle agrees with the record."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.denoiser}, site {self.site}: {'right' if self.passed else 'WRONG'}"]
        lines += [f"  {'ok  ' if check.passed else 'FAIL'}  {check.claim} ({check.detail})" for check in self.checks]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Probe(TokenIntervention):
    function: Edit
    skips_last: ClassVar[bool] = False
    observes: ClassVar[bool] = True

    def edit(self, tokens: Tensor) -> Tensor:
        return self.function(tokens)


@torch.no_grad()
def check_layout(
    denoiser: nn.Module, call: Mapping[str, Any], site: str | None = None, architecture: Architecture | None = None
) -> LayoutReport:
    """Check the record of a denoiser's class on one call.

    The oracles: tokens put back as they are change no bit of the output; the tokens differ between the images at
    every block, so they have read them; and an edit in the first block reaches the output. Of text, moreover, an
    edit in the last block does not, so no image token is among it; every block has as much of it; text and image do
    not overlap; and what belongs to neither does not count, so no token is left out.

    Args:
        denoiser: of a known or registered class, in eval mode; what torch.compile, peft or a data-parallel wrapper has
            made of one is taken off.
        call: arguments of its forward, by name, for at least two images of one prompt, which differ in their latents.
        site: "context", "attention", "image" or "cross_attention"; None: the first of "context", "cross_attention",
            "image" that the class has.
        architecture: a record to check in place of the registered one.

    Returns:
        A report; `print` it, or look at `passed`.

    Raises:
        ValueError: if the class is unknown or lacks the site.

    Example:
        >>> from variegate.check import capture_call
        >>> from variegate.emoji import load_pipeline
        >>> pipe = load_pipeline("emoji-base")
        >>> report = check_layout(pipe.transformer, capture_call(pipe, "an animal"))
        >>> report.site, report.passed
        ('context', True)
    """
    denoiser = unwrapped(denoiser)
    record = architecture or architecture_of(denoiser)
    if site is not None and site not in SITES:
        raise ValueError(f"site={site!r} is unknown; use one of {', '.join(SITES)}.")
    checked = cast(Site, site) if site else _main_site(record)
    bound = {**call, "self": denoiser}
    image_of_output = None if record.output is None else record.output.locate(bound)

    def run(function: Edit, where: Site = checked, blocks: Any = "all", record: Architecture = record) -> list[Tensor]:
        probe = _Probe(site=where, blocks=blocks, function=function, padding=False)
        with Attachment(denoiser, [probe], architecture=record):
            found = list(_tensors(_forward(denoiser, call)))
        return found if record.output is None else [_only(record.output.get(x, image_of_output)) for x in found]

    stock = run(lambda tokens: tokens)
    differences: list[float] = []
    lengths: set[int] = set()

    def observe(tokens: Tensor) -> Tensor:
        distance = (tokens - tokens[:, :1]).abs().amax(-1)[:, 1:]  # of every token to the first image's
        present = tokens.abs().amax(-1)[:, 1:] > 0  # padding is given as zeros
        differences.extend(distance[present].tolist())
        lengths.add(tokens.shape[2])
        return tokens

    run(observe)
    closest = min(differences, default=0.0)
    back, first = _change(stock, run(torch.clone)), _change(stock, run(_perturb, blocks=[0]))
    checks = [
        Check("tokens put back change nothing", back == 0, f"the output changes by {back:.1e}"),
        Check("every token differs between the images", closest > 0, f"the closest by {closest:.1e}"),
        Check("an edit in the first block counts", first > 0, f"the output changes by {first:.1e}"),
    ]
    if checked == "context":
        count = sum(len(blocks.of(denoiser)) for blocks in record.blocks)
        end = _change(stock, run(_perturb, blocks=[count - 1]))
        checks += [
            Check("no image token among the text", end == 0, f"an edit in the last block changes {end:.1e}"),
            Check("as much text in every block", len(lengths) == 1, f"{' or '.join(map(str, lengths))} tokens"),
        ]
        index = 0
        for blocks in record.blocks:
            if blocks.context and blocks.context.tokens and index < count - 1:
                twice, beside = _beside(blocks.context, blocks.image, bound)
                whole = replace(blocks.context, tokens=None, channels=None)
                bare = replace(record, blocks=tuple(replace(b, image=whole) for b in record.blocks))
                change = _change(stock, run(beside, "image", [index], bare))
                checks += [
                    Check(f"text and image apart in {blocks.name}", not twice[0], f"{twice[0]} tokens in both"),
                    Check(
                        f"no token left out in {blocks.name}", change == 0, f"an edit of the rest changes {change:.1e}"
                    ),
                ]
            index += len(blocks.of(denoiser))
    return LayoutReport(record.denoiser, checked, tuple(checks))


def capture_call(pipe: Any, prompt: str, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a pipeline's first denoiser call for two images of a prompt, in as few steps as it can take.

    Args:
        pipe: a diffusers pipeline.
        prompt: any prompt.
        **kwargs: passed on to the pipeline.

    Returns:
        Arguments by name, as `check_layout` takes them.
    """
    calls: list[dict[str, Any]] = []
    denoiser = denoisers_of(pipe)[0]
    names = list(inspect.signature(type(unwrapped(denoiser)).forward).parameters)[1:]

    def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls.append(dict(zip(names, args, strict=False)) | given)

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        short = {"num_inference_steps": fewest_steps(pipe), "output_type": "latent", "generator": generators}
        pipe([prompt] * 2, **(kwargs | short))
    finally:
        handle.remove()
    return calls[0]


def _forward(denoiser: nn.Module, call: Mapping[str, Any]) -> Any:
    tuples = "return_dict" in inspect.signature(type(denoiser).forward).parameters
    return denoiser(**{**call, "return_dict": False} if tuples else call)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _change(stock: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(stock, other, strict=True))


def _perturb(tokens: Tensor, which: slice | Tensor = slice(None)) -> Tensor:
    """Noise of the tokens' own size, another for every sample."""
    edited = tokens.clone()
    part = edited[:, :, which]
    if not part.numel():
        return tokens
    noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)).to(part)
    edited[:, :, which] = part + noise * tokens.float().std().to(part)
    return edited


def _main_site(record: Architecture) -> Site:
    preferred: tuple[Site, ...] = ("context", "cross_attention", "image")
    return next((site for site in preferred if any(getattr(blocks, site) for blocks in record.blocks)), "context")


def _beside(text: Part, image: Part | None, call: Call) -> tuple[list[int], Edit]:
    """An edit of what is neither text nor image in a sequence of both; it notes how many tokens are both."""
    places = [part.locate(call) for part in (text, image) if part and part.element == text.element]
    twice: list[int] = []

    def edit(tokens: Tensor) -> Tensor:
        count = torch.zeros(tokens.shape[2], dtype=torch.long)
        for place in places:
            count[place if isinstance(place, slice) or place is None else place[0]] += 1
        twice.append(int((count > 1).sum()))
        return _perturb(tokens, count == 0)

    return twice, edit


def _only(tokens: Tensor | None) -> Tensor:
    assert tokens is not None
    return tokens
