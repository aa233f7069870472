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
