"""Featurization as one would write it first: one molecule, one atom, one bond, one pair of atoms at a time.

Kept to measure ours against, and to prove it equal (tests/test_featurization.py). It follows the order in which the
atoms are written, so ours has to be run with `canonical_atom_order=False` to give the same.
"""

from itertools import pairwise

import numpy as np
from rdkit import Chem
from scipy.sparse.csgraph import floyd_warshall

from moleblend_hf.featurization_moleblend import (
    ATOM_FEATURE_VOCABULARIES,
    BOND_STEREO,
    BOND_TYPES,
    MISC,
)
from moleblend_hf.graphs_moleblend import MAX_DISTANCE, UNREACHABLE_DISTANCE


def index_in(vocabulary: list, value: object) -> int:
    """Returns the position of a value in a vocabulary, that of misc if it is not in it."""
    return vocabulary.index(value) if value in vocabulary else vocabulary.index(MISC)


def featurize_plainly(smiles: str, max_path_bonds: int = 5) -> dict[str, np.ndarray]:
    """Returns the atom features and `PairRelations` of a molecule by name."""
    mol = Chem.MolFromSmiles(smiles)
    num_atoms = mol.GetNumAtoms()
    atom_features = np.zeros((num_atoms, len(ATOM_FEATURE_VOCABULARIES)), dtype=np.int64)
    degree = np.zeros(num_atoms, dtype=np.int64)
    for atom in mol.GetAtoms():
        values = (
            atom.GetAtomicNum(),
            str(atom.GetChiralTag()),
            atom.GetTotalDegree(),
            atom.GetFormalCharge(),
            atom.GetTotalNumHs(),
            atom.GetNumRadicalElectrons(),
            str(atom.GetHybridization()),
            atom.GetIsAromatic(),
            atom.IsInRing(),
        )
        for column, (vocabulary, value) in enumerate(zip(ATOM_FEATURE_VOCABULARIES.values(), values, strict=True)):
            atom_features[atom.GetIdx(), column] = index_in(vocabulary, value) + 1
        degree[atom.GetIdx()] = atom.GetDegree()

    bonds = np.zeros((num_atoms, num_atoms), dtype=np.int64)
    for bond in mol.GetBonds():
        stereo = str(bond.GetStereo())
        joint = 1 + 12 * index_in(BOND_TYPES, str(bond.GetBondType())) + int(bond.GetIsConjugated())
        joint += 2 * (BOND_STEREO.index(stereo) if stereo in BOND_STEREO else 0)
        begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[begin, end] = bonds[end, begin] = joint

    distance, predecessors = floyd_warshall((bonds > 0).astype(float), unweighted=True, return_predecessors=True)
    shortest_path_distance = np.zeros((num_atoms, num_atoms), dtype=np.int64)
    path_bond_types = np.zeros((num_atoms, num_atoms, max_path_bonds), dtype=np.int64)
    for i in range(num_atoms):
        for j in range(num_atoms):
            if np.isinf(distance[i, j]):
                shortest_path_distance[i, j] = UNREACHABLE_DISTANCE
                continue
            shortest_path_distance[i, j] = min(int(distance[i, j]), MAX_DISTANCE)
            path = [j]
            while path[-1] != i:
                path.append(predecessors[i, path[-1]])
            path.reverse()
            for hop, (start, stop) in enumerate(pairwise(path[: max_path_bonds + 1])):
                path_bond_types[i, j, hop] = bonds[start, stop]
    return {
        "atom_features": atom_features,
        "degree": degree,
        "shortest_path_distance": shortest_path_distance,
        "path_bond_types": path_bond_types,
    }


def pad_plainly(graphs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns a batch, padded with zeros to the largest molecule."""
    width = max(len(graph["degree"]) for graph in graphs)
    batch = {}
    for name in graphs[0]:
        rows = []
        for graph in graphs:
            array = graph[name]
            atom_axes = {"atom_features": 1, "degree": 1}.get(name, 2)
            rows.append(np.pad(array, [(0, width - len(array))] * atom_axes + [(0, 0)] * (array.ndim - atom_axes)))
        batch[name] = np.stack(rows)
    batch["attention_mask"] = (batch["atom_features"][..., 0] > 0).astype(np.int64)
    return batch
