"""What every diversity method declares: where it acts, in which steps and blocks, and one pure edit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from variegate.fields import Range, check_fields, checked

if TYPE_CHECKING:
    from torch import Tensor

    from variegate.step import Moment, Step

Site = Literal["context", "attention", "image", "cross_attention"]
SITES: tuple[str, ...] = get_args(Site)
THIRDS = ("first", "middle", "last")

STRONGEST = 1_000  # beyond, a push only takes the numbers of a model out of their range
Strength = Annotated[float, Range(0, STRONGEST)]
Share = Annotated[float, Range(0, 1)]  # a noise level, too
Place = Annotated[int, Range(0, noun="a step count")] | Annotated[float, Range(0, 1, noun="a fraction of the steps")]
BlockChoice = Literal["all", "first", "middle", "last"] | slice | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):  # noqa: B024, what it edits is up to the classes below
    """A method's hyper-parameters and its window; state of a run belongs to the `Attachment`.

    A method derives from one of the classes below, which say where it acts, and overrides its `edit`.

    Attributes:
        start: first step of the window: an integer counts steps, a float in [0, 1] is a fraction of the run. Every
            step that a window in fractions touches is inside: from .05 on is the first step of four, the second of 20.
        stop: end of the window, exclusive, in the same units; None is the end of the run.
        branch: "both" guidance branches, each among its own samples, or only "cond" or "uncond".

    Every field is checked by its annotation when a method is built, those of a new method, too; see
    `variegate.fields.check_fields`.

    Raises:
        ValueError: if a field is not what its annotation says.
    """

    start: Place = 0
    stop: Place | None = None
    branch: Literal["both", "cond", "uncond"] = "both"

    needs_company: ClassVar[bool] = True  # a set of one is left alone
    observes: ClassVar[bool] = False  # it only looks: that it changes nothing is no fault to tell of

    def __post_init__(self) -> None:
        check_fields(self)

    def check_range(self, name: str, low: float, high: float = math.inf) -> None:
        """Refuse a hyper-parameter that is not a number from `low` to `high`; infinity itself is none.

        A `Range` in the field's annotation does the same.

        Raises:
            ValueError: one sentence with its name, its value and what would do.
        """
        checked(name, getattr(self, name), Annotated[float, Range(low, None if high == math.inf else high)])

    @property
    def enabled(self) -> bool:
        """Whether the edit can change anything at all; an attachment skips one that can't, such as of strength 0."""
        return bool(getattr(self, "strength", None) != 0)

    def window(self, total: int | None) -> tuple[int, float]:
        """First step of the window, and its end, in a run of `total` steps; None if that is unknown.

        Raises:
            ValueError: if the window is given in fractions and the length of the run is unknown.
        """
        fractions = [f"{name}={value}" for name in ("start", "stop") if isinstance(value := getattr(self, name), float)]
        if fractions and total is None:
            raise ValueError(
                f"{' and '.join(fractions)} can't be found in a run whose length is unknown: attach to the pipeline "
                "instead of its denoiser, or count steps with integers."
            )
        # Fractions such as 0.3 are not exact: 0.3 * 10 must still be step 3.
        steps = total or 0
        start = math.floor(self.start * steps + 1e-9) if isinstance(self.start, float) else self.start
        stop = math.ceil(self.stop * steps - 1e-9) if isinstance(self.stop, float) else self.stop
        return start, math.inf if stop is None else stop

    def active(self, step: Step) -> bool:
        """Whether the window holds this step.

        Raises:
            ValueError: if the window is given in fractions and the length of the run is unknown.
        """
        start, stop = self.window(step.total)
        return start <= step.index < stop

    def awake(self, step: Step) -> bool:
        """Whether it acts in this step or takes note of it; where none does, nobody asks what the rows are."""
        return self.active(step)

    def idle(self) -> str:
        """Why a run in which it was given something to edit stayed as it was, as far as its settings tell."""
        return "with these settings the images stay as they are"


@dataclass(frozen=True, kw_only=True)
class BlockIntervention(Intervention):
    """Edits tokens on their way through the denoiser; see the two kinds of it below.

    Attributes:
        blocks: "all", the "first", "middle" or "last" third, a slice, or indices, over the denoiser's joint
            blocks in order (on Flux the dual-stream blocks, then the single-stream ones).
        site: "context" (text tokens that leave a block), "attention" (text output of a block's attention,
            before the gated residual), "image" (image tokens that leave a block), or "cross_attention" (what the
            text contributes to the image tokens, in models whose text never reads the image).
        padding: whether padding tokens of the text take part, where the denoiser is told which they are.
        start, stop, branch: see `Intervention`.

    Raises:
        ValueError: if the site or the blocks are not of these forms.
    """

    blocks: BlockChoice = "all"
    site: Site = "context"
    padding: bool = True

    skips_last: ClassVar[bool] = True  # of the text that leaves the last block, which nobody reads

    def select(self, count: int) -> frozenset[int]:
        """Indices of the chosen blocks among `count`.

        Raises:
            ValueError: if an index is out of range, or the choice is empty.
        """
        every = range(count)
        if isinstance(self.blocks, str):
            third = [round(count * i / 3) for i in range(4)]
            place = THIRDS.index(self.blocks) if self.blocks != "all" else None
            chosen = every if place is None else every[third[place] : third[place + 1]]
            if not len(chosen):  # a third of one block or two
                chosen = every[max(third[place or 0] - 1, 0) :][:1]
        elif isinstance(self.blocks, slice):
            chosen = every[self.blocks]
        else:
            outside = [i for i in self.blocks if not -count <= i < count]
            if outside:
                raise ValueError(f"blocks={self.blocks!r}: the denoiser has {count} joint blocks, 0 to {count - 1}.")
            return frozenset(every[i] for i in self.blocks)
        if not len(chosen):
            raise ValueError(f"blocks={self.blocks!r} selects none of the denoiser's {count} joint blocks.")
        return frozenset(chosen)

    def split(self, count: int) -> BlockIntervention:
        """What acts at each of `count` places of one pass; itself, unless the method divides its strength."""
        return self


@dataclass(frozen=True, kw_only=True)
class TokenIntervention(BlockIntervention):
    """Edits tokens by themselves.

    Attributes:
        start, stop, branch, blocks, site, padding: see `BlockIntervention`.
    """

    @abstractmethod
    def edit(self, tokens: Tensor) -> Tensor:
        """Map the samples of each set to new ones.

        Args:
            tokens: `[S, B, N, D]`: S sets that must not influence each other, of B samples, N tokens, D channels.

        Returns:
            The same shape and dtype.
        """


@dataclass(frozen=True)
class BlockCall:
    """What an edit of image tokens may know besides them.

    Attributes:
        moment: noise level, and random numbers.
        size: height and width of the picture, in pixels; None where the pipeline does not tell, and for videos.
        rerun: the image tokens `[S, B, N, D]` that leave the block if it is given others, of the same shape, in place
            of those it had; no edit acts on this second run.
    """

    moment: Moment
    size: tuple[int, int] | None
    rerun: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageIntervention(BlockIntervention):
    """Edits image tokens with the help of their place in the picture, random numbers, or the block itself.

    Attributes:
        start, stop, branch, blocks: see `BlockIntervention`.
        site: always "image".

    Raises:
        ValueError: if the site is another one.
    """

    site: Site = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site != "image":
            raise ValueError(f"site={self.site!r}: {type(self).__name__} edits image tokens; use 'image'.")

    @abstractmethod
    def edit(self, tokens: Tensor, block: BlockCall) -> Tensor:
        """Map the samples of each set to new ones.

        Args:
            tokens: `[S, B, N, D]`: S sets that must not influence each other, of B samples, N tokens, D channels.
            block: where and when they were made.

        Returns:
            The same shape and dtype.
        """


@dataclass(frozen=True, kw_only=True)
class StartIntervention(Intervention):
    """Edits the noise that a pipeline starts from; see the two kinds of it below.

    It acts once, before the first step, so `start`, `stop` and `branch` keep their defaults.

    Raises:
        ValueError: if they don't.
    """

    branch: Literal["both", "cond", "uncond"] = "cond"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("start", 0), ("stop", None), ("branch", "cond")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: {type(self).__name__} acts once, before the first step; leave "
                    f"{name} out."
                )


@dataclass(frozen=True, kw_only=True)
class NoiseIntervention(StartIntervention):
    """Edits the noise of each image by itself, as the pipeline draws it or is handed it."""

    needs_company: ClassVar[bool] = False

    @abstractmethod
    def edit(self, noise: Tensor) -> Tensor:
        """Map the noise of each image to a new one.

        Args:
            noise: `[B, C, ..., H, W]`.

        Returns:
            The same shape and dtype.
        """


@dataclass(frozen=True, kw_only=True)
class PreviewIntervention(StartIntervention):
    """Edits the noise of a prompt's images by what the denoiser makes of it, right before its first step."""

    @abstractmethod
    def edit(self, noise: Tensor, preview: Callable[[Tensor], Tensor]) -> Tensor:
        """Map the noise of each set to a new one.

        Args:
            noise: `[S, B, ...]`, S sets that must not influence each other, of B samples.
            preview: the images that the denoiser predicts for their prompts from such noise, as latents of the same
                shape; one evaluation of the denoiser.

        Returns:
            The same shape and dtype.
        """


@dataclass(frozen=True, kw_only=True)
class ConditionIntervention(Intervention):
    """Edits the prompt's embeddings before the denoiser reads them, at every step anew from the originals."""

    needs_company: ClassVar[bool] = False

    @abstractmethod
    def edit(self, embeddings: Tensor, moment: Moment) -> Tensor:
        """Map the embeddings of each sample to new ones.

        Args:
            embeddings: `[S, B, N, D]` token embeddings or `[S, B, D]` pooled ones.
            moment: noise level, and random numbers.

        Returns:
            The same shape and dtype.
        """


@dataclass(frozen=True, kw_only=True)
class PredictionIntervention(Intervention):
    """Edits what the denoiser predicts: noise, or the velocity from the image towards noise."""

    shared: ClassVar[bool] = False  # edits the prompt's branch alone; what that adds is added to the others, too
    remembers: ClassVar[bool] = False  # wants the finished images
    reads_text: ClassVar[bool] = False  # wants `Moment.text`

    @abstractmethod
    def edit(self, prediction: Tensor, latents: Tensor, moment: Moment) -> Tensor:
        """Map the predictions of each set to new ones.

        Args:
            prediction: `[S, B, ...]`, S sets of B samples; it grows towards noise.
            latents: the same shape, what the denoiser was given.
            moment: noise level, and random numbers.

        Returns:
            The same shape and dtype.
        """

    def remembering(self, step: Step) -> bool:
        """Whether it takes note of the images of this step, the last of a run."""
        return self.remembers and step.total is not None and step.index == step.total - 1

    def awake(self, step: Step) -> bool:
        """See `Intervention.awake`."""
        return self.active(step) or self.remembering(step)

    def remember(self, images: Tensor, moment: Moment) -> None:
        """Take note of the images of a run in its last step, in the window or not, where `remembers`.

        Args:
            images: `[S, B, ...]`, latents that the prompt's prediction points to.
            moment: has the memory.
        """


@dataclass(frozen=True, kw_only=True)
class GuidanceIntervention(Intervention):
    """Edits the unconditional prediction by the conditional one, and so what guidance does with the two."""

    needs_company: ClassVar[bool] = False

    @abstractmethod
    def edit(self, unconditional: Tensor, conditional: Tensor, moment: Moment) -> Tensor:
        """The unconditional prediction that guidance is to see.

        Args:
            unconditional: `[S, B, ...]`, S sets of B samples.
            conditional: the same shape.
            moment: noise level, and random numbers.

        Returns:
            The same shape and dtype.
        """


KINDS = (
    TokenIntervention,
    ImageIntervention,
    NoiseIntervention,
    PreviewIntervention,
    ConditionIntervention,
    PredictionIntervention,
    GuidanceIntervention,
)
