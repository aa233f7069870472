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
"""Molecules to `MolecularGraph`s: RDKit and NumPy only, pure functions, no torch.

A molecule is a SMILES, an RDKit molecule or a `(symbols, coordinates)` pair. `featurize_molecules` takes many at once,
because asking RDKit atom by atom from Python is what costs: one getter runs over all atoms of all molecules. The result
for a molecule does not depend on its neighbours in the call.

Features come back in the atom order of the input, but do not depend on it: stereocentres are looked at by RDKit's
canonical ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np

from .graphs_moleblend import MolecularGraph
from .molecules_moleblend import (
    RDKIT_ERRORS,
    FeaturizationSettings,
    MoleculeError,
    ParsedMolecule,
    apply_modality,
    canonical_copy,
    describe_molecule,
    first_line,
    parse_molecule,
    require_rdkit,
)

try:  # Hidden from the Hub's import scanner, so that a model can be loaded where RDKit is not installed.
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdCIPLabeler
except ImportError:
    Chem = None


# OGB 1.3.6 vocabularies by name. An index is a position in its list plus one (0 is padding); the last slot of the lists
# that end in "misc" takes every value never seen.
MISC = "misc"
ATOM_FEATURE_VOCABULARIES: dict[str, list] = {
    "atomic_num": [*range(1, 119), MISC],
    "chirality": ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER", MISC],
    "degree": [*range(11), MISC],
    "formal_charge": [*range(-5, 6), MISC],
    "num_hs": [*range(9), MISC],
    "num_radical_electrons": [*range(5), MISC],
    "hybridization": ["SP", "SP2", "SP3", "SP3D", "SP3D2", MISC],
    "is_aromatic": [False, True],
    "is_in_ring": [False, True],
}
ATOM_FEATURES = tuple(ATOM_FEATURE_VOCABULARIES)
ATOM_FEATURE_SIZES = tuple(len(values) for values in ATOM_FEATURE_VOCABULARIES.values())
BOND_TYPES = ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC", MISC]
BOND_STEREO = ["STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"]
NUM_JOINT_BOND_TYPES = len(BOND_TYPES) * len(BOND_STEREO) * 2

_CLOCKWISE, _COUNTERCLOCKWISE, _OTHER_CHIRALITY = 2, 3, 4  # indices of the vocabulary, with the offset of one
_CIS, _TRANS = 4, 5  # in RDKit's enum of bond stereo
_ORDER_BY_BOND_TYPE = {"SINGLE": 1.0, "DOUBLE": 2.0, "TRIPLE": 3.0, "AROMATIC": 1.5}
# Between these RDKit makes no dative bond by itself.
_ORDINARY_ELEMENTS = frozenset((1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 34, 35, 53))


def featurize_molecule(
    molecule: Any, coordinates: Any = None, settings: FeaturizationSettings | None = None
) -> MolecularGraph:
    """Returns the graph of one molecule; raises `MoleculeError`. See `featurize_molecules`."""
    result = featurize_molecules([molecule], [coordinates], settings)[0]
    if isinstance(result, MoleculeError):
        raise result
    return result


def featurize_molecules(
    molecules: Sequence[Any], coordinates: Sequence[Any] | None = None, settings: FeaturizationSettings | None = None
) -> list[MolecularGraph | MoleculeError]:
    """Returns one graph, or the error that explains why there is none, for each molecule, in order.

    Args:
        molecules: SMILES, RDKit molecules, `(symbols, coordinates)` pairs, or `MoleculeError`s, which are handed on.
            At most a few hundred at a time: all atoms are held as Python objects.
        coordinates: for each molecule None or an array of shape (n, 3) or (C, n, 3) in angstrom.
        settings: defaults of `FeaturizationSettings` if left out.
    """
    require_rdkit()
    settings = settings or FeaturizationSettings()
    coordinates = [None] * len(molecules) if coordinates is None else coordinates
    results: list[Any] = []
    with rdBase.BlockLogs():
        for molecule, given in zip(molecules, coordinates, strict=True):
            try:
                results.append(apply_modality(parse_molecule(molecule, given, settings), settings))
            except MoleculeError as error:
                results.append(error)
        parsed = [index for index, result in enumerate(results) if not isinstance(result, MoleculeError)]
        for index, graph in zip(parsed, featurize_parsed([results[i] for i in parsed], settings), strict=True):
            results[index] = graph
    for molecule, result in zip(molecules, results, strict=True):
        if isinstance(result, MoleculeError) and not result.molecule:
            result.molecule = describe_molecule(molecule)
    return results


# From RDKit objects to arrays


@dataclass(slots=True, eq=False)
class _FlatMolecules:
    """Atoms and bonds of many molecules, one after the other.

    Attributes:
        num_atoms, num_bonds: (M,) of each molecule.
        atom_features: (A, 9) uint8, indices + 1.
        bonds: (E, 2) uint16, ends of each bond, counted within the molecule.
        bond_types: (E,) uint8 joint index, 1..60.
        unknown: (M, 9 + 1) number of values in no vocabulary, by atom feature and for bond stereo.
    """

    num_atoms: np.ndarray
    num_bonds: np.ndarray
    atom_features: np.ndarray
    bonds: np.ndarray
    bond_types: np.ndarray
    unknown: np.ndarray


def featurize_parsed(
    parsed: list[ParsedMolecule], settings: FeaturizationSettings
) -> list[MolecularGraph | MoleculeError]:
    """Returns a graph for each molecule; one that RDKit fails on does not take the others with it."""
    if not parsed:
        return []
    try:
        flat = _flatten(parsed, settings.canonical_atom_order)
    except RDKIT_ERRORS as error:
        if len(parsed) > 1:
            return [featurize_parsed([molecule], settings)[0] for molecule in parsed]
        return [MoleculeError(f"could not be featurized by RDKit: {first_line(error)}", "features", "Fix it")]
    return _cut(parsed, flat)


@cache
def _enum_table(enum_name: str, vocabulary: tuple) -> np.ndarray:
    """Returns position + 1 in the vocabulary by the integer of an RDKit enum; 0 where the name is in no slot."""
    members = getattr(Chem, enum_name).names
    table = np.zeros(max(map(int, members.values())) + 1, dtype=np.uint8)
    for name, member in members.items():
        if name in vocabulary:
            table[int(member)] = vocabulary.index(name) + 1
    return table


@dataclass(slots=True, eq=False)
class _Columns:
    """What RDKit says about the atoms and bonds of many molecules, as plain lists, one molecule after the other."""

    atomic_num: list = field(default_factory=list)
    chirality: list = field(default_factory=list)
    formal_charge: list = field(default_factory=list)
    num_hs: list = field(default_factory=list)
    num_radical_electrons: list = field(default_factory=list)
    hybridization: list = field(default_factory=list)
    is_aromatic: list = field(default_factory=list)
    is_in_ring: list = field(default_factory=list)
    rank: list = field(default_factory=list)
    begin: list = field(default_factory=list)
    end: list = field(default_factory=list)
    order: list = field(default_factory=list)  # of bonds; 1.5 is aromatic and 0 a type of no vocabulary
    stereo: list = field(default_factory=list)
    is_conjugated: list = field(default_factory=list)

    def extend(self, molecule: ParsedMolecule, canonical_atom_order: bool) -> None:
        """Asks RDKit once an atom and bond.

        The getters of enums are slow, so they are spared where the answer is implied: a SMILES without "@" has no
        stereocentres; and if it is plain and all its atoms are ordinary, bonds are told apart by their order, and only
        double bonds have stereo.
        """
        mol, smiles = molecule.mol, molecule.smiles
        # GetAtomWithIdx is twice as fast as iterating over GetAtoms. The objects are let go with their molecule: if
        # they pile up, Python's garbage collector takes longer than RDKit.
        atoms = list(map(mol.GetAtomWithIdx, range(mol.GetNumAtoms())))
        elements = list(map(Chem.Atom.GetAtomicNum, atoms))
        self.atomic_num.extend(elements)
        self.formal_charge.extend(map(Chem.Atom.GetFormalCharge, atoms))
        self.num_hs.extend(map(Chem.Atom.GetTotalNumHs, atoms))
        self.num_radical_electrons.extend(map(Chem.Atom.GetNumRadicalElectrons, atoms))
        self.hybridization.extend(map(Chem.Atom.GetHybridization, atoms))
        self.is_aromatic.extend(map(Chem.Atom.GetIsAromatic, atoms))
        self.is_in_ring.extend(map(Chem.Atom.IsInRing, atoms))
        achiral = smiles is not None and "@" not in smiles
        self.chirality.extend(repeat(0, len(atoms)) if achiral else map(Chem.Atom.GetChiralTag, atoms))
        self.rank.extend(_canonical_ranks(mol) if canonical_atom_order else range(len(atoms)))

        bonds = list(map(mol.GetBondWithIdx, range(mol.GetNumBonds())))
        self.begin.extend(map(Chem.Bond.GetBeginAtomIdx, bonds))
        self.end.extend(map(Chem.Bond.GetEndAtomIdx, bonds))
        self.is_conjugated.extend(map(Chem.Bond.GetIsConjugated, bonds))
        if smiles is not None and _ORDINARY_ELEMENTS.issuperset(elements):
            orders = list(map(Chem.Bond.GetBondTypeAsDouble, bonds))
            stereo = [bond.GetStereo() if order == 2 else 0 for bond, order in zip(bonds, orders, strict=True)]
        else:
            orders = [_ORDER_BY_BOND_TYPE.get(bond.GetBondType().name, 0) for bond in bonds]
            stereo = [bond.GetStereo() for bond in bonds]
        self.order.extend(orders)
        if max(stereo, default=0) >= _CIS:
            stereo = [
                _stereo_by_cip(bond) if _CIS <= kind <= _TRANS else kind
                for bond, kind in zip(bonds, stereo, strict=True)
            ]
        self.stereo.extend(stereo)


def _canonical_ranks(mol: "Chem.Mol", break_ties: bool = True, include_chirality: bool = True) -> Iterable[int]:
    """Returns the place of each atom in RDKit's canonical order; isotopes count, atom map numbers do not."""
    ranks = Chem.CanonicalRankAtoms(mol, break_ties, include_chirality, True, False)
    return map(ranks.__getitem__, range(len(ranks)))  # twice as fast as iterating


def _stereo_by_cip(bond: "Chem.Bond") -> int:
    """Returns Z, E or none for a bond that is cis or trans to two named atoms, from CIP labels on a copy."""
    mol = Chem.Mol(bond.GetOwningMol())
    rdCIPLabeler.AssignCIPLabels(mol, [], [bond.GetIdx()])
    labelled = mol.GetBondWithIdx(bond.GetIdx())
    label = labelled.GetProp("_CIPCode") if labelled.HasProp("_CIPCode") else "NONE"
    return Chem.BondStereo.names[f"STEREO{label}"]


def _flatten(parsed: list[ParsedMolecule], canonical_atom_order: bool) -> _FlatMolecules:
    columns = _Columns()
    for molecule in parsed:
        columns.extend(molecule, canonical_atom_order)
    num_atoms = np.array([molecule.mol.GetNumAtoms() for molecule in parsed])
    num_bonds = np.array([molecule.mol.GetNumBonds() for molecule in parsed])
    first_atom = np.cumsum(num_atoms) - num_atoms
    begin, end = np.array(columns.begin, dtype=np.int64), np.array(columns.end, dtype=np.int64)
    rank = np.array(columns.rank, dtype=np.int64)
    bond_start = np.repeat(first_atom, num_bonds)
    ends = np.concatenate([begin + bond_start, end + bond_start])
    degree = np.bincount(ends, minlength=len(rank))
    atom_features = _atom_features(columns, degree)
    bond_types, unknown_stereo = _bond_types(columns)
    if canonical_atom_order:
        parts = [slice(start, start + size) for start, size in zip(first_atom, num_atoms, strict=True)]
        centre, first, second = _neighbour_pairs(atom_features[:, 1], begin + bond_start, end + bond_start)
        atom_features[:, 1] = _canonical_chirality(atom_features[:, 1], centre, rank[first] > rank[second])
        ring_pairs = atom_features[centre, 8] == 2
        pairs = centre[ring_pairs], first[ring_pairs], second[ring_pairs]
        for index, tied, classes in _tied_centres(parsed, parts, *pairs):
            atom_features[parts[index], 1] = _settled_chirality(
                parsed[index].mol, atom_features[parts[index], 1], tied, classes
            )
    for molecule, start, size in zip(parsed, first_atom, num_atoms, strict=True):
        if not molecule.has_bonds:  # nothing is known but the element
            atom_features[start : start + size, 2:7] = ATOM_FEATURE_SIZES[2:7]
    return _FlatMolecules(
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        atom_features=atom_features,
        bonds=np.stack([begin, end], axis=1).astype(np.uint16),
        bond_types=bond_types,
        unknown=_count_unknown(atom_features, unknown_stereo, num_atoms, num_bonds),
    )


def _atom_features(columns: _Columns, degree: np.ndarray) -> np.ndarray:
    """Returns (A, 9) indices + 1."""
    num_hs = np.array(columns.num_hs)
    features = np.empty((len(degree), len(ATOM_FEATURES)), dtype=np.uint8)
    features[:, 0] = _position(columns.atomic_num, 1, ATOM_FEATURE_SIZES[0])
    features[:, 1] = _position_of_name(columns.chirality, "ChiralType", "chirality")
    features[:, 2] = _position(degree + num_hs, 0, ATOM_FEATURE_SIZES[2])  # the total degree: with all hydrogens
    features[:, 3] = _position(columns.formal_charge, -5, ATOM_FEATURE_SIZES[3])
    features[:, 4] = _position(num_hs, 0, ATOM_FEATURE_SIZES[4])
    features[:, 5] = _position(columns.num_radical_electrons, 0, ATOM_FEATURE_SIZES[5])
    features[:, 6] = _position_of_name(columns.hybridization, "HybridizationType", "hybridization")
    features[:, 7] = np.array(columns.is_aromatic, dtype=np.uint8) + 1
    features[:, 8] = np.array(columns.is_in_ring, dtype=np.uint8) + 1
    return features


def _position(values: Any, lowest: int, size: int) -> np.ndarray:
    """Returns index + 1 in a vocabulary of consecutive integers that ends in misc."""
    index = np.asarray(values) - lowest
    return np.where((index >= 0) & (index < size - 1), index, size - 1) + 1


def _position_of_name(values: list, enum_name: str, feature: str) -> np.ndarray:
    """Returns index + 1 in a vocabulary of names of an RDKit enum that ends in misc."""
    vocabulary = ATOM_FEATURE_VOCABULARIES[feature]
    index = _enum_table(enum_name, tuple(vocabulary))[np.array(values, dtype=np.int64)]
    return np.where(index == 0, len(vocabulary), index)


def _bond_types(columns: _Columns) -> tuple[np.ndarray, np.ndarray]:
    """Returns the joint index (E,) of each bond, and whether its stereo is in no vocabulary (E,)."""
    types = np.full(256, BOND_TYPES.index(MISC), dtype=np.uint8)
    for name, order in _ORDER_BY_BOND_TYPE.items():
        types[int(2 * order)] = BOND_TYPES.index(name)
    twice_order = (2 * np.array(columns.order)).astype(np.uint8)
    stereo = _enum_table("BondStereo", tuple(BOND_STEREO))[np.array(columns.stereo, dtype=np.int64)]
    conjugated = np.array(columns.is_conjugated, dtype=np.uint8)
    unknown = stereo == 0
    return 1 + 12 * types[twice_order] + 2 * (np.maximum(stereo, 1) - 1) + conjugated, unknown


def _neighbour_pairs(
    tags: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each stereocentre with each two of its neighbours, in the order of its bonds: (K,), (K,), (K,)."""
    is_centre = (tags == _CLOCKWISE) | (tags == _COUNTERCLOCKWISE)
    atom, neighbour = np.concatenate([begin, end]), np.concatenate([end, begin])
    (bond_ends,) = np.nonzero(is_centre[atom])
    bond_ends = bond_ends[np.lexsort((bond_ends % max(len(begin), 1), atom[bond_ends]))]
    atom, neighbour = atom[bond_ends], neighbour[bond_ends]
    pairs = []
    for step in (1, 2, 3):  # a tetrahedral centre has at most four neighbours
        (first,) = np.nonzero(atom[:-step] == atom[step:])
        pairs.append((atom[first], neighbour[first], neighbour[first + step]))
    centre, first, second = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return centre, first, second


def _canonical_chirality(tags: np.ndarray, centre: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """Returns (A,) chirality indices as seen when the neighbours are listed by canonical rank.

    RDKit's clockwise refers to the order of an atom's bonds, which is that of the input. It turns over with each swap
    of two neighbours, so what counts is whether an odd number of pairs is the wrong way round.
    """
    is_odd = np.bincount(centre[swapped], minlength=len(tags)) % 2 == 1
    return np.where(is_odd, _CLOCKWISE + _COUNTERCLOCKWISE - tags, tags)


def _tied_centres(
    parsed: list[ParsedMolecule], parts: list[slice], centre: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields molecules that have stereocentres between neighbours that only stereo tells apart.

    With the index of each come those of the centres in it, and the class of each of its atoms without stereo.
    """
    starts = np.array([part.start for part in parts])
    in_molecule = np.searchsorted(starts, centre, side="right") - 1
    for index in np.unique(in_molecule):
        classes = np.array(list(_canonical_ranks(parsed[index].mol, break_ties=False, include_chirality=False)))
        here = in_molecule == index
        ends = (values[here] - starts[index] for values in (centre, first, second))
        atom, one, other = ends
        tied = np.unique(atom[classes[one] == classes[other]])
        if len(tied):
            yield int(index), tied, classes


def _settled_chirality(mol: "Chem.Mol", chirality: np.ndarray, tied: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns chirality (n,) where centres between tied neighbours do not depend on the order of the input.

    As in 1,4-dimethylcyclohexane: which of the two neighbours in the ring comes first is arbitrary, and clockwise turns
    over with it. RDKit settles that when it writes the canonical SMILES, but not which of several equivalent centres
    comes first in it. So a class of centres has the chirality that it has there if it is the same for all, and "other"
    if it is not: cis and trans stay apart, and equivalent atoms equal.
    """
    copy = canonical_copy(mol)
    if copy is None:
        return chirality
    canonical, order = copy
    columns = _Columns()
    columns.extend(ParsedMolecule(canonical, None), canonical_atom_order=False)
    tags = _position_of_name(columns.chirality, "ChiralType", "chirality")
    centre, first, second = _neighbour_pairs(tags, np.array(columns.begin), np.array(columns.end))
    in_smiles = np.empty_like(tags)
    in_smiles[order] = _canonical_chirality(tags, centre, first > second)
    settled = chirality.copy()
    for group in np.unique(classes[tied]):
        members = tied[classes[tied] == group]
        found = np.unique(in_smiles[members])
        settled[members] = found[0] if len(found) == 1 else _OTHER_CHIRALITY
    return settled


def _count_unknown(
    atom_features: np.ndarray, unknown_stereo: np.ndarray, num_atoms: np.ndarray, num_bonds: np.ndarray
) -> np.ndarray:
    """Returns (M, 10) numbers of values in no vocabulary."""
    has_misc = np.array([MISC in values for values in ATOM_FEATURE_VOCABULARIES.values()])
    unknown = (atom_features == np.array(ATOM_FEATURE_SIZES)) & has_misc
    counts = np.zeros((len(num_atoms), len(ATOM_FEATURES) + 1), dtype=np.int64)
    rows, columns = np.nonzero(unknown)
    np.add.at(counts, (np.repeat(np.arange(len(num_atoms)), num_atoms)[rows], columns), 1)
    np.add.at(counts[:, -1], np.repeat(np.arange(len(num_atoms)), num_bonds)[unknown_stereo], 1)
    return counts


def _cut(parsed: list[ParsedMolecule], flat: _FlatMolecules) -> list[Any]:
    """Returns the flat arrays as one graph for each molecule."""
    atom_stop, bond_stop = np.cumsum(flat.num_atoms), np.cumsum(flat.num_bonds)
    graphs: list[Any] = []
    for index, molecule in enumerate(parsed):
        atoms = slice(atom_stop[index] - flat.num_atoms[index], atom_stop[index])
        bonds = slice(bond_stop[index] - flat.num_bonds[index], bond_stop[index])
        coordinates, unknown = molecule.coordinates, flat.unknown[index]
        counts = zip((*ATOM_FEATURES, "bond_stereo"), unknown, strict=True)
        graphs.append(
            MolecularGraph(
                atom_features=flat.atom_features[atoms].copy(),
                bonds=flat.bonds[bonds].copy(),
                bond_types=flat.bond_types[bonds].copy(),
                coordinates=np.empty((0, flat.num_atoms[index], 3), np.float32)
                if coordinates is None
                else coordinates,
                has_bonds=molecule.has_bonds,
                missing_coordinates_reason=molecule.missing_coordinates_reason,
                unknown_values={name: int(count) for name, count in counts if count} if unknown.any() else {},
            )
        )
    return graphs
