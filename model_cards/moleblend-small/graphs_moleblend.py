# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Molecules as arrays, and the relations of their atom pairs: NumPy only.

A graph is stored by its atoms and bonds. Shortest paths and the bonds along them follow from these, so they are worked
out for a batch when it is put together: that costs less than storing and reading them would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

MAX_DISTANCE = 509  # longest shortest path that is told apart, in bonds
UNREACHABLE_DISTANCE = 510
MAX_PATH_BONDS = 8  # what fits into one integer, beside the length of the path

_PAIRS_A_GROUP = 100_000  # atom pairs handled together: small enough for the cache, large enough to hide Python
_WORTH_A_GROUP = 100_000  # what one more group has to save to pay, in steps of Floyd-Warshall (N^3 a molecule)


class PairRelations(NamedTuple):
    """Relations of the atoms of B molecules, padded to N atoms with zeros.

    Attributes:
        degree: (B, N) int64, number of bonds of each atom.
        shortest_path_distance: (B, N, N) int64 in bonds, 0 on the diagonal, at most `MAX_DISTANCE`, and
            `UNREACHABLE_DISTANCE` between fragments.
        path_bond_types: (B, N, N, P) int64, joint index of the first P bonds on the shortest path i -> j, starting with
            the bond that leaves i: 1 + 12 * bond type + 2 * bond stereo + is conjugated; 0 where there is no such hop.
    """

    degree: np.ndarray
    shortest_path_distance: np.ndarray
    path_bond_types: np.ndarray


@dataclass(frozen=True)
class Budget:
    """What one forward may cost: padded tokens (N + 1 for a molecule padded to N atoms), and their squares."""

    max_tokens: int
    max_pairs: int

    @classmethod
    def on(cls, device: str, max_tokens: int | None = None, max_pairs: int | None = None) -> "Budget":
        """Returns what is given, and for what is None what suits that type of device: a CPU is fastest in its cache."""
        usual = cls(2_048, 16_384) if device == "cpu" else cls(16_384, 400_000)
        return cls(max_tokens or usual.max_tokens, max_pairs or usual.max_pairs)

    def largest(self) -> int:
        """Returns the atoms of the largest molecule that fits, alone."""
        return min(self.max_tokens, int(self.max_pairs**0.5)) - 1

    def cut(self, sizes: np.ndarray) -> Iterator[np.ndarray]:
        """Yields positions in `sizes` (n,) in parts of like size that fit, the largest first: it is them that may fail.

        A molecule that exceeds the budget is a part of its own.
        """
        order = np.argsort(-sizes, kind="stable")
        start = 0
        while start < len(order):
            tokens = int(sizes[order[start]]) + 1
            stop = start + max(1, min(self.max_tokens // tokens, self.max_pairs // tokens**2))
            yield order[start:stop]
            start = stop


@dataclass(frozen=True, slots=True, eq=False)
class MolecularGraph:
    """A featurized molecule of n atoms, in the atom order of the input.

    Attributes:
        atom_features: (n, 9) uint8, OGB index + 1 for each of `ATOM_FEATURES`.
        bonds: (E, 2) uint16, the two atoms of each bond.
        bond_types: (E,) uint8 joint index, 1 + 12 * bond type + 2 * bond stereo + is conjugated.
        coordinates: (C, n, 3) float32 in angstrom, C >= 0 conformers.
        has_bonds: False for bare atoms with coordinates, whose 2D relations are not known.
        missing_coordinates_reason: why there is no conformer although one was to be made, else None.
        unknown_values: how many values of this molecule were in no vocabulary, by feature.
    """

    atom_features: np.ndarray
    bonds: np.ndarray
    bond_types: np.ndarray
    coordinates: np.ndarray
    has_bonds: bool = True
    missing_coordinates_reason: str | None = None
    unknown_values: dict[str, int] = field(default_factory=dict)

    @property
    def num_atoms(self) -> int:
        return len(self.atom_features)

    def relations(self, max_path_bonds: int = 5, canonical_atom_order: bool = True) -> PairRelations:
        """Returns `PairRelations` of this molecule alone, without the axis of the batch."""
        padded = pair_relations(FlatGraphs.of([self]), max_path_bonds, canonical_atom_order)
        return PairRelations(*(values[0] for values in padded))


@dataclass(frozen=True, slots=True, eq=False)
class FlatGraphs:
    """Many graphs, the atoms of one after those of the other: A atoms, E bonds and M molecules in all.

    Attributes:
        num_atoms, num_bonds, num_conformers: (M,) of each molecule.
        atom_features: (A, 9) uint8, as in `MolecularGraph`.
        bonds: (E, 2) ends of each bond, counted within the molecule.
        bond_types: (E,) uint8.
        coordinates: (sum of num_atoms * num_conformers, 3) float32, the conformers of a molecule one after the other.
    """

    num_atoms: np.ndarray
    num_bonds: np.ndarray
    num_conformers: np.ndarray
    atom_features: np.ndarray
    bonds: np.ndarray
    bond_types: np.ndarray
    coordinates: np.ndarray

    @classmethod
    def of(cls, graphs: Sequence[MolecularGraph]) -> "FlatGraphs":
        """Returns graphs one after the other."""
        return cls(
            num_atoms=np.array([graph.num_atoms for graph in graphs]),
            num_bonds=np.array([len(graph.bonds) for graph in graphs]),
            num_conformers=np.array([len(graph.coordinates) for graph in graphs]),
            atom_features=np.concatenate([graph.atom_features for graph in graphs]),
            bonds=np.concatenate([graph.bonds for graph in graphs]),
            bond_types=np.concatenate([graph.bond_types for graph in graphs]),
            coordinates=np.concatenate([graph.coordinates.reshape(-1, 3) for graph in graphs]),
        )

    def __len__(self) -> int:
        return len(self.num_atoms)

    def padded_atoms(self, values: np.ndarray) -> np.ndarray:
        """Returns values of all atoms, (A, ...), as (M, N, ...), zero on padding."""
        width = int(self.num_atoms.max())
        rows, columns = ragged(self.num_atoms)
        padded = np.zeros((len(self) * width, *values.shape[1:]), dtype=values.dtype)
        padded[rows * width + columns] = values
        return padded.reshape(len(self), width, *values.shape[1:])

    def conformers(self, index: np.ndarray) -> np.ndarray:
        """Returns (A, 3) coordinates of conformer `index` (M,) of each molecule, zeros where there is none."""
        if len(self.coordinates) == len(self.atom_features) and (self.num_conformers == 1).all() and not index.any():
            return self.coordinates
        stored = self.num_atoms * self.num_conformers
        first = np.cumsum(stored) - stored + index * self.num_atoms
        rows, columns = ragged(self.num_atoms)
        has_one = (self.num_conformers > 0)[rows]
        chosen = np.zeros((len(rows), 3), dtype=np.float32)
        chosen[has_one] = self.coordinates[(first[rows] + columns)[has_one]]
        return chosen


def ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each item of rows with these counts its row and its place in the row."""
    starts = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - starts[rows]


def pair_relations(graphs: FlatGraphs, max_path_bonds: int, canonical_atom_order: bool) -> PairRelations:
    """Returns the relations of all atom pairs, padded; molecules of like size are worked out together.

    Args:
        graphs: M molecules.
        max_path_bonds: P, bonds of a path that are told apart.
        canonical_atom_order: of several shortest paths take the one with the smallest bond types, which does not depend
            on the order of the atoms, instead of the one that Floyd-Warshall meets first.
    """
    num, width = len(graphs), int(graphs.num_atoms.max())
    begin, end = graphs.bonds.T.astype(np.int64)
    first_atom = np.repeat(np.arange(num) * width, graphs.num_bonds)
    degree = np.bincount(np.concatenate([first_atom + begin, first_atom + end]), minlength=num * width)
    # Bond types are numbered by those that occur, in their order, so that a path takes few bits. 0 is no bond.
    occurring = np.bincount(graphs.bond_types, minlength=1) > 0
    occurring[0] = True
    kinds = np.flatnonzero(occurring)
    bits = (len(kinds) - 1).bit_length()
    bond_codes = np.zeros((num, width, width), dtype=np.uint8)
    codes = (np.cumsum(occurring) - 1).astype(np.uint8)[graphs.bond_types]
    flat = bond_codes.reshape(-1)
    flat[(first_atom + begin) * width + end] = flat[(first_atom + end) * width + begin] = codes
    distance = np.zeros((num, width, width), dtype=np.int64)
    paths = np.zeros((num, width, width), dtype=np.uint32 if bits * max_path_bonds <= 32 else np.uint64)
    find_paths = smallest_paths if canonical_atom_order else first_found_paths
    for group in _groups_of_like_size(graphs.num_atoms):
        sizes = graphs.num_atoms[group]
        size = int(sizes.max())
        found, path = find_paths(bond_codes[group, :size, :size], bits, max_path_bonds)
        unreachable = found >= size
        np.minimum(found, MAX_DISTANCE, out=found)
        if unreachable.any():  # other fragments, and what is only padding
            is_atom = (np.arange(size)[:, None] < sizes).T.astype(found.dtype)
            np.copyto(found, UNREACHABLE_DISTANCE, where=unreachable)
            found *= is_atom[:, :, None] * is_atom[:, None, :]
        distance[group, :size, :size] = found
        paths[group, :size, :size] = path
    hops = np.empty((max_path_bonds, num, width, width), dtype=np.int64)  # written and read a hop at a time
    mask = paths.dtype.type((1 << bits) - 1)
    for hop in range(max_path_bonds):
        code = paths >> paths.dtype.type(bits * (max_path_bonds - 1 - hop)) & mask
        kinds.take(code, out=hops[hop], mode="clip")
    return PairRelations(degree.reshape(num, width), distance, np.moveaxis(hops, 0, -1))


def _groups_of_like_size(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yields which molecules are worked out together, the largest first."""
    order = np.argsort(-sizes, kind="stable")
    costs = sizes[order].astype(np.int64) ** 3
    start = 0
    while start < len(order):
        stop = min(len(order), start + max(1, _PAIRS_A_GROUP // int(sizes[order[start]]) ** 2))
        # What is saved if the group ends before each of these, and those from there on are padded to its size.
        saved = (costs[start] - costs[start:stop]) * np.arange(stop - start, 0, -1)
        if saved.max() > _WORTH_A_GROUP:
            stop = start + int(saved.argmax())
        yield order[start:stop]
        start = stop


def smallest_paths(bond_codes: np.ndarray, bits: int, max_path_bonds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each pair the smallest of its shortest paths, compared bond by bond.

    Where two shortest paths tie, the one that Floyd-Warshall finds depends on the order of the atoms, and so would what
    equivalent atoms look like. The smallest does not. Floyd-Warshall finds it as well if path lengths are compared
    together with the bonds on the paths: both are in one integer, the length in the high bits, then the bonds, the first
    one highest. A path over an intermediate atom is the sum of its parts, the second one's bonds moved behind those of
    the first.

    Args:
        bond_codes: (B, N, N) uint8, symmetric, 0 where there is no bond.
        bits: of a code.
        max_path_bonds: P, bonds of a path that are compared and returned.

    Returns:
        distance: (B, N, N) unsigned, in bonds, N or more if there is no path.
        path: (B, N, N) unsigned, `bits` for each of P bonds, 0 where there is none.
    """
    num, width, _ = bond_codes.shape
    infinite = 1 << width.bit_length()  # more than any length; sums of two of them occur
    dtype: Any = np.uint32 if bits * max_path_bonds + infinite.bit_length() + 1 <= 32 else np.uint64
    path_bits, one = dtype(bits * max_path_bonds), dtype(1)
    path_mask = (one << path_bits) - one
    packed = _interleaved(num, width, dtype)
    candidate = np.empty_like(packed)
    one_bond = np.arange(1 << bits, dtype=dtype) << dtype(bits * (max_path_bonds - 1)) | one << path_bits
    one_bond[0] = dtype(infinite) << path_bits
    packed[:] = one_bond.take(bond_codes, mode="clip")
    atoms = np.arange(width)
    packed[:, atoms, atoms] = 0
    for via in range(width):
        onset, onward = packed[:, :, via], packed[:, via, :]
        behind = (onset >> path_bits) * dtype(bits)  # if these are more than there are, NumPy's shift gives 0
        np.right_shift((onward & path_mask)[:, None, :], behind[:, :, None], out=candidate)
        np.add(candidate, (onward & ~path_mask)[:, None, :], out=candidate)
        np.add(candidate, onset[:, :, None], out=candidate)
        np.minimum(packed, candidate, out=packed)
    return packed >> path_bits, packed & path_mask


def first_found_paths(bond_codes: np.ndarray, bits: int, max_path_bonds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `smallest_paths` does for the shortest paths that SciPy's Floyd-Warshall finds first."""
    num, width, _ = bond_codes.shape
    distance, next_atom = shortest_paths(bond_codes > 0)
    row, atoms = np.arange(num)[:, None, None] * width, np.arange(width)
    hop = bond_codes.take((row + atoms[:, None]) * width + next_atom)
    after_next = (row + next_atom) * width + atoms  # where the path goes on: from the next atom to the same end
    path = np.zeros(hop.shape, dtype=np.uint64)
    for _ in range(max_path_bonds):
        path = path << np.uint64(bits) | hop
        hop = hop.take(after_next)
    return distance, path


def shortest_paths(bonded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Floyd-Warshall on many molecules at once; among paths of one length the first one found stays.

    These are the paths of `scipy.sparse.csgraph.floyd_warshall(unweighted=True)`, which the original follows: its
    predecessor of j on the way from i is the atom after j on the way from j to i.

    Distance and next atom are packed into one integer, distance in the high bits, so that a step is an addition and a
    minimum. A candidate carries one more bit below its distance: it loses a tie against what is already there.

    Args:
        bonded: (B, N, N) bool, symmetric, False on the diagonal.

    Returns:
        distance: (B, N, N) unsigned, in bonds, N or more if there is no path.
        next_atom: (B, N, N) int64, the atom after i on the path from i to j; i itself if there is none.
    """
    num, width, _ = bonded.shape
    shift, candidate_bit, infinite = np.uint32(16), np.uint32(1 << 15), np.uint32(1 << 14)
    atoms = np.arange(width, dtype=np.uint32)
    packed = _interleaved(num, width, np.uint32)
    candidate = np.empty_like(packed)
    packed[:] = np.where(bonded, np.uint32(1) << shift | atoms, infinite << shift | atoms[:, None])
    packed[:, atoms, atoms] = atoms
    distance_bits = ~np.uint32((1 << 16) - 1)
    for via in range(width):
        onward = packed[:, via, :] & distance_bits | candidate_bit
        np.add(packed[:, :, via, None], onward[:, None, :], out=candidate)
        np.minimum(packed, candidate, out=packed)
        np.bitwise_and(packed, ~candidate_bit, out=packed)
    next_atom = (packed & np.uint32(candidate_bit - 1)).astype(np.int64)
    return packed >> shift, next_atom


def _interleaved(num: int, width: int, dtype: Any) -> np.ndarray:
    """Returns an empty (B, N, N) array laid out so that NumPy's innermost loop is a long one: over B if that is larger."""
    if num < width:
        return np.empty((num, width, width), dtype)
    return np.moveaxis(np.empty((width, width, num), dtype), -1, 0)
