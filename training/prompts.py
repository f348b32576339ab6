"""The prompts of tuning and of the report: no prompt and no seed is in both."""

from __future__ import annotations

GENERIC_TUNING = (
    "a bird", "a boat", "a dessert", "a flower", "a mammal", "a vehicle", "a vegetable", "a bug",
    "an animal, 3d style", "food, glossy style", "a plant, soft style", "a heart, bold flat style",
    "a boat, 3d style", "a dessert, soft style", "a mammal, black and white style", "a bird, bold flat style",
    "a flower, glossy style", "a vehicle, bright flat style", "a vegetable, 3d style", "a bug, glossy style",
)  # fmt: skip
GENERIC_HELDOUT = (
    "an animal", "food", "a plant", "a fruit", "a heart", "a land vehicle", "a reptile", "a sea animal",
    "an aircraft", "an animal, glossy style", "an animal, black and white style", "a vehicle, 3d style",
    "a mammal, bold flat style", "a bird, glossy style", "a bug, 3d style", "food, 3d style",
    "a fruit, soft style", "a vegetable, bright flat style", "a flower, bold flat style",
    "a land vehicle, black and white style",
)  # fmt: skip
SPECIFIC_TUNING = (
    "dog face", "rocket", "red apple", "tulip", "penguin", "bus", "carrot", "turtle", "glossy lion",
    "3d airplane", "soft rose", "bold flat banana", "black and white cat", "bright flat tractor", "fox",
    "cupcake", "crab", "spider", "palm tree", "purple heart",
)  # fmt: skip
SPECIFIC_HELDOUT = (
    "tiger", "rabbit face", "elephant", "koala", "owl", "flamingo", "frog", "snake", "octopus", "dolphin",
    "butterfly", "lady beetle", "sunflower", "cactus", "four leaf clover", "pineapple", "strawberry",
    "watermelon", "broccoli", "ear of corn", "doughnut", "lollipop", "automobile", "fire engine", "bicycle",
    "locomotive", "sailboat", "helicopter", "red heart", "broken heart", "3d zebra", "glossy panda",
    "bold flat shark", "soft honeybee", "black and white camel", "bright flat cherries", "3d tomato",
    "glossy ambulance", "bold flat mushroom", "black and white anchor",
)  # fmt: skip
SEEDS = {"tuning": 1000, "heldout": 2000}  # first seed of a group; the groups of a prompt follow one another
SHEET = ("an animal", "a vehicle", "food", "a heart", "tiger", "3d tomato", "sailboat", "black and white camel")
