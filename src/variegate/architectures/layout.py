"""The vocabulary of the table: where tokens lie in what a module returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Call = Mapping[str, Any]  # the arguments of the denoiser's current forward call, by name


class Part(ABC):
    """A part of a module's output that holds tokens `[rows, N, D]`."""

    @abstractmethod
    def get(self, output: Any, call: Call) -> Tensor | None:
        """The tokens, or None where this output carries none."""

    @abstractmethod
    def put(self, output: Any, call: Call, tokens: Tensor) -> Any:
        """A new output with the tokens in place of the old ones."""


@dataclass(frozen=True)
class Element(Part):
    """One element of a tuple."""

    index: int

    def get(self, output: Any, call: Call) -> Tensor | None:
        """The element; some last blocks have None in place of text that nobody reads."""
        tokens: Tensor | None = output[self.index]
        return tokens

    def put(self, output: Any, call: Call, tokens: Tensor) -> Any:
        """The tuple with this element replaced."""
        return tuple(tokens if i == self.index else value for i, value in enumerate(output))


@dataclass(frozen=True)
class Span(Part):
    """A stretch of one joint sequence `[rows, text + image, D]`, which depends on the denoiser's arguments."""

    tokens: Callable[[Call], slice]

    def get(self, output: Any, call: Call) -> Tensor | None:
        """A view of the stretch."""
        sequence: Tensor = output
        return sequence[:, self.tokens(call)]

    def put(self, output: Any, call: Call, tokens: Tensor) -> Any:
        """A copy of the sequence with the stretch replaced."""
        sequence: Tensor = output.clone()
        sequence[:, self.tokens(call)] = tokens
        return sequence


@dataclass(frozen=True)
class Blocks:
    """One list of joint blocks.

    Attributes:
        name: the denoiser's attribute that holds the list.
        text: where the text tokens are in a block's output.
        image: where the image tokens are in a block's output.
        attention: the block's submodule of joint attention.
        attention_text: where the text is in that submodule's output.
    """

    name: str
    text: Part
    image: Part
    attention: str = "attn"
    attention_text: Part = Element(1)


@dataclass(frozen=True)
class Architecture:
    """What an attachment must know of a denoiser class.

    Attributes:
        denoiser: the class name.
        blocks: the lists of joint blocks in the order they run.
        branches: guidance branches that share one batch, in row order; empty if every branch has a call of its own.
        latents: name of the denoiser's argument that holds the latents.
        text: name of the argument that holds the text embeddings, `[rows, N, D]`.
    """

    denoiser: str
    blocks: tuple[Blocks, ...]
    branches: tuple[str, ...] = ("uncond", "cond")
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
