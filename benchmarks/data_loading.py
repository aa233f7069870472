"""Stored rows -> padded batches, on one core: molecules a second, and what takes the time.

    python benchmarks/data_loading.py                       # the sample, repeated to 120,000 rows
    python benchmarks/data_loading.py --dataset data/qm9    # what preprocess.py wrote

The rows are memory-mapped by `datasets` and read in random order (those of atoms and bonds as training reads them) and in
sequence. Beside the form in which `preprocess.py` stores a molecule (atoms and bonds, from which each batch's relations are
made) stands the other one (relations stored). Both give the same batches, which is checked before anything is timed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data import ROWS_A_BATCH, GraphRows, open_dataset
from moleblend_hf import MoleBlendProcessor
from moleblend_hf.graphs_moleblend import FlatGraphs, pair_relations, ragged
from rows import GRAPH_COLUMNS, flat_graphs

SAMPLE = Path(__file__).parents[1] / "training" / "sample"
BATCHES_A_ROUND = 30


def with_relations(table: pa.Table, processor: MoleBlendProcessor) -> pa.Table:
    """The same molecules with degrees and relations instead of bonds."""
    graphs = flat_graphs(table)
    found = pair_relations(graphs, processor.max_path_bonds, processor.canonical_atom_order)
    rows, columns = ragged(graphs.num_atoms)
    is_atom = np.arange(int(graphs.num_atoms.max())) < graphs.num_atoms[:, None]
    is_pair = is_atom[:, :, None] & is_atom[:, None, :]

    def lists(values: np.ndarray, counts: np.ndarray) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))

    pairs = graphs.num_atoms**2
    return pa.table(
        {
            "atom_features": table["atom_features"].combine_chunks(),
            "coordinates": table["coordinates"].combine_chunks(),
            "degree": lists(found.degree[rows, columns].astype(np.uint8), graphs.num_atoms),
            "shortest_path_distance": lists(found.shortest_path_distance[is_pair].astype(np.uint16), pairs),
            "path_bond_types": lists(
                found.path_bond_types[is_pair].astype(np.uint8), pairs * processor.max_path_bonds
            ),
        }
    )


def batch_of_relations(table: pa.Table, processor: MoleBlendProcessor) -> dict[str, torch.Tensor]:
    """A batch from rows that `with_relations` made, without a loop over them."""
    table = table.combine_chunks()
    features, num_atoms = flattened(table["atom_features"])
    conformers, num_conformers = flattened(table["coordinates"])
    graphs = FlatGraphs(
        num_atoms=num_atoms,
        num_bonds=np.zeros_like(num_atoms),
        num_conformers=num_conformers,
        atom_features=features.flatten().to_numpy().reshape(-1, 9),
        bonds=np.zeros((0, 2), np.uint16),
        bond_types=np.zeros(0, np.uint8),
        coordinates=conformers.flatten().flatten().to_numpy().reshape(-1, 3),
    )
    batch = dict(processor.pad(graphs, modality="3d"))
    width = int(num_atoms.max())
    is_atom = np.arange(width) < num_atoms[:, None]
    is_pair = is_atom[:, :, None] & is_atom[:, None, :]
    for column, mask, tail in (
        ("degree", is_atom, ()),
        ("shortest_path_distance", is_pair, ()),
        ("path_bond_types", is_pair, (processor.max_path_bonds,)),
    ):
        padded = np.zeros((*mask.shape, *tail), np.int64)
        padded[mask] = flattened(table[column])[0].to_numpy().reshape(-1, *tail)
        batch[column] = torch.from_numpy(padded)
    return batch


def flattened(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Items of a column of lists, and how many each row has."""
    lists = column.chunk(0)
    return lists.flatten(), np.diff(lists.offsets.to_numpy())


def stored(table: pa.Table, folder: Path, name: str) -> tuple[datasets.Dataset, float, float]:
    """The table as training finds it, and its bytes a molecule: in the Parquet file, and mapped into memory."""
    path = folder / f"{name}.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=ROWS_A_BATCH)
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder), writer_batch_size=ROWS_A_BATCH
    )
    return rows.with_format("arrow"), path.stat().st_size / len(table), rows.data.nbytes / len(table)


def seconds(run: Callable[[int], object], batch_size: int) -> float:
    """Of one molecule, when `run` takes the position of the first one of a batch."""
    start = time.perf_counter()
    for batch in range(BATCHES_A_ROUND):
        run(batch * batch_size)
    return (time.perf_counter() - start) / (BATCHES_A_ROUND * batch_size)


def main(argv: list[str] | None = None) -> None:
    """Check that both forms give the same, measure in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(SAMPLE), help="folder that preprocess.py wrote")
    parser.add_argument("--min_rows", type=int, default=120_000, help="a smaller dataset is repeated up to this")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    dataset = open_dataset(args.dataset)
    processor = dataset.processor()
    table = dataset.splits["train"].with_format("arrow")[:].select(GRAPH_COLUMNS)
    table = pa.concat_tables([table] * -(-args.min_rows // len(table))).combine_chunks()
    order = np.random.default_rng(0).permutation(len(table))
    size = args.batch_size
    if BATCHES_A_ROUND * size > len(table):
        raise ValueError(f"{BATCHES_A_ROUND} batches of {size} need more than the {len(table)} rows there are.")

    with tempfile.TemporaryDirectory() as folder:
        compact, *compact_bytes = stored(table, Path(folder), "compact")
        parts = [with_relations(table.slice(start, size), processor) for start in range(0, len(table), size)]
        full, *full_bytes = stored(pa.concat_tables(parts), Path(folder), "relations")

        def pick(rows: datasets.Dataset, at: int, random: bool) -> pa.Table:
            return rows[order[at : at + size]] if random else rows[at : at + size]

        training_rows = GraphRows(compact, order)

        def gather(at: int) -> FlatGraphs:
            return training_rows.__getitems__([list(range(at, at + size))])[0][0]

        first = processor.pad(gather(0))
        second = batch_of_relations(pick(full, 0, True), processor)
        assert all(torch.equal(first[name], second[name]) for name in first), "the two forms differ"

        held = gather(0)
        measured: dict[str, Callable[[int], object]] = {
            "atoms and bonds, random": lambda at: processor.pad(gather(at)),
            "atoms and bonds, in sequence": lambda at: processor.pad(flat_graphs(pick(compact, at, False))),
            "relations, random": lambda at: batch_of_relations(pick(full, at, True), processor),
            "relations, in sequence": lambda at: batch_of_relations(pick(full, at, False), processor),
            "gather": gather,
            "relations": lambda at: pair_relations(held, processor.max_path_bonds, processor.canonical_atom_order),
        }
        times: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(args.rounds):
            for name, run in measured.items():
                times[name].append(seconds(run, size))

    median = {name: statistics.median(values) for name, values in times.items()}
    num_atoms = np.diff(table["atom_features"].chunk(0).offsets.to_numpy())
    print(
        f"{len(table):,} rows of {args.dataset}, {num_atoms.mean():.1f} atoms on average, batches of {size:,}, one core"
    )
    print(f"{'stored':<32}{'molecules/s':>12}{'slowest':>10}{'fastest':>10}{'bytes on disk':>15}{'in the map':>12}")
    for name, (disk, mapped) in zip(list(measured)[:4], [compact_bytes] * 2 + [full_bytes] * 2, strict=True):
        slowest, fastest = 1 / max(times[name]), 1 / min(times[name])
        print(f"{name:<32}{1 / median[name]:>12,.0f}{slowest:>10,.0f}{fastest:>10,.0f}{disk:>15.0f}{mapped:>12.0f}")
    whole = median["atoms and bonds, random"]
    parts_of = {
        "picking the rows": median["gather"],
        "shortest paths and the bonds along them": median["relations"],
        "padding": whole - median["gather"] - median["relations"],
    }
    print("of the time for atoms and bonds in random order:")
    for name, part in parts_of.items():
        print(f"  {name:<42}{part * 1e6:6.2f} us {part / whole:6.0%}")


if __name__ == "__main__":
    main()
