"""An experiment as a file: a model, its prompts and seeds, and methods whose parameters are swept."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from variegate.bench.prompts import prompt_set
from variegate.request import Request, to_text
from variegate.schema import Schema, brief, check, check_format, parse_json, parse_toml, read_text, short

MOST_CELLS = 20_000  # that are listed without being asked for twice

# Keys of an experiment that are its request's, and all others.
OF_REQUEST: Mapping[str, Schema] = {
    "model?": str, "revision?": str, "n?": int, "steps?": int, "guidance?": float, "dtype?": str,
    "negative_prompt?": str, "height?": int, "width?": int,
}  # fmt: skip
VALUE = (str, bool, float, None)  # finite: a record can't hold infinity
METHOD: Schema = {
    "name?": str, "label?": str, "steps?": (int, [int]), "guidance?": (float, [float]), "seed?": (int, [int]),
    ...: (*VALUE, [(*VALUE, [VALUE])]),
}  # fmt: skip
EXPERIMENT: Schema = {
    **OF_REQUEST, "prompts?": (str, [VALUE]), "count?": int, "groups?": int, "seed?": int, "judge?": bool,
    "images?": bool, "needs?": str, "format?": int, "method?": [METHOD],
}  # fmt: skip
# What a method's table may set besides its parameters.
OF_METHOD = ("steps", "guidance", "seed")


@dataclass(frozen=True)
class Cell:
    """The smallest piece of an experiment: one group of pictures of one prompt, and one record.

    Attributes:
        request: what to make: one prompt, without the stock pipeline's pictures beside it.
        judge: whether the judge of emoji pictures looks at them.
    """

    request: Request
    judge: bool = False

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides what the pictures are, as JSON knows it; not where and how fast they are made.

        Parameters are complete, so that a change of a method's defaults makes other cells. A model goes by its last
        name, so that no path is told; its weights are compared when records are written.
        """
        request, method = self.request, self.request.configured
        kept = ("revision", "n", "seed", "steps", "guidance", "dtype", "negative_prompt", "height", "width", "method")
        options = fields(method) if method else ()
        parameters = {option.name: to_text(getattr(method, option.name)) for option in options}
        return {
            "model": PurePath(request.model).name,
            "prompt": request.prompts[0],
            **{name: getattr(request, name) for name in kept},
            "parameters": parameters,
            "judge": self.judge,
        }

    @cached_property
    def key(self) -> str:
        """Name of the record: the method and a digest of the settings."""
        return key_of(self.settings)


def key_of(settings: Mapping[str, Any]) -> str:
    """Name of the record of a cell's settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return f"{settings['method']}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True)
class Setting:
    """A method with its parameters: a row of a table, a point of a plot.

    Attributes:
        curve: the points of a plot that belong together: what is not swept.
        point: what is swept, such as "strength=0.5".
        requests: one for each prompt and group, prompt by prompt.
    """

    curve: str
    point: str
    requests: tuple[Request, ...]

    @property
    def name(self) -> str:
        """Curve and point."""
        return f"{self.curve} {self.point}".strip()


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
        name: of the file.
        settings: the stock pipeline, then every method at every combination of its parameters.
        groups: per prompt; group g has the seeds `seed + g n` to `seed + g n + n - 1`; a method may have its own seed.
        judge: whether the judge of emoji pictures looks at them.
        images: whether the pictures are kept.
        needs: what a preset needs, in words.
    """

    name: str
    settings: tuple[Setting, ...]
    groups: int
    judge: bool
    images: bool
    needs: str

    def cells(self, setting: Setting) -> tuple[Cell, ...]:
        """The cells of one setting, prompt by prompt."""
        return tuple(Cell(request, self.judge) for request in setting.requests)

    def __iter__(self) -> Iterator[Cell]:
        """All cells, each once; the settings take turns, so that a slow hour of the machine slows all alike."""
        turns = zip(*(self.cells(setting) for setting in self.settings), strict=True)
        return iter({cell.key: cell for cell in itertools.chain.from_iterable(turns)}.values())


def presets() -> dict[str, Path]:
    """Name and file of the experiments in the package.

    Example:
        >>> list(presets())
        ['paper-flux-dev', 'paper-sd3.5-large', 'paper-sd3.5-turbo']
    """
    folder = Path(str(resources.files(__package__))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_grid(source: str | Path, *, prompts: str | None = None, model: str | None = None, yes: bool = False) -> Grid:
    """Read an experiment.

    Args:
        source: name of a preset, or a TOML or JSON file: docs/benchmark.md tells its keys.
        prompts: in place of those it names; a file is looked for in the current folder.
        model: in place of the one it names.
        yes: also if it has more than 20,000 cells. They are counted before any is listed.

    Raises:
        ValueError: if it can't be read, a key or value is unknown or out of its range, or it has too many cells.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        ...     _ = file.write('''
        ...         prompts = ["an animal", "food"]
        ...         groups = 3
        ...         [[method]]
        ...         name = "cads"
        ...         strength = [0.05, 0.1]
        ...     ''')
        ...     file.flush()
        ...     grid = read_grid(file.name)
        >>> [setting.name for setting in grid.settings], len(list(grid))
        (['stock', 'cads strength=0.05', 'cads strength=0.1'], 18)
    """
    path = presets().get(str(source), Path(source))
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason, known = getattr(error, "strerror", None) or error, ", ".join(presets())
        raise ValueError(f"{source} can't be read: {reason}; use a TOML or JSON file, or {known}.") from error
    try:
        table = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except ValueError as error:
        raise ValueError(f"{source} is neither TOML nor JSON: {error}.") from error
    try:
        check(table, EXPERIMENT, kind="an experiment")
        if model is not None:
            table = {**table, "model": model}
        if prompts is not None:
            return _grid(path, {**table, "prompts": prompts}, Path(), yes)
        return _grid(path, table, path.parent, yes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {brief(error)}") from error


def _grid(path: Path, table: Any, folder: Path, yes: bool) -> Grid:
    check_format(table, "it")
    given = {name: value for name, value in table.items() if f"{name}?" in OF_REQUEST}
    groups, seed, n = table.get("groups", 1), table.get("seed", 0), table.get("n", 8)
    for name, value, least in (("groups", groups, 1), ("n", n, 2)):
        if value < least:
            raise ValueError(f"{name}={value!r} is out of range; use an integer from {least} upwards.")
    if "prompts" not in table:
        raise ValueError(f"prompts are missing. {table.get('needs', 'Use the name of a set, a file or a list.')}")
    prompts = prompt_set(table["prompts"], count=table.get("count"), folder=folder)
    cells = len(prompts) * groups * (1 + sum(map(_points, table.get("method", []))))
    if cells > MOST_CELLS and not yes:
        raise ValueError(
            f"it has {f'{cells:,}' if cells < 10**15 else 'over 10^15'} cells ({len(prompts):,} prompts, "
            f"groups={groups:,}, and every combination of the lists); more than {MOST_CELLS:,} are made with --yes."
        )

    def setting(curve: str, point: str, **changes: Any) -> Setting:
        first = changes.pop("seed", seed)
        requests = (
            Request((prompt,), seed=first + group * n, compare=False, **{**given, **changes})
            for prompt in prompts
            for group in range(groups)
        )
        return Setting(curve, point, tuple(requests))

    settings = [setting("stock", "", method="none")]
    for method in table.get("method", []):
        settings += [setting(curve, point, **changes) for curve, point, changes in _sweep(method)]
    if table.get("judge", False):
        from variegate.emoji.reference import Reference

        reference = Reference.load()
        for prompt in prompts:
            reference.truth(prompt)  # refuses what can't be judged before anything is made
    options = {name: table.get(name, default) for name, default in (("judge", False), ("images", False), ("needs", ""))}
    return Grid(path.stem, tuple(settings), groups, **options)


def _points(method: Mapping[str, Any]) -> int:
    """How many combinations the lists of a method's table have; if they are beyond counting, some of them."""
    points = 1
    for value in method.values():
        points *= len(value) if isinstance(value, list) and points < 10**15 else 1
    return points


def _sweep(method: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Curve, point and changes of the request for every combination of the lists in a method's table."""
    if "name" not in method:
        raise ValueError(f"method={short(method)} has no name; every [[method]] needs one, such as name = 'cads'.")
    rest = {key: value for key, value in method.items() if key not in ("name", "label")}
    swept = {key: value for key, value in rest.items() if isinstance(value, list)}
    fixed = {key: value for key, value in rest.items() if key not in swept}
    curve = method.get("label") or " ".join([method["name"], *_pairs(fixed)])
    for key, value in swept.items():
        if not value:
            raise ValueError(f"{key}={value!r} of {method['name']} is an empty list; give it values.")
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        changes = {**fixed, **point}
        of_request = {key: changes.pop(key) for key in OF_METHOD if key in changes}
        yield curve, ", ".join(_pairs(point)), {"method": method["name"], "parameters": changes, **of_request}


def _pairs(values: Mapping[str, Any]) -> Sequence[str]:
    return [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]
