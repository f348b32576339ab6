"""Contextual repulsion: the text tokens that have read the emerging image are pushed apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from variegate.fields import Range
from variegate.intervention import BlockChoice, Place, Strength, TokenIntervention

if TYPE_CHECKING:
    from torch import Tensor

    from variegate.objectives import Objective

# model -> (inner steps M, window tau in steps)
PAPER = {"flux-dev": (50, 1), "sd3.5-large": (100, 4), "sd3.5-turbo": (100, 1)}


@dataclass(frozen=True, kw_only=True)
class ContextualRepulsion(TokenIntervention):
    """Push the images of one prompt apart in the contextual space, block by block, in the early steps.

    At each chosen block every sample's tokens, flattened to one vector c_i, take `inner_steps` gradient steps up
    the objective over the samples of the same prompt; in closed form, so the cost does not grow with the steps.

    Attributes:
        strength: dimensionless step length, eta / mean |c_i|^2, in sum over the blocks: differences that one block
            widens reach the next, so that deep models are not pushed harder; the same knob for every model, choice of
            blocks and prompt length. 0 is off, bit-identical to the stock pipeline.
        eta: step length at each block in the paper's unit, which does not carry over between models; takes the
            place of `strength`, which is left out then.
        inner_steps: M, gradient steps per block.
        objective: "vendi", "rke", "log_det" or "cosine".
        order: order q of the Vendi score, in (0, inf]; 1 is the paper's.
        target: stop pushing within a block once its Vendi score is this high, in images; None: never.
        preserve_norm: keep the length of every c_i.
        tokens: which text tokens take part: None for all, a slice, or indices.
        start, stop, blocks, site, branch, padding: see `TokenIntervention`.

    Raises:
        ValueError: if a value is out of its range.

    Reference:
        arXiv 2603.28762, eq. 2-4. *Deviation*: the M steps are taken exactly on the samples' Gram matrix (see
        `variegate.gram`), not one by one on the tokens; strength is dimensionless; the default window and blocks
        are those of docs/LOG.md, for 20-step models with guidance.

    Example:
        >>> ContextualRepulsion(strength=2.0, stop=0.3).inner_steps
        5
        >>> settings = ContextualRepulsion.paper("flux-dev", eta=1e8)
        >>> settings.inner_steps, settings.stop, settings.blocks
        (50, 1, 'all')
    """

    strength: Strength = 0.6
    start: Place = 0
    stop: Place | None = 0.2
    eta: Annotated[float, Range(0, 10**12)] | None = None
    blocks: BlockChoice = "first"
    inner_steps: Annotated[int, Range(1, 10_000)] = 5
    objective: str = "vendi"
    order: Annotated[float, Range(0, math.inf)] = 1.0
    target: Annotated[float, Range(1)] | None = None
    preserve_norm: bool = False
    tokens: slice | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Its default is what it has if nobody gave it, and after `replace` and in recipes, too.
        if self.eta is not None and self.strength != type(self).strength:
            raise ValueError(f"strength={self.strength!r} beside eta={self.eta!r}: each is the step length; give one.")
        self._objective()  # refuses an unknown name or order

    @classmethod
    def paper(cls, model: str, *, eta: float) -> ContextualRepulsion:
        """The settings of the paper: all blocks, all text tokens, both branches.

        Args:
            model: "flux-dev" (also Kontext), "sd3.5-large" or "sd3.5-turbo".
            eta: in the paper's unit; its tables hold 5e6 to 8e9, 5e2 to 5e6 and 1e5 to 1e7.

        Raises:
            ValueError: if the paper has no settings for `model`.
        """
        if model not in PAPER:
            raise ValueError(f"model={model!r} is not in the paper; use one of {', '.join(PAPER)}.")
        inner_steps, tau = PAPER[model]
        return cls(eta=eta, inner_steps=inner_steps, start=0, stop=tau, blocks="all")

    @property
    def enabled(self) -> bool:
        """Whether the strength is above 0."""
        return (self.strength if self.eta is None else self.eta) > 0

    def split(self, count: int) -> ContextualRepulsion:
        """The push at each of `count` blocks."""
        return self if self.eta is not None else replace(self, strength=self.strength / count)

    def edit(self, tokens: Tensor) -> Tensor:
        """Take the inner steps; see `TokenIntervention.edit`. Gradients pass with W held constant; see `gram_flow`."""
        if self.tokens is None:
            return self._flow(tokens)
        chosen = self.tokens if isinstance(self.tokens, slice) else list(self.tokens)
        count = tokens.shape[2]
        if isinstance(chosen, list) and not all(-count <= index < count for index in chosen):
            raise ValueError(f"tokens={self.tokens!r}: the prompt has {count} text tokens, 0 to {count - 1}.")
        edited = tokens.clone()
        edited[:, :, chosen] = self._flow(tokens[:, :, chosen])
        return edited

    def _objective(self) -> Objective:
        # Imported late, and so is the flow: the command line reads the defaults above without waiting for torch.
        from variegate.objectives import objective

        return objective(self.objective, self.order)

    def _flow(self, tokens: Tensor) -> Tensor:
        from variegate.gram import gram_flow

        return gram_flow(
            tokens,
            self._objective(),
            strength=self.strength if self.eta is None else None,
            eta=self.eta,
            inner_steps=self.inner_steps,
            target=self.target,
            preserve_norm=self.preserve_norm,
        )
