"""training/predict.py: a row of the output for each row of the input, in order, whatever happens in between."""

import csv
import gzip
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem
from safetensors.torch import load_file, save_file
from tiny import SMILES, tiny_config

import engines
import predict
import prediction_parts
import preprocess
from data import open_dataset
from labels import labelled
from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendProcessor,
    embed_graphs,
    predict_graphs,
)
from parts import Part

ROOT = Path(__file__).parent.parent
MOLECULES = [*SMILES, "C1CC", "c1ccccc1", "CCN", "", "CCCl"]
UNREADABLE = {5: "could not be parsed by RDKit: unclosed ring", 8: "is an empty SMILES"}
TARGETS = {"id2label": {0: "gap", 1: "mu"}, "label2id": {"gap": 0, "mu": 1}}


def fine_tuned(model_class=MoleBlendForSequenceClassification, **changes):
    config = tiny_config(**{"problem_type": "regression", "initializer_range": 0.3, **TARGETS, **changes})
    return model_class(config).eval()


def saved(model, folder: Path, **processor) -> Path:
    model.save_pretrained(folder)
    MoleBlendProcessor(**processor).save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """The parts are made in this process, which spares the seconds that others take to start."""
    monkeypatch.setattr(predict, "RECORDS_A_PART", 4)
    monkeypatch.setattr(predict, "CONFORMERS_A_PART", 4)
    prediction_parts.loaded_model.cache_clear()

    def run(parts, settings, num_proc, work):
        return (work(part, settings) for part in parts)

    monkeypatch.setattr(predict, "run_locally", run)


@pytest.fixture
def model(tmp_path) -> MoleBlendForSequenceClassification:
    model = fine_tuned()
    saved(model, tmp_path / "model", modality="2d")
    return model


def table_of(tmp_path: Path, smiles: list[str], name: str = "in.csv") -> Path:
    path = tmp_path / name
    path.write_text("smiles,name\n" + "".join(f"{text},m{row}\n" for row, text in enumerate(smiles)))
    return path


def run(tmp_path: Path, source: Path, *flags: str, output: str = "out.parquet", model: str = "model") -> pa.Table:
    argv = ["--model", str(tmp_path / model), "--input", str(source), "--output", str(tmp_path / output), *flags]
    predict.main(argv)
    return pq.read_table(tmp_path / output) if output.endswith(".parquet") else None


def expected_of(model, smiles: list[str], **processor) -> np.ndarray:
    processor = MoleBlendProcessor(**{"modality": "2d", **processor})
    return predict_graphs(model, processor, processor.featurize_many(smiles)).values


def test_every_row_of_a_table_is_in_the_output_in_order(here, model, tmp_path):
    found = run(tmp_path, table_of(tmp_path, MOLECULES))
    assert found.column_names == ["id", "smiles", "gap", "mu", "modality", "error"]
    assert found["id"].to_pylist() == [f"m{row}" for row in range(len(MOLECULES))]
    assert found["smiles"].to_pylist() == MOLECULES
    assert {row: error for row, error in enumerate(found["error"].to_pylist()) if error} == UNREADABLE
    readable = [row for row in range(len(MOLECULES)) if row not in UNREADABLE]
    values = np.column_stack([found["gap"].take(readable), found["mu"].take(readable)])
    np.testing.assert_allclose(values, expected_of(model, [MOLECULES[row] for row in readable]), atol=1e-6)
    assert [found["gap"][row].as_py() for row in UNREADABLE] == [None, None]
    assert found["modality"].to_pylist() == [None if row in UNREADABLE else "2d" for row in range(len(MOLECULES))]
    assert not (tmp_path / "out.parquet.parts").exists()


def test_csv_and_parquet_say_the_same(here, model, tmp_path):
    source = table_of(tmp_path, MOLECULES)
    found = run(tmp_path, source)
    run(tmp_path, source, output="out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found)
    for row, other in zip(rows, found.to_pylist(), strict=True):
        assert list(row) == list(other)
        for name, value in other.items():
            assert row[name] == ("" if value is None else value) if name not in TARGETS["label2id"] else True
        assert row["gap"] == "" if other["gap"] is None else float(row["gap"]) == other["gap"]


@pytest.mark.parametrize("name", ["in.csv.gz", "in.tsv", "in.smi", "in.sdf", "in.sdf.gz", "in.parquet"])
def test_all_kinds_of_files_are_read(here, model, tmp_path, name):
    path, smiles = tmp_path / name, ["CCO", "c1ccccc1", "CC(=O)N", "C#N", "CCCl"]
    lines = {
        "in.csv.gz": "SMILES\n" + "".join(f"{text}\n" for text in smiles),
        "in.tsv": "smiles\tother\n" + "".join(f"{text}\tx\n" for text in smiles),
        "in.smi": "".join(f"{text} m\n" for text in smiles),
    }
    lines["in.sdf"] = "".join(Chem.MolToMolBlock(Chem.MolFromSmiles(text)) + "$$$$\n" for text in smiles)
    lines["in.sdf.gz"] = lines["in.sdf"]
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"smiles": smiles}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[name].encode()))
    else:
        path.write_text(lines[name])
    found = run(tmp_path, path)
    values = np.column_stack([found["gap"], found["mu"]])
    np.testing.assert_allclose(values, expected_of(model, smiles), atol=1e-6)
    written = [Chem.CanonSmiles(text) for text in smiles] if "sdf" in name else smiles
    assert found["smiles"].to_pylist() == written


def test_files_without_rows_or_without_readable_ones_have_an_output_too(here, model, tmp_path):
    names = ["id", "smiles", "gap", "mu", "modality", "error"]
    assert run(tmp_path, table_of(tmp_path, [])).column_names == names
    assert run(tmp_path, table_of(tmp_path, ["C1"] * 3), "--overwrite")["gap"].null_count == 3
    run(tmp_path, table_of(tmp_path, []), output="out.csv")
    assert (tmp_path / "out.csv").read_text().count("\n") == 1


def test_an_ensemble_has_spreads_and_a_calibrated_one_intervals(here, tmp_path):
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned() for _ in range(3)])
    ensemble.config.conformal_coverage, ensemble.config.conformal_quantiles = 0.9, [0.5, None]
    saved(ensemble, tmp_path / "model")
    found = run(tmp_path, table_of(tmp_path, SMILES))
    assert found.column_names[2:-2] == [
        "gap",
        "gap_ensemble_spread",
        "gap_lower",
        "gap_upper",
        "mu",
        "mu_ensemble_spread",
    ]
    np.testing.assert_allclose(np.subtract(found["gap_upper"], found["gap_lower"]), 1.0)
    assert min(found["mu_ensemble_spread"].to_pylist()) > 0


def test_conformers_are_averaged_and_their_spread_is_told(here, tmp_path):
    model = fine_tuned()
    saved(model, tmp_path / "model", modality="2d+3d", num_conformers=3)
    found = run(tmp_path, table_of(tmp_path, ["CCCO", "CCN"]))
    assert found["modality"].to_pylist() == ["2d+3d"] * 2
    expected = expected_of(model, ["CCCO", "CCN"], modality="2d+3d", num_conformers=3)
    np.testing.assert_allclose(found["gap"], expected[:, 0], atol=1e-6)
    assert min(found["gap_conformer_spread"].to_pylist()) > 0
    flat = run(tmp_path, table_of(tmp_path, ["CCCO", "CCN"]), "--overwrite", "--modality", "2d")
    assert flat["modality"].to_pylist() == ["2d"] * 2
    np.testing.assert_allclose(flat["gap"], expected_of(model, ["CCCO", "CCN"])[:, 0], atol=1e-6)


def test_classes_and_binary_targets_have_sets(here, tmp_path):
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [1.0, 0.0]}
    saved(fine_tuned(problem_type="multi_label_classification", **calibration), tmp_path / "binary")
    found = run(tmp_path, table_of(tmp_path, SMILES), model="binary")
    assert found.column_names[2:-2] == ["gap", "gap_set", "mu", "mu_set"]
    assert (found["gap_set"][0].as_py(), found["mu_set"][0].as_py()) == ("0|1", "(none)")
    calibration["conformal_quantiles"] = [1.0]
    saved(fine_tuned(problem_type="single_label_classification", **calibration), tmp_path / "classes")
    row = run(tmp_path, table_of(tmp_path, SMILES), "--overwrite", model="classes").to_pylist()[0]
    assert row["gap"] + row["mu"] == pytest.approx(1)
    assert row["prediction"] == ("gap" if row["gap"] > row["mu"] else "mu")
    assert row["prediction_set"] == "gap|mu"


# Models of atoms


def atoms_of(model, molecule, **processor) -> np.ndarray:
    """What the model predicts for the atoms of a molecule, in the order of the input."""
    processor = MoleBlendProcessor(**{"modality": "2d", **processor})
    return predict_graphs(model, processor, [processor.featurize(molecule)]).values


def test_a_model_of_atoms_has_a_list_for_each_molecule(here, tmp_path):
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [0.5, None]}
    model = fine_tuned(MoleBlendForTokenClassification, **calibration)
    saved(model, tmp_path / "model", modality="2d")
    source = table_of(tmp_path, MOLECULES)
    found = run(tmp_path, source)
    assert found.column_names[2:-2] == ["gap", "gap_lower", "gap_upper", "mu"]
    for row, smiles in enumerate(MOLECULES):
        if row in UNREADABLE:
            assert found["gap"][row].as_py() is found["mu"][row].as_py() is None
            continue
        values = np.column_stack([found["gap"][row].as_py(), found["mu"][row].as_py()])
        np.testing.assert_allclose(values, atoms_of(model, smiles), atol=1e-5)
        np.testing.assert_allclose(np.subtract(found["gap_upper"][row].as_py(), values[:, 0]), 0.5)
    assert {row: error for row, error in enumerate(found["error"].to_pylist()) if error} == UNREADABLE

    run(tmp_path, source, output="out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for text, values in zip([row["gap"] for row in rows], found["gap"].to_pylist(), strict=True):
        assert [float(part) for part in text.split(";") if part] == (values or [])
    assert run(tmp_path, table_of(tmp_path, ["C1"] * 3), "--overwrite")["gap"].null_count == 3
    assert len(run(tmp_path, table_of(tmp_path, []), "--overwrite")) == 0


@pytest.mark.parametrize("hydrogens", ["drop", "keep", "add"])
def test_values_of_atoms_are_in_the_order_of_the_input(here, tmp_path, hydrogens):
    """Also where the row's SMILES has another: of an SDF, and with hydrogens that are added."""
    model = fine_tuned(MoleBlendForTokenClassification)
    saved(model, tmp_path / "model", modality="2d", hydrogens=hydrogens)
    molecules = [Chem.MolFromSmiles(smiles) for smiles in ("OCC#N", "C(Cl)C=O")]
    shuffled = [Chem.RenumberAtoms(mol, [2, 0, 3, 1]) for mol in molecules]
    (tmp_path / "in.sdf").write_text("".join(Chem.MolToMolBlock(mol) + "$$$$\n" for mol in shuffled))
    found = run(tmp_path, tmp_path / "in.sdf")
    for values, mol in zip(found["gap"].to_pylist(), shuffled, strict=True):
        np.testing.assert_allclose(values, atoms_of(model, mol, hydrogens=hydrogens)[:, 0], atol=1e-5)
    smiles = ["C(Cl)C=O", "O=CCCl", "[H]OCC"]
    found = run(tmp_path, table_of(tmp_path, smiles), "--overwrite")
    for values, text in zip(found["gap"].to_pylist(), smiles, strict=True):
        np.testing.assert_allclose(values, atoms_of(model, text, hydrogens=hydrogens)[:, 0], atol=1e-5)


def test_classes_of_atoms_are_lists_of_text(here, tmp_path):
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [1.0]}
    classes = {"problem_type": "single_label_classification", **calibration}
    saved(fine_tuned(MoleBlendForTokenClassification, **classes), tmp_path / "model")
    row = run(tmp_path, table_of(tmp_path, ["CCO"])).to_pylist()[0]
    assert row["prediction"] == ["gap" if a > b else "mu" for a, b in zip(row["gap"], row["mu"], strict=True)]
    assert row["prediction_set"] == ["gap|mu"] * 3
    run(tmp_path, table_of(tmp_path, ["CCO"]), output="out.csv")
    assert "gap|mu;gap|mu;gap|mu" in (tmp_path / "out.csv").read_text()


def test_an_atom_without_a_finite_prediction_is_an_error_of_its_molecule(here, tmp_path, monkeypatch):
    saved(fine_tuned(MoleBlendForTokenClassification), tmp_path / "model", modality="2d")
    forward = MoleBlendForTokenClassification.forward

    def broken(self, **inputs):
        outputs = forward(self, **inputs)
        outputs.logits[inputs["attention_mask"].sum(1) == 3, 1] = float("nan")
        return outputs

    monkeypatch.setattr(MoleBlendForTokenClassification, "forward", broken)
    found = run(tmp_path, table_of(tmp_path, ["CCO", "CC"]))
    assert found["error"].to_pylist() == ["got a prediction that is not finite", None]
    assert found["gap"][0].as_py()[1] is None
    run(tmp_path, table_of(tmp_path, ["CCO", "CC"]), output="out.csv")
    assert ";nan;" in (tmp_path / "out.csv").read_text()


def test_predictions_for_atoms_can_be_labels(here, tmp_path):
    """The CSV of a model of atoms is what preprocess.py takes: the same values for the same atoms."""
    model = fine_tuned(MoleBlendForTokenClassification)
    saved(model, tmp_path / "model", modality="2d")
    run(tmp_path, table_of(tmp_path, ["[H]OC", "C(Cl)C=O", "OC(C)N"]), output="out.csv")
    flags = ["--atom_targets", "gap,mu", "--modality", "2d", "--smiles_column", "smiles"]
    preprocess.main(
        ["--source", "csv", "--input", str(tmp_path / "out.csv"), "--output", str(tmp_path / "data"), *flags]
    )
    data = labelled(open_dataset(tmp_path / "data").splits["train"], ["gap", "mu"])
    for smiles, values in zip(data.smiles, data.of_atoms(), strict=True):
        np.testing.assert_allclose(values, atoms_of(model, smiles), atol=1e-5)


def test_embeddings_are_those_of_the_encoder(here, tmp_path):
    model = MoleBlendModel(tiny_config()).eval()
    processor = MoleBlendProcessor()
    saved(model, tmp_path / "model")
    found = run(tmp_path, table_of(tmp_path, MOLECULES), "--embeddings")
    rows = [row for row in range(len(MOLECULES)) if row not in UNREADABLE]
    expected = embed_graphs(model, processor, processor.featurize_many([MOLECULES[row] for row in rows]))
    np.testing.assert_allclose(np.stack(found["embedding"].take(rows).to_numpy()), np.stack(expected), atol=1e-6)
    assert [found["embedding"][row].as_py() for row in UNREADABLE] == [None, None]


def test_embeddings_after_the_lowest_layers(here, tmp_path):
    model = MoleBlendModel(tiny_config()).eval()
    processor = MoleBlendProcessor()
    saved(model, tmp_path / "model")
    found = run(tmp_path, table_of(tmp_path, SMILES), "--embeddings", "--layers", "1")
    with torch.no_grad():
        states = model(**processor(SMILES, modality="2d"), output_hidden_states=True).hidden_states
    assert len(states) > 2
    np.testing.assert_allclose(np.stack(found["embedding"].to_numpy()), states[1][:, 0].numpy(), atol=1e-6)


def test_what_the_model_cannot_do_is_an_error_of_its_row(here, model, tmp_path, monkeypatch):
    forward = MoleBlendForSequenceClassification.forward

    def limited(self, **inputs):
        if inputs["attention_mask"].sum() > 10:
            raise MemoryError
        outputs = forward(self, **inputs)
        outputs.logits[inputs["attention_mask"].sum(1) == 1] = float("nan")
        return outputs

    monkeypatch.setattr(MoleBlendForSequenceClassification, "forward", limited)
    found = run(tmp_path, table_of(tmp_path, SMILES))
    errors = found["error"].to_pylist()
    assert errors[0] == "has 13 atoms, which do not fit into the memory of cpu alone"
    assert errors[1] == "got a prediction that is not finite"
    assert errors[2:] == [None] * 3
    assert found["gap"].null_count == 2


# Interrupts


def killed_in_process(argv: list[str], moment: str) -> None:
    """`predict.main` with small parts, in a process of its own, that dies at a moment of its end."""
    # The server of forks that the tests have is used, instead of one more that takes seconds to start; but not their lock.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    predict.tqdm.set_lock(threading.RLock())
    predict.RECORDS_A_PART = 20
    move, unlink = Path.replace, Path.unlink

    def replace(path: Path, target: Path) -> None:
        if path.name == "output.partial" and moment == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
        move(path, target)

    def remove(path: Path, **options) -> None:
        unlink(path, **options)
        if path.name.startswith("predictions-0000003") and moment == "cleaning":
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace, Path.unlink = replace, remove
    predict.main(argv)


def start(argv: list[str], moment: str) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=killed_in_process, args=(argv, moment))
    process.start()
    return process


def test_a_run_that_is_killed_goes_on_and_the_output_is_the_same(model, tmp_path, monkeypatch):
    """By `kill -9`, while parts are made, while the output is written, and while the parts are deleted."""
    monkeypatch.setattr(predict, "RECORDS_A_PART", 20)
    source = table_of(tmp_path, (MOLECULES * 20)[:190])
    run(tmp_path, source, "--num_proc", "2", output="whole.csv")
    whole = (tmp_path / "whole.csv").read_bytes()
    assert whole.count(b"\n") == 191
    output, work = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    argv = ["--model", str(tmp_path / "model"), "--input", str(source), "--output", str(output), "--num_proc", "2"]
    process = start(argv, "predicting")
    end = time.monotonic() + 100
    while not (work.is_dir() and len(list(work.glob("predictions-*"))) >= 2):
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(0.2)  # until its processes have ended too
    assert not output.exists()
    made = {int(path.stem.rsplit("-")[-1]) for path in work.glob("predictions-*.parquet")}
    again: set[int] = set()

    def noted(parts, *args):
        return engines.run_locally((again.add(part.index) or part for part in parts), *args)

    monkeypatch.setattr(predict, "run_locally", noted)
    for moment in ("writing", "cleaning"):
        process = start(argv, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert output.exists() == (moment == "cleaning")
    predict.main(argv)
    assert output.read_bytes() == whole
    assert not work.exists()
    assert len(made) < 10
    assert len(again) < 10  # only those that were deleted


TRAPS = """
import ctypes, os, signal
from rdkit import Chem
parse = Chem.MolFromSmiles

def MolFromSmiles(smiles, *args, **kwargs):
    if smiles == "CC[Se]CC":
        os.kill(os.getpid(), signal.SIGSEGV)
    if smiles == "CC[Te]CC":
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter
    return parse(smiles, *args, **kwargs)

Chem.MolFromSmiles = MolFromSmiles
"""


def test_molecules_on_which_rdkit_crashes_or_hangs_are_errors_of_their_rows(model, tmp_path):
    smiles = [f"C{'C' * (row % 7)}O" for row in range(100)]
    smiles[20], smiles[21] = "CC[Se]CC", "CC[Te]CC"
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "sitecustomize.py").write_text(TRAPS)
    command = [sys.executable, ROOT / "training" / "predict.py", "--model", tmp_path / "model", "--input"]
    command += [table_of(tmp_path, smiles), "--output", tmp_path / "out.parquet", "--molecule_time_limit", "1.5"]
    result = subprocess.run(
        [*map(str, command), "--num_proc", "1"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "traps")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["smiles"].to_pylist() == smiles
    errors = {row: error for row, error in enumerate(found["error"].to_pylist()) if error}
    assert errors == {20: "made RDKit crash (SIGSEGV)", 21: "took RDKit more than 1.5 s"}
    assert found["gap"].null_count == 2
    assert "100 rows written" in result.stdout


def test_an_unfinished_run_is_not_mixed_with_another(here, model, tmp_path, monkeypatch):
    source = table_of(tmp_path, MOLECULES)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_output", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source)
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(modality\)"):
        run(tmp_path, source, "--modality", "auto")
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(ValueError, match="unfinished run with other input files, model or versions"):
        run(tmp_path, source)
    assert len(run(tmp_path, source, "--overwrite")) == len(MOLECULES)
    with pytest.raises(FileExistsError, match=r"out.parquet exists. Choose another --output"):
        run(tmp_path, source)


def test_the_parts_that_are_done_are_not_done_again(here, model, tmp_path, monkeypatch):
    source, made = table_of(tmp_path, MOLECULES), []
    work = predict.predict_part

    def stopping(part: Part, settings):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part.index)
        return work(part, settings)

    monkeypatch.setattr(predict, "predict_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source)
    monkeypatch.setattr(
        predict, "predict_part", lambda part, settings: (made.append(part.index), work(part, settings))[1]
    )
    assert len(run(tmp_path, source)) == len(MOLECULES)
    assert made == [0, 1, 2]


# What cannot work


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out.xlsx"], "output is 'out.xlsx', but predictions are written to .csv or .parquet"),
        (["--output", "o.csv", "--embeddings"], "output is 'o.csv', but embeddings are written to .parquet"),
        (["--input", "in.txt"], "'in.txt' does not end in .csv"),
        (["--layers", "1"], "layers is 1, but a prediction takes all layers"),
        (["--num_conformers", "2"], "num_conformers is 2, but with modality='2d' none are made"),
        (["--num_proc", "0"], "num_proc must be 1 or more, got 0"),
        (["--molecule_time_limit", "0"], "molecule_time_limit must be more than 0 seconds, got 0"),
        (["--smiles_column", "structure"], "has no column 'structure'"),
    ],
)
def test_settings_that_cannot_work_are_said(here, model, tmp_path, flags, message):
    source = table_of(tmp_path, SMILES)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, source, *flags)


def test_checkpoints_that_do_not_fit_are_said(here, tmp_path):
    source = table_of(tmp_path, SMILES)
    saved(MoleBlendForPreTraining(tiny_config()), tmp_path / "pretrained")
    with pytest.raises(ValueError, match="holds MoleBlendForPreTraining, which predicts no properties"):
        run(tmp_path, source, model="pretrained")
    saved(MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned()]), tmp_path / "ensemble")
    with pytest.raises(ValueError, match="is an ensemble, whose members have no common embedding"):
        run(tmp_path, source, "--embeddings", model="ensemble")
    lacking = saved(fine_tuned(), tmp_path / "lacking") / "model.safetensors"
    save_file({name: weight for name, weight in load_file(lacking).items() if "classifier" not in name}, lacking)
    with pytest.raises(ValueError, match=r"has no weights for 4 parts of its MoleBlendForSequenceClassification, the"):
        run(tmp_path, source, model="lacking")
    with pytest.raises(ValueError, match="layers is 9, but the model has"):
        run(tmp_path, source, "--embeddings", "--layers", "9", model="pretrained")
    saved(fine_tuned(), tmp_path / "paths", max_path_bonds=3)
    with pytest.raises(ValueError, match="tells 3 bonds of a path apart, but its model 5"):
        run(tmp_path, source, model="paths")
    named = {"id2label": {0: "gap", 1: "error"}, "label2id": {"gap": 0, "error": 1}}
    saved(fine_tuned(**named), tmp_path / "named")
    with pytest.raises(ValueError, match=r"would have two columns 'error'\. Rename the target"):
        run(tmp_path, source, model="named")
    assert not list(tmp_path.glob("*.parts"))


def test_the_identity_of_a_run_is_written_as_text(here, model, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "remove", lambda work: None)
    run(tmp_path, table_of(tmp_path, SMILES))
    identity = json.loads((tmp_path / "out.parquet.parts" / "run.json").read_text())
    assert identity["settings"]["modality"] is None
    assert {Path(name).name for name, _, _ in identity["files"]} >= {"in.csv", "model.safetensors"}


def test_the_input_is_not_replaced(here, tmp_path):
    saved(MoleBlendForSequenceClassification(tiny_config(num_labels=1)), tmp_path / "model", modality="2d")
    source = table_of(tmp_path, ["CCO"])
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is the input"):
        run(tmp_path, source, "--overwrite", output="in.csv")
    assert source.read_bytes() == before
