"""The console script: the model's numbers as rows, errors as lines, exit codes; what it says about checkpoints."""

import csv
import gzip
import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from tiny import CARD_METADATA, GOLDEN, SMILES, tiny_config
from transformers import BertConfig
from transformers.utils import logging
from typer.testing import CliRunner, Result

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendProcessor,
    predict_graphs,
)
from moleblend_hf.cli import app
from moleblend_hf.molecule_files import read_molecules
from moleblend_hf.verification import write_reference_outputs
from sources import open_source

ROOT = Path(__file__).parent.parent
UNREADABLE = "C1CC"
MOLECULES = [*SMILES[:2], UNREADABLE, *SMILES[2:]]
READABLE = [row for row, smiles in enumerate(MOLECULES) if smiles != UNREADABLE]
CALIBRATED = {"conformal_coverage": 0.9, "conformal_quantiles": [0.5, None]}
TARGETS = {"id2label": {0: "gap", 1: "mu"}, "label2id": {"gap": 0, "mu": 1}, "target_units": ["eV", "D"]}


def saved(model, folder: Path):
    model.eval().save_pretrained(folder)
    processor = MoleBlendProcessor()
    processor.save_pretrained(folder)
    write_reference_outputs(model, processor, folder)
    return model


def regression(**changes):
    return MoleBlendForSequenceClassification(
        tiny_config(**{"problem_type": "regression", "initializer_range": 0.3, **TARGETS, **CALIBRATED, **changes})
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    saved(MoleBlendForPreTraining(tiny_config()), folder / "pretrain")
    saved(regression(), folder / "finetune")
    saved(MoleBlendEnsembleForSequenceClassification.from_members([regression(), regression()]), folder / "ensemble")
    charges = {"id2label": {0: "charge"}, "label2id": {"charge": 0}, "problem_type": "regression"}
    saved(MoleBlendForTokenClassification(tiny_config(**charges)), folder / "atoms")
    classes = {"id2label": {0: "low", 1: "mid", 2: "high"}, "label2id": {"low": 0, "mid": 1, "high": 2}}
    classes |= {"problem_type": "single_label_classification", "conformal_coverage": 0.9, "conformal_quantiles": [1.0]}
    saved(MoleBlendForSequenceClassification(tiny_config(**classes)), folder / "classes")
    return folder


@pytest.fixture(autouse=True)
def logging_as_before():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def moleblend(*args: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(map(str, args)), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rows_of(result: Result) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.stderr
    return list(csv.DictReader(io.StringIO(result.stdout)))


def expected(folder: Path, molecules=SMILES) -> np.ndarray:
    model, processor = MoleBlendForSequenceClassification.from_pretrained(folder), MoleBlendProcessor()
    return predict_graphs(model, processor, processor.featurize_many(list(molecules))).values


# Rows


def test_predictions_have_a_row_for_each_molecule_in_order(models):
    result = moleblend("predict", models / "finetune", stdin="smiles\n" + "\n".join(MOLECULES))
    rows = rows_of(result)
    assert list(rows[0]) == ["id", "smiles", "gap", "gap_lower", "gap_upper", "mu", "modality", "error"]
    assert [row["smiles"] for row in rows] == MOLECULES
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    found = np.array([[float(rows[row][name]) for name in ("gap", "mu")] for row in READABLE])
    np.testing.assert_allclose(found, expected(models / "finetune"), atol=1e-6)
    assert float(rows[0]["gap_upper"]) - float(rows[0]["gap_lower"]) == pytest.approx(1.0)
    assert "could not be parsed by RDKit" in rows[2]["error"]
    assert rows[2]["gap"] == rows[2]["modality"] == rows[0]["error"] == ""
    assert "6 molecules, 1 of them with an error." in result.stderr


def sdf_text(smiles: list[str]) -> str:
    text = ""
    for index, each in enumerate(smiles):
        mol = Chem.AddHs(Chem.MolFromSmiles(each))
        rdDistGeom.EmbedMolecule(mol, randomSeed=1)
        mol.SetProp("_Name", f"molecule {index}")
        text += Chem.MolToMolBlock(mol) + f">  <code>\nX{index}\n\n$$$$\n"
    return text


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("format", ["csv", "tsv", "smi"])
def test_tables_and_smiles_files_give_the_same(models, tmp_path, format, zipped):
    mark = {"csv": ",", "tsv": "\t", "smi": " "}[format]
    lines = [f"{smiles}{mark}name {row}" for row, smiles in enumerate(MOLECULES)]
    text = "\n".join([] if format == "smi" else [f"SMILES{mark}name"]) + "\n" + "\n".join(lines) + "\n"
    path = tmp_path / f"in.{format}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    flags = [] if format == "smi" else ["--id_column", "name"]
    rows = rows_of(moleblend("predict", models / "finetune", path, *flags))
    assert [(row["id"], row["smiles"]) for row in rows] == [(f"name {i}", s) for i, s in enumerate(MOLECULES)]
    found = np.array([float(rows[row]["gap"]) for row in READABLE])
    np.testing.assert_allclose(found, expected(models / "finetune")[:, 0], atol=1e-6)


def test_parquet_gives_the_same(models, tmp_path):
    path = tmp_path / "in.parquet"
    table = {"SMILES": [*MOLECULES, None], "name": list(range(7)), "positions": [[1.0]] * 7}
    pq.write_table(pa.table(table), path, row_group_size=2)
    rows = rows_of(moleblend("predict", models / "finetune", path, "--id-column", "name"))
    assert [(row["id"], row["smiles"]) for row in rows] == [(str(i), s) for i, s in enumerate([*MOLECULES, ""])]
    found = np.array([float(rows[row]["gap"]) for row in READABLE])
    np.testing.assert_allclose(found, expected(models / "finetune")[:, 0], atol=1e-6)
    assert rows[6]["error"] == "is an empty SMILES"
    assert "The columns: 'SMILES', 'name'." in error_of(
        "predict", models / "finetune", path, "--id-column", "positions"
    )
    stdin = error_of("predict", models / "finetune", "--format", "parquet", stdin="C")
    assert "Parquet cannot be read from standard input" in stdin


def test_geometries_of_an_sdf_are_shown_to_the_model(models, tmp_path):
    path = tmp_path / "in.sdf"
    path.write_text(sdf_text(["CCO", "CC#N"]) + "no molecule\n\n\nbroken\n$$$$\n")
    rows = rows_of(moleblend("predict", models / "finetune", path))
    assert [row["id"] for row in rows] == ["molecule 0", "molecule 1", "no molecule"]
    assert [row["smiles"] for row in rows] == ["CCO", "CC#N", ""]
    assert [row["modality"] for row in rows] == ["2d+3d", "2d+3d", ""]
    assert "could not be read by RDKit" in rows[2]["error"]
    rows = rows_of(moleblend("predict", models / "finetune", path, "--modality", "2d", "--id-column", "code"))
    assert [(row["id"], row["modality"]) for row in rows[:2]] == [("X0", "2d"), ("X1", "2d")]
    values = [float(row["gap"]) for row in rows[:2]]
    np.testing.assert_allclose(values, expected(models / "finetune", ["CCO", "CC#N"])[:, 0], atol=1e-6)


def test_rows_of_a_table_that_cannot_be_read_stay_in_their_place(models):
    text = 'smiles,x\nCCO,1\n\nC\n"C"C,1\nCC,2\n'
    rows = rows_of(moleblend("predict", models / "finetune", "--format", "csv", stdin=text))
    assert [row["smiles"] for row in rows] == ["CCO", "", "", "CC"]
    assert rows[1]["error"] == "is in a row with 1 cells under 2 columns"
    assert "cannot be read: ',' expected after '\"'" in rows[2]["error"]
    assert rows[3]["error"] == ""


def test_a_row_of_empty_cells_is_a_row_and_a_blank_line_is_none(models):
    rows = rows_of(moleblend("predict", models / "finetune", "--format", "csv", stdin="smiles,y\nC,1\n,\n\nCC,2\n"))
    assert [(row["id"], row["smiles"], bool(row["error"])) for row in rows] == [
        ("0", "C", False), ("1", "", True), ("2", "CC", False)
    ]  # fmt: skip
    rows = rows_of(moleblend("predict", models / "finetune", "--format", "csv", stdin='smiles\nC\n""\n\n \nCC\n'))
    assert [(row["smiles"], bool(row["error"])) for row in rows] == [("C", False), ("", True), ("CC", False)]


def test_a_name_without_a_smiles_is_not_taken_for_one(models):
    rows = rows_of(moleblend("predict", models / "finetune", stdin="\tCN\n CCO\tb\t\n \tCN\n CO\n \t\n"))
    assert [(row["id"], row["smiles"], bool(row["error"])) for row in rows] == [
        ("CN", "", True), ("b", "CCO", False), ("CN", "", True), ("3", "CO", False)
    ]  # fmt: skip


def test_records_that_rdkit_reads_but_not_twice_or_not_at_all_stay_in_their_place(models, tmp_path):
    """Of a conjugated ring with a bond of any order, RDKit removes no hydrogens; after the last `$$$$` stands what old DOS ended files with."""
    block = Chem.MolToMolBlock(Chem.MolFromSmiles("N1C=NC=O1", sanitize=False)).replace("  5  1  1", "  5  1  8")
    ends = sdf_text(["CCO", "CCN"]).split("$$$$\n")
    path = tmp_path / "in.sdf"
    path.write_text(f"{ends[0]}$$$$\n{block}$$$$\n{ends[1]}$$$$\n\x1a")
    rows = rows_of(moleblend("predict", models / "finetune", path))
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert "is cut short: it holds no molecule" in rows[3]["error"]
    path.write_bytes(sdf_text(["CCO", "CCN"]).replace("\n", "\r").encode())  # as of old Macintoshes
    assert [row["smiles"] for row in rows_of(moleblend("predict", models / "finetune", path))] == ["CCO", "CCN"]


@pytest.mark.parametrize("length", [2, 9, 12])
def test_a_file_that_is_cut_in_its_first_bytes_is_damaged(models, tmp_path, length):
    path = tmp_path / "cut.smi.gz"
    path.write_bytes(gzip.compress(b"CCO\n", mtime=0)[:length])
    result = moleblend("predict", models / "finetune", path)
    assert result.exit_code == 1
    assert "lies where the file is damaged" in result.stdout


@pytest.mark.parametrize("name", ["cut.csv.gz", "cut.smi.gz"])
def test_a_damaged_file_gives_the_rows_before_and_says_so(models, tmp_path, name):
    molecules = ["C" * (1 + index * 7919 % 23) + "N" * (index % 5) for index in range(400)]
    path = tmp_path / name
    path.write_bytes(gzip.compress("\n".join(["smiles", *molecules]).encode(), mtime=0)[:-60])
    *found, last = rows_of(moleblend("predict", models / "finetune", path))
    assert 0 < len(found) < 400
    assert [row["smiles"] for row in found][:-1] == molecules[: len(found) - 1]
    assert last["error"].startswith("lies where the file is damaged")
    assert last["id"] == str(len(found))


def test_a_name_may_come_after_an_extension_and_several_spaces(models):
    (row,) = rows_of(moleblend("predict", models / "finetune", stdin="C[C@H](O)CC  |o1:1|  butanol\n"))
    assert (row["id"], row["smiles"]) == ("butanol", "C[C@H](O)CC |o1:1|")


def test_ensembles_classes_and_atoms_have_their_columns(models, tmp_path):
    rows = rows_of(moleblend("predict", models / "ensemble", stdin="CCO"))
    assert float(rows[0]["gap_ensemble_spread"]) > 0
    assert "mu_lower" not in rows[0]
    rows = rows_of(moleblend("predict", models / "classes", stdin="CCO"))
    assert sum(float(rows[0][name]) for name in ("low", "mid", "high")) == pytest.approx(1)
    assert rows[0]["prediction"] in ("low", "mid", "high")
    assert rows[0]["prediction_set"] == "low|mid|high"
    rows = rows_of(moleblend("predict", models / "atoms", stdin="CCO\nC1CC"))
    assert len(rows[0]["charge"].split(";")) == 3
    output = tmp_path / "atoms.parquet"
    moleblend("predict", models / "atoms", "-o", output, stdin="CCO\nC1CC\nC")
    charges = pq.read_table(output)["charge"].to_pylist()
    assert charges[1] is None
    assert [len(charges[0]), len(charges[2])] == [3, 1]
    assert charges[0] == pytest.approx([float(value) for value in rows[0]["charge"].split(";")], abs=1e-6)


def test_conformers_are_averaged_and_their_spread_is_given(models):
    flags = ["--modality", "2d+3d", "--num-conformers", "3"]
    rows = rows_of(moleblend("predict", models / "finetune", *flags, stdin="CCCCO\n"))
    assert float(rows[0]["gap_conformer_spread"]) > 0
    assert rows[0]["modality"] == "2d+3d"


def test_embeddings_of_molecules_and_atoms(models, tmp_path):
    model = MoleBlendForPreTraining.from_pretrained(models / "pretrain").eval()
    known = model.moleblend.embed(SMILES, MoleBlendProcessor())
    molecules, atoms = tmp_path / "molecules.parquet", tmp_path / "atoms.parquet"
    assert moleblend("embed", models / "pretrain", "-o", molecules, stdin="\n".join(MOLECULES)).exit_code == 0
    assert moleblend("embed", models / "pretrain", "--atoms", "-o", atoms, stdin="\n".join(MOLECULES)).exit_code == 0
    rows = rows_of(moleblend("embed", models / "pretrain", stdin="\n".join(MOLECULES)))
    by_molecule, by_atom = pq.read_table(molecules), pq.read_table(atoms)
    for place, row in enumerate(READABLE):
        embedding = known.molecule_embeddings[place].numpy()
        np.testing.assert_allclose(by_molecule["embedding"][row].as_py(), embedding, atol=1e-5)
        np.testing.assert_allclose(np.array(rows[row]["embedding"].split(";"), float), embedding, atol=1e-5)
        np.testing.assert_allclose(
            np.array(by_atom["atom_embeddings"][row].as_py()), known.atom_embeddings[place].numpy(), atol=1e-5
        )
    lowest = rows_of(moleblend("embed", models / "pretrain", "--layers", "1", stdin="CCO"))
    with torch.no_grad():
        states = model.moleblend(
            **MoleBlendProcessor()(["CCO"], modality="2d"), output_hidden_states=True
        ).hidden_states
    np.testing.assert_allclose(np.array(lowest[0]["embedding"].split(";"), float), states[1][0, 0].numpy(), atol=1e-5)
    assert by_molecule["embedding"][2].as_py() is by_atom["atom_embeddings"][2].as_py() is None


def test_many_molecules_are_streamed(models, monkeypatch, tmp_path):
    monkeypatch.setattr("moleblend_hf.cli.MOLECULES_A_BATCH", 4)
    monkeypatch.setattr("moleblend_hf.molecule_files.ROWS_A_WRITE", 5)
    output = tmp_path / "out.parquet"
    moleblend("predict", models / "finetune", "--output", output, stdin="\n".join(SMILES * 5))
    found = pq.read_table(output)
    assert found["smiles"].to_pylist() == SMILES * 5
    np.testing.assert_allclose(found["gap"].to_numpy(), np.tile(expected(models / "finetune")[:, 0], 5), atol=1e-6)


def test_a_prediction_that_is_not_finite_is_an_error(models, tmp_path):
    model = regression()
    torch.nn.init.constant_(model.classifier.out_proj.bias, float("nan"))
    model.save_pretrained(tmp_path)
    MoleBlendProcessor().save_pretrained(tmp_path)
    result = moleblend("predict", tmp_path, stdin="CCO")
    assert "got a prediction that is not finite" in result.stdout
    assert result.exit_code == 1


# What goes wrong


def error_of(*args: object, stdin: str | None = None) -> str:
    """The one line on standard error of a command that fails."""
    result = moleblend(*args, stdin=stdin)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_errors_are_a_line_and_leave_no_file(models, tmp_path):
    output, finetune = tmp_path / "out.csv", models / "finetune"
    assert "holds a MoleBlendForPreTraining, which predicts no properties" in error_of("predict", models / "pretrain")
    assert "is an ensemble, whose members have no common embedding" in error_of("embed", models / "ensemble")
    assert "layers is 9, but the model has" in error_of("embed", models / "pretrain", "--layers", "9", stdin="C")
    assert "A list of vectors does not fit into CSV" in error_of("embed", finetune, "--atoms", stdin="C")
    quotes = error_of("predict", finetune, "--format", "csv", stdin='smiles,"na"me\nC,1\n')
    assert "The first row, of the names of columns, cannot be read" in quotes
    assert "There are no molecules" in error_of("predict", finetune, "-o", output, stdin="\n")
    assert "'in.xyz' does not end in .smi, .smiles" in error_of("predict", finetune, "in.xyz")
    assert "No such file" in error_of("predict", finetune, tmp_path / "in.csv", "-o", output)
    assert "does not end in .csv or .parquet" in error_of("predict", finetune, "-o", "out.xlsx", stdin="C")
    assert "has no column 'x'. Leave" in error_of("predict", finetune, "--smiles-column", "x", stdin="C")
    assert "has no column 'x': names stand" in error_of("predict", finetune, "--id-column", "x", stdin="C")
    conformers = error_of("predict", finetune, "--num-conformers", "2", stdin="C")
    assert "num_conformers is 2, but with modality='auto' none are made. Say modality 2d+3d" in conformers
    table = ["predict", finetune, "--format", "csv", "-o", output]
    assert "There is no column 'x'. The columns: 'a', 'b'" in error_of(*table, "--smiles-column", "x", stdin="a,b\n")
    assert "No column can be told to hold the SMILES" in error_of(*table, stdin="a,b\n")
    assert "There is no device 'abacus'" in error_of("predict", finetune, "--device", "abacus", stdin="C")
    assert not list(tmp_path.iterdir())
    output.touch()
    assert "exists. Choose another --output" in error_of("predict", finetune, "-o", output, stdin="C")
    assert moleblend("predict", finetune, "-o", output, "--overwrite", stdin="C").exit_code == 0


def test_checkpoints_that_are_none_are_an_error(models, tmp_path):
    assert "couldn't connect" in error_of("info", "nowhere")  # it could be on the Hub
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    assert "holds a BertModel, but has to hold one of MoleBlendModel" in error_of("info", tmp_path / "bert")
    model = regression()
    weights = model.state_dict()
    del weights["classifier.out_proj.bias"]
    model.save_pretrained(tmp_path / "part", state_dict=weights)
    MoleBlendProcessor().save_pretrained(tmp_path / "part")
    assert "no weights for 1 parts of its MoleBlendForSequenceClassification, the first classifier.out_proj.bias" in (
        error_of("predict", tmp_path / "part", stdin="C")
    )
    MoleBlendProcessor(max_path_bonds=3).save_pretrained(tmp_path / "part")
    assert "tells 3 bonds of a path apart, but its model 5" in error_of("predict", tmp_path / "part", stdin="C")
    saved(regression(id2label={0: "error", 1: "b"}, label2id={"error": 0, "b": 1}), tmp_path / "named")
    assert "would have two columns 'error'" in error_of("predict", tmp_path / "named", stdin="C")
    saved(regression(id2label={0: "a", 1: "a_lower"}, label2id={"a": 0, "a_lower": 1}), tmp_path / "end")
    assert "would have two columns 'a_lower'" in error_of("predict", tmp_path / "end", stdin="C")


def test_a_target_may_be_called_prediction(models, tmp_path):
    saved(regression(id2label={0: "prediction", 1: "b"}, label2id={"prediction": 0, "b": 1}), tmp_path)
    (row,) = rows_of(moleblend("predict", tmp_path, stdin="CCO"))
    assert float(row["prediction"]) == pytest.approx(expected(tmp_path, ["CCO"])[0, 0], abs=1e-6)


def test_only_errors_is_a_failure(models):
    result = moleblend("predict", models / "finetune", stdin="C1\nc1\n")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "args", [["predict"], ["predict", "m", "--colour"], ["paint"], ["embed", "m", "--modality", "4d"], []]
)
def test_wrong_usage_has_code_2(args):
    result = moleblend(*args)
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize("command", ["predict", "embed", "demo", "verify", "convert", "card", "info"])
def test_help_has_examples_on_lines_of_their_own(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = moleblend(command, "--help")
    assert result.exit_code == 0
    assert f"\n    moleblend {command} " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


# In the browser


def test_the_demo_is_launched_with_what_was_asked_for(models, tmp_path, monkeypatch):
    demo = pytest.importorskip("moleblend_hf.demo")
    if demo.gr is None:
        assert "needs gradio, which is not installed" in error_of("demo", models / "finetune")
        pytest.skip("the extra `demo` is not installed")
    (tmp_path / "in.csv").write_text("name,smiles\nethanol,CCO\nnothing,C1CC\n")
    launched = {}
    monkeypatch.setattr(demo, "launch_demo", lambda blocks, **settings: launched.update(settings, title=blocks.title))
    flags = ["--neighbours", tmp_path / "in.csv", "--id-column", "name", "--port", "8000", "--modality", "2d"]
    result = moleblend("demo", models / "ensemble", *flags)
    assert result.exit_code == 0
    assert f"{tmp_path / 'in.csv'}: 1 molecules; rows that cannot be read: 1.\n" in result.stderr
    assert launched == {"title": "ensemble", "server_name": "127.0.0.1", "server_port": 8000, "share": False}
    assert "No such file" in error_of("demo", models / "finetune", "--neighbours", tmp_path / "none.csv")


# Checkpoints


def test_info_says_what_a_checkpoint_is(models, tmp_path):
    found = json.loads(moleblend("info", models / "finetune", "--json").stdout)
    assert found["class"] == "MoleBlendForSequenceClassification"
    assert found["parameters"] == regression().num_parameters()
    assert found["targets"] == {"gap": {"unit": "eV", "conformal quantile": 0.5}, "mu": {"unit": "D"}}
    assert found["conformal coverage"] == "90%"
    assert found["processor"]["max_atoms"] == 512
    assert "auto_map" not in found["processor"]
    assert "members: 2\n" in moleblend("info", models / "ensemble").stdout
    text = moleblend("info", models / "finetune").stdout
    assert "  mu   unit D\n" in text
    assert "  gap  unit eV, conformal quantile 0.5\n" in text
    assert "classes: low, mid, high\n" in moleblend("info", models / "classes").stdout
    assert "predicts for: atoms\n" in moleblend("info", models / "atoms").stdout
    assert "targets" not in json.loads(moleblend("info", models / "pretrain", "--json").stdout)
    saved(MoleBlendForSequenceClassification(tiny_config(num_labels=2)), tmp_path)
    untold = json.loads(moleblend("info", tmp_path, "--json").stdout)
    assert (untold["problem"], untold["outputs"]) == ("not in the config", "LABEL_0, LABEL_1")


def test_verify_tells_a_changed_checkpoint_by_its_exit_code(models, tmp_path):
    result = moleblend("verify", models / "finetune")
    assert result.exit_code == 0
    assert "is the model that was saved" in result.stdout
    model = saved(regression(), tmp_path)
    with torch.no_grad():
        model.moleblend.layers[1].mlp.dense_in.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    result = moleblend("verify", tmp_path)
    assert result.exit_code == 1
    assert "first departs at layers.1" in result.stdout
    (tmp_path / "reference_outputs.json").unlink()
    assert "has no reference_outputs.json" in error_of("verify", tmp_path)


def test_convert_writes_a_folder_once(tmp_path):
    target = tmp_path / "converted"
    result = moleblend("convert", GOLDEN / "pretrain_state.safetensors", target)
    assert result.exit_code == 0
    assert result.stdout.strip() == str(target)
    assert "dropped encoder." in result.stderr
    assert moleblend("info", target).exit_code == 0
    assert "exists and is not empty" in error_of("convert", GOLDEN / "pretrain_state.safetensors", target)
    (tmp_path / "text.safetensors").write_text("no tensors here")
    error_of("convert", tmp_path / "text.safetensors", tmp_path / "other")


CARD = (
    CARD_METADATA
    + """# A card

![losses](losses.png) and [the paper](https://arxiv.org/abs/2307.06235)

```python
batch = processor(["N[C@H](CO)C", "CC[C@@H](C=O)N"])  # no links
```
"""
)


def test_cards_are_printed_and_checked(tmp_path):
    assert "No such file" in error_of("card", tmp_path)
    assert "README.md does not exist" in moleblend("card", tmp_path, "--check").stdout
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "losses.png").touch()
    assert moleblend("card", tmp_path).stdout == CARD + "\n"
    assert moleblend("card", tmp_path, "--check").exit_code == 0
    (tmp_path / "losses.png").unlink()
    (tmp_path / "README.md").write_text(CARD.replace("datasets: [qm9]\n", "") + "\n{{ name }}\n")
    result = moleblend("card", tmp_path, "--check")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "The metadata names no datasets that the model was trained on.",
        "A place was not filled in: '{{ name }}'.",
        "It shows losses.png, which is not there.",
    ]
    (tmp_path / "README.md").write_text("# Without metadata\n")
    assert "The metadata has no license." in moleblend("card", tmp_path, "--check").stdout
    (tmp_path / "README.md").write_text("---\ntags: [\n---\n")
    assert "cannot be read" in moleblend("card", tmp_path, "--check").stdout
    assert "is no folder" in error_of("card", "user/name", "--check")


# As a process


def test_the_console_script_is_this_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["moleblend"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_process_reads_standard_input_and_writes_only_rows_to_standard_output(models):
    result = subprocess.run(
        [sys.executable, "-m", "moleblend_hf.cli", "predict", str(models / "finetune")],
        input="\n".join(MOLECULES),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "info"},
    )
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    values = [float(rows[row]["gap"]) for row in READABLE]
    np.testing.assert_allclose(values, expected(models / "finetune")[:, 0], atol=1e-6)
    assert result.stderr == "6 molecules, 1 of them with an error.\n"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_tables_as_excel_saves_them_are_read_with_their_names(models, tmp_path, encoding):
    """In Windows' encodings, with semicolons where commas are decimal."""
    path = tmp_path / "excel.csv"
    path.write_bytes("SMILES;Name\r\nCCO;café\r\nCCC;Ångström\r\nC;\r\n".encode(encoding))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is text that is not UTF-8")
        rows = rows_of(moleblend("predict", models / "finetune", path, "--id-column", "Name"))
    assert [row["id"] for row in rows] == ["café", "Ångström", "row 2"]
    assert not any(row["error"] for row in rows)


def test_paths_that_are_wrong_are_said_at_once(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    assert "There is no 'finetun' in '.'" in error_of("info", "./finetun")
    assert "There is no 'checkpoint-1' in 'finetune'" in error_of("predict", "finetune/checkpoint-1", stdin="C")
    assert "Save the workbook as CSV." in error_of("predict", models / "finetune", "in.xlsx")
    assert f"There is no folder '{tmp_path / 'no'}'" in error_of(
        "predict", models / "finetune", "-o", tmp_path / "no" / "x.csv", stdin="C"
    )


def test_standard_input_may_be_utf16(monkeypatch):
    table = io.BytesIO("SMILES;Name\r\nCCO;x\r\n".encode("utf-16"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(table), encoding="utf-8"))
    assert [row.smiles for row in read_molecules("-", "csv")] == ["CCO"]


@pytest.mark.parametrize("header", ["id,isomeric_smiles,canonical_smiles", "id,SMI,y", '"id";"SMILES";"y, mol/L"'])
def test_columns_are_told_as_by_the_training_scripts(models, tmp_path, header):
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\n" + (";" if ";" in header else ",").join(["7", "CCO", "C"]) + "\n")
    assert [row["smiles"] for row in rows_of(moleblend("predict", models / "finetune", path))] == ["CCO"]
    (record,) = open_source("csv", path).records()
    assert record.smiles == "CCO"


def test_the_output_is_utf8_whatever_the_code_page_of_the_terminal(models, tmp_path):
    path = tmp_path / "names.smi"
    path.write_text("CCO ethanol\nCC β-name\n", encoding="utf-8")
    command = [sys.executable, "-m", "moleblend_hf.cli", "predict", str(models / "finetune"), str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    found = subprocess.run(command, capture_output=True, env=environment, check=True).stdout.decode("utf-8")
    assert [row["id"] for row in csv.DictReader(io.StringIO(found))] == ["ethanol", "β-name"]


def test_the_input_is_not_replaced(models, tmp_path):
    path = tmp_path / "molecules.csv"
    path.write_text("smiles\nCCO\n")
    result = moleblend(
        "predict", models / "finetune", path, "--output", tmp_path / "." / "molecules.csv", "--overwrite"
    )
    assert result.exit_code != 0
    assert "is the input. Name another file" in result.stderr
    assert path.read_text() == "smiles\nCCO\n"
