"""Prompts to measure on: the bundled models' own, whose truth the judge knows, and files that a user has."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from variegate.schema import check, parse_json, read_text, short

MOST_BYTES = 256 << 20  # of a file: the captions of COCO's training pictures have 92 MB

# Emoji prompts of tuning and of the report: none is in both, and neither is a seed of `SEEDS`.
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

PROMPT_SETS: Mapping[str, tuple[str, ...]] = {
    "emoji-generic-tuning": GENERIC_TUNING,
    "emoji-generic-heldout": GENERIC_HELDOUT,
    "emoji-specific-tuning": SPECIFIC_TUNING,
    "emoji-specific-heldout": SPECIFIC_HELDOUT,
}


def prompt_set(source: str | Sequence[str], *, count: int | None = None, folder: Path = Path()) -> tuple[str, ...]:
    """The prompts of an experiment, each once, in their order.

    Args:
        source: a name of `PROMPT_SETS`; the prompts themselves; or a file: `.json` of COCO captions (the first caption
            of every image), `.tsv` of PartiPrompts (its column Prompt) or `.txt` (one prompt a line).
        count: take a sample of this many, always the same; None: all.
        folder: where a relative file is.

    Raises:
        ValueError: if there is no such set or file, or it has too few prompts.

    Example:
        >>> prompt_set("emoji-generic-tuning", count=2)
        ('a boat, 3d style', 'a dessert, soft style')
    """
    if not isinstance(source, str):
        if not all(isinstance(prompt, str) for prompt in source):
            raise ValueError(f"prompts={short(source)} holds something that is not text.")
        found = source
    elif source in PROMPT_SETS:
        found = PROMPT_SETS[source]
    elif (read := _READERS.get(Path(source).suffix.lower())) is not None:
        try:
            text = read_text(folder / source, MOST_BYTES)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"prompts={source!r} can't be read: {reason}.") from error
        try:
            found = list(read(text))
            check(found, [str])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(
                f"prompts={source!r} is not of its kind: .json are COCO captions with annotations of image_id, id and "
                "caption, .tsv PartiPrompts with a column Prompt, .txt one prompt a line."
            ) from error
    else:
        raise ValueError(
            f"prompts={source!r} is unknown; use one of {', '.join(PROMPT_SETS)}, a file ({', '.join(_READERS)}) "
            "or a list of prompts."
        )
    prompts = tuple(dict.fromkeys(stripped for prompt in found if (stripped := prompt.strip())))
    if not prompts or (count is not None and not 0 < count <= len(prompts)):
        wanted = "one at least" if count is None else f"count={count!r}"
        raise ValueError(f"prompts={short(source)} has {len(prompts)} different prompts, where {wanted} is asked for.")
    return prompts if count is None else tuple(random.Random(0).sample(prompts, count))


def _coco(text: str) -> Iterable[str]:
    first: dict[int, str] = {}
    for annotation in sorted(parse_json(text)["annotations"], key=lambda row: (row["image_id"], row["id"])):
        first.setdefault(annotation["image_id"], annotation["caption"])
    return first.values()


def _parti(text: str) -> Iterable[str]:
    # Its quotation marks belong to the prompts.
    return [row["Prompt"] for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)]


_READERS: Mapping[str, Callable[[str], Iterable[str]]] = {".json": _coco, ".tsv": _parti, ".txt": str.splitlines}
