"""The folder of one gallery: its files come and go together, and nobody else's are touched."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RECORD = "run.json"
SHEET = "sheet.png"
_PREFIX = ".variegate-"
_READY = f"{_PREFIX}ready"  # folder of a gallery that is complete, on its way to where it belongs
_OLD = "old.json"  # in there: the record of the gallery whose place it takes


class TakenError(ValueError):
    """A folder that holds something in the place of what is to be saved there."""


def check_free(folder: Path, wanted: Callable[[str], bool], overwrite: bool) -> None:
    """Make sure that files can be saved in a folder, after what killed runs left there is tidied up.

    Args:
        folder: there is one.
        wanted: whether a file of this name is going to be saved.
        overwrite: whether a gallery that is there may be replaced.

    Raises:
        TakenError: if it holds a gallery that may not, or a file of such a name that no gallery's record lists.
    """
    with _alone(folder):
        _tidy(folder)
        _refuse(folder, wanted, overwrite)


@contextmanager
def replacing_gallery(folder: Path, names: Collection[str], overwrite: bool) -> Iterator[Path]:
    """Where to write the files of a gallery, which take the place of an older one once all are there.

    Killed at any moment, the folder holds files of the old gallery only or of the new one only, and a record only
    beside all files that it lists; if the new files were complete, the next run brings in what is missing of them.

    Args:
        folder: made if needed.
        names: of the files, with `RECORD`, which lists the others.
        overwrite: see `check_free`.

    Raises:
        TakenError: see `check_free`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _tidy(folder)
        _refuse(folder, names.__contains__, overwrite)
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary)
            raise
        temporary.rename(folder / _READY)
        _bring_in(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time, so that what is found there is no other run's who is at it; not on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _tidy(folder: Path) -> None:
    """Finish or remove what killed runs have left."""
    if (folder / _READY).is_dir():
        _bring_in(folder)
    for path in folder.glob(f"{_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _bring_in(folder: Path) -> None:
    """Put the gallery that is ready in the place of the old one; to be done again if it is cut short.

    The old record goes first and the new one comes last, and no new picture comes before all old ones are gone.
    """
    ready = folder / _READY
    if (ready / RECORD).exists():
        if (folder / RECORD).exists():
            os.replace(folder / RECORD, ready / _OLD)
        if (ready / _OLD).exists():
            for name in _listed(ready / _OLD):
                (folder / name).unlink(missing_ok=True)
            (ready / _OLD).unlink()
        for name in _listed(ready / RECORD) - {RECORD}:
            if (ready / name).exists():
                os.replace(ready / name, folder / name)
        os.replace(ready / RECORD, folder / RECORD)
    shutil.rmtree(ready)


def _refuse(folder: Path, wanted: Callable[[str], bool], overwrite: bool) -> None:
    listed = _listed(folder / RECORD)
    if listed and not overwrite:
        raise TakenError(
            f"output={str(folder)!r} holds a gallery already; replace it by --overwrite (overwrite=True in Python), "
            "or use another -o."
        )
    for path in sorted(folder.iterdir()):
        if wanted(path.name) and (path.name not in listed or path.is_dir()):
            raise TakenError(f"output={str(folder)!r} holds {path.name}, which is of no gallery there; use another -o.")


def _listed(record: Path) -> set[str]:
    """The files of the gallery that a record is of; none if it is no such record, or missing."""
    try:
        groups = json.loads(record.read_text(encoding="utf-8"))["groups"]
        names = {name for group in groups for row in group["rows"] for name in row["files"]}
        # A record from elsewhere must not reach into other folders.
        is_ours = all(Path(name).name == name and name.endswith(".png") for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {*names, SHEET, RECORD} if is_ours else set()
