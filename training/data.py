"""Molecules on disk -> graphs in memory -> padded batches, in an order that depends on the seed and the epoch alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np


@dataclass(frozen=True)
class Molecules:
    """Columns of a dataset: SMILES, and for each its coordinates (atoms, 3) in angstrom, or None where it has none."""

    smiles: list[str]
    coordinates: list[np.ndarray | None]


def read_molecules(folder: str | Path) -> Molecules:
    """All rows of the Parquet files in `folder`: `smiles`, and `coordinates` of the atoms in their order, if there are any."""
    files = sorted(str(path) for path in Path(folder).glob("*.parquet"))
    if not files:
        state = "holds no *.parquet file" if Path(folder).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The dataset folder {str(folder)!r} {state}. Give one with --dataset; training/sample shows the layout."
        )
    rows = datasets.load_dataset("parquet", data_files=files, split="train").with_format("numpy")
    if "smiles" not in rows.column_names:
        raise ValueError(f"{folder} has no column 'smiles'. Its columns: {', '.join(rows.column_names)}.")
    if "coordinates" not in rows.column_names:
        return Molecules(list(rows["smiles"]), [None] * len(rows))
    return Molecules(
        [str(smiles) for smiles in rows["smiles"]],
        [None if xyz is None else np.asarray(xyz, np.float32).reshape(-1, 3) for xyz in rows["coordinates"]],
    )


def split_held_out(smiles: list[str], num_held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (training, held out), about `num_held_out` held out; equal SMILES fall on one side, so none is in both."""
    _, molecule_of_row = np.unique(np.asarray(smiles, dtype=object).astype(str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(molecule_of_row.max() + 1)
    if not 0 < num_held_out < len(order):
        raise ValueError(
            f"held_out_molecules must lie between 1 and the number of different molecules less one ({len(order) - 1}), "
            f"got {num_held_out}."
        )
    held_out = np.isin(molecule_of_row, order[:num_held_out])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class TrainingBatches:
    """Row indices of one process's micro-batches, from optimizer step `first_step` on, without end.

    The batch of a step is a function of the seed and the step alone: each epoch is shuffled by (seed, epoch) and cut into
    batches, of which every process takes its share and every accumulation step its part of that. So a resumed run sees
    what an uninterrupted one sees, and more processes see the same batches as one. The rest of an epoch that does not
    fill a batch is left out; the next epoch is shuffled anew.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Check that batches fill and divide evenly: uneven parts would weigh their molecules unevenly."""
        if batch_size > num_rows:
            raise ValueError(f"batch_size is {batch_size}, but there are only {num_rows} training molecules.")
        if batch_size % (accumulation_steps * num_processes):
            raise ValueError(
                f"batch_size must be a multiple of gradient_accumulation_steps x processes "
                f"({accumulation_steps} x {num_processes}), got {batch_size}."
            )
        self.num_rows, self.batch_size, self.seed, self.first_step = num_rows, batch_size, seed, first_step
        self.accumulation_steps = accumulation_steps
        self.first_part, self.num_parts = process_index * accumulation_steps, num_processes * accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch = self.first_step, -1
        while True:
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            first_row = step % self.steps_per_epoch * self.batch_size
            parts = order[first_row : first_row + self.batch_size].reshape(self.num_parts, -1)
            yield from parts[self.first_part : self.first_part + self.accumulation_steps].tolist()
            step += 1


def draw_seed(*numbers: int) -> int:
    """A well-mixed seed for `torch.Generator` from several small numbers (run seed, step, part of the batch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batched(items: list[Any], size: int) -> list[list[Any]]:
    """`items` in lists of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
