"""One cell of a grid, wherever it is run: its pictures and its record."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from variegate.bench.grid import Cell
from variegate.bench.records import Record

if TYPE_CHECKING:
    from variegate.emoji.judge import Judge
    from variegate.gallery import Gallery

DIGITS = 4
JUDGED = ("precision", "style_precision", "similarity", "labels", "drawings", "styles", "kid")


class Place(NamedTuple):
    """Where the cells of a run are made: as in `Request`."""

    device: str = "auto"
    offload: str = "none"


HERE = Place()


class Made(NamedTuple):
    """A cell's record, and its pictures if they are kept."""

    record: Record
    gallery: Gallery | None


class Failure(NamedTuple):
    """Why a cell has no record; `fatal` if no other cell would have one."""

    reason: str
    fatal: bool = False


def attempt(cell: Cell, place: Place, images: bool) -> Made | Failure:
    """Make and measure a cell; what its settings or the machine can't do is a failure, not an error."""
    try:
        _load(cell, place)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        return Failure(str(error), fatal=True)
    try:
        made = measure(cell, place)
    except (ValueError, MemoryError, RuntimeError) as error:
        return Failure(str(error) or type(error).__name__)
    return made if images else made._replace(gallery=None)


def measure(cell: Cell, place: Place = HERE) -> Made:
    """Make the pictures of a cell and measure them.

    Raises:
        ValueError, MemoryError: as `variegate.generate`.

    Example:
        >>> from variegate.request import Request
        >>> cell = Cell(Request(("an animal",), n=2, steps=2, method="none", compare=False), judge=True)
        >>> sorted(measure(cell).record.measures)[:4]
        ['distance', 'drawings', 'kid', 'labels']
    """
    from variegate.generation import generate

    pipeline, model, weights = _load(cell, place)
    done = [0.0]

    def mark(step: int, total: int) -> None:
        # The last call comes when the pipeline has returned, before anything is measured.
        done[0] = time.perf_counter()

    request = dataclasses.replace(cell.request, model=model, device=_device(place))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"variegate\.")
        reset_peak_memory(request.device)
        began = time.perf_counter()
        gallery = generate(request, pipeline=pipeline, progress=mark)
    memory = peak_memory(request.device)
    (row,) = gallery.groups[0].rows
    found = {"vendi": row.vendi, "distance": row.distance, "seconds": done[0] - began, "peak_memory": memory}
    verdicts = []
    if cell.judge:
        report = _judge().report(row.images, request.prompts[0])
        found |= {name: getattr(report, name) for name in JUDGED}
        verdicts = [(one.label, one.style, round(one.similarity, DIGITS)) for one in report.verdicts]
    record = Record(
        settings=cell.settings,
        made={"model": model, "weights": weights}
        | {name: gallery.settings[name] for name in ("steps", "guidance", "dtype")},
        seeds=gallery.seeds(row),
        pixels=hashlib.blake2b(b"".join(image.tobytes() for image in row.images), digest_size=8).hexdigest(),
        measures={name: round(value, DIGITS) for name, value in found.items() if value is not None},
        verdicts=tuple(verdicts),
        versions=gallery.settings["versions"],
        hardware=hardware(request.device),
        warnings=tuple(str(warning.message) for warning in caught),
    )
    return Made(record, gallery)


def _load(cell: Cell, place: Place) -> tuple[Any, str, str]:
    request = cell.request
    return _pipeline(request.model, request.revision, request.dtype, request.height, request.width, place)


@lru_cache(maxsize=1)
def _pipeline(
    model: str, revision: str | None, dtype: str, height: int | None, width: int | None, place: Place
) -> tuple[Any, str, str]:
    """Pipeline, name and weights of a model; warm, since the first call of a process is slower than all others."""
    from variegate.emoji.models import load_pipeline, locate
    from variegate.generation import generate
    from variegate.request import Request

    checkpoint = locate(model, revision)
    pipeline = load_pipeline(checkpoint.folder, dtype=dtype, device=place.device, offload=place.offload)
    # Two steps: a scheduler with a terminal shift can't do with one.
    first = Request(("a",), n=2, model=checkpoint.name, method="none", steps=2, height=height, width=width)
    generate(first, pipeline=pipeline)
    return pipeline, checkpoint.name, checkpoint.revision or digest(checkpoint.folder)


@lru_cache(maxsize=1)
def _judge() -> Judge:
    from variegate.emoji.judge import Judge

    return Judge.load()


def _device(place: Place) -> str:
    from variegate.emoji.models import pick_device

    return pick_device(place.device)


def digest(folder: Path) -> str:
    """Digest of all weights of a checkpoint, by their place in it."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()


def reset_peak_memory(device: str) -> None:
    """Count the peak from here, where the system can: on CUDA, and for processes of Linux."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def peak_memory(device: str) -> float | None:
    """MiB at most since the reset: of tensors on the accelerator, else resident in the process; None if unknown."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def hardware(device: str) -> dict[str, Any]:
    """What it is made on: no names of hosts or users."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"processor": processor, "device": name, "threads": torch.get_num_threads()}
