"""What a dataset row holds, and the way between rows (Arrow) and graphs (NumPy).

| Column | Content |
|---|---|
| `id` | of the source, or the number of the row there |
| `smiles` | its atoms are those of the graph, in the same order |
| `atom_features` | (atoms, 9) index + 1 in OGB's vocabularies |
| `bonds` | (bonds, 3) two atoms, and 1 + 12 * bond type + 2 * bond stereo + is conjugated |
| `coordinates` | (conformers, atoms, 3) in angstrom, no conformer where there is no geometry |
| each target | a number or null |
| each target of atoms | (atoms,) numbers or nulls; null if none is known |

Shortest paths and the bonds along them are not stored: they follow from the bonds, and making them for a batch costs less
than reading them would (`benchmarks/data_loading.py`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from moleblend_hf import FlatGraphs, MolecularGraph
from moleblend_hf.graphs_moleblend import ragged

GRAPH_COLUMNS = ("atom_features", "bonds", "coordinates")
FORMAT_VERSION = 1  # raised when columns change their meaning

_TYPES = {
    "atom_features": pa.list_(pa.list_(pa.uint8(), 9)),
    "bonds": pa.list_(pa.list_(pa.uint16(), 3)),
    "coordinates": pa.list_(pa.list_(pa.list_(pa.float32(), 3))),
}


def schema(targets: Iterable[str] = (), extra: Iterable[str] = (), atom_targets: Iterable[str] = ()) -> pa.Schema:
    """The columns of a dataset with these targets, and with `extra` columns of text after `smiles`."""
    text = [(name, pa.string()) for name in ("id", "smiles", *extra)]
    numbers = [(name, pa.float64()) for name in targets]
    lists = [(name, pa.list_(pa.float32())) for name in atom_targets]
    return pa.schema([*text, *_TYPES.items(), *numbers, *lists])


def graph_columns(graphs: Sequence[MolecularGraph]) -> dict[str, pa.Array]:
    """The columns `GRAPH_COLUMNS` of graphs."""
    if not graphs:
        return {name: pa.array([], kind) for name, kind in _TYPES.items()}
    flat = FlatGraphs.of(graphs)
    bonds = np.column_stack([flat.bonds, flat.bond_types.astype(np.uint16)])
    atoms_of_conformers = np.repeat(flat.num_atoms, flat.num_conformers)
    return {
        "atom_features": _lists(_vectors(flat.atom_features), flat.num_atoms),
        "bonds": _lists(_vectors(bonds), flat.num_bonds),
        "coordinates": _lists(_lists(_vectors(flat.coordinates), atoms_of_conformers), flat.num_conformers),
    }


def flat_graphs(table: pa.Table) -> FlatGraphs:
    """The graphs of rows, without a loop over them; Arrow's buffers are used as they are where they lie in one piece."""
    table = table.select(GRAPH_COLUMNS).combine_chunks()  # faster than column by column
    atom_features, num_atoms = _flattened(table["atom_features"])
    bonds, num_bonds = _flattened(table["bonds"])
    conformers, num_conformers = _flattened(table["coordinates"])
    bonds = _matrix(bonds, 3)
    return FlatGraphs(
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        num_conformers=num_conformers,
        atom_features=_matrix(atom_features, 9),
        bonds=bonds[:, :2],
        bond_types=bonds[:, 2].astype(np.uint8),
        coordinates=_matrix(conformers.flatten(), 3),
    )


class GraphTable:
    """The graphs of many rows where they lie, in a memory map, from which any of them are picked.

    To pick rows through Arrow costs an object a row; here it costs an indexing a column of each record batch.
    """

    def __init__(self, table: pa.Table) -> None:
        """`table` has the columns `GRAPH_COLUMNS`; nothing of them is copied but where lists begin."""
        batches = [batch for batch in table.select(GRAPH_COLUMNS).to_batches() if len(batch)]
        self._stops = np.cumsum([len(batch) for batch in batches])
        self._atoms = [_vectors_of(batch["atom_features"]) for batch in batches]
        self._bonds = [_vectors_of(batch["bonds"]) for batch in batches]
        self._num_conformers = [np.diff(batch["coordinates"].offsets) for batch in batches]
        self._positions = [_vectors_of(batch["coordinates"]) for batch in batches]

    def sizes(self) -> np.ndarray:
        """Atoms of each row, (n,) int32."""
        return np.concatenate([np.diff(starts) for starts, _ in self._atoms])

    def num_conformers(self) -> np.ndarray:
        """Geometries of each row, (n,) int32."""
        return np.concatenate(self._num_conformers)

    def take(self, rows: np.ndarray) -> FlatGraphs:
        """The graphs of some rows, in their order."""
        batch = np.searchsorted(self._stops, rows, side="right")
        places = [(index, np.flatnonzero(batch == index)) for index in np.unique(batch).tolist()]
        first = np.concatenate([[0], self._stops])
        picked = [(index, place, rows[place] - first[index]) for index, place in places]
        num_conformers = np.empty(len(rows), np.int64)
        for index, place, numbers in picked:
            num_conformers[place] = self._num_conformers[index][numbers]
        atom_features, num_atoms = _picked(self._atoms, picked, len(rows))
        bonds, num_bonds = _picked(self._bonds, picked, len(rows))
        return FlatGraphs(
            num_atoms=num_atoms,
            num_bonds=num_bonds,
            num_conformers=num_conformers,
            atom_features=atom_features,
            bonds=bonds[:, :2],
            bond_types=bonds[:, 2].astype(np.uint8),
            coordinates=_picked(self._positions, picked, len(rows))[0],
        )


def _vectors_of(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Where the vectors of each row start, (n + 1,), and all vectors; a list of lists of vectors counts as one list."""
    starts, values = column.offsets.to_numpy(), column.values
    if pa.types.is_list(values.type):
        starts, values = values.offsets.to_numpy()[starts], values.values
    return starts, _matrix(values, values.type.list_size)


def _picked(
    columns: list[tuple[np.ndarray, np.ndarray]], picked: list[tuple[int, np.ndarray, np.ndarray]], num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of picked rows, and how many each has.

    Args:
        columns: of each batch, from `_vectors_of`.
        picked: batch, places among the picked rows, and numbers of the rows in the batch.
        num_rows: that are picked.
    """
    counts = np.empty(num_rows, np.int64)
    for index, place, numbers in picked:
        starts = columns[index][0]
        counts[place] = starts[numbers + 1] - starts[numbers]
    begin = np.cumsum(counts) - counts
    found = np.empty((int(counts.sum()), columns[0][1].shape[1]), columns[0][1].dtype)
    for index, place, numbers in picked:
        starts, vectors = columns[index]
        rows, within = ragged(counts[place])
        found[begin[place][rows] + within] = vectors[starts[numbers][rows] + within]
    return found, counts


def graphs(table: pa.Table) -> list[MolecularGraph]:
    """The graphs of rows, one by one."""
    flat = flat_graphs(table)
    stops = (np.cumsum(flat.num_atoms), np.cumsum(flat.num_bonds), np.cumsum(flat.num_atoms * flat.num_conformers))
    starts = [[0, *stop[:-1]] for stop in stops]
    found = []
    for row, (atom, bond, position) in enumerate(zip(*starts, strict=True)):
        atom_stop, bond_stop, position_stop = (stop[row] for stop in stops)
        found.append(
            MolecularGraph(
                atom_features=flat.atom_features[atom:atom_stop],
                bonds=flat.bonds[bond:bond_stop],
                bond_types=flat.bond_types[bond:bond_stop],
                coordinates=flat.coordinates[position:position_stop].reshape(-1, flat.num_atoms[row], 3),
            )
        )
    return found


def _vectors(values: np.ndarray) -> pa.Array:
    """(n, k) as an array of n vectors."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _lists(values: pa.Array, counts: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)), values)


def _flattened(column: pa.ChunkedArray) -> tuple[Any, np.ndarray]:
    """The items of a column of lists in one array, and how many each row has."""
    lists = column.chunk(0)
    return lists.flatten(), np.diff(lists.offsets.to_numpy())


def _matrix(vectors: Any, width: int) -> np.ndarray:
    return vectors.flatten().to_numpy().reshape(-1, width)
