"""Parts of a source -> finished parts, on the processes of one machine or on a Ray cluster, whatever ends a process.

Both engines take parts from an iterator as they have room for them, so that a source never sits in memory, and give back
what is done in any order. A part whose process ended is tried again (`parts.py` says how).
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from parts import Part, PartSettings, after_failure, featurize_part

S = TypeVar("S", bound=PartSettings)

ENGINES = ("local", "ray")
# What takes seconds to import, and is imported once for all processes. Only packages: Python 3.11 does not tell the server
# that forks where the files beside a script are.
PRELOADED = ["moleblend_hf", "datasets", "accelerate", "matplotlib.figure"]
KILLED = "had its process killed, as happens when memory runs out"
PARTS_A_PROCESS = 2  # in work and waiting, so that no process ever waits for the reader
# Then a process ends and another takes its place: memory that libraries keep for each new shape of a batch, or lose, is bounded.
PARTS_A_LIFE = 50


def run_locally(
    parts: Iterable[Part], settings: S, num_proc: int, work: Callable[[Part, S], tuple[int, int]] = featurize_part
) -> Iterator[tuple[int, int]]:
    """Numbers of rows and rejections of each part, which are what `work` returns, from `num_proc` processes."""
    # Forked by a server that runs no thread: forks of this process could hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPool(num_proc, PARTS_A_LIFE, initializer=_end_with_parent, context=context) as pool:
        pending: dict[Any, Part] = {}

        def finished() -> Iterator[tuple[int, int]]:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                part = pending.pop(future)
                try:
                    yield future.result()
                except ProcessExpired as error:
                    again = after_failure(part, settings, _ending(error.exitcode))
                    pending[pool.schedule(work, args=(again, settings))] = again

        try:
            for part in parts:
                pending[pool.schedule(work, args=(part, settings))] = part
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
    if own := not ray.is_initialized():
        ray.init(log_to_driver=False)
    ended = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    # Its processes look for our files where this one does. Retries are ours, which know the row to blame.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
    task = ray.remote(max_retries=0, runtime_env=environment)(featurize_part)
    pending: dict[Any, Part] = {}

    def finished() -> Iterator[tuple[int, int]]:
        done, _ = ray.wait(list(pending), num_returns=1)
        part = pending.pop(done[0])
        try:
            yield ray.get(done[0])
        except ended as error:
            how = KILLED if isinstance(error, ray.exceptions.OutOfMemoryError) else "made RDKit crash"
            again = after_failure(part, settings, how)
            pending[task.remote(again, settings)] = again
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # without Ray's copy of it, which has no errno

    try:
        for part in parts:
            pending[task.remote(part, settings)] = part
            while len(pending) >= num_proc:
                yield from finished()
        while pending:
            yield from finished()
    finally:
        if own:
            ray.shutdown()


def _end_with_parent() -> None:
    """Let this process end when the one that started it does, even by `kill -9`: nobody would wait for its results."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ending(exit_code: int) -> str:
    """How a process ended, phrased to follow the name of a row."""
    if exit_code == -signal.SIGKILL:
        return KILLED
    return f"made RDKit crash ({signal.Signals(-exit_code).name if exit_code < 0 else f'exit code {exit_code}'})"
