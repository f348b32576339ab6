"""Which pictures belong together: as their paths say, or what is written into them, or the folders that they are in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from variegate.embedded import a1111_prompt, comfyui_prompt
from variegate.gallery import METADATA_KEY, NoRecipeError, read_recipe
from variegate.pictures import SUFFIXES, BadPictureError, Header, find, inspect, load

FACTS = ("prompt", "negative_prompt", "model", "method", "parameters", "steps", "guidance")  # of a recipe; and the size
ALIKE = ("seed", "n", "index")  # in these, pictures of a group may differ
NAMES, WIDTH = 6, 60


@dataclass(frozen=True)
class Group:
    """Pictures that were made alike.

    Attributes:
        name: what they have in common, printable on one line.
        by: what told: "pattern", "recipe", "prompt" or "folder".
        method: that of their recipes; empty for pictures that aren't ours, or in groups by a pattern.
        prompt: theirs, if that is what told.
        files: the pictures, in order.
    """

    name: str
    by: str
    method: str
    prompt: str | None
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Told:
    """What a picture tells of its group; pictures that tell the same are one."""

    by: str
    method: str = ""
    prompt: str | None = None
    facts: tuple[tuple[str, str], ...] = ()


def rows_of(
    folders: Sequence[str | Path], notes: list[str], pattern: str | None = None, *, skip_bad: bool = False
) -> dict[str, list[Group]]:
    """The groups of each folder, and of each method in it, by the name of the two.

    Args:
        folders: given twice, also through a link, one counts once.
        notes: gets what has to be said: what was left out, and what could not be told.
        pattern: as in `grouped`.
        skip_bad: leave out pictures that can't be read.

    Raises:
        ValueError: as `usable` and `grouped` do; and if no group has two pictures.
    """
    rows: dict[str, list[Group]] = {}
    counted: list[str | Path] = []
    for folder in folders:
        same = next((one for one in counted if Path(folder).exists() and Path(folder).samefile(one)), None)
        if same is not None:
            notes.append(f"{folder} is the folder {same}, given twice; it counts once.")
            continue
        counted.append(folder)
        headers = usable(folder, notes, skip_bad=skip_bad)
        groups, more = grouped(folder, headers, pattern)
        notes += [f"{folder}: {note}" for note in more]
        for group in groups:
            name = f"{folder}{f' ({shown(group.method)})' if group.method else ''}"
            rows.setdefault(name, []).append(group)
    for name, members in rows.items():
        alone = sum(len(group.files) == 1 for group in members)
        if alone == len(members):
            raise ValueError(
                f"{name} has no two images of one prompt, so there is no diversity to measure. "
                f"Its groups: {describe(members)}."
            )
        if alone:
            notes.append(f"{name}: {alone} of {len(members)} groups are a single image, without diversity.")
    return rows


def usable(folder: str | Path, notes: list[str], *, skip_bad: bool = False) -> dict[Path, Header]:
    """The pictures of a folder, and what is written into them; `notes` gets what was left out.

    Raises:
        ValueError: if there are none; if one can't be read, unless `skip_bad`.
    """
    found = find(folder)
    headers: dict[Path, Header] = {}
    bad = []
    for path in found.files:
        try:
            headers[path] = inspect(path)
            if skip_bad:
                load(path)
        except BadPictureError as error:
            if not skip_bad:
                raise
            headers.pop(path, None)
            bad.append(shown(str(error), 200))
    if found.left_out:
        notes.append(f"{folder}: left out {found}.")
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        notes.append(f"{folder}: left out {len(bad)} of {len(found.files)} images as broken: {' '.join(bad[:3])}{more}")
    if not headers:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}){f'; it has {found}' if str(found) else ''}.")
    return headers


def grouped(
    folder: str | Path, headers: Mapping[Path, Header], pattern: str | None = None
) -> tuple[list[Group], list[str]]:
    """Put pictures into groups.

    By `pattern`, if there is one. Else by recipe: what agrees in prompts, model, method, its parameters, steps,
    guidance and size is a group, whatever the seeds. Pictures without a recipe by the prompt in A1111's `parameters`
    or in ComfyUI's graph; those that tell none by the folder they are in.

    Args:
        folder: what paths are below.
        headers: the files, and what is written into each.
        pattern: path below the folder with fields, such as `{seed}/gen_{prompt}.png`: files that agree in all fields
            but `seed`, `n` and `index` are a group. These three are digits where that fits; any other field is as
            short as can be. Then nothing is read from the pictures.

    Returns:
        The groups, in the order of their first files; and what has to be said about the pictures.

    Raises:
        ValueError: if a recipe is broken, if `pattern` has no field or two without anything between, or if it
            matches no file.
    """
    told: dict[_Told, list[Path]] = {}
    notes: Counter[str] = Counter()
    parts = None if pattern is None else _parts(pattern)
    for path, header in headers.items():
        below = path.relative_to(folder)
        if parts is None:
            found = _written(path, header, notes) or _by_folder(folder, below)
        elif fields := _fields(parts, below.as_posix()):
            found = _Told("pattern", facts=tuple(item for item in fields.items() if item[0] not in ALIKE))
        else:
            notes[f"don't match group_by={pattern!r} and are left out"] += 1
            continue
        told.setdefault(found, []).append(path)
    if not told:
        example = next(iter(headers)).relative_to(folder).as_posix()
        raise ValueError(
            f"group_by={pattern!r} matches none of the {len(headers)} pictures in {folder}; {example!r} is one of them."
        )
    groups = [
        Group(name, found.by, found.method, found.prompt, tuple(told[found]))
        for found, name in zip(told, _names(list(told)), strict=True)
    ]
    return groups, [f"{count} of {len(headers)} pictures {note}." for note, count in notes.items()]


def describe(groups: Sequence[Group]) -> str:
    """How many groups there are, by what, and the names of the first."""
    found = []
    for by, count in Counter(group.by for group in groups).items():
        names = [group.name for group in groups if group.by == by][:NAMES]
        more = f" and {count - NAMES} more" if count > NAMES else ""
        found.append(f"{count} by {by}: {', '.join(names)}{more}")
    return "; ".join(found)


def shown(text: str, width: int = WIDTH) -> str:
    r"""Text from elsewhere on one line, cut to a width, without what would steer a terminal.

    Example:
        >>> shown("a cat\n\x1b[31masleep", 12)
        'a cat ?[ ...'
    """
    line = " ".join(text[: 8 * width].split())
    line = line if len(line) <= width and len(text) <= 8 * width else f"{line[: width - 4]} ..."
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _written(path: Path, header: Header, notes: Counter[str]) -> _Told | None:
    """What is written into a picture; None if that is nothing about a prompt."""
    texts = header.texts
    if METADATA_KEY in texts:
        try:
            recipe: dict[str, Any] = {**read_recipe(path), "size": header.size}
        except NoRecipeError:
            notes[f"have a {METADATA_KEY} text that is no recipe of ours, and count as anybody's"] += 1
        else:
            named = {name: recipe.get(name) for name in (*FACTS, "size")}
            if isinstance(parameters := named["parameters"], dict):
                del named["parameters"]
                named |= {f"{name} of the method" if name in named else name: parameters[name] for name in parameters}
            facts = tuple((name, _stated(named[name])) for name in sorted(named))
            return _Told("recipe", str(recipe.get("method", "")), str(recipe["prompt"]), facts)
    prompt = a1111_prompt(texts.get("parameters", "")) or comfyui_prompt(texts.get("prompt", ""))
    if prompt is not None:
        return _Told("prompt", "", prompt, (("prompt", prompt),))
    if "parameters" in texts or "prompt" in texts:
        notes["have a text or a graph that does not lead to one prompt, and are grouped by folder"] += 1
    return None


def _by_folder(folder: str | Path, below: Path) -> _Told:
    inside = below.parent.as_posix()
    return _Told("folder", facts=(("folder", f"{Path(folder).absolute().name}/" if inside == "." else inside),))


def _stated(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _names(found: Sequence[_Told]) -> Iterator[str]:
    """A name for each group: the folder, the fields, the prompt; of recipes also what differs under one prompt."""
    values: dict[tuple[str, str | None], dict[str, set[str]]] = {}
    for one in found:
        for name, value in one.facts:
            values.setdefault((one.method, one.prompt), {}).setdefault(name, set()).add(value)
    for one in found:
        if one.by == "recipe":
            differing = [name for name, all_of in values[one.method, one.prompt].items() if len(all_of) > 1]
            facts = dict(one.facts)
            settings = ", ".join(f"{name} {shown(facts[name])}" for name in differing)
            yield shown(one.prompt or "") + (f" ({settings})" if settings else "")
        elif len(one.facts) == 1:
            yield shown(one.facts[0][1])
        else:
            yield shown(", ".join(f"{name} {value}" for name, value in one.facts) or "all")


def _parts(pattern: str) -> list[tuple[str, str | None]]:
    """Literal text and the name of the field behind it, if there is one, all through a pattern."""
    try:
        parsed = list(Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"group_by={pattern!r} is no pattern: {error}.") from error
    parts = [(literal, name) for literal, name, _, _ in parsed]
    before: str | None = None
    for literal, name, form, conversion in parsed:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ValueError(f"group_by={pattern!r} has a field that is no name; use fields such as {{seed}}.")
        if not literal and None not in (before, name):
            raise ValueError(f"group_by={pattern!r} has two fields with nothing between; put text between them.")
        before = name
    if all(name is None for _, name in parts):
        raise ValueError(f"group_by={pattern!r} has no field; use a path with fields, such as {{seed}}/{{prompt}}.png.")
    return parts


def _fields(parts: Sequence[tuple[str, str | None]], path: str) -> dict[str, str] | None:
    """What stands in a path for each field, the first as short as can be; None if it doesn't match.

    For every place of the path that the parts so far can end at, the fields: no path takes long.
    """
    for numbers in (ALIKE, ()):
        ends: dict[int, dict[str, str]] = {0: {}}
        for literal, name in parts:
            starts, ends = ends, {}
            for start, fields in starts.items():
                if not path.startswith(literal, start):
                    continue
                start += len(literal)
                if name is None:
                    choices = [start]
                elif name in fields:
                    same = path.startswith(fields[name], start)
                    choices = [start + len(fields[name])] if same else []
                else:
                    stop = path.find("/", start)
                    choices = list(range(start + 1, (len(path) if stop < 0 else stop) + 1))
                    if name in numbers:
                        choices = [end for end in choices if path[start:end].isdecimal()]
                for end in choices:
                    # Starts come in the order of their fields' lengths, so the first to get here has the shortest.
                    ends.setdefault(end, fields if name is None else {**fields, name: path[start:end]})
        if len(path) in ends:
            return ends[len(path)]
    return None
