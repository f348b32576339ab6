"""The real drawings that the judge knows, and the language of the prompts that they answer."""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

FEATURES, TABLE = "reference.safetensors", "reference.json"


class Drawing(NamedTuple):
    """One real drawing.

    Attributes:
        label: name of the emoji, lower case.
        style: the artwork it comes from.
        subgroup: Unicode's subgroup of the emoji.
        subject: what captions call it: the label, without colour words where the style has no colour.
    """

    label: str
    style: str
    subgroup: str
    subject: str


class Truth(NamedTuple):
    """What a prompt allows: the labels, and the style if it names one."""

    labels: frozenset[str]
    style: str | None


@dataclass(frozen=True, eq=False)
class Reference:
    """Every drawing of the bundled models' domain.

    Attributes:
        features: `[M, 1280]`, float32, a row of length 1 for each drawing.
        drawings: the M drawings, in the same order; no two share label and style.
        styles: style to the word that prompts use for it.
        phrases: subgroup to its generic phrases, narrow to wide.
    """

    features: Tensor
    drawings: tuple[Drawing, ...]
    styles: Mapping[str, str]
    phrases: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, *, device: str | torch.device = "cpu") -> Reference:
        """The table in the package, written by `training/judge_reference.py`."""
        from safetensors.torch import load

        folder = resources.files(__package__)
        table = json.loads(folder.joinpath(TABLE).read_text(encoding="utf-8"))
        features = load(folder.joinpath(FEATURES).read_bytes())["features"]
        return cls(
            features=normalize(features.to(device, torch.float32), dim=-1),
            drawings=tuple(Drawing(*row) for row in table["drawings"]),
            styles=table["styles"],
            phrases={subgroup: tuple(phrases) for subgroup, phrases in table["phrases"].items()},
        )

    @cached_property
    def subjects(self) -> Mapping[str, frozenset[str]]:
        """Every subject of a prompt, specific or generic, to the labels it allows."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for drawing in self.drawings:
            for subject in (drawing.subject, *self.phrases[drawing.subgroup]):
                found[subject].add(drawing.label)
        return {subject: frozenset(labels) for subject, labels in found.items()}

    def truth(self, prompt: str) -> Truth:
        """What a prompt allows.

        A prompt is a subject, or a subject and a style word: "rocket", "3d rocket", "an animal, 3d style". If
        it can be read as both, like "soft ice cream", it is the subject. A subject without its colour, as
        captions have it for black and white drawings, allows every colour: "heart", "apple".

        Args:
            prompt: in any case and spacing.

        Raises:
            ValueError: if the prompt is not of this form.

        Example:
            >>> reference = Reference.load()
            >>> reference.truth("3d rocket")
            Truth(labels=frozenset({'rocket'}), style='fluent')
            >>> sorted(reference.truth("Apple").labels)
            ['green apple', 'red apple']
        """
        text = " ".join(prompt.lower().split())
        if text in self.subjects:
            return Truth(self.subjects[text], None)
        for style, word in self.styles.items():
            for subject in (text.removeprefix(f"{word} "), text.removesuffix(f", {word} style")):
                if subject in self.subjects:
                    return Truth(self.subjects[subject], style)
        close = difflib.get_close_matches(text, self.subjects) or ["an animal", "rocket"]
        raise ValueError(
            f"prompt={prompt!r} has no truth to judge by; use an emoji of the domain or a generic phrase, "
            f"such as {' or '.join(map(repr, close))}, alone or with a style "
            "('3d rocket', 'rocket, 3d style')."
        )
