"""Odd inputs by the thousand to the processor, the config and the converter: what came of them, counted.

    python benchmarks/fuzz.py                          # 3,000 inputs, a minute
    python benchmarks/fuzz.py --num_inputs 100000      # the claim in the README

The inputs are those of `tests/fuzzing.py`: SMILES-like text, real SMILES with places changed, RDKit molecules put together at
random, coordinates, values of wrong types; values of config fields; states of the original's checkpoints with keys and
tensors changed. An input should give a result or a documented error. What does neither is printed and makes the exit
status 1: another exception, a process that dies, one that is stuck with an input for longer than `--time_limit`.

A process has `INPUTS_A_PROCESS` inputs, drawn from its own seed. A file says which one it is at, so that the input is known
that RDKit crashes or hangs on.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import TRIALS
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm.auto import tqdm

INPUTS_A_PROCESS = 1000
SHARES = {"processor": 0.7, "config": 0.2, "converter": 0.1}
MAX_PRINTED = 20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fuzzing"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_inputs", type=int, default=3000, help="of all kinds together")
    parser.add_argument("--kinds", default=",".join(TRIALS), help="of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--time_limit", type=float, default=60.0, help="seconds for one input")
    return parser.parse_args(argv)


def attempt_many(kind: str, number: int, num_inputs: int, time_limit: float, folder: str) -> None:
    """Try inputs of a kind, and write what came of them and how often, and what did not end well."""
    strategy, attempt = TRIALS[kind]
    counts: Counter[str] = Counter()
    failures: list[list[str]] = []
    slowest = 0.0
    marker = (Path(folder) / "marker").open("w", buffering=1, encoding="utf-8", errors="backslashreplace")

    @seed(number)
    @settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempted(value: object) -> None:
        nonlocal slowest
        marker.seek(0)
        marker.truncate()
        marker.write(repr(value))
        marker.flush()
        faulthandler.dump_traceback_later(time_limit, exit=True)
        started = time.perf_counter()
        try:
            counts[attempt(value)] += 1
        except Exception as error:  # all that is not documented is what is looked for
            counts[f"BUG: {type(error).__name__}"] += 1
            failures.append([repr(value), f"{type(error).__name__}: {error}"])
        slowest = max(slowest, time.perf_counter() - started)
        faulthandler.cancel_dump_traceback_later()

    attempted()
    found = {"counts": counts, "failures": failures, "slowest": slowest}
    (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")


def supervised(kind: str, number: int, num_inputs: int, time_limit: float) -> dict:
    """`attempt_many` in a process of its own, which may die."""
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=attempt_many, args=(kind, number, num_inputs, time_limit, folder))
        process.start()
        process.join()
        found = Path(folder, "found.json")
        if found.exists():
            return json.loads(found.read_text(encoding="utf-8"))
        value = Path(folder, "marker").read_text(encoding="utf-8")
        how = f"the process ended with exit code {process.exitcode}: a crash, or more than {time_limit:g} s"
        return {"counts": {"BUG: process ended": 1}, "failures": [[value, how]], "slowest": time_limit}


def main(argv: list[str] | None = None) -> int:
    """Print counts by outcome, and return how many inputs did not end well."""
    args = parse_args(argv)
    kinds = args.kinds.split(",")
    total = sum(SHARES[kind] for kind in kinds)
    tasks = []
    for kind in kinds:
        left = round(args.num_inputs * SHARES[kind] / total)
        while left > 0:
            tasks.append((kind, args.seed + len(tasks), min(left, INPUTS_A_PROCESS)))
            left -= INPUTS_A_PROCESS
    counts = {kind: Counter() for kind in kinds}
    slowest: dict[str, float] = dict.fromkeys(kinds, 0.0)
    failures: list[list[str]] = []
    started = time.perf_counter()
    with (
        ThreadPoolExecutor(args.num_proc) as pool,
        tqdm(total=args.num_inputs, unit=" inputs", unit_scale=True) as progress,
    ):
        for (kind, _, size), found in zip(
            tasks, pool.map(lambda task: supervised(*task, args.time_limit), tasks), strict=True
        ):
            counts[kind].update(found["counts"])
            failures += found["failures"]
            slowest[kind] = max(slowest[kind], found["slowest"])
            progress.update(size)
    print(f"{sum(map(Counter.total, counts.values())):,} inputs in {time.perf_counter() - started:.0f} s\n")
    print("| Input | Outcome | Number |\n|---|---|---|")
    for kind in kinds:
        for outcome, count in counts[kind].most_common():
            print(f"| {kind} | {outcome} | {count:,} |")
    print("\nslowest: " + ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in slowest.items()))
    for value, reason in failures[:MAX_PRINTED]:
        print(f"\n{reason}\n  {value[:2000]}")
    return sum(count for each in counts.values() for outcome, count in each.items() if outcome.startswith("BUG"))


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
