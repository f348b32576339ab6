"""The domain of the bundled models: which emoji, which styles, under which licences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Share-alike sets (openmoji, emojione-v1) are left out: every style here is MIT, Apache-2.0 or CC-BY.
LICENSED_STYLES = (
    "noto", "blob", "twemoji", "fluent", "fluent-flat", "silhouette", "fxemoji", "emojione", "streamline",
)  # fmt: skip

# Generic phrases of a subgroup, narrow to wide.
GENERIC = {
    "animal-mammal": ("a mammal", "an animal"),
    "animal-bird": ("a bird", "an animal"),
    "animal-amphibian": ("a frog", "an animal"),
    "animal-reptile": ("a reptile", "an animal"),
    "animal-marine": ("a sea animal", "an animal"),
    "animal-bug": ("a bug", "an animal"),
    "plant-flower": ("a flower", "a plant"),
    "plant-other": ("a plant",),
    "food-fruit": ("a fruit", "food"),
    "food-vegetable": ("a vegetable", "food"),
    "food-sweet": ("a dessert", "food"),
    "transport-ground": ("a land vehicle", "a vehicle"),
    "transport-water": ("a boat", "a vehicle"),
    "transport-air": ("an aircraft", "a vehicle"),
    "heart": ("a heart",),
}

# The styles, most frequent first: frequency is proportional to 1 / rank.
STYLES = {
    "noto": "glossy",
    "fluent": "3d",
    "twemoji": "bold flat",
    "silhouette": "black and white",
    "emojione": "soft",
    "fluent-flat": "bright flat",
}


def in_domain(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Boolean `[N]`: rows of the data set that the models are trained on."""
    return np.isin(data["subgroup"], list(GENERIC)) & np.isin(data["style"], list(STYLES))


def in_licence(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Boolean `[N]`: rows whose artwork licence allows use without share-alike."""
    return np.isin(data["style"], LICENSED_STYLES)


# Most typical first: the head of the 1 / rank frequencies. The rest follows in a seeded random order, since no
# public data counts these drawings.
POPULAR = (
    "dog face", "red heart", "automobile", "red apple", "rose", "cat", "birthday cake", "airplane", "carrot",
    "penguin", "tropical fish", "sailboat", "butterfly", "evergreen tree", "turtle", "bear", "sunflower", "bus",
    "strawberry", "horse", "doughnut", "tomato", "owl", "rocket", "whale", "lion", "broken heart", "tulip",
    "honeybee", "bicycle", "banana", "rabbit", "cactus", "ship", "ice cream", "elephant", "octopus", "eagle",
    "snake", "locomotive", "two hearts", "mushroom", "motor scooter", "helicopter", "spider", "ear of corn",
)  # fmt: skip
