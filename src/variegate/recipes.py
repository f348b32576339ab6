"""A recipe as it comes from elsewhere: what it must hold, and what of it is followed. All who read one come here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variegate.emoji.models import HUB_ID, bundled_models, call_defaults, locate
from variegate.request import Request
from variegate.schema import NAME, SCALAR, Schema, brief, check, check_format, parse_json, read_text, short

RECIPE: Schema = {
    "format?": int,
    "prompt": str, "index": int, "method": NAME, "parameters": {...: SCALAR}, "seeds?": [int],
    "n": int, "seed": int, "model": NAME, "revision": (NAME, None), "negative_prompt": (str, None),
    "height": (int, None), "width": (int, None), "dtype": NAME, "device": NAME, "offload": NAME,
    "steps": int, "guidance": (float, None), "versions": {...: NAME},
    "scheduler?": ({"class": NAME, "digest": NAME}, None),
    "adapters?": [{"model": NAME, "name": NAME, "scales": [float], "digest": (NAME, None)}],
    ...: object,
}  # fmt: skip
KEYS_OF_OURS = 5  # of `RECIPE` that make a table one of ours: others have prompts and seeds, too

# A recipe may ask for this much, whoever wrote it; more takes `variegate generate`, whose options say the same.
MOST = {"n": 256, "steps": 1000, "height": 16_384, "width": 16_384}
MOST_AREAS = 4  # times the pixels that the model is made for
USUAL_SIDE = 1024  # that a model is made for which does not tell


def parse_recipe(text: str, source: object) -> dict[str, Any] | None:
    """The recipe in a picture's text.

    Args:
        text: whatever was found under our key.
        source: name of the file.

    Returns:
        The recipe, with keys and types as `RECIPE` says; None if the text is not of ours.

    Raises:
        ValueError: if it is one of ours and lacks a key, has one of another type or is of a newer format.
    """
    try:
        recipe = parse_json(text)
    except ValueError:
        return None
    names = {key.removesuffix("?") for key in RECIPE if key is not ...}
    if not isinstance(recipe, dict) or len(names & recipe.keys()) < KEYS_OF_OURS:
        return None
    check_format(recipe, source)
    try:
        check(recipe, RECIPE, kind="a recipe")
    except ValueError as error:
        raise ValueError(f"{source} has a recipe that is damaged: {error}") from error
    return recipe


def request_of(
    recipe: Mapping[str, Any],
    source: object,
    *,
    model: str | None = None,
    device: str | None = None,
    pipeline: Any | None = None,
    trust: bool = False,
) -> Request:
    """The request that makes a picture's group again, if it is one to be followed.

    A recipe may name a bundled model. One on the hub is taken only if the user names it (`model`) or trusts the recipe;
    a local folder only if the user names it.

    Args:
        recipe: as `parse_recipe` gave it.
        source: name of the file.
        model: in place of the recipe's.
        device: in place of the recipe's.
        pipeline: that makes the pictures, whatever the recipe says.
        trust: follow a hub id and a revision of the recipe.

    Raises:
        ValueError: if it can't be followed, or asks for more than is sane.
    """
    names = {option.name for option in dataclasses.fields(Request)}
    settings = {key: value for key, value in recipe.items() if key in names}
    if model is not None:
        settings |= {"model": model, "revision": None}
    elif pipeline is None:
        _check_model(recipe, source, trust)
    if device is not None:
        settings["device"] = device
    try:
        for name, most in MOST.items():
            if (recipe[name] or 0) > most:
                raise ValueError(f"{name}={recipe[name]} is out of range; a recipe gets up to {most:,}.")
        if "seeds" in settings:
            settings["seeds"] = tuple(settings["seeds"])
        request = Request(prompts=(recipe["prompt"],), compare=False, **settings)
        if not 0 <= recipe["index"] < request.n:
            raise ValueError(f"index={recipe['index']} is none of n={request.n} pictures.")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} has a recipe that can't be followed: {brief(error)}") from error
    return request


def _check_model(recipe: Mapping[str, Any], source: object, trust: bool) -> None:
    name = recipe["model"]
    if name in bundled_models() and recipe["revision"] is None:
        return
    if not re.fullmatch(HUB_ID, name) or os.path.exists(name):
        raise ValueError(
            f"{source} was made with a local model, {short(name)}, and what a recipe says of folders is not followed; "
            "give its folder with --model."
        )
    if not trust:
        revision = f" (revision {short(recipe['revision'])})" if recipe["revision"] else ""
        raise ValueError(
            f"{source} names the model {short(name)}{revision} of the hub, which a recipe does not load by itself; "
            f"give --model {name}, or --trust-recipe if you trust who made the file."
        )


def name_of(model: str) -> str:
    """A model as recipes tell it: a bundled name or a hub id as it is, of a path the last part.

    Example:
        >>> name_of("/home/me/models/mine"), name_of("owner/name")
        ('mine', 'owner/name')
    """
    if re.fullmatch(HUB_ID, model) and not os.path.exists(model):
        return model
    return re.split(r"[\\/]", model.rstrip("\\/"))[-1] or "unnamed"


def check_size(request: Request, source: object, pipeline: Any | None) -> None:
    """Refuse a size that is far above what a model is made for.

    Args:
        request: of a recipe.
        source: name of the file.
        pipeline: that makes the pictures; None: it is not loaded yet.

    Raises:
        ValueError: if it is.
    """
    if request.height is None and request.width is None:
        return
    place = locate(request.model, request.revision).folder if pipeline is None else pipeline
    side = call_defaults(request.model).get("height") or _side(place) or USUAL_SIDE
    height, width = request.height or side, request.width or side
    if height * width > MOST_AREAS * side**2:
        raise ValueError(
            f"{source} has a recipe that can't be followed: height={height} and width={width} are out of range; the "
            f"model is made for {side} x {side} pixels, and a recipe gets at most {MOST_AREAS} times as many."
        )


def _side(place: Any) -> int | None:
    """Pixels of a side that a model is made for, as its configurations tell; None if they don't."""
    denoiser, decoder = (
        next(filter(None, (_config(place, part) for part in parts)), {})
        for parts in (("transformer", "unet"), ("vae",))
    )
    latents = denoiser.get("sample_size")
    blocks = decoder.get("block_out_channels") or decoder.get("encoder_block_out_channels")
    if type(latents) is not int or not isinstance(blocks, (list, tuple)):
        return None
    side: int = latents * 2 ** (len(blocks) - 1)
    return side


def _config(place: Any, part: str) -> Mapping[str, Any]:
    if not isinstance(place, Path):
        return getattr(getattr(place, part, None), "config", None) or {}
    try:
        found = parse_json(read_text(place / part / "config.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
