"""Make what is missing of a grid: in this process, in several, or on a Ray cluster. The records are the same."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from variegate.bench.grid import Cell, Grid
from variegate.bench.records import Record, read, write
from variegate.bench.worker import HERE, Failure, Made, Place, attempt
from variegate.gallery import check_writable

RETRIES = 3  # of a cell whose Ray worker dies

Options = tuple[Place, bool]  # of `attempt`
Results = Generator[tuple[Cell, Made | Failure], None, None]


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        before: cells that had a record.
        made: records written.
        failures: reason to the number of cells that have none because of it.
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
    """Make the cells of a grid that have no record yet.

    Records are written by this process alone, each as soon as its cell is done: whenever it is ended, at most the
    cells at work are lost. A cell that fails is left without a record, and the others go on.

    Args:
        grid: the experiment.
        folder: of the records; made if needed.
        workers: processes on this machine, which share its processor.
        ray: address of a Ray cluster, "auto" or "local", in place of `workers`; a task takes a GPU where there are any.
        place: device and offload.
        progress: called with the cells that are done and all of them, at the start and after each.

    Raises:
        ValueError: if the model can't be loaded, the records there are don't belong to it, an optional package is
            missing, or a worker process dies.
        OSError: if a record can't be written.
    """
    folder = Path(folder)
    check_writable(folder)
    if workers < 1:
        raise ValueError(f"workers={workers!r} is out of range; use an integer from 1 upwards.")
    cells = list(grid)
    records = read(folder, cells)
    weights = {record.made["weights"] for record in records.values()}
    missing = [
        cell
        for cell in cells
        if cell.key not in records or (grid.images and not (folder / "images" / cell.key).is_dir())
    ]
    before = len(cells) - len(missing)
    failures: Counter[str] = Counter()
    made = 0
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
    with closing(results):
        for cell, result in results:
            if isinstance(result, Failure):
                if result.fatal:
                    raise ValueError(" ".join(filter(None, [result.reason, grid.needs])))
                failures[result.reason] += 1
            else:
                _check_weights(weights, result.record, folder)
                if result.gallery is not None:
                    result.gallery.save(folder / "images" / cell.key, overwrite=True)
                write(folder, result.record)
                made += 1
            if progress is not None:
                progress(before + made + failures.total(), len(cells))
    return Outcome(before, made, failures)


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
