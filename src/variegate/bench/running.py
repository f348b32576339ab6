"""Make what is missing of a grid: in this process, in several, or on a Ray cluster. The records are the same."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variegate.bench.grid import Cell, Grid
from variegate.bench.records import Record, read, write
from variegate.bench.worker import HERE, Failure, Made, Place, attempt
from variegate.gallery import check_writable

if TYPE_CHECKING:
    from variegate.gallery import Gallery

RETRIES = 3  # of a cell whose Ray worker dies
OTHER_PICTURES = (
    "its pictures came out different from those its record tells of, perhaps by other libraries or another machine; "
    "they are not kept: remove the record to make both again"
)

Options = tuple[Place, bool]  # of `attempt`
Results = Generator[tuple[Cell, Made | Failure], None, None]


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        before: cells that were done: there is a record and, if pictures are kept, every picture.
        made: cells that are done now.
        failures: reason to the number of cells that are not because of it.
    """

    before: int
    made: int
    failures: Mapping[str, int]


def run(
    grid: Grid,
    folder: str | Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    place: Place = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Make the cells of a grid that are not done yet.

    Records are written by this process alone, each as soon as its cell is made, its pictures before it: whenever the
    run is ended, at most the cells at work are lost. What a killed run left half-written is removed by the next one.
    A cell that fails is left undone, and the others go on.

    Args:
        grid: the experiment.
        folder: of the records; made if needed.
        workers: processes on this machine, which share its processor.
        ray: address of a Ray cluster, "auto" or "local", in place of `workers`; a task takes a GPU where there are any.
        place: device and offload.
        progress: called with the cells that are done and all of them, at the start and after each.

    Raises:
        ValueError: if the model can't be loaded, the records there are don't belong to it, an optional package is
            missing, a worker process dies, or records are gone when the run ends.
        OSError: if a record or a picture can't be written.
    """
    folder = Path(folder)
    check_writable(folder)
    if workers < 1:
        raise ValueError(f"workers={workers!r} is out of range; use an integer from 1 upwards.")
    cells = list(grid)
    records = read(folder, cells)
    weights = {record.made["weights"] for record in records.values()}

    def is_done(cell: Cell, is_recorded: bool) -> bool:
        return is_recorded and (not grid.images or _has_pictures(folder / "images" / cell.key, cell.request.n))

    missing = [cell for cell in cells if not is_done(cell, cell.key in records)]
    before = len(cells) - len(missing)
    failures: Counter[str] = Counter()
    made: list[Cell] = []
    folder.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        progress(before, len(cells))
    options = (place, grid.images)
    results: Results
    if ray is not None:
        results = _on_ray(missing, options, ray)
    elif workers == 1:
        results = ((cell, attempt(cell, *options)) for cell in missing)
    else:
        results = _in_processes(missing, options, workers)
    with closing(results), _tidied(folder):
        for cell, result in results:
            if isinstance(result, Failure):
                if result.fatal:
                    raise ValueError(" ".join(filter(None, [result.reason, grid.needs])))
                failures[result.reason] += 1
            else:
                _check_weights(weights, result.record, folder)
                before_it = records.get(cell.key)
                if before_it is not None and before_it.pixels != result.record.pixels:
                    failures[OTHER_PICTURES] += 1
                else:
                    try:
                        if result.gallery is not None:
                            _keep(result.gallery, folder / "images", cell.key)
                        write(folder, result.record)
                    except FileNotFoundError as error:
                        raise _gone(folder) from error
                    made.append(cell)
            if progress is not None:
                progress(before + len(made) + failures.total(), len(cells))
    if not all(is_done(cell, (folder / f"{cell.key}.json").is_file()) for cell in made):
        raise _gone(folder)
    return Outcome(before, len(made), failures)


def _has_pictures(folder: Path, n: int) -> bool:
    """Whether a gallery is there with all pictures: `run.json` is the file that it writes last."""
    return (folder / "run.json").is_file() and sum(1 for _ in folder.glob("*.png")) > n  # and the sheet


def _keep(gallery: Gallery, folder: Path, name: str) -> None:
    """Save a gallery as a folder that is there whole or not at all."""
    folder.mkdir(exist_ok=True)  # not its parents: a results folder that was removed is not made again
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".tmp", dir=folder))
    try:
        gallery.save(temporary)
        temporary.chmod(0o755)
        if (folder / name).exists():
            shutil.rmtree(folder / name)  # half of it, of a version that wrote file by file
        temporary.rename(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _tidied(folder: Path) -> Iterator[None]:
    """Without what killed runs left half-written, which is removed where it is certain that no other run is at work."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # another is at work, or the disk has no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _tidy(folder)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)  # until the run ends, however it does
        yield
    finally:
        os.close(handle)


def _tidy(folder: Path) -> None:
    pictures = folder / "images"
    for place in (folder, pictures, *pictures.glob("*")):
        for pattern in (".variegate-*", ".*.tmp"):
            for path in place.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _gone(folder: Path) -> ValueError:
    return ValueError(f"{folder} was removed, or records in it, while the run was at work; run again.")


def _check_weights(weights: set[str], record: Record, folder: Path) -> None:
    weights.add(record.made["weights"])
    if len(weights) > 1:
        raise ValueError(
            f"{folder} holds records of other weights of {record.made['model']}; "
            "nothing was changed: use another folder for these."
        )


def _in_processes(cells: Sequence[Cell], options: Options, workers: int) -> Results:
    from multiprocessing import get_context

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (max(1, cores // workers),))
    futures = {pool.submit(attempt, cell, *options): cell for cell in cells}
    try:
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "A worker process was killed, perhaps for want of memory; what is recorded is kept: run again, "
            f"with fewer than workers={workers}."
        ) from error
    finally:
        # One by one: `cancel_futures` is forgotten if the pool is collected before its thread has looked.
        for future in futures:
            future.cancel()
        pool.shutdown(wait=False)


def _start(threads: int) -> None:
    """In a new worker process: its share of the processor, and its end when the one that started it has ended."""
    import threading
    from multiprocessing import parent_process

    import torch

    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_ray(cells: Sequence[Cell], options: Options, address: str) -> Results:
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ValueError("ray is not installed; use pip install 'variegate[bench]'.") from error
    with _cluster(ray, address):
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(attempt)
        died = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
        waiting = {task.remote(cell, *options): cell for cell in cells}
        try:
            while waiting:
                (ready,), _ = ray.wait(list(waiting))
                cell = waiting.pop(ready)
                try:
                    result = ray.get(ready)
                except died as error:
                    result = Failure(f"its Ray worker died {RETRIES + 1} times: {type(error).__name__}")
                yield cell, result
        finally:
            for reference in waiting:
                ray.cancel(reference)


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Connected to a cluster; the connection of a caller who has one is used, and left open."""
    if ray.is_initialized():
        yield
        return
    try:
        host, colon, port = address.rpartition(":")
        if colon and "/" not in host:  # Ray itself would wait for minutes, even where nobody listens
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"ray={address!r} is no cluster that can be reached: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
