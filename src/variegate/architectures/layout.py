"""The vocabulary of the table: which modules are a denoiser's blocks, and where tokens lie in what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Call = Mapping[str, Any]  # the arguments of the denoiser's current forward call by name, "self" among them
Place = slice | Sequence[slice] | None  # a stretch of tokens: the same in every row, one a row, or all of them
Locate = Callable[[Call], Place]


@dataclass(frozen=True)
class Part:
    """Tokens in what a module returns.

    Attributes:
        element: place in a returned tuple; None where the module returns one tensor.
        tokens: the stretch of the sequence, from the denoiser's arguments; None: all of it.
        channels: how many leading channels count, from their number; None: all of them.
        batch: the axis of the rows, 0 or 1.
        module: the submodule of the block that returns this; "" is the block itself.
    """

    element: int | None = None
    tokens: Locate | None = None
    channels: Callable[[int], int] | None = None
    batch: int = 0
    module: str = ""

    def locate(self, call: Call) -> Place:
        """The place of the tokens in this call."""
        return None if self.tokens is None else self.tokens(call)

    def get(self, output: Any, place: Place) -> Tensor | None:
        """Tokens `[rows, N, D]`, shorter rows filled up with zeros; None where this output carries none."""
        whole = self._whole(output)
        if whole is None or place is None:
            return whole
        if isinstance(place, slice):
            return whole[:, place]
        return pad_sequence([row[stretch] for row, stretch in zip(whole, place, strict=True)], batch_first=True)

    def put(self, output: Any, place: Place, tokens: Tensor) -> Any:
        """A new output with these tokens in place of the old ones."""
        tensor = output if self.element is None else output[self.element]
        new = tensor.clone()
        whole = self._whole(new, copied=True)
        assert whole is not None
        if place is None:
            whole.copy_(tokens)
        elif isinstance(place, slice):
            whole[:, place] = tokens
        else:
            for row, stretch, values in zip(whole, place, tokens, strict=True):
                row[stretch] = values[: stretch.stop - stretch.start]
        if self.element is None:
            return new
        return tuple(new if i == self.element else value for i, value in enumerate(output))

    def _whole(self, output: Any, copied: bool = False) -> Tensor | None:
        """The tensor as `[rows, tokens, channels]`, a view of it; some last blocks have None for unread text."""
        tensor: Tensor | None = output if self.element is None or copied else output[self.element]
        if tensor is None:
            return None
        if self.batch:
            tensor = tensor.transpose(0, 1)
        if tensor.ndim > 3:  # heads apart
            tensor = tensor.flatten(2)
        return tensor if self.channels is None else tensor[..., : self.channels(tensor.shape[-1])]


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind, and where the tokens of each site are.

    Attributes:
        name: module names, `*` for every child: "transformer_blocks.*".
        context: text tokens that leave a block; None where text never meets the image.
        image: image tokens that leave a block.
        attention: text output of the joint attention.
        cross_attention: what the text contributes to the image tokens, where it enters by cross-attention.
        stop: how many of the blocks count, from the denoiser; None: all of them.
    """

    name: str
    context: Part | None = None
    image: Part | None = None
    attention: Part | None = None
    cross_attention: Part | None = None
    stop: Callable[[Any], int] | None = None

    def of(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks of a denoiser, in order."""
        found = [denoiser]
        for name in self.name.split("."):
            if name == "*":
                found = [child for module in found for child in module.children()]
            else:
                named = (getattr(module, name, None) for module in found)
                found = [child for child in named if isinstance(child, nn.Module)]
        return found if self.stop is None else found[: self.stop(denoiser)]


@dataclass(frozen=True)
class Architecture:
    """What an attachment must know of a denoiser class.

    Attributes:
        denoiser: the class name.
        blocks: in the order they run; none where no site can be served.
        branches: guidance branches that share one batch, in row order; empty if every branch has a call of its own.
        latents: name of the denoiser's argument that holds the latents, rows first, or a list of rows.
        text: name of the argument that holds the text embeddings, rows first, or a list of rows.
        real: which text tokens are not padding, bool `[rows, N]`, True for real ones, from the denoiser's
            arguments; None where they don't tell.
        sign: 1 where the prediction grows towards noise; -1 where it grows towards the image, and the pipeline turns it
            or its time runs that way.
        output: where the image tokens are in what the denoiser returns; None: it returns nothing else.
        no_context: why there is no contextual space, where there is none.
    """

    denoiser: str
    blocks: tuple[Blocks, ...]
    branches: tuple[str, ...] = ("uncond", "cond")
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
    real: Callable[[Call], Tensor | None] | None = None
    sign: int = 1
    output: Part | None = None
    no_context: str = ""


def unwrapped(module: nn.Module) -> nn.Module:
    """The denoiser in what torch.compile, peft's `get_peft_model` or a data-parallel wrapper made of it; or itself."""
    inner: Any = None
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = module.module
    elif hasattr(module, "get_base_model"):  # peft
        inner = module.get_base_model()  # type: ignore[operator]
    else:
        inner = getattr(module, "_orig_mod", None)  # torch.compile
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def dual(name: str, *, text: int = 0, attention: str = "attn", **kwargs: Any) -> Blocks:
    """Blocks with text and image apart: element `text` of a pair holds text; the attention returns (image, text)."""
    return Blocks(f"{name}.*", context=Part(text), image=Part(1 - text), attention=Part(1, module=attention), **kwargs)


def single(name: str, text: Locate, image: Locate, *, attention: str = "attn") -> Blocks:
    """Blocks on one joint sequence, and so their attention."""
    return Blocks(
        f"{name}.*",
        context=Part(tokens=text),
        image=Part(tokens=image),
        attention=Part(tokens=text, module=attention),
    )


def split(name: str, text: Locate, *, attention: str = "attn") -> Blocks:
    """Blocks that return (text, image), with attention on one joint sequence."""
    return Blocks(f"{name}.*", context=Part(0), image=Part(1), attention=Part(tokens=text, module=attention))


def leading(length: Callable[[Call], int]) -> tuple[Locate, Locate]:
    """Text and image of a joint sequence that begins with `length` text tokens."""
    return (lambda call: slice(length(call)), lambda call: slice(length(call), None))


def by_row(starts: Sequence[int], lengths: Sequence[int]) -> Place:
    """A stretch for each row, or the one that all of them share."""
    found = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return found[0] if all(stretch == found[0] for stretch in found) else found


def text_length(call: Call) -> int:
    """Number of text tokens of the call."""
    return int(call["encoder_hidden_states"].shape[1])


def mask(name: str) -> Callable[[Call], Tensor | None]:
    """The padding mask in the denoiser's argument `name`, which may be absent."""

    def real(call: Call) -> Tensor | None:
        given: Tensor | None = call.get(name)
        return None if given is None else given.bool()

    return real
