"""Inputs that nobody would write, and what becomes of them: a result, a documented error, or a bug, which is raised.

`test_fuzz.py` tries a few hundred of each kind, `benchmarks/fuzz.py` any number.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from rdkit import Chem, rdBase
from tiny import GOLDEN, SMILES

from moleblend_hf import MoleBlendConfig, MoleBlendProcessor, MoleculeError
from moleblend_hf.convert_original_checkpoint import convert_state, load_original


def one_of(*strategies: st.SearchStrategy) -> st.SearchStrategy:
    """Each as likely as the others; `st.one_of` takes the parts of those that are a choice themselves for more of them."""
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


# Molecules


PIECES = [
    *"BCNOPSFIbcnops*()[]=#$:-+.@/\\%123456789H~>|,{}^_& \t\n",
    *("Cl", "Br", "[nH]", "[Na+]", "[13C@@H]", "[Fe+2]", "[C@]", "[SH6]", "%12", "C1CC1", "c1ccccc1", "@SP1", "@OH3", "->", "[2H]"),
    *("[H]", "[Xx]", "[999Og-9]", "[*:1]", " |$a;b$|", " |^1:0|", ">>", "\ud800"),
]  # fmt: skip
DRUGS = [
    *SMILES,
    "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "CC(C)(C)NCC(O)c1ccc(O)c(CO)c1",
    "C[C@H]1CC[C@@H]2[C@@]13C(=O)O[C@H]3C=C2",
    "N[Pt](N)(Cl)Cl",
    "[O-][N+](=O)c1ccc2[nH]cnc2c1",
    "F[C@@H](Cl)/C=C\\[Si](C)(C)C#N",
]

pieces = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
# Surrogates too, which are no UTF-8.
texts = st.one_of(
    pieces, st.text(st.characters(exclude_categories=()), max_size=20), st.text(string.printable, max_size=30)
)


@st.composite
def mutated_smiles(draw: st.DrawFn) -> str:
    """A real SMILES with some places deleted, doubled, exchanged or filled with something else."""
    smiles = draw(st.sampled_from(DRUGS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(smiles)))
        stop = draw(st.integers(start, min(len(smiles), start + 4)))
        middle = draw(st.one_of(st.just(""), st.just(smiles[start:stop] * 2), st.sampled_from(PIECES)))
        smiles = smiles[:start] + middle + smiles[stop:]
    return smiles


@st.composite
def rdkit_molecules(draw: st.DrawFn) -> Chem.Mol:
    """Atoms and bonds as RDKit lets anyone put them together, unsanitized, perhaps with a conformer."""
    molecule = Chem.RWMol()
    for _ in range(draw(st.integers(0, 9))):
        atom = Chem.Atom(draw(st.one_of(st.sampled_from([1, 6, 6, 6, 7, 8, 16, 17]), st.integers(0, 118))))
        if draw(st.integers(0, 4)) == 0:
            atom.SetFormalCharge(draw(st.integers(-9, 9)))
            atom.SetNumExplicitHs(draw(st.integers(0, 5)))
            atom.SetNumRadicalElectrons(draw(st.integers(0, 5)))
            atom.SetIsotope(draw(st.integers(0, 300)))
            atom.SetChiralTag(draw(st.sampled_from(list(Chem.ChiralType.values.values()))))
            atom.SetNoImplicit(draw(st.booleans()))
            atom.SetIsAromatic(draw(st.booleans()))
        molecule.AddAtom(atom)
    num_atoms = molecule.GetNumAtoms()
    if num_atoms > 1:
        types = [Chem.BondType.SINGLE] * 4 + list(Chem.BondType.values.values())
        for _ in range(draw(st.integers(0, num_atoms + 2))):
            first, second = (draw(st.integers(0, num_atoms - 1)) for _ in range(2))
            if first != second and molecule.GetBondBetweenAtoms(first, second) is None:
                molecule.AddBond(first, second, draw(st.sampled_from(types)))
                if draw(st.integers(0, 4)) == 0:
                    bond = molecule.GetBondBetweenAtoms(first, second)
                    bond.SetStereo(draw(st.sampled_from([Chem.BondStereo.STEREOANY, Chem.BondStereo.STEREONONE])))
                    bond.SetBondDir(draw(st.sampled_from(list(Chem.BondDir.values.values()))))
    if num_atoms and draw(st.booleans()):
        conformer = Chem.Conformer(num_atoms)
        conformer.Set3D(draw(st.booleans()))
        conformer.SetPositions(np.array(draw(positions(num_atoms)), dtype=np.float64).reshape(num_atoms, 3))
        molecule.AddConformer(conformer)
    return molecule.GetMol()


numbers = st.one_of(st.floats(-5, 5), st.floats(), st.sampled_from([0.0, 1e-320, 1e38, 1e300]))


def positions(num_atoms: int) -> st.SearchStrategy[list]:
    """A row for each atom: mostly a molecule's, at times anything."""
    values = st.one_of(st.floats(-5, 5), st.floats(-5, 5), numbers)
    return st.lists(st.lists(values, min_size=3, max_size=3), min_size=num_atoms, max_size=num_atoms)


symbols = st.one_of(st.sampled_from(["C", "H", "O", "N", "Cl", "Na"]), st.sampled_from([6, 1, 0, -1, 119, "", "Xx", None, 1.5]))  # fmt: skip


@st.composite
def pairs(draw: st.DrawFn) -> tuple:
    """`(symbols, coordinates)`, of which one may not fit the other."""
    common = st.lists(st.sampled_from(["C", "H", "O", "N", 6, 1, 8]), max_size=8)
    names = draw(st.one_of(common, common, st.lists(symbols, max_size=5), texts))
    return names, draw(st.one_of(positions(len(names)), coordinates))


coordinates = st.one_of(
    st.none(),
    st.integers(0, 6).flatmap(positions),
    st.integers(1, 5).flatmap(positions).map(np.array),
    st.lists(st.integers(1, 4).flatmap(positions), max_size=3),
    st.lists(st.lists(st.one_of(numbers, st.none(), st.text(max_size=2)), max_size=4), max_size=4),
    st.sampled_from(["", "CCO", 3, np.zeros((0, 3)), np.zeros((1, 2, 3, 3)), np.array([["a"] * 3]), {}, object()]),
)
# What is no molecule at all.
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=5),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.tuples(st.text(max_size=2)),
    st.tuples(st.integers(), st.none()),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@dataclass(frozen=True)
class MoleculeInput:
    """What a processor is given."""

    molecule: Any
    coordinates: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        molecule = self.molecule
        if isinstance(molecule, Chem.Mol):
            molecule = f"Chem.Mol({molecule.ToBinary()!r})"
        return f"MoleculeInput({molecule!r}, {self.coordinates!r}, {self.settings!r})"


molecules = st.builds(
    MoleculeInput,
    one_of(
        texts,
        texts,
        mutated_smiles(),
        mutated_smiles(),
        mutated_smiles(),
        rdkit_molecules(),
        rdkit_molecules(),
        pairs(),
        junk,
    ),
    one_of(st.none(), st.none(), st.none(), coordinates),
    st.fixed_dictionaries(
        {
            "modality": st.sampled_from(["auto", "auto", "2d", "3d", "2d+3d"]),
            "hydrogens": st.sampled_from(["drop", "keep", "add"]),
            "bonds": st.sampled_from([None, "determine"]),
            "canonical_atom_order": st.booleans(),
        }
    ),
)
# A molecule takes as long as these allow.
LIMITS = {
    "max_conformer_atoms": 12,
    "max_embedding_attempts": 1,
    "max_mmff_iterations": 5,
    "max_bond_order_iterations": 100,
}


def try_processor(given: MoleculeInput) -> str:
    """A molecule through the processor: the graph is sound and pads to a batch, or there is a `MoleculeError`."""
    processor = MoleBlendProcessor(**given.settings, **LIMITS)
    with rdBase.BlockLogs():
        try:
            graph = processor.featurize(given.molecule, given.coordinates)
        except MoleculeError as error:
            return f"MoleculeError, {error.stage}"
    num_atoms = graph.num_atoms
    sizes = np.array(MoleBlendConfig.atom_vocabulary_sizes)
    assert num_atoms > 0
    assert graph.atom_features.shape == (num_atoms, 9)
    assert ((graph.atom_features >= 1) & (graph.atom_features <= sizes)).all()
    assert graph.coordinates.shape[1:] == (num_atoms, 3)
    assert np.isfinite(graph.coordinates).all()
    assert (graph.bonds < num_atoms).all()
    modality = "3d" if not graph.has_bonds else None
    batch = processor.pad([graph], modality=modality)
    for name, tensor in batch.items():
        assert torch.isfinite(tensor.float()).all(), name
    return "a graph"


# Configs


FIELDS = {each.name: each.default for each in fields(MoleBlendConfig) if each.name in MoleBlendConfig.__annotations__}
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    st.sampled_from(["gelu", "uniform", "mean", "sum", "log10", "direction"]),
)
any_values = st.one_of(
    values,
    st.lists(values, max_size=4),
    st.lists(st.one_of(st.floats(0, 1), st.integers(0, 12)), max_size=4),
    st.tuples(values, values),
    st.dictionaries(st.text(max_size=2), values, max_size=2),
)


@st.composite
def plausible(draw: st.DrawFn, name: str) -> Any:
    """A value near the field's default."""
    default = FIELDS[name]
    if isinstance(default, bool) or default is None or isinstance(default, str):
        return draw(any_values)
    if isinstance(default, tuple):
        return [draw(st.sampled_from([value, value, value * 2, 0, -value])) for value in default]
    return default * draw(st.sampled_from([0, 1, 1, 2, -1, 0.5]))


configs = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: one_of(*[plausible(name)] * 3, any_values) for name in names})
)


def _named(error: Exception) -> str:
    """The type of an error that says which field it is about."""
    assert any(name in str(error) for name in FIELDS), error
    return type(error).__name__


def try_config(given: dict[str, Any]) -> str:
    """Values of a config: it is valid and survives being saved, or there is an error that names a field."""
    try:
        config = MoleBlendConfig(**given)
    except (ValueError, TypeError, StrictDataclassError) as error:
        return _named(error)
    again = MoleBlendConfig.from_dict(config.to_dict())
    assert again.to_json_string() == config.to_json_string()
    return "a config"


# Checkpoints of the original


@cache
def original_state(run: str) -> dict[str, torch.Tensor]:
    """The original's weights of the run "pretrain" or "finetune"."""
    return load_original(GOLDEN / f"{run}_state.safetensors")


@dataclass(frozen=True)
class StateInput:
    """A state of the original, and what is changed in it: the key, how, and a number for it."""

    run: str
    changes: tuple[tuple[int, str, int], ...]

    def tensors(self) -> dict[str, Any]:
        """The state as it is after the changes."""
        state: dict[str, Any] = dict(original_state(self.run))
        for index, change, number in self.changes:
            if not state:
                break
            name = list(state)[index % len(state)]
            tensor = state[name]
            if change == "delete":
                del state[name]
            elif change == "rename":
                state[name[: number % len(name)] + "x" + name[number % len(name) :]] = state.pop(name)
            elif change == "layer":
                state[name.replace("layers.0", f"layers.{number}")] = tensor
            elif change == "junk":
                state[name] = [None, number, "weight", [1.0], np.zeros(3)][number % 5]
            elif isinstance(tensor, torch.Tensor):
                state[name] = changed(tensor, change, number)
        return state


def changed(tensor: torch.Tensor, change: str, number: int) -> torch.Tensor:
    """A tensor of another shape or type."""
    if change == "unsqueeze":
        return tensor.unsqueeze(number % (tensor.ndim + 1))
    if change == "scalar":
        return torch.tensor(1.0)
    if change == "type":
        tensor = tensor.real
        return tensor.to([torch.int8, torch.bool, torch.float16, torch.complex64][number % 4])
    if tensor.ndim == 0:
        return tensor
    if change == "cut":
        return tensor[: number % (len(tensor) + 1)]
    if change == "grow":
        return torch.cat([tensor, tensor])
    return tensor.flatten() if change == "flatten" or tensor.ndim == 1 else tensor.mT


CHANGES = ("delete", "rename", "layer", "junk", "cut", "grow", "flatten", "unsqueeze", "transpose", "scalar", "type")
states = st.builds(
    StateInput,
    st.sampled_from(["pretrain", "finetune"]),
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from(CHANGES), st.integers(0, 40)), min_size=1, max_size=3).map(
        tuple
    ),
)


def try_converter(given: StateInput) -> str:
    """A state through the converter: a model all of whose parameters are floats, or a `ValueError`."""
    try:
        model, _ = convert_state(given.tensors())
    except ValueError:
        return "ValueError"
    assert all(parameter.is_floating_point() and parameter.numel() for parameter in model.parameters())
    return "a model"


TRIALS: dict[str, tuple[st.SearchStrategy, Callable[[Any], str]]] = {
    "processor": (molecules, try_processor),
    "config": (configs, try_config),
    "converter": (states, try_converter),
}
