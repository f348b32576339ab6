"""Records on disk: one JSON file per cell, written once, never changed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from variegate.bench.grid import Cell, key_of
from variegate.schema import FORMAT, Schema, check, check_format, parse_json, read_text

RECORD: Schema = {
    "format?": int,
    "settings": {"method": str, ...: (str, bool, float, None, {...: (str, bool, float, None)})},
    "made": {"model": str, "weights": str, "steps": int, "guidance": (float, None), "dtype": str},
    "seeds": [int],
    "pixels": str,
    "measures": {...: float},
    "verdicts": [[str, str, float]],
    "versions": {...: str},
    "hardware": {"processor": str, "device": str, "threads": int},
    "warnings": [str],
}


@dataclass(frozen=True)
class Record:
    """What was made and measured of one cell.

    Attributes:
        settings: the cell's, see `Cell.settings`.
        made: how it was made: model, weights (commit, or a digest of their files), steps, guidance and dtype.
        seeds: one per picture.
        pixels: digest of the pictures.
        measures: name to value: `vendi`, `distance`, `seconds` of the pipeline's call and `peak_memory` in MiB (of
            the accelerator, else of the process; where the system tells); with the judge also its own.
        verdicts: of the judge, for each picture: label, style and similarity.
        versions: of the libraries.
        hardware: processor, device, threads.
        warnings: that were given on the way.
    """

    settings: Mapping[str, Any]
    made: Mapping[str, Any]
    seeds: tuple[int, ...]
    pixels: str
    measures: Mapping[str, float]
    verdicts: tuple[tuple[str, str, float], ...]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    warnings: tuple[str, ...]


def write(folder: Path, record: Record) -> Path:
    """Write a record whole or not at all; one that is there already stays as it is.

    Raises:
        OSError: if the disk is full or can't be written to.
    """
    path = folder / f"{key_of(record.settings)}.json"
    table = {"format": FORMAT, **asdict(record)}
    lines = [f'"{name}": {json.dumps(value, ensure_ascii=False, allow_nan=False)}' for name, value in table.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)
    return path


def read(folder: Path, cells: Iterable[Cell]) -> dict[str, Record]:
    """The records there are of some cells, by key.

    Raises:
        ValueError: if one is of another format, has keys or values that no record has, or is of another cell.
    """
    found = {}
    for cell in cells:
        path = folder / f"{cell.key}.json"
        try:
            table = parse_json(read_text(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _damaged(path, getattr(error, "strerror", None) or error) from error
        if isinstance(table, dict):
            check_format(table, path)
        try:
            check(table, RECORD, kind="a record")
        except ValueError as error:
            raise _damaged(path, str(error).rstrip(".")) from error
        table.pop("format", None)
        record = Record(**table)
        if key_of(record.settings) != cell.key:
            raise _damaged(path, "its settings are others")
        found[cell.key] = record
    return found


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: it does not hold the record of its name ({reason}); remove it and run again."
    )
