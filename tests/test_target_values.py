"""training/target_values.py and what preprocessing does with it: classes, and values of atoms that stay with their atom."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import preprocess
from corpora import Target
from data import open_dataset
from labels import labelled
from moleblend_hf.molecules_moleblend import FeaturizationSettings, MoleculeError
from rows import graphs
from sources import open_source
from target_values import AtomOrder, stored_number, stored_numbers

SHIFT = Target("shift", of_atoms=True)


def run(tmp_path: Path, content: str | dict, *flags: str, source: str = "csv") -> Path:
    """What `preprocess` makes of a file of that content."""
    path = tmp_path / f"input.{source}"
    path.write_text(content) if isinstance(content, str) else pq.write_table(pa.table(content), path)
    output = tmp_path / "out"
    preprocess.main(["--source", source, "--input", str(path), "--output", str(output), "--overwrite", *flags])
    return output


def rows_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "data" / "train-00000-of-00001.parquet")


def reasons(folder: Path) -> list[tuple]:
    found = pq.read_table(folder / "rejected.parquet").to_pylist()
    assert {row["stage"] for row in found} <= {"target"}
    return [(row["row"], row["reason"]) for row in found]


def about(folder: Path) -> dict:
    return json.loads((folder / "preprocessing.json").read_text())


# What a cell says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 2.5  -3e1", [1, 2.5, -30]),
        ("1;2.5; -30\n4", [1, 2.5, -30, 4]),
        ("[1, null, 2.5]", [1, None, 2.5]),
        ("[1,NaN]", [1, None]),
        ("1;;n/a;2", [1, None, None, 2]),
        ("[?] 1 ? 2", [1, None, 2]),
        ("[] 1 nan 2", [1, None, 2]),
        ("7", [7]),
    ],
)
def test_lists_are_read_from_text(text, expected):
    assert stored_numbers(text, SHIFT) == expected


def test_units_and_classes_are_those_of_each_atom():
    assert stored_numbers([1.0, None, float("nan"), 2], SHIFT, 10) == [10, None, None, 20]
    sites = Target("site", task="classes", class_names=("none at all", "sp2", "sp3"), of_atoms=True)
    assert stored_numbers('["sp2", "sp3", null]', sites) == [1, 2, None]


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        (SHIFT, "1;x;3", "has 'x' for target 'shift', which is no number"),
        (SHIFT, [1e39], "has 1e.39 for target 'shift', which is no number"),  # that float32 holds
        (SHIFT, "inf 1", "has 'inf' for target 'shift', which is no number"),
    ],
)
def test_lists_that_are_no_numbers(target, value, reason):
    with pytest.raises(MoleculeError, match=reason):
        stored_numbers(value, target)


TWO, THREE, NUMBERED = ("inactive", "active"), ("low", "medium", "high"), ("1", "2", "3")


@pytest.mark.parametrize(
    ("task", "names", "value", "expected"),
    [
        ("classes", (), "2", 2),
        ("classes", (), 3.0, 3),
        ("classes", THREE, " high ", 2),
        ("classes", THREE, "1", 1),
        ("classes", NUMBERED, "1", 0),
        ("classes", NUMBERED, 3.0, 2),
        ("classes", NUMBERED, "2.0", 1),
        ("classification", TWO, "active", 1),
        ("classification", TWO, 0.0, 0),
        ("classification", (), "1", 1),
        ("classification", (), True, 1),
        ("classification", (), " TRUE", 1),
        ("classification", (), "false", 0),
        ("classification", TWO, True, 1),
        ("classification", TWO, "TRUE", 1),
        ("classification", ("True", "False"), True, 0),
        ("classification", ("True", "False"), False, 1),
        ("classification", ("TRUE", "FALSE"), False, 1),
        ("classification", ("False", "True"), "True", 1),
        ("classification", ("1", "0"), True, 0),
        ("classes", ("unknown", "false", "true"), True, 2),
        ("regression", (), True, 1),
    ],
)
def test_classes_are_stored_as_their_index(task, names, value, expected):
    assert stored_number(value, Target("y", task=task, class_names=names)) == expected


@pytest.mark.parametrize(
    ("task", "names", "value", "what"),
    [
        ("classes", (), "1.5", r"no index of a class \(0, 1, 2, \.\.\.\)"),
        ("classes", (), -1.0, "no index of a class"),
        ("classes", (), "high", "no index of a class"),
        ("classes", (), "inf", "no index of a class"),
        ("classes", THREE, "High", "none of its classes low, medium, high"),
        ("classes", THREE, "3", "none of its classes"),
        ("classes", THREE, "0.5", "none of its classes"),
        ("classes", NUMBERED, "0", "none of its classes 1, 2, 3"),
        ("classification", TWO, "2", "none of its classes inactive, active"),
        ("classification", (), "2", "neither 0 nor 1"),
        ("classification", (), "active", "no number"),
        ("classes", ("true", "unknown"), False, "none of its classes true, unknown"),
        ("regression", (), "True", "no number"),
        ("regression", (), "1_000", "no number"),
        ("classes", (), "1_0", "no index of a class"),
    ],
)
def test_what_is_no_class_is_rejected(task, names, value, what):
    with pytest.raises(MoleculeError, match=f"has '?{value}'? for target 'y', which is {what}"):
        stored_number(value, Target("y", task=task, class_names=names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": "a"}, "class_names must be a list of names, got the text 'a'"),
        ({"class_names": ["a"], "tasks": {"y": "classes"}}, "must be two or more different names, got 'a'"),
        ({"class_names": ["a", "b", "a"], "tasks": {"y": "classes"}}, "different names, got 'a', 'b', 'a'"),
        (
            {"class_names": ["none", "b"], "tasks": {"y": "classes"}},
            "A cell 'none' is a missing value, so no class can",
        ),
        ({"class_names": ["a", "b"]}, "class_names are given, but no target is of classes. Say which is with --tasks"),
        (
            {"class_names": ["a", "b", "c"], "tasks": {"y": "classification"}},
            "'y' has the task 'classification', of two classes, but there are 3 class_names. Take --tasks y=classes",
        ),
        (
            {"units": {"y": "eV"}, "tasks": {"y": "classes"}},
            "'y' has the task 'classes', so it has no unit. Leave its",
        ),
        ({"atom_targets": ["y"]}, "'y' is named as a target of molecules and of atoms. Name it once"),
        ({"atom_targets": ["z"]}, "has no column 'z'"),
        ({"atom_targets": "z"}, "atom_targets must be a list of names, got the text 'z'"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, message):
    (tmp_path / "a.csv").write_text("smiles,y\nC,1\n")
    with pytest.raises(ValueError, match=message):
        open_source("csv", tmp_path / "a.csv", targets=["y"], **options)


def test_a_column_of_lists_has_to_be_one(tmp_path):
    pq.write_table(pa.table({"smiles": ["C"], "y": [1.0], "z": [[1.0]]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"'y' of .* has the type double, but lists of numbers, or text, were expected"
    ):
        open_source("parquet", tmp_path / "a.parquet", atom_targets=["y"])
    with pytest.raises(ValueError, match=r"'z' of .* has the type list.*, but numbers or text were expected"):
        open_source("parquet", tmp_path / "a.parquet", targets=["z"])
    with pytest.raises(ValueError, match="atom_targets has no meaning for source 'moleculenet'"):
        open_source("moleculenet", tmp_path / "bbbp.csv", atom_targets=["y"])


# Through preprocessing


def test_classes_are_written_with_their_names(tmp_path):
    content = "smiles,tox,active\nC,low,active\nCC,high,\nCCC,medium,inactive\nCCCC,Low,active\nN,2,1\nO,,0\n"
    flags = "--targets tox --tasks tox=classes --class_names low,medium,high"
    folder = run(tmp_path, content, *flags.split())
    assert rows_of(folder)["tox"].to_pylist() == [0, 2, 1, 2, None]
    assert reasons(folder) == [(3, "has 'Low' for target 'tox', which is none of its classes low, medium, high")]
    (target,) = about(folder)["targets"]
    assert (target["task"], target["class_names"]) == ("classes", ["low", "medium", "high"])
    assert "| `tox` | classes (0 low, 1 medium, 2 high) |" in (folder / "README.md").read_text()
    flags = "--targets active --tasks active=classification --class_names inactive,active"
    assert rows_of(run(tmp_path, content, *flags.split()))["active"].to_pylist() == [1, None, 0, 1, 1, 0]
    flags = "--targets active --tasks active=classification --class_names True,False"
    content = {"smiles": ["C", "CC", "CCC"], "active": [True, False, None]}
    folder = run(tmp_path, content, *flags.split(), source="parquet")
    assert rows_of(folder)["active"].to_pylist() == [0, 1, None]


def written(seed: int = 0) -> list[Chem.Mol]:
    """Molecules with all their hydrogens, their atoms in a random order and numbered in the property `place`."""
    rng = np.random.default_rng(seed)
    mols = []
    for smiles in ("C[C@H](N)C(=O)O", "c1ccncc1OC", "[2H]C(F)Cl", "[NH4+].[Cl-]", "C/C=C/O"):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=1)
        mol = Chem.RenumberAtoms(mol, rng.permutation(mol.GetNumAtoms()).tolist())
        for atom in mol.GetAtoms():
            atom.SetDoubleProp("place", atom.GetIdx() + 0.25)
        mols.append(mol)
    return mols


def input_of(mols: list[Chem.Mol], source: str, only_graph: bool) -> str | dict:
    """The molecules as a source with a list `x`, the x coordinate of each atom, or of each that is no common hydrogen."""
    values = []
    for mol in mols:
        positions = mol.GetConformer().GetPositions()
        kept = [atom.GetAtomicNum() > 1 or atom.GetIsotope() > 0 for atom in mol.GetAtoms()]
        values.append(positions[kept if only_graph else slice(None), 0].round(4).tolist())
    if source == "sdf":
        records = []
        for mol, numbers in zip(mols, values, strict=True):
            mol.SetProp("atom.dprop.x", " ".join(map(str, numbers)))
            records.append(Chem.SDWriter.GetText(mol))
        return "".join(records)
    params = Chem.SmilesWriteParams()
    params.canonical = False
    smiles, coordinates = [], []
    for index, mol in enumerate(mols):
        smiles.append(Chem.MolToSmiles(mol, params))
        order = list(mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])
        coordinates.append(mol.GetConformer().GetPositions()[order].round(4).tolist())
        kept = [mol.GetAtomWithIdx(atom) for atom in order]
        kept = [not only_graph or atom.GetAtomicNum() > 1 or atom.GetIsotope() > 0 for atom in kept]
        values[index] = [point[0] for point, is_kept in zip(coordinates[-1], kept, strict=True) if is_kept]
    return {"smiles": smiles, "coordinates": coordinates, "x": values}


@pytest.mark.parametrize("source", ["sdf", "parquet"])
@pytest.mark.parametrize(
    ("hydrogens", "only_graph"), [("drop", False), ("drop", True), ("keep", False), ("add", False)]
)
def test_values_of_atoms_stay_with_them(tmp_path, source, hydrogens, only_graph):
    """A target that is the x coordinate is that of the stored geometry, whatever becomes of order and hydrogens."""
    content = input_of(written(), source, only_graph)
    folder = run(tmp_path, content, "--hydrogens", hydrogens, "--atom_targets", "x", source=source)
    assert reasons(folder) == []
    rows = rows_of(folder)
    assert rows.schema.field("x").type == pa.list_(pa.float32())
    for graph, values in zip(graphs(rows), rows["x"].to_pylist(), strict=True):
        np.testing.assert_allclose(values, graph.coordinates[0, :, 0], atol=1e-4)
    dataset = open_dataset(folder)
    found = labelled(dataset.splits["train"], ["x"]).of_atoms()
    assert [len(values) for values in found] == [graph.num_atoms for graph in graphs(rows)]
    assert about(folder)["targets"][0]["of_atoms"]


def test_rdkits_own_lists_are_read(tmp_path):
    """As RDKit writes and reads them: lines that are folded, and its mark for what is missing."""
    mol = Chem.AddHs(Chem.MolFromSmiles("C" * 40))
    for atom in mol.GetAtoms():
        if atom.GetIdx() % 3:
            atom.SetDoubleProp("shift", atom.GetIdx() / 7)
        atom.SetIntProp("kind", atom.GetAtomicNum())
    Chem.CreateAtomDoublePropertyList(mol, "shift", "?")
    Chem.CreateAtomIntPropertyList(mol, "kind")
    content = Chem.SDWriter.GetText(mol)
    assert "[?]" in content
    flags = "--atom_targets shift,kind --units shift=ppm --hydrogens keep"
    row = rows_of(run(tmp_path, content, *flags.split(), source="sdf")).to_pylist()[0]
    (read,) = Chem.SDMolSupplier(str(tmp_path / "input.sdf"), removeHs=False)
    order = [atom.GetAtomicNum() for atom in Chem.MolFromSmiles(row["smiles"], sanitize=False).GetAtoms()]
    assert row["kind"] == order
    given = sorted(atom.GetDoubleProp("shift") for atom in read.GetAtoms() if atom.HasProp("shift"))
    np.testing.assert_allclose(sorted(value for value in row["shift"] if value is not None), given, rtol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `shift` | of each atom: regression, ppm |" in card


def test_lists_of_another_length_are_rejected_and_missing_ones_are_null(tmp_path):
    content = "smiles,shift\n[H]OC,1;2;3\n[H]OC,2;3\nCO,\nCO,1;2;3\nCO,1;2;\nCO,[]\nCO,1;a\nCO,[?] 4 ?\n"
    folder = run(tmp_path, content, "--atom_targets", "shift", "--duplicates", "keep")
    assert rows_of(folder)["shift"].to_pylist() == [[2, 3], [2, 3], None, [4, None]]
    wrong = "has {} values for the target of atoms 'shift', but 2 atoms are written, of which the graph has 2"
    assert reasons(folder) == [
        (3, wrong.format(3)),
        (4, wrong.format(3)),
        (5, wrong.format(0)),
        (6, "has 'a' for target 'shift', which is no number"),
    ]
    first = about(folder)["content_sha256"]
    again = run(tmp_path, content.replace("2;3\nCO", "2;4\nCO"), "--atom_targets", "shift", "--duplicates", "keep")
    assert about(again)["content_sha256"] != first


def test_fields_of_an_sdf_that_are_no_lists_of_atoms_are_named(tmp_path):
    content = Chem.SDWriter.GetText(Chem.MolFromSmiles("CO")).replace("$$$$", "> <atom.prop.shift>\n1 2\n\n$$$$")
    with pytest.raises(
        ValueError, match=r"no data fields for the target of atoms 'shift'; .*'atom.iprop.shift' was exp"
    ):
        run(tmp_path, content, "--atom_targets", "shift", source="sdf")


def test_hydrogens_that_are_added_have_no_value(tmp_path):
    content = "smiles,shift\nCO,4;5\nO[H],8;1\n"
    for row in rows_of(run(tmp_path, content, "--hydrogens", "add", "--atom_targets", "shift")).to_pylist():
        element = [features[0] for features in row["atom_features"]]
        known = {(place, value) for place, value in zip(element, row["shift"], strict=True) if value is not None}
        assert known == ({(6, 4), (8, 5)} if 6 in element else {(8, 8), (1, 1)})
        assert row["shift"].count(None) == len(element) - 2


def test_units_of_atoms_are_converted(tmp_path):
    content = {"smiles": ["CO"], "charge": [[1.0, None]], "energy": [[1, 2]]}
    flags = "--atom_targets charge,energy --units energy=hartree charge=e --convert energy=eV"
    row = rows_of(run(tmp_path, content, *flags.split(), source="parquet")).to_pylist()[0]
    assert row["charge"] == [1, None]
    assert row["energy"] == pytest.approx([27.211386, 54.422772], rel=1e-6)


def test_atoms_without_a_certain_place_are_named():
    with pytest.raises(MoleculeError, match="has 3 atoms, but 2 if its hydrogens are dropped after it is read"):
        AtomOrder("CO", FeaturizationSettings(), 3, None)
