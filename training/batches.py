"""Which molecules make a step, and how they are cut into parts of like size: a function of the seed and the step alone.

The batch of an optimizer step is drawn from all molecules, whatever their size. Its cost is the padding of its parts, so it
is sorted by size and cut where the next molecule would exceed the budget of padded tokens or pairs; the processes share the
parts. Losses are exact means over the whole batch and draws depend on the molecule (`objective.py`), so neither the cut nor
the number of processes changes what is learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Budget:
    """What one forward may cost, in padded tokens (N + 1 for a molecule padded to N atoms) and their squares."""

    max_tokens: int
    max_pairs: int

    def largest(self) -> int:
        """Atoms of the largest molecule that fits, alone."""
        return min(self.max_tokens, int(self.max_pairs**0.5)) - 1

    def molecules(self, num_atoms: int) -> int:
        """How many molecules padded to `num_atoms` fit."""
        tokens = num_atoms + 1
        return max(1, min(self.max_tokens // tokens, self.max_pairs // tokens**2))


def cut(sizes: np.ndarray, budget: Budget, min_parts: int = 1) -> list[np.ndarray]:
    """Positions in `sizes` (n,), cut into parts of like size that fit the budget, the largest molecules first.

    At least `min_parts` if there are as many molecules: the costliest part is halved until there are.
    """
    order = np.argsort(-sizes, kind="stable")
    parts, start = [], 0
    while start < len(order):
        stop = start + budget.molecules(int(sizes[order[start]]))
        parts.append(order[start:stop])
        start = stop
    while len(parts) < min(min_parts, len(sizes)):
        index = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1) * cost(sizes[parts[i]]))
        half = -(-len(parts[index]) // 2)
        parts[index : index + 1] = [parts[index][:half], parts[index][half:]]
    return parts


def cost(sizes: np.ndarray) -> float:
    """About what a part costs: its padded tokens, and its padded pairs, of which about 64 cost as much as a token."""
    tokens = int(sizes.max()) + 1
    return len(sizes) * (tokens + tokens**2 / 64)


def shared(parts: Sequence[np.ndarray], sizes: np.ndarray, num_processes: int) -> list[list[np.ndarray]]:
    """The parts of each process, of about the same cost: the costliest part first, to whom has least."""
    shares: list[list[np.ndarray]] = [[] for _ in range(num_processes)]
    loads = np.zeros(num_processes)
    for part in sorted(parts, key=lambda part: -cost(sizes[part])):
        process = int(loads.argmin())
        shares[process].append(part)
        loads[process] += cost(sizes[part])
    return shares


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
        """Check that there is a batch, and that each process gets a molecule of it."""
        if not num_processes <= batch_size <= len(sizes):
            raise ValueError(
                f"batch_size must lie between the number of processes ({num_processes}) and that of training molecules "
                f"({len(sizes):,}), got {batch_size:,}."
            )
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


def padding_share(parts: Sequence[np.ndarray], sizes: np.ndarray) -> tuple[float, float]:
    """Which shares of the tokens and of the pairs of these parts are padding."""
    tokens = sum(len(part) * (int(sizes[part].max()) + 1) for part in parts)
    pairs = sum(len(part) * (int(sizes[part].max()) + 1) ** 2 for part in parts)
    real = [sizes[part] + 1 for part in parts]
    return 1 - sum(int(r.sum()) for r in real) / tokens, 1 - sum(int((r**2).sum()) for r in real) / pairs
