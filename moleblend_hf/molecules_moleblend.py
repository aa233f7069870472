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
"""Reading molecules: SMILES, RDKit molecules, `(symbols, coordinates)` pairs and SDF files.

What comes out is a sanitized RDKit molecule with the atoms that count, and its coordinates in angstrom if there are
any; or a `MoleculeError` that says what is wrong with the input and what to do about it.
"""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .graphs_moleblend import MAX_PATH_BONDS

try:  # Hidden from the Hub's import scanner, so that a model can be loaded where RDKit is not installed.
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDetermineBonds, rdDistGeom, rdForceFieldHelpers
except ImportError:
    Chem = None

MIN_ATOM_SEPARATION = 1e-4  # angstrom; closer atoms are taken for missing coordinates
FRAGMENT_GAP = 3.0  # angstrom; between the fragments of an embedded salt, before MMFF
HYDROGENS = ("drop", "keep", "add")
MODALITIES = ("auto", "2d", "3d", "2d+3d")
BONDS = (None, "determine")
RDKIT_ERRORS = (RuntimeError, ValueError, OverflowError)
Embed: TypeAlias = "Callable[[Chem.Mol, FeaturizationSettings], np.ndarray]"

MAX_ATOMIC_NUMBER = 118  # of RDKit's periodic table; 0 is a dummy atom
_INPUT_ATOM = "_moleblend_input_atom"  # property of an atom: its index in the input
# What follows the first white space, unless it is a CXSMILES extension, in which there may be more.
_BEHIND_SMILES = re.compile(r"\s*\S+\s+(?!\|[^|]*\|\s*$)(\S.*)", re.DOTALL)
_UNUSUAL_SMILES = re.compile(r"[|>~]|@[ASTO]")  # CXSMILES, dative and query bonds, stereo other than tetrahedral


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


class RejectedMolecule(NamedTuple):
    """A molecule that did not make it into the batch, or did so without 3D, and why."""

    index: int  # type: ignore[assignment]  # in place of tuple.index
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

    def __post_init__(self) -> None:
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
        if self.max_path_bonds > MAX_PATH_BONDS:
            raise ValueError(
                f"`max_path_bonds` is {self.max_path_bonds}, but has to be at most {MAX_PATH_BONDS}. Pass a smaller one."
            )


@dataclass(frozen=True, slots=True, eq=False)
class ParsedMolecule:
    """A sanitized RDKit molecule with the atoms that will be featurized.

    `smiles` is what it was written as, if RDKit's getters can be spared what a plain SMILES cannot say.
    """

    mol: "Chem.Mol"
    coordinates: np.ndarray | None
    smiles: str | None = None
    has_bonds: bool = True
    missing_coordinates_reason: str | None = None


def require_rdkit() -> None:
    """Raises an ImportError that says what to install, if RDKit is missing."""
    if Chem is None:
        raise ImportError("Reading molecules needs RDKit, which is not installed. Run `pip install rdkit`.")


def without_column(molecules: Any) -> Any:
    """
    Returns the list of what a column of NumPy, pandas, polars, Arrow or datasets holds; anything else as it is.

    Raises:
        ValueError: for a table, of which it is not known which column is meant.
    """
    if type(molecules).__name__ == "Column":
        return list(molecules)
    if not isinstance(molecules, np.ndarray) and not hasattr(molecules, "to_numpy"):
        return molecules
    shape = getattr(molecules, "shape", ())
    if len(shape) > 1:
        raise ValueError(
            f"`molecules` is a table of shape {tuple(shape)}. Pass the column of it that holds the molecules."
        )
    if hasattr(molecules, "to_pylist"):
        return molecules.to_pylist()
    return molecules.tolist() if hasattr(molecules, "tolist") else molecules.to_list()


def describe_molecule(molecule: Any, max_length: int = 80) -> str:
    """Returns a name for a molecule that is short enough for a message."""
    if Chem is not None and isinstance(molecule, Chem.Mol):
        try:
            is_large = molecule.GetNumAtoms() > 1000
            text = "RDKit molecule" if is_large else repr(Chem.MolToSmiles(_without_unknown_chirality(molecule)))
        except RDKIT_ERRORS:
            text = "RDKit molecule"
        try:
            name = molecule.GetProp("_Name") if molecule.HasProp("_Name") else ""
        except UnicodeDecodeError:  # of a file that is not UTF-8
            name = ""
        text = f"{text}, named {name!r}" if name else text
    elif isinstance(molecule, tuple) and len(molecule) == 2 and isinstance(molecule[0], Sequence):
        text = f"({' '.join(map(str, molecule[0][:20]))}, coordinates) of {len(molecule[0])} atoms"
    else:
        text = repr(molecule)
    return text if len(text) <= max_length else f"{text[: max_length - 20]}... ({len(text)} characters)"


class _Whole:
    """An RDKit molecule on its way to another process, and the molecule itself once it is there.

    RDKit's own pickles leave out properties, with them the order of ligands around a metal, and round coordinates.
    """

    def __init__(self, mol: "Chem.Mol") -> None:
        self.mol = mol

    def __reduce__(self) -> tuple[Any, ...]:
        kept = Chem.PropertyPickleOptions.AllProps | Chem.PropertyPickleOptions.CoordsAsDouble
        return Chem.Mol, (self.mol.ToBinary(int(kept)),)


def portable(molecules: Sequence[Any]) -> list[Any]:
    """Returns molecules as they can be pickled without a loss."""
    return [_Whole(mol) if Chem is not None and isinstance(mol, Chem.Mol) else mol for mol in molecules]


def _without_unknown_chirality(mol: "Chem.Mol") -> "Chem.Mol":
    """Returns the molecule, or a copy without the tags that stand for nothing RDKit knows: in a ring they crash its SMILES writer."""
    unknown = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetChiralTag() == Chem.ChiralType.CHI_OTHER]
    if unknown:
        mol = Chem.Mol(mol)
        for index in unknown:
            mol.GetAtomWithIdx(index).SetChiralTag(Chem.ChiralType.CHI_UNSPECIFIED)
    return mol


# Reading a molecule


def parse_molecule(molecule: Any, given: Any, settings: FeaturizationSettings) -> ParsedMolecule:
    if isinstance(molecule, MoleculeError):
        raise molecule
    if settings.modality == "2d":
        given = None
    if isinstance(molecule, str):
        parsed = _parse_smiles(molecule, given, settings)
    elif isinstance(molecule, Chem.Mol):
        parsed = _parse_mol(_without_unknown_chirality(Chem.Mol(molecule)), given, settings)
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
    _check_size(num_atoms, settings)
    if parsed.coordinates is not None and settings.modality != "2d":
        _check_coordinates(parsed.coordinates)
    return parsed


def _check_size(num_atoms: int, settings: FeaturizationSettings) -> None:
    if num_atoms > settings.max_atoms:
        raise MoleculeError(
            f"has {num_atoms} atoms, but `max_atoms` is {settings.max_atoms}",
            "size",
            "Raise `max_atoms` if there is memory for pairs of that many atoms",
        )


def input_atoms(molecule: Any, settings: FeaturizationSettings) -> tuple[np.ndarray, int]:
    """Returns for each atom of a molecule's graph its index in the input, -1 if it was added; and how many the input writes.

    The input writes the hydrogens that are atoms of it: those in brackets of a SMILES, all of an RDKit molecule or a pair.
    """
    with rdBase.BlockLogs():
        if isinstance(molecule, str):
            molecule = _mol_from_smiles(molecule, remove_hydrogens=False)
        if isinstance(molecule, Chem.Mol):
            molecule = Chem.Mol(molecule)
            for atom in molecule.GetAtoms():
                atom.SetIntProp(_INPUT_ATOM, atom.GetIdx())
            num_written = molecule.GetNumAtoms()
        else:
            num_written = len(molecule[0])
        atoms = parse_molecule(molecule, None, settings).mol.GetAtoms()
    indices = [atom.GetIntProp(_INPUT_ATOM) if atom.HasProp(_INPUT_ATOM) else -1 for atom in atoms]
    return np.array(indices, dtype=np.int64), num_written


def _parse_smiles(smiles: str, given: Any, settings: FeaturizationSettings) -> ParsedMolecule:
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
    return ParsedMolecule(mol, given, None if unusual else smiles)


def _mol_from_smiles(smiles: str, remove_hydrogens: bool = True) -> "Chem.Mol":
    if behind := _BEHIND_SMILES.match(smiles):
        # RDKit takes it for a name: "CC O", a line that was broken, would silently be ethane.
        raise MoleculeError(
            f"has white space in its SMILES, and behind it {behind[1].strip()[:40]!r}",
            "parse",
            "Remove the white space if that belongs to the SMILES, else the text",
        )
    parse: Any = Chem.MolFromSmiles
    if not remove_hydrogens:
        params = Chem.SmilesParserParams()
        params.removeHs = False
        parse = partial(_call_with, Chem.MolFromSmiles, params)
    try:
        mol = parse(smiles)
    except UnicodeEncodeError as error:
        raise MoleculeError("has characters that are no text: lone surrogates", "parse", "Fix it") from error
    if mol is None:
        reason = _captured_reason(parse, smiles)
        raise MoleculeError(f"could not be parsed by RDKit: {reason}", "parse", "Fix it")
    return mol


def _call_with(function: Any, second: Any, first: Any) -> Any:
    return function(first, second)


def _captured_reason(function: Any, *arguments: Any) -> str:
    """Returns the first line that RDKit logs while the function fails on these arguments."""
    if not hasattr(rdBase, "CaptureErrorLog"):  # RDKit before 2026
        return "see RDKit's log"
    with rdBase.CaptureErrorLog() as capture:
        function(*arguments)
    try:
        messages = capture.messages
    except UnicodeDecodeError:  # RDKit cuts the input where it quotes it, at times within a character
        return "it has characters of no SMILES"
    # The input itself is named elsewhere.
    return re.sub(r"( while parsing| for input): .*$", "", _telling_line(messages))


def first_line(error: Exception) -> str:
    """Returns what an RDKit exception says, in a line."""
    return _telling_line(str(error))


def _telling_line(text: str) -> str:
    lines = [re.sub(r"^(\[[\d:]+\])? *(ERROR:|\w+ Parse Error:)? *", "", line).strip() for line in text.splitlines()]
    telling = [line for line in lines if re.search("[a-z]", line) and "Violation" not in line]
    return (telling or lines or ["no reason given"])[0][:200]


def _parse_mol(mol: "Chem.Mol", given: Any, settings: FeaturizationSettings) -> ParsedMolecule:
    """Sanitizes a molecule of one's own (never a user's), treats its hydrogens and takes its 3D conformers along."""
    if mol.GetNumAtoms() == 0:
        return ParsedMolecule(mol, None)
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
        Chem.SetDoubleBondNeighborDirections(mol)  # else cis and trans that were set by hand are lost below
        Chem.SanitizeMol(mol)
        if settings.hydrogens == "drop":
            mol = Chem.RemoveHs(mol)
        elif settings.hydrogens == "add":
            mol = Chem.AddHs(mol, addCoords=any(conformer.Is3D() for conformer in mol.GetConformers()))
        Chem.AssignStereochemistry(mol, cleanIt=True, force=True)
    except RDKIT_ERRORS as error:
        raise MoleculeError(f"could not be sanitized by RDKit: {first_line(error)}", "parse", "Fix it") from error
    if given is not None:
        if given.shape[1] != mol.GetNumAtoms():
            raise _wrong_count(given, mol)
        return ParsedMolecule(mol, given)
    conformers = [conformer.GetPositions() for conformer in mol.GetConformers() if conformer.Is3D()]
    return ParsedMolecule(mol, _as_coordinates(conformers) if conformers else None)


def _parse_pair(symbols: Any, positions: Any, given: Any, settings: FeaturizationSettings) -> ParsedMolecule:
    """Reads atoms with coordinates and no bonds, whose bonds are determined by RDKit or stay unknown."""
    if given is not None:
        raise MoleculeError("has coordinates twice: in the pair and in `coordinates`", "type", "Pass them once")
    mol = Chem.RWMol()
    try:
        for symbol in symbols:
            if not isinstance(symbol, str) and not 0 <= int(symbol) <= MAX_ATOMIC_NUMBER:  # RDKit takes it modulo 256
                raise ValueError(f"{symbol!r} is no atomic number")
            index = mol.AddAtom(Chem.Atom(symbol if isinstance(symbol, str) else int(symbol)))
            mol.GetAtomWithIdx(index).SetIntProp(_INPUT_ATOM, index)
    except (*RDKIT_ERRORS, TypeError) as error:
        raise MoleculeError(
            f"has a symbol that is no element: {first_line(error)}", "type", "Pass symbols such as 'C' or 'Na'"
        ) from error
    coordinates = _as_coordinates(positions)
    if coordinates.shape[1] != mol.GetNumAtoms():
        raise _wrong_count(coordinates, mol)
    if mol.GetNumAtoms() == 0:
        return ParsedMolecule(mol, None)
    atomic_numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    if settings.bonds == "determine":
        # Before each pair of atoms is looked at; hydrogens that are dropped are there still.
        is_counted = (atomic_numbers != 1) | (settings.hydrogens != "drop")
        _check_size(int(is_counted.sum()), settings)
        _check_coordinates(coordinates)
        mol.AddConformer(_conformer(coordinates[0]), assignId=True)
        try:
            rdDetermineBonds.DetermineBonds(mol, maxIterations=settings.max_bond_order_iterations)
        except RDKIT_ERRORS as error:
            raise MoleculeError(
                f"has coordinates from which RDKit determines no bonds: {first_line(error)}",
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
    if settings.hydrogens == "drop" and (atomic_numbers > 1).any():
        coordinates = coordinates[:, atomic_numbers != 1]
        mol.BeginBatchEdit()
        for index in np.flatnonzero(atomic_numbers == 1):
            mol.RemoveAtom(int(index))
        mol.CommitBatchEdit()
    for atom in mol.GetAtoms():
        atom.SetNoImplicit(True)
    Chem.SanitizeMol(mol)
    return ParsedMolecule(mol, coordinates, has_bonds=False)


def _conformer(positions: np.ndarray) -> "Chem.Conformer":
    conformer = Chem.Conformer(len(positions))
    conformer.Set3D(True)
    conformer.SetPositions(np.ascontiguousarray(positions, dtype=np.float64))
    return conformer


# Coordinates


def _as_coordinates(values: Any) -> np.ndarray:
    """Returns given coordinates as (C, n, 3) float32."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: tensors with gradients
        raise MoleculeError(
            f"has coordinates that are no array of numbers: {first_line(error)}",
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


def apply_modality(
    parsed: ParsedMolecule, settings: FeaturizationSettings, embed: "Embed | None" = None
) -> ParsedMolecule:
    """Drops or generates coordinates as the modality says."""
    if settings.modality == "2d":
        return replace(parsed, coordinates=None)
    if parsed.coordinates is not None or settings.modality == "auto":
        return parsed
    try:
        return replace(parsed, coordinates=generate_conformers(parsed.mol, settings, embed or embed_conformers))
    except MoleculeError as error:
        if settings.modality == "3d":
            raise
        return replace(parsed, missing_coordinates_reason=error.reason)


def generate_conformers(mol: "Chem.Mol", settings: FeaturizationSettings, embed: "Embed | None" = None) -> np.ndarray:
    """Returns (C, n, 3) float32 coordinates in angstrom from ETKDGv3, relaxed by MMFF where it has parameters.

    The same for every way to write a molecule: they are generated on the molecule that RDKit reads from its canonical
    SMILES, and mapped back. All limits count atoms or iterations, none counts time.

    Args:
        mol: a sanitized molecule; hydrogens that are not atoms of it take part, but are not returned.
        settings: number of conformers, seed and limits.
        embed: takes the place of `embed_conformers`, as a cache of what that returns does.
    """
    copy = canonical_copy(mol)
    if copy is None:
        raise _no_conformer("RDKit does not read its own canonical SMILES")
    canonical, order = copy
    positions = (embed or embed_conformers)(canonical, settings)
    coordinates = np.empty_like(positions)
    coordinates[:, order] = positions
    return coordinates


def embed_conformers(canonical: "Chem.Mol", settings: FeaturizationSettings) -> np.ndarray:
    """Returns (C, n, 3) float32 coordinates of a molecule in the atom order of its canonical SMILES."""
    num_atoms = canonical.GetNumAtoms()
    mol = Chem.AddHs(canonical)
    if mol.GetNumAtoms() > settings.max_conformer_atoms:
        raise _no_conformer(
            f"{mol.GetNumAtoms()} atoms with hydrogens are more than `max_conformer_atoms` "
            f"= {settings.max_conformer_atoms}"
        )
    params = rdDistGeom.ETKDGv3()
    params.randomSeed = settings.conformer_seed
    params.maxIterations = settings.max_embedding_attempts
    params.numThreads = 1
    try:
        rdDistGeom.EmbedMultipleConfs(mol, settings.num_conformers, params)
        if mol.GetNumConformers() == 0:
            params.useRandomCoords = True
            rdDistGeom.EmbedMultipleConfs(mol, settings.num_conformers, params)
        if mol.GetNumConformers() == 0:
            raise _no_conformer("ETKDG found no geometry")
        _separate_fragments(mol)
        if settings.max_mmff_iterations and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(
                mol, maxIters=settings.max_mmff_iterations, ignoreInterfragInteractions=False
            )
    except RDKIT_ERRORS as error:
        if isinstance(error, MoleculeError):
            raise
        raise _no_conformer(first_line(error)) from error
    coordinates = np.stack([conformer.GetPositions()[:num_atoms] for conformer in mol.GetConformers()])
    coordinates = coordinates.astype(np.float32)
    try:
        _check_coordinates(coordinates)
    except MoleculeError as error:
        raise _no_conformer(f"the embedded geometry {error.reason}") from error
    return coordinates


def _separate_fragments(mol: "Chem.Mol") -> None:
    """Moves the fragments of each conformer into a row: ETKDG leaves the ions of a salt in one place."""
    fragments = Chem.GetMolFrags(mol)
    if len(fragments) == 1:
        return
    for conformer in mol.GetConformers():
        positions = conformer.GetPositions()
        start = 0.0
        for atoms in map(list, fragments):
            positions[atoms, 0] += start - positions[atoms, 0].min()
            start = positions[atoms, 0].max() + FRAGMENT_GAP
        conformer.SetPositions(positions)


def _no_conformer(reason: str) -> MoleculeError:
    return MoleculeError(
        f"has no conformer: {reason}", "conformer", 'Pass coordinates, or use modality="2d+3d", which falls back to 2D'
    )


def canonical_copy(mol: "Chem.Mol") -> tuple["Chem.Mol", list[int]] | None:
    """Returns the molecule as read from its canonical SMILES, and for each atom of that its index in `mol`.

    None for the odd molecule whose SMILES RDKit does not read back.
    """
    mol = Chem.Mol(mol, True)  # without its properties, which may be no text of UTF-8 and are all read below
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
    params = Chem.SmilesParserParams()
    params.removeHs = False
    canonical = Chem.MolFromSmiles(Chem.MolToSmiles(mol), params)
    if canonical is None or canonical.GetNumAtoms() != mol.GetNumAtoms():
        return None
    order = mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"]
    return canonical, list(order)


# SDF files


def read_sdf(path: str | os.PathLike) -> Iterator["Chem.Mol | MoleculeError"]:
    """Yields the molecules of an SDF or MOL file, plain or gzipped, one for each record.

    A record that RDKit cannot read is yielded as a `MoleculeError` in its place, which the processor takes for a
    rejected molecule, so that rows stay where they are. Hydrogens are kept. A conformer counts as 3D
    (`Conformer.Is3D()`) if the record's second line says so; a record flagged "2D" is a drawing whatever its z.
    """
    require_rdkit()
    with open(path, "rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_gzip else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        for index, record in enumerate(sdf_records(file)):
            if isinstance(record, MoleculeError):
                record.index, record.molecule = index, f"record of {os.path.basename(path)}"
                yield record
                continue
            with rdBase.BlockLogs():
                result = parse_sdf_record(record)
            if isinstance(result, MoleculeError):
                title = record.partition("\n")[0].strip()
                result.index, result.molecule = index, f"record {title[:60]!r} of {os.path.basename(path)}"
            yield result


def sdf_records(lines: Iterable[str]) -> Iterator[str | MoleculeError]:
    """Yields the text of each record of an SDF file, without its "$$$$" line; a `MoleculeError` where it is damaged."""
    record: list[str] = []
    try:
        for line in lines:
            if line.startswith("$$$$"):
                yield "".join(record)
                record = []
            else:
                record.append(line)
    except (EOFError, OSError, zlib.error) as error:
        yield MoleculeError(f"lies where the file is damaged: {first_line(error)}", "sdf", "Fetch the file again")
        return
    if any(line.strip() for line in record):
        yield "".join(record)


def parse_sdf_record(record: str) -> "Chem.Mol | MoleculeError":
    """Returns the molecule of an SDF record with its hydrogens and data fields, or what is wrong with it."""
    if not record.strip():
        return MoleculeError("is empty", "sdf", "Remove it from the file")
    # RDKit reads the first; data fields after it would be those of another molecule.
    if sum(line.startswith("M  END") for line in record.split("\n")) > 1:
        return MoleculeError("holds several molecules, as if a line $$$$ were missing", "sdf", "Put one between them")
    supplier = Chem.SDMolSupplier()
    supplier.SetData(record, sanitize=True, removeHs=False)
    if not len(supplier):
        return MoleculeError("is cut short: it holds no molecule", "sdf", "Fix it")
    try:
        mol = supplier[0]
    except RDKIT_ERRORS as error:
        return MoleculeError(f"could not be read by RDKit: {first_line(error)}", "sdf", "Fix it")
    if mol is None:
        reason = _captured_reason(_read_first, record)
        return MoleculeError(f"could not be read by RDKit: {reason}", "sdf", "Fix it")
    header = record.split("\n")[1]  # a title may hold other separators of lines, which splitlines() knows
    if header[20:22].upper() == "2D":  # RDKit takes it for 3D as soon as one z is not zero
        for conformer in mol.GetConformers():
            conformer.Set3D(False)
    if any(conformer.Is3D() for conformer in mol.GetConformers()):
        _settle_double_bonds(mol)
    return mol


def _settle_double_bonds(mol: "Chem.Mol") -> None:
    """Gives double bonds that are drawn as "cis or trans" the stereo that they have in the geometry."""
    open_bonds = [bond for bond in mol.GetBonds() if bond.GetStereo() == Chem.BondStereo.STEREOANY]
    for bond in open_bonds:
        bond.SetStereo(Chem.BondStereo.STEREONONE)
        bond.SetBondDir(Chem.BondDir.NONE)
    if open_bonds:
        Chem.AssignStereochemistryFrom3D(mol)


def _read_first(record: str) -> "Chem.Mol | None":
    supplier = Chem.SDMolSupplier()
    supplier.SetData(record, sanitize=True, removeHs=False)
    return supplier[0]
