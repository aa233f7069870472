"""Parts of a source -> finished parts, on the processes of one machine or on a Ray cluster, whatever ends a process.

Both engines take parts from an iterator as they have room for them, so that a source never sits in memory, and give back
what is done in any order. A part whose process ended is tried again (`parts.py` says how).
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from typing import Any

from pebble import ProcessExpired, ProcessPool

from parts import Part, PartSettings, featurize_part

ENGINES = ("local", "ray")
PARTS_A_PROCESS = 2  # in work and waiting, so that no process ever waits for the reader


def run_locally(parts: Iterable[Part], settings: PartSettings, num_proc: int) -> Iterator[tuple[int, int]]:
    """Numbers of rows and rejections of each part, from `num_proc` processes."""
    # Forked by a server that has imported everything and runs no thread: forks of this process could hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parts"])
    with ProcessPool(num_proc, context=context) as pool:
        pending: dict[Any, Part] = {}

        def finished() -> Iterator[tuple[int, int]]:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                part = pending.pop(future)
                try:
                    yield future.result()
                except ProcessExpired as error:
                    again = after_crash(part, settings, f"exit code {error.exitcode}")
                    pending[pool.schedule(featurize_part, args=(again, settings))] = again

        try:
            for part in parts:
                pending[pool.schedule(featurize_part, args=(part, settings))] = part
                while len(pending) >= PARTS_A_PROCESS * num_proc:
                    yield from finished()
            while pending:
                yield from finished()
        except BaseException:
            pool.stop()
            raise


def run_on_ray(parts: Iterable[Part], settings: PartSettings, num_proc: int) -> Iterator[tuple[int, int]]:
    """The same from up to `num_proc` tasks at once on the Ray cluster that is there, or on one of this machine.

    The folder of the parts has to be on a file system that all machines share.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('The engine "ray" needs Ray. Run `pip install "ray"`, or use --engine local.') from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A process of its own for each part: one that RDKit took down takes no other part with it.
    task = ray.remote(max_retries=0, max_calls=0)(featurize_part)
    pending: dict[Any, Part] = {}

    def finished() -> Iterator[tuple[int, int]]:
        done, _ = ray.wait(list(pending), num_returns=1)
        part = pending.pop(done[0])
        try:
            yield ray.get(done[0])
        except ray.exceptions.WorkerCrashedError:
            again = after_crash(part, settings, "worker crashed")
            pending[task.remote(again, settings)] = again

    for part in parts:
        pending[task.remote(part, settings)] = part
        while len(pending) >= num_proc:
            yield from finished()
    while pending:
        yield from finished()


def after_crash(part: Part, settings: PartSettings, how: str) -> Part:
    """The part as it is to be tried again: row by row, then with the row that ended its process marked as a failure."""
    marker = part.path("marker")
    if not marker.exists():
        raise RuntimeError(f"A process ended before it began its part ({how}). Is there enough memory for so many?")
    if not part.one_by_one:
        return replace(part, one_by_one=True)
    row = int(marker.read_bytes())
    if len(part.failures.get(row, ())) > 2:
        raise RuntimeError(f"Row {row} was left out, but a process still ended there ({how}).")
    limit = settings.molecule_time_limit
    slow = time.time() - marker.stat().st_mtime >= limit
    reason = f"took RDKit more than {limit:g} s" if slow else f"made RDKit crash ({how})"
    failures = {**part.failures, row: (*part.failures.get(row, ()), reason)}
    return replace(part, failures=failures)
