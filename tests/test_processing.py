"""Processor: batches, modalities, rejections, saving and loading."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from transformers import AutoFeatureExtractor, AutoProcessor

from moleblend_hf.graphs_moleblend import MolecularGraph
from moleblend_hf.molecules_moleblend import FeaturizationSettings, MoleculeError
from moleblend_hf.processing_moleblend import MoleBlendProcessor

RELATIONS = {"degree", "shortest_path_distance", "path_bond_types"}
ATOMS = {"atom_features", "attention_mask"}
COORDINATES = {"coordinates", "coordinates_mask"}
ETHANOL_3D = np.array([[-0.89, 0.16, -0.07], [0.47, -0.50, -0.05], [1.39, 0.28, 0.71]])


@pytest.fixture(scope="module")
def processor() -> MoleBlendProcessor:
    return MoleBlendProcessor()


def embedded(smiles: str) -> Chem.Mol:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    return mol


# Batches


def test_batch_has_the_glossarys_names_shapes_and_dtypes(processor):
    batch = processor(["CCO", "c1ccccc1O"], coordinates=[ETHANOL_3D, None], labels=[[1.5, 2.0], [None, 3.0]])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "atom_features": ((2, 7, 9), torch.int64),
        "attention_mask": ((2, 7), torch.int64),
        "degree": ((2, 7), torch.int64),
        "shortest_path_distance": ((2, 7, 7), torch.int64),
        "path_bond_types": ((2, 7, 7, 5), torch.int64),
        "coordinates": ((2, 7, 3), torch.float32),
        "coordinates_mask": ((2,), torch.bool),
        "labels": ((2, 2), torch.float32),
    }
    assert set(batch) - {"labels"} == set(processor.model_input_names)
    assert batch["coordinates_mask"].tolist() == [True, False]
    assert batch["labels"][0].tolist() == [1.5, 2.0]
    assert batch["labels"].isnan().tolist() == [[False, False], [True, False]]


def test_padding_is_zero_and_real_values_do_not_depend_on_the_batch(processor):
    alone, together = processor("CCO", ETHANOL_3D), processor(["CCO", "CCCCCCCC"], [ETHANOL_3D, None])
    for name, value in alone.items():
        padded = together[name][0]
        real = tuple(map(slice, value.shape[1:]))
        assert torch.equal(padded[real], value[0]), name
        assert padded.to(torch.float64).sum() == value.to(torch.float64).sum(), name
    assert together["coordinates"][1].abs().sum() == 0


def test_one_molecule_is_a_batch_of_one_and_a_tuple_is_one_molecule(processor):
    assert processor("CCO")["atom_features"].shape == (1, 3, 9)
    pair = (["C", "C", "O"], ETHANOL_3D)
    assert set(processor(pair, modality="3d")) == ATOMS | COORDINATES
    with pytest.raises(MoleculeError, match="only a list is a batch"):
        processor({"CCO", "CC"})


def test_numpy_batches_hold_the_same_numbers(processor):
    expected = processor(["CCO", "C"], return_tensors="pt")
    for name, value in processor(["CCO", "C"], return_tensors="np").items():
        assert isinstance(value, np.ndarray)
        assert np.array_equal(value, expected[name])


@pytest.mark.parametrize(
    ("labels", "dtype", "expected"),
    [
        ([1, 0], torch.int64, [[1], [0]]),
        ([True, False], torch.int64, [[1], [0]]),
        ([1, None], torch.float32, [[1.0], [None]]),
        ([[0.5, None], [1, 2]], torch.float32, [[0.5, None], [1.0, 2.0]]),
        (np.array([[1.0], [2.0]]), torch.float32, [[1.0], [2.0]]),
    ],
)
def test_labels_are_one_row_a_molecule(processor, labels, dtype, expected):
    found = processor(["CC", "CO"], labels=labels)["labels"]
    assert found.dtype == dtype
    assert [[None if value != value else value for value in row] for row in found.tolist()] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"molecules": []}, "The list of molecules is empty"),
        ({"molecules": ["CC"], "labels": [1, 2]}, "`labels` has 2 entries for 1 molecules"),
        ({"molecules": ["CC", "CO"], "labels": 1.0}, "`labels` has 1 entries for 2 molecules"),
        ({"molecules": ["CC"], "labels": [["a b"]]}, "`labels` cannot be turned into an array"),
        ({"molecules": ["CC", "CO"], "labels": [[1], [1, 2]]}, "`labels` cannot be turned into an array"),
        ({"molecules": ["CC", "CO"], "coordinates": [None]}, "`coordinates` has 1 entries for 2 molecules"),
        ({"molecules": ["CC"], "on_error": "ignore"}, "`on_error` is 'ignore'"),
        ({"molecules": ["CC"], "modality": "1d"}, "`modality` is '1d', but has to be one of 'auto', '2d'"),
    ],
)
def test_calls_that_make_no_sense_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


# Labels of atoms


def by_atom(molecules: list, batch) -> list[list]:
    """What each atom of a molecule's graph has for a label; padding has none."""
    sizes = batch["attention_mask"].sum(1).tolist()
    assert len(sizes) == len(molecules)
    for labels, size in zip(batch["labels"], sizes, strict=True):
        assert bool((labels[size:] == -100).all() if labels.dtype == torch.int64 else labels[size:].isnan().all())
    return [labels[:size].tolist() for labels, size in zip(batch["labels"], sizes, strict=True)]


@pytest.mark.parametrize(
    "column", [np.array, pd.Series, pa.array, lambda smiles: Dataset.from_dict({"x": smiles})["x"]]
)
def test_a_column_is_a_list_of_molecules(processor, column):
    smiles = ["CCO", "C", "CN"]
    expected = processor(smiles, labels=[1.0, 2.0, 3.0])
    found = processor(column(smiles), labels=[1.0, 2.0, 3.0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [graph.num_atoms for graph in processor.featurize_many(column(smiles))] == [3, 1, 2]


def test_a_table_is_no_column(processor):
    table = pd.DataFrame({"C": ["CCO", "CC"], "N": ["a", "b"]})
    for given in (table, table.to_numpy()):
        with pytest.raises(ValueError, match=r"is a table of shape \(2, 2\)\. Pass the column"):
            processor(given)
    assert torch.equal(processor(np.array("CCO"))["degree"], processor("CCO")["degree"])


def test_columns_of_pandas_are_taken_by_position(processor):
    """A shuffle moves the labels of the rows with them."""
    table = pd.DataFrame({"y": [1.0, 2.0, 3.0], "z": [4.0, None, 6.0]}, index=[2, 0, 1])
    molecules = ["C", "CC", "CCC"]
    assert processor(molecules, labels=table["y"])["labels"].tolist() == [[1], [2], [3]]
    found = processor(molecules, labels=table)["labels"]
    torch.testing.assert_close(found, torch.tensor([[1, 4], [2, torch.nan], [3, 6.0]]), equal_nan=True)
    of_atoms = pd.Series([[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]], index=[2, 0, 1])
    assert processor(molecules, atom_labels=of_atoms)["labels"].nansum() == 10
    graphs = processor.featurize_many(pd.Series(["C", "C1CC", "CC"], index=[7, 8, 9]), on_error="skip")
    assert [graph.num_atoms for graph in graphs] == [1, 2]
    assert [(rejected.index, rejected.molecule) for rejected in processor.rejected] == [(1, "C1CC")]


def test_atom_labels_are_padded_as_nan_or_ignored(processor):
    molecules = ["CCO", "C"]
    batch = processor(molecules, atom_labels=[[1.0, 2.0, 3.0], None])
    assert (batch["labels"].shape, batch["labels"].dtype) == ((2, 3, 1), torch.float32)
    assert by_atom(molecules, batch)[0] == [[1], [2], [3]]
    assert batch["labels"][1].isnan().all()
    batch = processor(molecules, atom_labels=[np.array([[1, 5], [2, 6], [3, 7]]), [[0, 9]]])
    assert (batch["labels"].shape, batch["labels"].dtype) == ((2, 3, 2), torch.int64)
    assert by_atom(molecules, batch) == [[[1, 5], [2, 6], [3, 7]], [[0, 9]]]
    batch = processor(molecules, atom_labels=[[1, None, 3], [4]])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"][0, 1].isnan().all()
    assert processor("CCO", atom_labels=[1, 2, 3])["labels"].tolist() == [[[1], [2], [3]]]


def test_rdkit_is_silent_about_hydrogens_that_labels_are_of(processor, capfd):
    assert processor("[H+].[H]OC", atom_labels=[1, 2, 3, 4])["labels"].tolist() == [[[1], [3], [4]]]
    assert capfd.readouterr().err == ""


HYDROGENS_WRITTEN = [
    "[H]C([H])([H])O[H]",
    "C([H])([2H])=O",
    "[H][H]",
    "[H]/C(C)=C(/[H])Cl",
    "[H][C@](F)(Cl)Br",
    "[H]O[H].[Na+].[H][O-]",
]


@pytest.mark.parametrize("hydrogens", ["drop", "keep", "add"])
@pytest.mark.parametrize("form", ["smiles", "renumbered", "pair"])
def test_atom_labels_stay_with_their_atoms(hydrogens, form):
    """Labels that are x coordinates come back where the coordinates do, however hydrogens are treated."""
    processor = MoleBlendProcessor(hydrogens=hydrogens, bonds="determine")
    params = Chem.SmilesParserParams()
    params.removeHs = False
    rng = np.random.default_rng(0)
    molecules, positions = [], []
    for smiles in HYDROGENS_WRITTEN:
        mol = Chem.MolFromSmiles(smiles, params) if form != "pair" else embedded("C[C@H](N)C=O")
        if form != "smiles":
            mol = Chem.RenumberAtoms(mol, rng.permutation(mol.GetNumAtoms()).tolist())
        given = rng.normal(size=(mol.GetNumAtoms(), 3))
        if form == "pair":
            given = mol.GetConformer().GetPositions()
            molecules.append(([atom.GetSymbol() for atom in mol.GetAtoms()], given))
        else:
            molecules.append(smiles if form == "smiles" else mol)
        positions.append(given)
    labels = [given[:, 0] for given in positions]
    batch = processor(molecules, None if form == "pair" else positions, atom_labels=labels)
    found, x = batch["labels"][..., 0], batch["coordinates"][..., 0]
    known = ~found.isnan()
    assert torch.equal(found[known], x[known])
    is_atom = batch["attention_mask"] == 1
    assert torch.equal(known, is_atom) == (hydrogens != "add" or form == "pair")  # a pair has all its hydrogens
    assert known.sum() == sum(map(len, labels)) or hydrogens == "drop"
    of_atoms = [values[mask].numpy() for values, mask in zip(batch["labels"], is_atom, strict=True)]
    graphs = processor.featurize_many(molecules)
    torch.testing.assert_close(processor.pad(graphs, atom_labels=of_atoms)["labels"], batch["labels"], equal_nan=True)


def test_atom_labels_are_in_the_order_of_the_input_without_the_dropped_hydrogens(processor):
    molecules = ["[H]OC([H])=N", "O([H])C=N"]
    every = processor(molecules, atom_labels=[[9, 1, 2, 9, 3], [1, 9, 2, 3]])
    kept = processor(molecules, atom_labels=[[1, 2, 3], [1, 2, 3]])
    assert every["labels"].tolist() == kept["labels"].tolist() == [[[1], [2], [3]]] * 2
    with_gap = processor(molecules, atom_labels=[[9, 1, 2, 9, 3], [1, 9, None, 3]])["labels"]
    assert with_gap.dtype == torch.float32
    assert with_gap.isnan().tolist() == [[[False]] * 3, [[False], [True], [False]]]


def test_added_hydrogens_have_no_label():
    processor = MoleBlendProcessor(hydrogens="add")
    found = processor(["CO", "N"], atom_labels=[[1, 2], None])["labels"]
    assert found[0].tolist() == [[1], [2], *[[-100]] * 4]
    found = processor(["CO", "N"], atom_labels=[[1, 2], [0.5]])["labels"]
    assert found[0, 2:].isnan().all()
    assert found[1, 1:].isnan().all()


def test_atom_labels_of_skipped_molecules_go_with_them(processor):
    batch = processor(["C1CC", "CO", None, "N"], atom_labels=[[7.0], [1.0, 2.0], [8.0], [3.0]], on_error="skip")
    assert by_atom(["CO", "N"], batch) == [[[1], [2]], [[3]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atom_labels": [[1, 2]]}, "`atom_labels` has 1 entries for 2 molecules"),
        ({"atom_labels": [[1, 2], [1, 2]], "labels": [1, 2]}, "Both `labels` and `atom_labels` are given"),
        ({"atom_labels": [None, None]}, "`atom_labels` is None for all molecules"),
        (
            {"atom_labels": [[1, 2], [1, 2, 3, 4]]},
            r"Molecule 1 \('\[H\]OC'\) has labels for 4 atoms, but the input writes 3, of which the graph has 2. Pass",
        ),
        (
            {"atom_labels": [[1, "a"], [1, 2]]},
            r"Molecule 0 \('CO'\) has atom labels that cannot be turned into an array",
        ),
        ({"atom_labels": [1, 2]}, r"Molecule 0 \('CO'\) has atom labels of shape \(\), but \(atoms,\) or"),
        ({"atom_labels": [[[1, 1], [2, 2]], [1, 2]]}, r"Graph 1 has atom labels of shape \(2, 1\), but \(2, 2\) is"),
    ],
)
def test_atom_labels_that_do_not_fit_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(["CO", "[H]OC"], **arguments)


def test_pad_takes_atom_labels_of_graphs(processor):
    graphs = processor.featurize_many(["CO", "[H]OC"])
    with pytest.raises(ValueError, match=r"Graph 1 has atom labels of shape \(3, 1\), but \(2, 1\) is expected"):
        processor.pad(graphs, atom_labels=[[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="`atom_labels` has 1 entries for 2 graphs"):
        processor.pad(graphs, atom_labels=[[1, 2]])


def test_one_smiles_is_no_list():
    """Else each of its letters would be taken for a molecule."""
    with pytest.raises(ValueError, match="`molecules` is one SMILES, 'CCO'"):
        MoleBlendProcessor().featurize_many("CCO")


# Modalities


def test_modality_decides_which_relations_are_in_the_batch(processor):
    molecules, coordinates = ["CCO", "CCN"], [ETHANOL_3D, None]
    found = {m: set(processor(molecules, coordinates, modality=m)) for m in ("auto", "2d", "3d", "2d+3d")}
    assert found == {
        "auto": ATOMS | RELATIONS | COORDINATES,
        "2d": ATOMS | RELATIONS,
        "3d": ATOMS | COORDINATES,
        "2d+3d": ATOMS | RELATIONS | COORDINATES,
    }
    assert set(processor(molecules)) == ATOMS | RELATIONS  # nothing was given, nothing is made


def test_modality_auto_takes_3d_conformers_but_no_drawings(processor):
    drawing = Chem.MolFromSmiles("CCO")
    conformer = Chem.Conformer(3)
    conformer.SetPositions(ETHANOL_3D)
    conformer.Set3D(False)
    drawing.AddConformer(conformer)
    assert processor([drawing, embedded("CCO")])["coordinates_mask"].tolist() == [False, True]


def test_given_coordinates_win_over_generated_ones(processor):
    batch = processor(["CCO", "CCO"], [ETHANOL_3D, None], modality="2d+3d")
    torch.testing.assert_close(batch["coordinates"][0], torch.tensor(ETHANOL_3D, dtype=torch.float32))
    assert batch["coordinates_mask"].all()
    assert not torch.equal(batch["coordinates"][0], batch["coordinates"][1])


def test_bad_coordinates_are_ignored_in_2d_mode_and_named_otherwise(processor):
    processor("CCO", np.zeros((3, 3)), modality="2d")
    for modality in ("auto", "2d+3d", "3d"):
        with pytest.raises(MoleculeError, match="coordinates that are all zero"):
            processor("CCO", np.zeros((3, 3)), modality=modality)


def test_generated_conformers_depend_on_the_seed_alone():
    first, again, other = (MoleBlendProcessor(modality="3d", conformer_seed=seed) for seed in (1, 1, 2))
    coordinates = [p("CCCCO")["coordinates"] for p in (first, again, other)]
    assert torch.equal(coordinates[0], coordinates[1])
    assert not torch.equal(coordinates[0], coordinates[2])


# Rejections and reports


def test_skip_keeps_rows_and_labels_where_they_belong(processor):
    molecules = ["CCO", "C1CC", "CC", None, "C"]
    batch = processor(molecules, labels=[10, 11, 12, 13, 14], on_error="skip")
    assert batch["kept_indices"].tolist() == [0, 2, 4]
    assert batch["labels"].tolist() == [[10], [12], [14]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 1]
    assert [(index, molecule, stage) for index, molecule, stage, _ in processor.rejected] == [
        (1, "C1CC", "parse"),
        (3, None, "type"),
    ]
    assert processor.rejected[0].reason == "could not be parsed by RDKit: unclosed ring"
    processor("CCO")
    assert processor.rejected == []


def test_raise_names_the_index_the_molecule_and_the_remedy(processor):
    message = (
        r"^Molecule 300 \('C1CC'\) could not be parsed by RDKit: unclosed ring\. Fix it, or pass on_error=\"skip\"\.$"
    )
    with pytest.raises(MoleculeError, match=message):
        processor(["CC"] * 300 + ["C1CC"])


def test_nothing_kept_is_an_error(processor):
    with pytest.raises(
        ValueError, match=r"None of the 2 molecules could be featurized \(2 at stage 'parse'\).*'C1CC'"
    ):
        processor(["C1CC", ""], on_error="skip")
    assert len(processor.rejected) == 2


def test_conformers_that_fail_are_fallbacks_in_2d3d_and_rejections_in_3d():
    processor = MoleBlendProcessor(max_conformer_atoms=20)
    molecules = ["CCO", "CCCCCCCCCC"]
    batch = processor(molecules, modality="2d+3d")
    assert batch["coordinates_mask"].tolist() == [True, False]
    assert [(f.index, f.molecule) for f in processor.fallbacks] == [(1, "CCCCCCCCCC")]
    assert "32 atoms with hydrogens are more than `max_conformer_atoms` = 20" in processor.fallbacks[0].reason
    batch = processor(molecules, modality="3d", on_error="skip")
    assert batch["kept_indices"].tolist() == [0]
    assert [r.stage for r in processor.rejected] == ["conformer"]


def test_chirality_that_rdkit_does_not_know_is_none(processor):
    """In a ring, RDKit's SMILES writer crashes on it (found by benchmarks/fuzz.py)."""
    ring, broken = (Chem.MolFromSmiles(smiles, sanitize=False) for smiles in ("OC1CC1", "OC1(F)(Cl)(Br)CC1"))
    for mol in (ring, broken):
        mol.GetAtomWithIdx(1).SetChiralTag(Chem.ChiralType.CHI_OTHER)
    found, expected = (dict(processor(molecule, return_tensors="np")) for molecule in (ring, "OC1CC1"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert ring.GetAtomWithIdx(1).GetChiralTag() == Chem.ChiralType.CHI_OTHER
    with pytest.raises(MoleculeError, match=r"'OC1\(F\)\(Cl\)\(Br\)CC1'\) could not be sanitized"):
        processor(broken)


def test_values_never_seen_are_counted(processor):
    processor(["[Na+]", "*C", "CCO"])
    assert processor.unknown_values == {"hybridization": 2, "atomic_num": 1}


# Graphs


def test_featurize_and_pad_give_what_the_call_gives(processor):
    molecules, labels = ["CCO", "c1ccccc1", embedded("CC")], [1.0, 2.0, 3.0]
    graphs = [processor.featurize(molecule) for molecule in molecules]
    expected = processor(molecules, labels=labels)
    for name, value in processor.pad(graphs, labels).items():
        assert torch.equal(value, expected[name]), name


def test_featurize_many_is_the_same_for_any_number_of_processes(processor):
    molecules = ["C" * (1 + index % 30) for index in range(600)] + ["C1CC", Chem.MolFromSmiles("CCO")]
    one = processor.featurize_many(molecules, on_error="skip")
    rejected = processor.rejected
    two = processor.featurize_many(molecules, on_error="skip", num_proc=2)
    assert processor.rejected == rejected
    assert len(one) == len(two) == 601
    for first, second in zip(one, two, strict=True):
        for name in MolecularGraph.__slots__:
            assert np.array_equal(getattr(first, name), getattr(second, name))
    # The order of ligands around a metal is a property, which RDKit's own pickles leave out.
    ligands = [Chem.MolFromSmiles(f"Cl[Pt@SP{order}](Cl)(N)N") for order in (1, 2, 3)]
    one, two = (processor.featurize_many(ligands, modality="2d+3d", num_proc=num_proc) for num_proc in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert np.array_equal(first.coordinates, second.coordinates)
    assert not np.allclose(one[0].coordinates, one[1].coordinates)
    with pytest.raises(ValueError, match="`num_proc` is 0"):
        processor.featurize_many(["C"], num_proc=0)


def test_pad_takes_the_conformer_it_is_told(processor):
    ensemble = np.stack([ETHANOL_3D, ETHANOL_3D + 1.0])
    graphs = [processor.featurize("CCO", ensemble), processor.featurize("CCO"), processor.featurize("CCO", ETHANOL_3D)]
    first, chosen = processor.pad(graphs), processor.pad(graphs, conformer_index=[1, 7, 0])
    torch.testing.assert_close(chosen["coordinates"][0], first["coordinates"][0] + 1.0)
    assert torch.equal(chosen["coordinates"][1:], first["coordinates"][1:])
    with pytest.raises(ValueError, match="`conformer_index` is 1 for graph 2, which has 1 conformers"):
        processor.pad(graphs, conformer_index=1)


def test_pad_names_graphs_that_lack_what_the_modality_needs(processor):
    bare = processor.featurize((["C", "O"], ETHANOL_3D[:2]), modality="3d")
    with pytest.raises(ValueError, match="Graph 1 has no bonds"):
        processor.pad([processor.featurize("CC"), bare])
    with pytest.raises(ValueError, match="Graph 1 has no coordinates, which modality='3d' needs"):
        processor.pad([bare, processor.featurize("CC")], modality="3d")
    with pytest.raises(ValueError, match="There are no graphs to pad"):
        processor.pad([])


# Settings, saving and loading


def test_defaults_are_those_of_the_featurization():
    saved = MoleBlendProcessor().to_dict()
    assert {name: saved[name] for name in asdict(FeaturizationSettings())} == asdict(FeaturizationSettings())


def test_settings_are_checked_at_construction():
    with pytest.raises(ValueError, match="`hydrogens` is 'no', but has to be one of 'drop', 'keep', 'add'"):
        MoleBlendProcessor(hydrogens="no")
    with pytest.raises(ValueError, match=r"no setting \['hydrogenz'\]. Use one of: modality, hydrogens"):
        MoleBlendProcessor(hydrogenz="drop")


def test_saved_settings_come_back(tmp_path):
    processor = MoleBlendProcessor(hydrogens="add", max_path_bonds=3, modality="2d")
    processor("CCO")
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "featurization_moleblend.py",
        "graphs_moleblend.py",
        "molecules_moleblend.py",
        "preprocessor_config.json",
        "processing_moleblend.py",
    ]
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == processor.to_dict()
    assert saved["auto_map"] == {
        "AutoFeatureExtractor": "processing_moleblend.MoleBlendProcessor",
        "AutoProcessor": "processing_moleblend.MoleBlendProcessor",
    }
    loaded = MoleBlendProcessor.from_pretrained(tmp_path, max_atoms=7)
    assert loaded.to_dict() == {**saved, "max_atoms": 7}
    assert processor("CCO")["path_bond_types"].shape == (1, 9, 9, 3)


@pytest.mark.parametrize("auto", [MoleBlendProcessor, AutoProcessor, AutoFeatureExtractor])
def test_settings_can_be_overridden_where_they_are_loaded(tmp_path, auto):
    MoleBlendProcessor(modality="2d").save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    del saved["hydrogens"]  # as before there was such a setting
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"no setting \['hydrogenz'\]. Use one of: modality, hydrogens"):
        auto.from_pretrained(tmp_path, hydrogenz="add")
    of_loading = {
        "cache_dir": tmp_path, "force_download": False, "local_files_only": True, "token": False, "revision": "main",
        "subfolder": "", "trust_remote_code": False, "code_revision": None,
    }  # fmt: skip
    processor = auto.from_pretrained(tmp_path, hydrogens="add", **of_loading)
    assert isinstance(processor, MoleBlendProcessor)
    assert (processor.hydrogens, processor.modality) == ("add", "2d")
    processor, unused = MoleBlendProcessor.from_pretrained(
        tmp_path, hydrogens="keep", other=1, return_unused_kwargs=True
    )
    assert (processor.hydrogens, unused) == ("keep", {"other": 1})
    of_the_model = {"attn_implementation": "eager", "dtype": "auto"}  # a pipeline hands them to all that it loads
    assert auto.from_pretrained(tmp_path, _from_pipeline="molecule-property", **of_the_model).modality == "2d"


WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoFeatureExtractor, AutoProcessor
source, target = sys.argv[1:]
for auto in (AutoProcessor, AutoFeatureExtractor):
    processor = auto.from_pretrained(source, trust_remote_code=True)
    assert processor.hydrogens == "add", processor
    assert len(processor.featurize_many(["CCO", "C"], num_proc=2)) == 2
    source = f"{target}/{auto.__name__}"
    processor.save_pretrained(source)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
assert processor("CCO")["atom_features"].shape == (1, 9, 9)
assert not any(name.split(".")[0] == "moleblend_hf" for name in sys.modules)
print("loaded")
"""


def test_loads_and_saves_again_in_a_process_without_the_package(tmp_path):
    MoleBlendProcessor(hydrogens="add").save_pretrained(tmp_path / "source")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "source"), str(tmp_path / "target")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip().endswith("loaded"), result.stderr[-2000:]


@pytest.mark.parametrize("smiles", ["CC O", "C\nC", "CCO ethanol", "CC\tO", "C |a| x"])
def test_white_space_within_a_smiles_is_no_name(smiles):
    """RDKit would take what follows it for one: "CC O" would be ethane."""
    processor = MoleBlendProcessor()
    assert processor.featurize_many([smiles, "CCO"], on_error="skip")[0].num_atoms == 3
    assert "white space in its SMILES" in processor.rejected[0].reason


def test_white_space_around_a_smiles_and_before_its_extension_is_none_of_it():
    processor = MoleBlendProcessor()
    assert [graph.num_atoms for graph in processor.featurize_many([" CCO \n", "CCO |$;a b;R$|", "CO\t"])] == [3, 3, 2]


@pytest.mark.parametrize("number", [119, 200, 256, 300, -1])
def test_a_number_of_no_element_is_rejected(number):
    """RDKit takes them modulo 256: 300 would be ruthenium."""
    processor, xyz = MoleBlendProcessor(modality="3d"), np.array([[0, 0, 0], [1.0, 0, 0]])
    assert len(processor.featurize_many([(["C", "O"], xyz), ([number, 8], xyz)], on_error="skip")) == 1
    assert "no element" in processor.rejected[0].reason
