"""Which molecules make a step, and how they are cut into parts of like size: a function of the seed and the step alone.

The batch of an optimizer step is drawn from all molecules, whatever their size. Its cost is the padding of its parts, so it
is sorted by size and cut where the next molecule would exceed the budget of padded tokens or pairs; the processes share the
parts. Losses are exact means over the whole batch and draws depend on the molecule (`objective.py`), so neither the cut nor
the number of processes changes what is learned.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from moleblend_hf.graphs_moleblend import Budget


class Sized(Protocol):
    """Rows of a dataset whose sizes are known."""

    indices: np.ndarray

    def sizes(self) -> np.ndarray:
        """Atoms of each."""


def cut(sizes: np.ndarray, budget: Budget, multiple_of: int = 1) -> list[np.ndarray]:
    """Positions in `sizes` (n,), cut into parts of like size that fit the budget, the largest molecules first.

    Their number is a multiple of `multiple_of`: of that many parts the budget is the smallest, so that all cost about the same;
    where it comes to fewer, the costliest is halved.
    """
    order = np.argsort(-sizes, kind="stable")  # once, and not for each budget that is tried
    ordered = sizes[order]
    parts = list(budget.cut(ordered))
    if multiple_of > 1:
        allowed = -(-len(parts) // multiple_of) * multiple_of
        enough, too_small = 1.0, 0.0
        for _ in range(12):
            share = (enough + too_small) / 2
            smaller = list(Budget(int(share * budget.max_tokens), int(share * budget.max_pairs)).cut(ordered))
            if len(smaller) <= allowed:
                enough, parts = share, smaller
            else:
                too_small = share
    while len(parts) % multiple_of:
        if len(parts) == len(sizes):
            raise ValueError(f"{len(sizes):,} molecules cannot be shared by {multiple_of} processes. Take a multiple.")
        index = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1) * cost(ordered[parts[i]]))
        half = -(-len(parts[index]) // 2)
        parts[index : index + 1] = [parts[index][:half], parts[index][half:]]
    return [order[part] for part in parts]


def cost(sizes: np.ndarray) -> float:
    """About what a part costs: its padded tokens, and its padded pairs, of which about 64 cost as much as a token."""
    tokens = int(sizes.max()) + 1
    return len(sizes) * (tokens + tokens**2 / 64)


def shared(parts: Sequence[np.ndarray], sizes: np.ndarray, num_processes: int) -> list[list[np.ndarray]]:
    """The parts of each process: as many for each, dealt by their cost to and fro, so that all take about as long."""
    by_cost = sorted(parts, key=lambda part: -cost(sizes[part]))
    rounds = [by_cost[start : start + num_processes] for start in range(0, len(by_cost), num_processes)]
    dealt = [hand if index % 2 == 0 else hand[::-1] for index, hand in enumerate(rounds)]
    return [list(share) for share in zip(*dealt, strict=True)]


def fitting(rows: "Sized", budget: Budget, oversized: str) -> int:
    """Leave out of `rows` the molecules that exceed the budget alone, and return how many; or raise."""
    sizes = rows.sizes()
    too_large = sizes > budget.largest()
    if too_large.any() and oversized == "error":
        largest = int(sizes.max())
        raise ValueError(
            f"{int(too_large.sum()):,} molecules exceed the budget of one forward; the largest has {largest} atoms. Raise "
            f"max_tokens to {largest + 1:,} and max_pairs to {(largest + 1) ** 2:,} or more, or leave them out with "
            "--oversized skip."
        )
    rows.indices = rows.indices[~too_large]
    return int(too_large.sum())


class StepBatches:
    """Row positions of the parts that one process works on, step by step from `first_step` on, without end.

    Each epoch is shuffled by (seed, epoch) and cut into batches. What does not fill a batch is left out; the next epoch is
    shuffled anew.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        budget: Budget,
        seed: int,
        first_step: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Check that there is a batch, and that the processes can share it."""
        if not 0 < batch_size <= len(sizes):
            raise ValueError(f"batch_size is {batch_size:,}, but there are {len(sizes):,} training molecules.")
        if batch_size % num_processes:
            raise ValueError(f"batch_size must be a multiple of the processes ({num_processes}), got {batch_size}.")
        self.sizes, self.batch_size, self.budget, self.seed, self.first_step = (
            sizes,
            batch_size,
            budget,
            seed,
            first_step,
        )
        self.process_index, self.num_processes = process_index, num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.sizes) // self.batch_size

    def batch(self, step: int, order: np.ndarray) -> np.ndarray:
        """Row positions of the whole batch of a step, in the shuffled order of its epoch."""
        first = step % self.steps_per_epoch * self.batch_size
        return order[first : first + self.batch_size]

    def order(self, epoch: int) -> np.ndarray:
        """Row positions of an epoch, shuffled."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))

    def __iter__(self) -> Iterator[list[list[int]]]:
        step, epoch = self.first_step, -1
        while True:
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            rows = self.batch(step, order)
            sizes = self.sizes[rows]
            parts = cut(sizes, self.budget, self.num_processes)
            yield [rows[part].tolist() for part in shared(parts, sizes, self.num_processes)[self.process_index]]
            step += 1
