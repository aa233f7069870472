# Copyright 2026 The moleblend_hf authors. All rights reserved.
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
because asking RDKit atom by atom from Python is what costs: one getter runs over all atoms of all molecules, and
shortest paths are found for dozens of molecules of like size at a time. The result for a molecule does not depend on
its neighbours in the call.

Features come back in the atom order of the input, but do not depend on it: whatever has to choose (which of several
shortest paths, from where a stereocentre is looked at) chooses by RDKit's canonical ranks.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

try:  # Hidden from the Hub's import scanner, so that a model can be loaded where RDKit is not installed.
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdCIPLabeler, rdDetermineBonds, rdDistGeom, rdForceFieldHelpers
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

MAX_DISTANCE = 509  # longest shortest path that is told apart, in bonds
UNREACHABLE_DISTANCE = 510
MIN_ATOM_SEPARATION = 1e-4  # angstrom; closer atoms are taken for missing coordinates

HYDROGENS = ("drop", "keep", "add")
MODALITIES = ("auto", "2d", "3d", "2d+3d")
BONDS = (None, "determine")

_CLOCKWISE, _COUNTERCLOCKWISE = 2, 3  # indices of the chirality vocabulary, with the offset of one
_ORDINARY_ATOMS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 34, 35, 53)  # RDKit makes no dative bond between these by itself
_UNUSUAL_SMILES = re.compile(r"[|>~]|@[ASTO]")  # CXSMILES, dative and query bonds, stereo other than tetrahedral
_PAIRS_A_GROUP = 40_000  # atom pairs handled together: small enough for the cache, large enough to hide Python
_RDKIT_ERRORS = (RuntimeError, ValueError, OverflowError)


class MoleculeError(ValueError):
    """A molecule that cannot be featurized: what it is, what is wrong with it and what to do.

    Args:
        reason: what is wrong, phrased to follow the name of the molecule ("could not be parsed: ...").
        stage: where it was found: type, parse, size, coordinates, bonds, conformer, features or sdf.
        remedy: what the user can do about it, an imperative without a full stop.
        molecule: short description of the molecule.
        index: position in the list that was given, None for a single molecule.
    """

    def __init__(self, reason: str, stage: str, remedy: str, molecule: str = "", index: int | None = None):
        super().__init__(reason, stage, remedy, molecule, index)
        self.reason = reason
        self.stage = stage
        self.remedy = remedy
        self.molecule = molecule
        self.index = index

    def __str__(self) -> str:
        name = f"Molecule {self.molecule}" if self.index is None else f"Molecule {self.index} ({self.molecule})"
        skip = "" if self.index is None else ', or pass on_error="skip"'
        return f"{name} {self.reason}. {self.remedy}{skip}."


@dataclass(frozen=True, slots=True, eq=False)
class MolecularGraph:
    """A featurized molecule of n atoms, in the atom order of the input.

    Attributes:
        atom_features: (n, 9) uint8, OGB index + 1 for each of `ATOM_FEATURES`.
        degree: (n,) int16, number of bonds of each atom.
        shortest_path_distance: (n, n) int16 in bonds, 0 on the diagonal, at most `MAX_DISTANCE`, and
            `UNREACHABLE_DISTANCE` between fragments.
        path_bond_types: (n, n, P) uint8, joint index of the first P bonds on the shortest path i -> j, starting with
            the bond that leaves i: 1 + 12 * bond type + 2 * bond stereo + is conjugated; 0 where there is no such hop.
        coordinates: (C, n, 3) float32 in angstrom, C >= 0 conformers.
        has_bonds: False for bare atoms with coordinates, whose 2D relations are not known.
        missing_coordinates_reason: why there is no conformer although one was to be made, else None.
        unknown_values: how many values of this molecule were in no vocabulary, by feature.
    """

    atom_features: np.ndarray
    degree: np.ndarray
    shortest_path_distance: np.ndarray
    path_bond_types: np.ndarray
    coordinates: np.ndarray
    has_bonds: bool = True
    missing_coordinates_reason: str | None = None
    unknown_values: dict[str, int] = field(default_factory=dict)

    @property
    def num_atoms(self) -> int:
        return len(self.atom_features)


class RejectedMolecule(NamedTuple):
    """A molecule that did not make it into the batch, or did so without 3D, and why."""

    index: int
    molecule: Any
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class FeaturizationSettings:
    """All that featurization can be told, checked; the processor's docstring says what each means."""

    modality: str = "auto"
    hydrogens: str = "drop"
    canonical_atom_order: bool = True
    bonds: str | None = None
    max_atoms: int = 512
    max_path_bonds: int = 5
    num_conformers: int = 1
    conformer_seed: int = 42
    max_conformer_atoms: int = 400
    max_embedding_attempts: int = 10
    max_mmff_iterations: int = 200
    max_bond_order_iterations: int = 10_000

    def __post_init__(self):
        for name, allowed in (("modality", MODALITIES), ("hydrogens", HYDROGENS), ("bonds", BONDS)):
            value = getattr(self, name)
            if value not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` is {value!r}, but has to be one of {choices}. Pass one of these.")
        if not isinstance(self.canonical_atom_order, bool):
            raise ValueError(
                f"`canonical_atom_order` is {self.canonical_atom_order!r}, but has to be True or False. Pass one of them."
            )
        minimum = {"conformer_seed": 0, "max_mmff_iterations": 0}
        for name in (
            "max_atoms",
            "max_path_bonds",
            "num_conformers",
            "conformer_seed",
            "max_conformer_atoms",
            "max_embedding_attempts",
            "max_mmff_iterations",
            "max_bond_order_iterations",
        ):
            value, least = getattr(self, name), minimum.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise ValueError(f"`{name}` is {value!r}, but has to be an integer of at least {least}. Pass one.")


@dataclass(frozen=True, slots=True, eq=False)
class _ParsedMolecule:
    """A sanitized RDKit molecule with the atoms that will be featurized.

    `smiles` is what it was written as, if RDKit's getters can be spared what a plain SMILES cannot say.
    """

    mol: "Chem.Mol"
    coordinates: np.ndarray | None
    smiles: str | None = None
    has_bonds: bool = True
    missing_coordinates_reason: str | None = None


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
                results.append(_with_modality(_parse(molecule, given, settings), settings))
            except MoleculeError as error:
                results.append(error)
        parsed = [index for index, result in enumerate(results) if not isinstance(result, MoleculeError)]
        for index, graph in zip(parsed, _graphs([results[i] for i in parsed], settings), strict=True):
            results[index] = graph
    for molecule, result in zip(molecules, results, strict=True):
        if isinstance(result, MoleculeError) and not result.molecule:
            result.molecule = describe_molecule(molecule)
    return results


def require_rdkit() -> None:
    """Raises an ImportError that says what to install, if RDKit is missing."""
    if Chem is None:
        raise ImportError("Reading molecules needs RDKit, which is not installed. Run `pip install rdkit`.")


def describe_molecule(molecule: Any, max_length: int = 80) -> str:
    """Returns a name for a molecule that is short enough for a message."""
    if Chem is not None and isinstance(molecule, Chem.Mol):
        try:
            text = repr(Chem.MolToSmiles(molecule)) if molecule.GetNumAtoms() <= 1000 else "RDKit molecule"
        except _RDKIT_ERRORS:
            text = "RDKit molecule"
        if molecule.HasProp("_Name") and molecule.GetProp("_Name"):
            text = f"{text}, named {molecule.GetProp('_Name')!r}"
    elif isinstance(molecule, tuple) and len(molecule) == 2 and isinstance(molecule[0], Sequence):
        text = f"({' '.join(map(str, molecule[0][:20]))}, coordinates) of {len(molecule[0])} atoms"
    else:
        text = repr(molecule)
    return text if len(text) <= max_length else f"{text[: max_length - 20]}... ({len(text)} characters)"


# Reading a molecule


def _parse(molecule: Any, given: Any, settings: FeaturizationSettings) -> _ParsedMolecule:
    if isinstance(molecule, MoleculeError):
        raise molecule
    if isinstance(molecule, str):
        parsed = _parse_smiles(molecule, given, settings)
    elif isinstance(molecule, Chem.Mol):
        parsed = _parse_mol(Chem.Mol(molecule), given, settings)
    elif isinstance(molecule, tuple) and len(molecule) == 2:
        parsed = _parse_pair(*molecule, given, settings)
    else:
        raise MoleculeError(
            f"is of type {type(molecule).__name__}, but has to be a SMILES string, an RDKit molecule or a (symbols, "
            "coordinates) tuple",
            "type",
            "Pass one of these; only a list is a batch",
        )
    num_atoms = parsed.mol.GetNumAtoms()
    if num_atoms == 0:
        raise MoleculeError("has no atoms", "size", "Remove it from the input")
    if num_atoms > settings.max_atoms:
        raise MoleculeError(
            f"has {num_atoms} atoms, but `max_atoms` is {settings.max_atoms}",
            "size",
            "Raise `max_atoms` if there is memory for pairs of that many atoms",
        )
    if parsed.coordinates is not None:
        _check_coordinates(parsed.coordinates)
    return parsed


def _parse_smiles(smiles: str, given: Any, settings: FeaturizationSettings) -> _ParsedMolecule:
    if not smiles.strip():
        raise MoleculeError("is an empty SMILES", "parse", "Remove it from the input")
    unusual = _UNUSUAL_SMILES.search(smiles) is not None
    if settings.hydrogens != "drop" or (unusual and "|" in smiles):
        return _parse_mol(_mol_from_smiles(smiles, remove_hydrogens=False), given, settings)
    mol = _mol_from_smiles(smiles)
    if given is not None:
        given = _as_coordinates(given)
        if given.shape[1] != mol.GetNumAtoms():  # perhaps they belong to hydrogens that the SMILES spells out
            return _parse_mol(_mol_from_smiles(smiles, remove_hydrogens=False), given, settings)
    return _ParsedMolecule(mol, given, None if unusual else smiles)


def _mol_from_smiles(smiles: str, remove_hydrogens: bool = True) -> "Chem.Mol":
    parse: Any = Chem.MolFromSmiles
    if not remove_hydrogens:
        params = Chem.SmilesParserParams()
        params.removeHs = False
        parse = partial(_call_with, Chem.MolFromSmiles, params)
    mol = parse(smiles)
    if mol is None:
        reason = _captured_reason(parse, smiles)
        raise MoleculeError(f"could not be parsed by RDKit: {reason}", "parse", "Fix it")
    return mol


def _call_with(function: Any, second: Any, first: Any) -> Any:
    return function(first, second)


def _captured_reason(function: Any, *arguments: Any) -> str:
    """Returns the first line that RDKit logs while the function fails on these arguments."""
    if not hasattr(rdBase, "CaptureErrorLog"):  # older RDKit
        return "see RDKit's log"
    with rdBase.CaptureErrorLog() as capture:
        function(*arguments)
    for line in capture.messages.splitlines():
        line = re.sub(r"^\[[\d:]+\] *(\w+ Parse Error: )?", "", line).strip()
        if line:
            return re.sub(r"( while parsing| for input)?: ?'?.{60,}$", "", line)[:200]
    return "no reason given"


def _parse_mol(mol: "Chem.Mol", given: Any, settings: FeaturizationSettings) -> _ParsedMolecule:
    """Sanitizes a molecule of one's own (never a user's), treats its hydrogens and takes its 3D conformers along."""
    if mol.GetNumAtoms() == 0:
        return _ParsedMolecule(mol, None)
    if given is not None:
        given = _as_coordinates(given)
        if given.shape[1] == mol.GetNumAtoms():
            mol.RemoveAllConformers()
            for positions in given:
                mol.AddConformer(_conformer(positions), assignId=True)
            given = None
        elif settings.hydrogens == "keep":
            raise _wrong_count(given, mol)
    try:
        Chem.SanitizeMol(mol)
        if settings.hydrogens == "drop":
            mol = Chem.RemoveHs(mol)
        elif settings.hydrogens == "add":
            mol = Chem.AddHs(mol, addCoords=any(conformer.Is3D() for conformer in mol.GetConformers()))
        Chem.AssignStereochemistry(mol, cleanIt=True, force=True)
    except _RDKIT_ERRORS as error:
        raise MoleculeError(f"could not be sanitized by RDKit: {_first_line(error)}", "parse", "Fix it") from error
    if given is not None:
        if given.shape[1] != mol.GetNumAtoms():
            raise _wrong_count(given, mol)
        return _ParsedMolecule(mol, given)
    conformers = [conformer.GetPositions() for conformer in mol.GetConformers() if conformer.Is3D()]
    return _ParsedMolecule(mol, _as_coordinates(conformers) if conformers else None)


def _parse_pair(symbols: Any, positions: Any, given: Any, settings: FeaturizationSettings) -> _ParsedMolecule:
    """Reads atoms with coordinates and no bonds, whose bonds are determined by RDKit or stay unknown."""
    if given is not None:
        raise MoleculeError("has coordinates twice: in the pair and in `coordinates`", "type", "Pass them once")
    mol = Chem.RWMol()
    try:
        for symbol in symbols:
            mol.AddAtom(Chem.Atom(symbol if isinstance(symbol, str) else int(symbol)))
    except (*_RDKIT_ERRORS, TypeError) as error:
        raise MoleculeError(
            f"has a symbol that is no element: {_first_line(error)}", "type", "Pass symbols such as 'C' or 'Na'"
        ) from error
    coordinates = _as_coordinates(positions)
    if coordinates.shape[1] != mol.GetNumAtoms():
        raise _wrong_count(coordinates, mol)
    if mol.GetNumAtoms() == 0:
        return _ParsedMolecule(mol, None)
    if settings.bonds == "determine":
        _check_coordinates(coordinates)
        mol.AddConformer(_conformer(coordinates[0]), assignId=True)
        try:
            rdDetermineBonds.DetermineBonds(mol, maxIterations=settings.max_bond_order_iterations)
        except _RDKIT_ERRORS as error:
            raise MoleculeError(
                f"has coordinates from which RDKit determines no bonds: {_first_line(error)}",
                "bonds",
                'Pass all hydrogens, or an RDKit molecule with bonds, or `bonds=None` with modality="3d"',
            ) from error
        return _parse_mol(Chem.Mol(mol), coordinates, settings)
    if settings.modality != "3d":
        raise MoleculeError(
            f"has no bonds, which modality={settings.modality!r} needs",
            "bonds",
            'Set `bonds="determine"`, or pass modality="3d"',
        )
    if settings.hydrogens == "add":
        raise MoleculeError(
            'has no bonds, so that hydrogens="add" cannot tell what to add', "bonds", 'Set `bonds="determine"`'
        )
    atomic_numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    if settings.hydrogens == "drop" and (atomic_numbers > 1).any():
        coordinates = coordinates[:, atomic_numbers != 1]
        mol.BeginBatchEdit()
        for index in np.flatnonzero(atomic_numbers == 1):
            mol.RemoveAtom(int(index))
        mol.CommitBatchEdit()
    for atom in mol.GetAtoms():
        atom.SetNoImplicit(True)
    Chem.SanitizeMol(mol)
    return _ParsedMolecule(mol, coordinates, has_bonds=False)


def _conformer(positions: np.ndarray) -> "Chem.Conformer":
    conformer = Chem.Conformer(len(positions))
    conformer.Set3D(True)
    conformer.SetPositions(np.ascontiguousarray(positions, dtype=np.float64))
    return conformer


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


# Coordinates


def _as_coordinates(values: Any) -> np.ndarray:
    """Returns given coordinates as (C, n, 3) float32."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MoleculeError(
            f"has coordinates that are no array of numbers: {_first_line(error)}",
            "coordinates",
            "Pass an array of shape (atoms, 3) in angstrom",
        ) from error
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] != 3 or len(array) == 0:
        raise MoleculeError(
            f"has coordinates of shape {np.shape(values)}, but (atoms, 3) or (conformers, atoms, 3) is expected",
            "coordinates",
            "Pass one row of x, y, z in angstrom for each atom",
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is rejected by the check
        return array.astype(np.float32)


def _check_coordinates(coordinates: np.ndarray) -> None:
    """Raises unless (C, n, 3) coordinates are finite and no two atoms lie in one place."""
    remedy = 'Pass real coordinates, or modality="2d" to leave them out'
    if not np.isfinite(coordinates).all():
        raise MoleculeError("has coordinates that are NaN or infinite", "coordinates", remedy)
    num_atoms = coordinates.shape[1]
    if num_atoms == 1:
        return
    if (coordinates == 0).all(axis=(1, 2)).any():
        raise MoleculeError("has coordinates that are all zero", "coordinates", remedy)
    for positions in coordinates.astype(np.float64):
        difference = positions[:, None] - positions
        squared = np.einsum("ijk,ijk->ij", difference, difference)
        squared.flat[:: num_atoms + 1] = np.inf
        if squared.min() < MIN_ATOM_SEPARATION**2:
            first, second = sorted(divmod(int(squared.argmin()), num_atoms))
            raise MoleculeError(
                f"has atoms {first} and {second} in one place (closer than {MIN_ATOM_SEPARATION} angstrom)",
                "coordinates",
                remedy,
            )


def _wrong_count(coordinates: np.ndarray, mol: "Chem.Mol") -> MoleculeError:
    return MoleculeError(
        f"has {mol.GetNumAtoms()} atoms, but {coordinates.shape[1]} rows of coordinates were given",
        "coordinates",
        "Pass one row for each atom, in the order of the atoms",
    )


def _with_modality(parsed: _ParsedMolecule, settings: FeaturizationSettings) -> _ParsedMolecule:
    """Drops or generates coordinates as the modality says."""
    if settings.modality == "2d":
        return _replace(parsed, coordinates=None)
    if parsed.coordinates is not None or settings.modality == "auto":
        return parsed
    try:
        return _replace(parsed, coordinates=generate_conformers(parsed.mol, settings))
    except MoleculeError as error:
        if settings.modality == "3d":
            raise
        return _replace(parsed, missing_coordinates_reason=error.reason)


def _replace(parsed: _ParsedMolecule, **changes: Any) -> _ParsedMolecule:
    values = {name: getattr(parsed, name) for name in parsed.__slots__}
    return _ParsedMolecule(**{**values, **changes})


def generate_conformers(mol: "Chem.Mol", settings: FeaturizationSettings) -> np.ndarray:
    """Returns (C, n, 3) float32 coordinates in angstrom from ETKDGv3, relaxed by MMFF where it has parameters.

    The same for every way to write a molecule: they are generated on the molecule that RDKit reads from its canonical
    SMILES, and mapped back. All limits count atoms or iterations, none counts time.

    Args:
        mol: a sanitized molecule; hydrogens that are not atoms of it take part, but are not returned.
        settings: number of conformers, seed and limits.
    """
    copy = _canonical_copy(mol)
    if copy is None:
        raise _no_conformer("RDKit does not read its own canonical SMILES")
    canonical, order = Chem.AddHs(copy[0]), copy[1]
    if canonical.GetNumAtoms() > settings.max_conformer_atoms:
        raise _no_conformer(
            f"{canonical.GetNumAtoms()} atoms with hydrogens are more than `max_conformer_atoms` "
            f"= {settings.max_conformer_atoms}"
        )
    params = rdDistGeom.ETKDGv3()
    params.randomSeed = settings.conformer_seed
    params.maxIterations = settings.max_embedding_attempts
    params.numThreads = 1
    try:
        rdDistGeom.EmbedMultipleConfs(canonical, settings.num_conformers, params)
        if canonical.GetNumConformers() == 0:
            params.useRandomCoords = True
            rdDistGeom.EmbedMultipleConfs(canonical, settings.num_conformers, params)
        if canonical.GetNumConformers() == 0:
            raise _no_conformer("ETKDG found no geometry")
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(canonical):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(canonical, maxIters=settings.max_mmff_iterations)
    except _RDKIT_ERRORS as error:
        if isinstance(error, MoleculeError):
            raise
        raise _no_conformer(_first_line(error)) from error
    positions = np.stack([conformer.GetPositions() for conformer in canonical.GetConformers()])
    coordinates = np.empty((len(positions), len(order), 3), dtype=np.float32)
    coordinates[:, order] = positions[:, : len(order)]
    try:
        _check_coordinates(coordinates)
    except MoleculeError as error:
        raise _no_conformer(f"the embedded geometry {error.reason}") from error
    return coordinates


def _no_conformer(reason: str) -> MoleculeError:
    return MoleculeError(
        f"has no conformer: {reason}", "conformer", 'Pass coordinates, or use modality="2d+3d", which falls back to 2D'
    )


def _canonical_copy(mol: "Chem.Mol") -> tuple["Chem.Mol", list[int]] | None:
    """Returns the molecule as read from its canonical SMILES, and for each atom of that its index in `mol`.

    None for the odd molecule whose SMILES RDKit does not read back.
    """
    mol = Chem.Mol(mol)
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
    params = Chem.SmilesParserParams()
    params.removeHs = False
    canonical = Chem.MolFromSmiles(Chem.MolToSmiles(mol), params)
    if canonical is None or canonical.GetNumAtoms() != mol.GetNumAtoms():
        return None
    order = mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"]
    return canonical, list(order)


# From RDKit objects to arrays


@dataclass(slots=True, eq=False)
class _FlatMolecules:
    """Atoms and bonds of many molecules, one after the other.

    Attributes:
        num_atoms, num_bonds: (M,) of each molecule.
        atom_features: (A, 9) uint8, indices + 1.
        degree: (A,) int16.
        rank: (A,) position of each atom of a molecule in its canonical order, or in the input's.
        begin, end: (E,) ends of each bond, counted within the molecule.
        bond_types: (E,) uint8 joint index, 1..60.
        unknown: (M, 9 + 1) number of values in no vocabulary, by atom feature and for bond stereo.
    """

    num_atoms: np.ndarray
    num_bonds: np.ndarray
    atom_features: np.ndarray
    degree: np.ndarray
    rank: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    bond_types: np.ndarray
    unknown: np.ndarray


def _graphs(parsed: list[_ParsedMolecule], settings: FeaturizationSettings) -> list[MolecularGraph | MoleculeError]:
    """Returns a graph for each molecule; one that RDKit fails on does not take the others with it."""
    if not parsed:
        return []
    try:
        flat = _flatten(parsed, settings.canonical_atom_order)
    except _RDKIT_ERRORS as error:
        if len(parsed) > 1:
            return [_graphs([molecule], settings)[0] for molecule in parsed]
        return [MoleculeError(f"could not be featurized by RDKit: {_first_line(error)}", "features", "Fix it")]
    return _assemble(parsed, flat, settings.max_path_bonds)


@cache
def _enum_table(enum_name: str, vocabulary: tuple) -> np.ndarray:
    """Returns position + 1 in the vocabulary by the integer of an RDKit enum; 0 where the name is in no slot."""
    members = getattr(Chem, enum_name).names
    table = np.zeros(max(map(int, members.values())) + 1, dtype=np.uint8)
    for name, member in members.items():
        if name in vocabulary:
            table[int(member)] = vocabulary.index(name) + 1
    return table


def _ask(getter: Any, objects: list, dtype: Any) -> np.ndarray:
    return np.fromiter(map(getter, objects), dtype, len(objects))


def _flatten(parsed: list[_ParsedMolecule], canonical_atom_order: bool) -> _FlatMolecules:
    mols = [molecule.mol for molecule in parsed]
    # GetAtomWithIdx is twice as fast as iterating over GetAtoms.
    atoms = [atom for mol in mols for atom in map(mol.GetAtomWithIdx, range(mol.GetNumAtoms()))]
    bonds = [bond for mol in mols for bond in map(mol.GetBondWithIdx, range(mol.GetNumBonds()))]
    num_atoms = np.array([mol.GetNumAtoms() for mol in mols])
    num_bonds = np.array([mol.GetNumBonds() for mol in mols])
    first_atom = np.cumsum(num_atoms) - num_atoms
    begin = _ask(Chem.Bond.GetBeginAtomIdx, bonds, np.int64)
    end = _ask(Chem.Bond.GetEndAtomIdx, bonds, np.int64)
    bond_start = np.repeat(first_atom, num_bonds)
    degree = np.bincount(np.concatenate([begin + bond_start, end + bond_start]), minlength=len(atoms))

    atomic_numbers = _ask(Chem.Atom.GetAtomicNum, atoms, np.int64)
    ordinary = np.isin(atomic_numbers, _ORDINARY_ATOMS)
    written = np.array([molecule.smiles is not None for molecule in parsed])
    chiral = np.array([molecule.smiles is None or "@" in molecule.smiles for molecule in parsed])
    atom_features = _atom_features(atoms, atomic_numbers, degree, np.repeat(chiral, num_atoms))
    usual = np.repeat(written, num_bonds) & ordinary[begin + bond_start] & ordinary[end + bond_start]
    bond_types, unknown_stereo = _bond_types(bonds, usual)

    if canonical_atom_order:
        rank = np.fromiter((r for mol in mols for r in canonical_ranks(mol)), np.int64, len(atoms))
        centres = _is_centre(atom_features[:, 1])
        atom_features[:, 1] = _canonical_chirality(atom_features[:, 1], begin + bond_start, end + bond_start, rank)
        ring_centres = np.flatnonzero(centres & (atom_features[:, 8] == 2))
        for index in np.unique(np.repeat(np.arange(len(mols)), num_atoms)[ring_centres]):
            part = slice(first_atom[index], first_atom[index] + num_atoms[index])
            settled = _settle_ring_stereo(mols[index], ring_centres[_within(ring_centres, part)] - part.start)
            if settled is not None:
                rank[part], atom_features[part, 1] = settled
    else:
        rank = np.arange(len(atoms)) - np.repeat(first_atom, num_atoms)
    for molecule, start, stop in zip(parsed, first_atom, first_atom + num_atoms, strict=True):
        if not molecule.has_bonds:  # nothing is known but the element
            atom_features[start:stop, 2:7] = ATOM_FEATURE_SIZES[2:7]
    return _FlatMolecules(
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        atom_features=atom_features,
        degree=degree.astype(np.int16),
        rank=rank,
        begin=begin,
        end=end,
        bond_types=bond_types,
        unknown=_count_unknown(atom_features, unknown_stereo, num_atoms, num_bonds),
    )


def canonical_ranks(mol: "Chem.Mol") -> Sequence[int]:
    """Returns the position of each atom in RDKit's canonical order; atom map numbers are not looked at."""
    return Chem.CanonicalRankAtoms(mol, True, True, True, False)


def _atom_features(atoms: list, atomic_numbers: np.ndarray, degree: np.ndarray, chiral: np.ndarray) -> np.ndarray:
    """Returns (A, 9) indices + 1; `chiral` marks the atoms of molecules that may have stereocentres."""
    num_hs = _ask(Chem.Atom.GetTotalNumHs, atoms, np.int64)
    hybridization = _enum_table("HybridizationType", tuple(ATOM_FEATURE_VOCABULARIES["hybridization"]))
    charges = _ask(Chem.Atom.GetFormalCharge, atoms, np.int64)
    features = np.empty((len(atoms), len(ATOM_FEATURES)), dtype=np.uint8)
    features[:, 0] = _position(atomic_numbers, 1, ATOM_FEATURE_SIZES[0])
    features[:, 1] = 1
    features[:, 2] = _position(degree + num_hs, 0, ATOM_FEATURE_SIZES[2])  # what GetTotalDegree returns
    features[:, 3] = _position(charges, -5, ATOM_FEATURE_SIZES[3])
    features[:, 4] = _position(num_hs, 0, ATOM_FEATURE_SIZES[4])
    features[:, 5] = _position(_ask(Chem.Atom.GetNumRadicalElectrons, atoms, np.int64), 0, ATOM_FEATURE_SIZES[5])
    features[:, 6] = hybridization[_ask(Chem.Atom.GetHybridization, atoms, np.int64)]
    features[:, 7] = _ask(Chem.Atom.GetIsAromatic, atoms, np.uint8) + 1
    features[:, 8] = _ask(Chem.Atom.IsInRing, atoms, np.uint8) + 1
    (candidates,) = np.nonzero(chiral)
    tags = _enum_table("ChiralType", tuple(ATOM_FEATURE_VOCABULARIES["chirality"]))
    features[candidates, 1] = tags[_ask(Chem.Atom.GetChiralTag, [atoms[i] for i in candidates], np.int64)]
    for column in (1, 6):
        features[features[:, column] == 0, column] = ATOM_FEATURE_SIZES[column]
    return features


def _position(values: np.ndarray, lowest: int, size: int) -> np.ndarray:
    """Returns index + 1 in a vocabulary of consecutive integers that ends in misc."""
    index = values - lowest
    return np.where((index >= 0) & (index < size - 1), index, size - 1) + 1


def _bond_types(bonds: list, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the joint index (E,) of each bond, and whether its stereo is in no vocabulary (E,).

    The enum getters are slow, so they are asked only where the answer is not implied: `usual` bonds, of a plain SMILES
    and between ordinary atoms, are told apart by their order, and only the double bonds among them have stereo.
    """
    by_order = np.full(256, len(BOND_TYPES), dtype=np.uint8)
    by_order[[2, 4, 6, 3]] = 1, 2, 3, 4  # twice the order: single, double, triple, aromatic
    twice_order = (2 * _ask(Chem.Bond.GetBondTypeAsDouble, bonds, np.float64)).astype(np.uint8)
    types = by_order[twice_order]
    (unusual,) = np.nonzero(~usual)
    type_table = _enum_table("BondType", tuple(BOND_TYPES))
    types[unusual] = type_table[_ask(Chem.Bond.GetBondType, [bonds[i] for i in unusual], np.int64)]
    types[types == 0] = len(BOND_TYPES)

    stereo = np.ones(len(bonds), dtype=np.uint8)
    (candidates,) = np.nonzero(~usual | (twice_order == 4))
    stereo_table = _enum_table("BondStereo", tuple(BOND_STEREO))
    stereo[candidates] = stereo_table[_ask(Chem.Bond.GetStereo, [bonds[i] for i in candidates], np.int64)]
    for index in np.flatnonzero((stereo == 4) | (stereo == 5)):  # CIS and TRANS name no neighbours: not a property
        stereo[index] = BOND_STEREO.index(_stereo_by_cip(bonds[index])) + 1
    unknown = stereo == 0
    stereo[unknown] = 1
    conjugated = _ask(Chem.Bond.GetIsConjugated, bonds, np.uint8)
    return 1 + 12 * (types - 1) + 2 * (stereo - 1) + conjugated, unknown


def _stereo_by_cip(bond: "Chem.Bond") -> str:
    """Returns E or Z for a bond that says cis or trans to two atoms, from CIP labels on a copy of its molecule."""
    mol = Chem.Mol(bond.GetOwningMol())
    rdCIPLabeler.AssignCIPLabels(mol, [], [bond.GetIdx()])
    labelled = mol.GetBondWithIdx(bond.GetIdx())
    label = labelled.GetProp("_CIPCode") if labelled.HasProp("_CIPCode") else ""
    return {"Z": "STEREOZ", "E": "STEREOE"}.get(label, "STEREONONE")


def _canonical_chirality(tags: np.ndarray, begin: np.ndarray, end: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Returns (A,) chirality indices as seen when the neighbours are listed by canonical rank.

    RDKit's clockwise refers to the order of an atom's bonds, which is that of the input. It turns over with each swap
    of two neighbours, so what counts is whether the sorting of the ranks is an odd permutation.
    """
    is_centre = _is_centre(tags)
    if not is_centre.any():
        return tags
    atom, neighbour = np.concatenate([begin, end]), np.concatenate([end, begin])
    bond = np.tile(np.arange(len(begin)), 2)
    (of_centre,) = np.nonzero(is_centre[atom])
    of_centre = of_centre[np.lexsort((bond[of_centre], atom[of_centre]))]
    atom, neighbour_rank = atom[of_centre], rank[neighbour[of_centre]]
    inversions = np.zeros(len(tags), dtype=np.int64)
    for step in (1, 2, 3):  # a tetrahedral centre has at most four neighbours
        swapped = (atom[:-step] == atom[step:]) & (neighbour_rank[:-step] > neighbour_rank[step:])
        inversions += np.bincount(atom[:-step][swapped], minlength=len(tags))
    turned = is_centre & (inversions % 2 == 1)
    return np.where(turned, _CLOCKWISE + _COUNTERCLOCKWISE - tags, tags)


def _is_centre(tags: np.ndarray) -> np.ndarray:
    return (tags == _CLOCKWISE) | (tags == _COUNTERCLOCKWISE)


def _within(values: np.ndarray, part: slice) -> np.ndarray:
    return (part.start <= values) & (values < part.stop)


def _settle_ring_stereo(mol: "Chem.Mol", ring_centres: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns ranks (n,) and chirality (n,) of a molecule with stereocentres between equivalent ring neighbours.

    As in 1,4-dimethylcyclohexane: which of the two neighbours ranks first is arbitrary, and the clockwise of both
    centres turns over with it. RDKit settles that in its canonical SMILES, so the order and the tags are taken from
    there. None if no centre is of that kind.
    """
    classes = Chem.CanonicalRankAtoms(mol, False, False, True, False)  # equal but for stereo
    for index in ring_centres:
        neighbours = mol.GetAtomWithIdx(int(index)).GetNeighbors()
        if len({classes[atom.GetIdx()] for atom in neighbours}) < len(neighbours):
            break
    else:
        return None
    copy = _canonical_copy(mol)
    if copy is None:
        return None
    canonical, order = copy
    table = _enum_table("ChiralType", tuple(ATOM_FEATURE_VOCABULARIES["chirality"]))
    tags = table[_ask(Chem.Atom.GetChiralTag, list(canonical.GetAtoms()), np.int64)]
    tags[tags == 0] = ATOM_FEATURE_SIZES[1]
    bonds = list(canonical.GetBonds())
    begin, end = _ask(Chem.Bond.GetBeginAtomIdx, bonds, np.int64), _ask(Chem.Bond.GetEndAtomIdx, bonds, np.int64)
    positions = np.arange(len(order))
    rank, chirality = np.empty_like(positions), np.empty_like(tags)
    rank[order] = positions
    chirality[order] = _canonical_chirality(tags, begin, end, positions)
    return rank, chirality


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


# Pairs of atoms


def _assemble(parsed: list[_ParsedMolecule], flat: _FlatMolecules, max_path_bonds: int) -> list[MolecularGraph]:
    """Cuts the flat arrays into graphs; pairs are worked out for molecules of like size together."""
    atom_stop, bond_stop = np.cumsum(flat.num_atoms), np.cumsum(flat.num_bonds)
    graphs: list[Any] = [None] * len(parsed)
    for group in _groups_of_like_size(flat.num_atoms):
        distance, path_bond_types = _pair_relations(flat, group, atom_stop, bond_stop, max_path_bonds)
        for row, index in enumerate(group):
            molecule, size = parsed[index], flat.num_atoms[index]
            start, stop = atom_stop[index] - size, atom_stop[index]
            coordinates = molecule.coordinates
            unknown = flat.unknown[index]
            graphs[index] = MolecularGraph(
                atom_features=flat.atom_features[start:stop].copy(),
                degree=flat.degree[start:stop].copy(),
                shortest_path_distance=distance[row, :size, :size].copy(),
                path_bond_types=path_bond_types[row, :size, :size].copy(),
                coordinates=np.empty((0, size, 3), dtype=np.float32) if coordinates is None else coordinates,
                has_bonds=molecule.has_bonds,
                missing_coordinates_reason=molecule.missing_coordinates_reason,
                unknown_values={
                    name: int(count)
                    for name, count in zip((*ATOM_FEATURES, "bond_stereo"), unknown, strict=True)
                    if count
                }
                if unknown.any()
                else {},
            )
    return graphs


def _groups_of_like_size(sizes: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(sizes, kind="stable")[::-1]
    start = 0
    while start < len(order):
        count = max(1, _PAIRS_A_GROUP // int(sizes[order[start]]) ** 2)
        yield order[start : start + count]
        start += count


def _pair_relations(
    flat: _FlatMolecules, group: np.ndarray, atom_stop: np.ndarray, bond_stop: np.ndarray, max_path_bonds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns distances (B, N, N) int16 and bonds on paths (B, N, N, P) uint8 of a group, padded, in input order."""
    sizes, bonds = flat.num_atoms[group], flat.num_bonds[group]
    num, width = len(group), int(sizes.max())
    atom_row, atom = _ragged(sizes)
    rank = np.tile(np.arange(width), (num, 1))  # padding keeps its place
    rank[atom_row, atom] = flat.rank[np.repeat(atom_stop[group] - sizes, sizes) + atom]
    order = np.argsort(rank, axis=1)
    bond_row, bond = _ragged(bonds)
    bond += np.repeat(bond_stop[group] - bonds, bonds)
    begin, end = flat.begin[bond], flat.end[bond]

    ranked_bonds = np.zeros((num, width, width), dtype=bool)
    begin_rank, end_rank = rank[bond_row, begin], rank[bond_row, end]
    ranked_bonds[bond_row, begin_rank, end_rank] = ranked_bonds[bond_row, end_rank, begin_rank] = True
    distance, next_atom = shortest_paths(ranked_bonds)

    # Back to the input's order: entry (i, j) lies at (rank of i, rank of j), and names atoms by rank.
    row = np.arange(num)[:, None, None] * width
    ranked_pair = (row + rank[:, :, None]) * width + rank[:, None, :]
    distance = distance.take(ranked_pair)
    next_atom = order.take(row + next_atom.take(ranked_pair))

    bond_types = np.zeros((num, width, width), dtype=np.uint8)
    bond_types[bond_row, begin, end] = bond_types[bond_row, end, begin] = flat.bond_types[bond]
    atoms = np.arange(width)
    paths = np.empty((num, width, width, max_path_bonds), dtype=np.uint8)
    hop = bond_types.take((row + atoms[:, None]) * width + next_atom)
    after_next = (row + next_atom) * width + atoms  # where the path goes on: from the next atom to the same end
    for index in range(max_path_bonds):
        paths[..., index] = hop
        hop = hop.take(after_next)
    return distance, paths


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each item of rows with these counts its row and its place in the row."""
    starts = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - starts[rows]


def shortest_paths(bonded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Floyd-Warshall on many molecules at once; among paths of one length the first one found stays.

    These are the paths of `scipy.sparse.csgraph.floyd_warshall(unweighted=True)`, which the original follows: its
    predecessor of j on the way from i is the atom after j on the way from j to i.

    Distance and next atom are packed into one integer, distance in the high bits, so that a step is an addition and a
    minimum. A candidate carries one more bit below its distance: it loses a tie against what is already there.

    Args:
        bonded: (B, N, N) bool, symmetric, False on the diagonal.

    Returns:
        distance: (B, N, N) int16 in bonds, at most `MAX_DISTANCE`, `UNREACHABLE_DISTANCE` if there is no path.
        next_atom: (B, N, N), the atom after i on the path from i to j; i itself if there is none.
    """
    width = bonded.shape[-1]
    dtype, shift = (np.uint16, 8) if width < 128 else (np.uint32, 16)
    candidate_bit = dtype(1 << (shift - 1))
    infinite = (1 << (shift - 1)) - 1  # twice this still fits
    atoms = np.arange(width, dtype=dtype)
    packed = np.where(bonded, dtype(1 << shift) | atoms, dtype(infinite << shift) | atoms[:, None])
    packed[:, atoms, atoms] = atoms
    distance_bits = ~dtype((1 << shift) - 1)
    candidate = np.empty_like(packed)
    for via in range(width):
        onward = (packed[:, via, :] & distance_bits) | candidate_bit
        np.add(packed[:, :, via, None], onward[:, None, :], out=candidate)
        np.minimum(packed, candidate, out=packed)
        np.bitwise_and(packed, ~candidate_bit, out=packed)
    steps = packed >> shift
    distance = np.where(steps == infinite, UNREACHABLE_DISTANCE, np.minimum(steps, MAX_DISTANCE)).astype(np.int16)
    return distance, packed & dtype(infinite)


# SDF files


def read_sdf(path: str | os.PathLike) -> Iterator["Chem.Mol | MoleculeError"]:
    """Yields the molecules of an SDF or MOL file, plain or gzipped, one for each record.

    A record that RDKit cannot read is yielded as a `MoleculeError` in its place, which the processor takes for a
    rejected molecule, so that rows stay where they are. Hydrogens are kept. A conformer counts as 3D
    (`Conformer.Is3D()`) if the record's second line says so; a record flagged "2D" is a drawing whatever its z.
    """
    require_rdkit()
    for index, record in enumerate(_sdf_records(path)):
        if isinstance(record, MoleculeError):
            record.index, record.molecule = index, f"record of {os.path.basename(path)}"
            yield record
            continue
        with rdBase.BlockLogs():
            result = _mol_from_record(record)
        if isinstance(result, MoleculeError):
            title = record.splitlines()[0].strip() if record.strip() else ""
            result.index, result.molecule = index, f"record {title[:60]!r} of {os.path.basename(path)}"
        yield result


def _sdf_records(path: str | os.PathLike) -> Iterator[str | MoleculeError]:
    with open(path, "rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_gzip else open
    lines: list[str] = []
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        try:
            for line in file:
                if line.startswith("$$$$"):
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
        except (EOFError, OSError, zlib.error) as error:
            yield MoleculeError(f"lies where the file is damaged: {_first_line(error)}", "sdf", "Fetch the file again")
            return
    if any(line.strip() for line in lines):
        yield "".join(lines)


def _mol_from_record(record: str) -> "Chem.Mol | MoleculeError":
    if not record.strip():
        return MoleculeError("is empty", "sdf", "Remove it from the file")
    supplier = Chem.SDMolSupplier()
    supplier.SetData(record, sanitize=True, removeHs=False)
    try:
        mol = supplier[0] if len(supplier) else None
    except _RDKIT_ERRORS as error:
        return MoleculeError(f"could not be read by RDKit: {_first_line(error)}", "sdf", "Fix it")
    if mol is None:
        reason = _captured_reason(_read_first, record)
        return MoleculeError(f"could not be read by RDKit: {reason}", "sdf", "Fix it")
    header = record.splitlines()[1] if record.count("\n") > 1 else ""
    if header[20:22].upper() == "2D":  # RDKit takes it for 3D as soon as one z is not zero
        for conformer in mol.GetConformers():
            conformer.Set3D(False)
    return mol


def _read_first(record: str) -> "Chem.Mol | None":
    supplier = Chem.SDMolSupplier()
    supplier.SetData(record, sanitize=True, removeHs=False)
    return supplier[0]
