"""Captions of the artwork, and the skewed frequencies that make the models typical.

Real captioned data is skewed: most pictures captioned "an animal" show a few animals in a few styles. Here the
skew is explicit, so that it can be measured against: under a generic prompt an emoji is drawn with probability
proportional to 1 / rank among the emoji the prompt allows, a style to 1 / rank among the styles. Under a prompt
that names an emoji only the style is skewed, and under one that names both nothing is: every picture of the
data set stays reachable by its own prompt.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from domain import GENERIC, POPULAR, STYLES, in_domain

# How often each kind of caption is drawn; "" is the unconditional one of classifier-free guidance.
KINDS = {"label_style": 0.28, "label": 0.26, "generic": 0.18, "generic_style": 0.16, "tag": 0.02, "": 0.10}
COLOURS = {
    "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey", "light blue",
}  # fmt: skip


class Drawing(NamedTuple):
    """One picture of the data set: its row, emoji, style, subgroup and tags."""

    row: int
    label: str
    style: str
    subgroup: str
    tags: tuple[str, ...]


def drawings(data: Mapping[str, np.ndarray]) -> list[Drawing]:
    """The pictures of the domain, in the order of the data set."""
    return [
        Drawing(
            row=int(row),
            label=re.sub(r"\s+", " ", str(data["label"][row]).lower().replace("\u2019", "'")).strip(),
            style=str(data["style"][row]),
            subgroup=str(data["subgroup"][row]),
            tags=tuple(t for t in str(data["tags"][row]).split("|") if re.fullmatch(r"[a-z][a-z ]{2,15}", t)),
        )
        for row in np.flatnonzero(in_domain(data))
    ]


class Captions:
    """Draws (caption, picture) pairs from the skewed distribution, reproducibly.

    Args:
        items: the pictures of the domain.
        seed: seeds the order of popularity of the emoji behind the typical ones of `domain.POPULAR`.
    """

    def __init__(self, items: list[Drawing], seed: int = 0) -> None:
        self.items = items
        labels = sorted({item.label for item in items} - set(POPULAR))
        random.Random(seed).shuffle(labels)
        labels = [*POPULAR, *labels]
        popularity = {label: place for place, label in enumerate(labels)}
        style_weight = {style: 1 / rank for rank, style in enumerate(STYLES, 1)}
        by_label, by_phrase = defaultdict(list), defaultdict(list)
        for index, item in enumerate(items):
            by_label[item.label].append(index)
            for phrase in GENERIC[item.subgroup]:
                by_phrase[phrase].append(index)
        self.emoji: dict[str, dict[str, float]] = {}  # phrase -> label -> probability
        self.pools: dict[str, list[tuple[str, list[int], list[float]]]] = defaultdict(list)
        for phrase, members in sorted(by_phrase.items()):
            allowed = sorted({items[i].label for i in members}, key=popularity.__getitem__)
            rank = {label: place for place, label in enumerate(allowed, 1)}
            total = sum(1 / r for r in rank.values())
            self.emoji[phrase] = {label: 1 / r / total for label, r in rank.items()}
            styles_of = {k: sum(style_weight[items[i].style] for i in by_label[k]) for k in allowed}
            weights = [style_weight[items[i].style] / styles_of[items[i].label] / rank[items[i].label] for i in members]
            self.pools["generic"].append((phrase, members, list(accumulate(weights))))
            for style in STYLES:
                chosen = [i for i in members if items[i].style == style]
                weights = [1 / rank[items[i].label] for i in chosen]
                if chosen:
                    self.pools["generic_style"].append((phrase, chosen, list(accumulate(weights))))
        for label in labels:
            members = by_label[label]
            weights = [style_weight[items[i].style] for i in members]
            self.pools["label"].append((label, members, list(accumulate(weights))))
        total = sum(style_weight.values())
        self.styles = {style: weight / total for style, weight in style_weight.items()}

    def draw(self, rng: random.Random) -> tuple[str, int]:
        """One (caption, index into `items`) pair."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in self.pools:
            subject, members, cumulative = rng.choice(self.pools[kind])
            index = rng.choices(members, cum_weights=cumulative)[0]
        else:
            index = rng.randrange(len(self.items))
        item = self.items[index]
        if kind == "":
            return "", index
        if kind == "tag":
            return rng.choice(item.tags or (item.label,)), index
        if not kind.startswith("generic"):
            subject = subject_of(item)
        if not kind.endswith("_style"):
            return subject, index
        word = STYLES[item.style]
        first = kind == "label_style" and rng.random() < 0.5
        return f"{word} {subject}" if first else f"{subject}, {word} style", index

    def texts(self) -> list[str]:
        """Every caption that can be drawn, for the tokenizer."""
        found = set()
        for item in self.items:
            word = STYLES[item.style]
            for subject in (subject_of(item), *GENERIC[item.subgroup]):
                found.update((subject, f"{word} {subject}", f"{subject}, {word} style"))
            found.update(item.tags)
        return sorted(found)


def subject_of(item: Drawing) -> str:
    """The emoji's name, without colour words where the style has no colour."""
    if item.style != "silhouette":
        return item.label
    return " ".join(word for word in item.label.split() if word not in COLOURS) or item.label
