"""Evaluation: the figures are those of the model's own predictions, labels stay with their molecules, refusals by message."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import without_dropout

import evaluate
import preprocess
from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendProcessor,
)

SMILES = [f"{'C' * length}{end}" for length in range(1, 9) for end in ("O", "N")]
REGRESSION = {
    "id2label": {0: "gap", 1: "mu"},
    "problem_type": "regression",
    "target_means": [1.0, -2.0],
    "target_scales": [3.0, 0.5],
    "target_units": ["eV", "D"],
}
BINARY = {"id2label": {0: "active", 1: "toxic"}, "problem_type": "multi_label_classification"}
CLASSES = {"id2label": {0: "gas", 1: "liquid", 2: "solid"}, "problem_type": "single_label_classification"}


def saved(folder: Path, model_class=MoleBlendForSequenceClassification, **config) -> Path:
    """A checkpoint of random weights that read 2D only."""
    model_class(without_dropout(**config)).save_pretrained(folder)
    MoleBlendProcessor(modality="2d").save_pretrained(folder)
    return folder


def predicted(folder: Path) -> np.ndarray:
    model = MoleBlendForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**MoleBlendProcessor.from_pretrained(folder)(SMILES, return_tensors="pt")).logits.double().numpy()


def table(path: Path, **columns) -> Path:
    """A CSV of `SMILES` with a row in between that cannot be read; None is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", *columns])
        for row, smiles in enumerate(SMILES):
            if row == 3:
                writer.writerow(["C1CC", *(values[0] for values in columns.values())])
            writer.writerow([smiles, *("" if values[row] is None else values[row] for values in columns.values())])
    return path


def run(folder: Path, source: Path, output: Path, *flags: str) -> dict:
    return evaluate.main(["--model", str(folder), "--input", str(source), "--output_dir", str(output), *flags])


def test_figures_are_those_of_the_models_own_predictions_whatever_the_order_and_the_gaps(tmp_path):
    folder = saved(tmp_path / "model", **REGRESSION)
    values = predicted(folder)
    gap, mu = values[:, 0] + 0.25, values[:, 1] - np.linspace(0, 1, len(SMILES))
    mus = [None if row % 3 == 0 else value for row, value in enumerate(mu)]
    mus[0] = mu[0]  # for the row that is rejected
    results = run(folder, table(tmp_path / "new.csv", mu=mus, note=["x"] * len(SMILES), gap=gap), tmp_path / "out")
    targets = results["models"]["MoleBLEND"]["runs"][0]["test"]["targets"]
    assert targets["gap"]["mae"] == pytest.approx(0.25, abs=1e-5)
    assert targets["gap"]["spearman"] == pytest.approx(1.0)
    kept = [row for row in range(len(SMILES)) if row % 3 or row == 0]
    assert targets["mu"]["mae"] == pytest.approx(np.mean(np.linspace(0, 1, len(SMILES))[kept]), abs=1e-5)
    assert (targets["gap"]["num"], targets["mu"]["num"]) == (len(SMILES), len(kept))
    assert results["targets"] == {"gap": "eV", "mu": "D"}

    rejected = pq.read_table(tmp_path / "out" / "data" / "rejected.parquet").to_pylist()
    assert [row["input"] for row in rejected] == ["C1CC"]
    assert results["dataset"]["num_read"] == len(SMILES) + 1
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# MoleBLEND evaluated on new.csv" in card
    assert "| rejected | 1 |" in card
    assert "Nothing was trained or chosen here." in card


def test_the_example_of_the_card_runs_and_gives_what_was_measured(tmp_path):
    folder = saved(tmp_path / "model", **REGRESSION)
    run(folder, table(tmp_path / "new.csv", gap=range(len(SMILES)), mu=range(len(SMILES))), tmp_path / "out")
    by_auto_class, by_pipeline = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL
    )
    names: dict = {}
    exec(by_auto_class, names)
    rows = [
        SMILES.index(smiles)
        for smiles in re.search(r"processor\((\[.*?\])", by_auto_class)[1].strip("[]").replace("'", "").split(", ")
    ]
    np.testing.assert_allclose(names["predictions"].numpy(), predicted(folder)[rows], atol=1e-5)
    lines = by_pipeline.rstrip().splitlines()
    exec("\n".join([*lines[:-1], f"answers = {lines[-1]}"]), names)
    found = [[answer["predictions"][name]["value"] for name in ("gap", "mu")] for answer in names["answers"]]
    np.testing.assert_allclose(found, predicted(folder)[rows], atol=1e-5)


def test_some_targets_of_binary_tasks(tmp_path):
    folder = saved(tmp_path / "model", **BINARY)
    labels = (predicted(folder)[:, 1] > np.median(predicted(folder)[:, 1])).astype(int)
    source = table(tmp_path / "new.csv", toxic=labels)
    flags = ["--targets", "toxic", "--preprocessing", "class_names=harmless,toxic"]
    results = run(folder, source, tmp_path / "out", *flags)
    assert results["binary_class_names"] == {"toxic": ["harmless", "toxic"]}
    test = results["models"]["MoleBLEND"]["runs"][0]["test"]
    assert list(test["targets"]) == ["toxic"]
    assert test["mean"]["roc_auc"] == 1.0


def test_names_of_targets_are_handed_on_as_they_are(tmp_path):
    names = ["Neoplasms benign, malignant", "-act (>=5)"]
    folder = saved(tmp_path / "model", **BINARY | {"id2label": dict(enumerate(names))})
    source = table(tmp_path / "new.csv", **dict.fromkeys(names, [0, 1] * (len(SMILES) // 2)))
    assert list(run(folder, source, tmp_path / "out")["targets"]) == names


def test_classes_are_read_by_the_names_that_the_model_knows(tmp_path):
    folder = saved(tmp_path / "model", **CLASSES)
    best = predicted(folder).argmax(-1)
    phases = [CLASSES["id2label"][index] for index in best]
    results = run(folder, table(tmp_path / "new.csv", phase=phases), tmp_path / "out", "--targets", "phase")
    assert results["models"]["MoleBLEND"]["runs"][0]["test"]["mean"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"predicts which of gas, liquid, solid a molecule is\. Name the one column"):
        run(folder, tmp_path / "new.csv", tmp_path / "other")
    # A dataset may list them in another order.
    flags = ["--source", "csv", "--input", str(tmp_path / "new.csv"), "--targets", "phase", "--modality", "2d"]
    flags += ["--tasks", "phase=classes", "--class_names"]
    preprocess.main([*flags, "solid,gas,liquid", "--output", str(tmp_path / "data")])
    results = run(folder, tmp_path / "data", tmp_path / "again", "--targets", "phase")
    assert results["models"]["MoleBLEND"]["runs"][0]["test"]["mean"]["accuracy"] == 1.0
    preprocess.main([*flags, "solid,gas,liquid,plasma", "--output", str(tmp_path / "more")])
    with pytest.raises(ValueError, match="has the class 'plasma', but the model knows gas, liquid, solid"):
        run(folder, tmp_path / "more", tmp_path / "third", "--targets", "phase")


def test_an_ensemble_with_intervals_is_evaluated_as_one_model(tmp_path):
    members = [MoleBlendForSequenceClassification(without_dropout(**REGRESSION)) for _ in range(2)]
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(members)
    ensemble.config.conformal_coverage, ensemble.config.conformal_quantiles = 0.9, [1e6, None]
    ensemble.save_pretrained(tmp_path / "model")
    MoleBlendProcessor(modality="2d").save_pretrained(tmp_path / "model")
    source = table(tmp_path / "new.csv", gap=range(len(SMILES)), mu=range(len(SMILES)))
    test = run(tmp_path / "model", source, tmp_path / "out")["models"]["MoleBLEND"]["runs"][0]["test"]
    assert test["targets"]["gap"]["coverage"] == 1.0
    assert test["targets"]["mu"]["coverage"] is None


def test_a_model_of_atoms_is_measured_over_atoms(tmp_path):
    folder = saved(tmp_path / "model", MoleBlendForTokenClassification, **REGRESSION)
    model, processor = MoleBlendForTokenClassification.from_pretrained(folder), MoleBlendProcessor(modality="2d")
    with torch.no_grad():
        values = [model(**processor(smiles)).logits[0].double().numpy() for smiles in SMILES]
    gap = [json.dumps((atoms[:, 0] + 0.25).tolist()) for atoms in values]
    mus = [";".join("" if row % 2 else str(value) for row, value in enumerate(atoms[:, 1])) for atoms in values]
    mus[5] = None
    results = run(folder, table(tmp_path / "new.csv", gap=gap, mu=mus), tmp_path / "out")
    targets = results["models"]["MoleBLEND"]["runs"][0]["test"]["targets"]
    assert targets["gap"]["mae"] == pytest.approx(0.25, abs=1e-5)
    assert targets["mu"]["mae"] == pytest.approx(0, abs=1e-5)
    sizes = [len(atoms) for atoms in values]
    assert targets["gap"]["num"] == sum(sizes)
    assert targets["mu"]["num"] == sum((size + 1) // 2 for row, size in enumerate(sizes) if row != 5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card
    assert "Whoever named their median for every atom" in card


def test_a_part_of_a_preprocessed_dataset(tmp_path):
    folder = saved(tmp_path / "model", **REGRESSION)
    source = table(tmp_path / "new.csv", gap=range(len(SMILES)), mu=range(len(SMILES)))
    flags = ["--targets", "gap,mu", "--split", "random", "--split_fractions", "0.5,0.25,0.25", "--modality", "2d"]
    preprocess.main(["--source", "csv", "--input", str(source), "--output", str(tmp_path / "data"), *flags])
    test = run(folder, tmp_path / "data", tmp_path / "test")
    validation = run(folder, tmp_path / "data", tmp_path / "validation", "--split", "validation")
    assert test["split"]["tested"] == "test"
    assert validation["split"]["tested"] == "validation"
    assert test["split"]["parts"] == validation["split"]["parts"]
    assert test["split"]["leakage"] == dict.fromkeys(
        ("train and validation", "train and test", "validation and test"), 0
    )
    assert test["models"] != validation["models"]
    with pytest.raises(ValueError, match=r"has no part 'dev'\. Choose of train, validation, test with --split"):
        run(folder, tmp_path / "data", tmp_path / "dev", "--split", "dev")
    MoleBlendProcessor(modality="2d+3d").save_pretrained(folder)  # which makes conformers where there are none
    with pytest.raises(
        ValueError, match=r"made with modality='2d' and has no geometries of 4 of 4 molecules, which modality"
    ):
        run(folder, tmp_path / "data", tmp_path / "bent")


# Refusals


@pytest.fixture
def folder(tmp_path) -> Path:
    return saved(tmp_path / "model", **REGRESSION)


def test_columns_have_to_be_named_like_the_targets(tmp_path, folder):
    source = table(tmp_path / "new.csv", gap=range(len(SMILES)), dipole=range(len(SMILES)))
    (tmp_path / "folder" / "old").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "folder", target_is_directory=True)
    with pytest.raises(ValueError, match=r"has no column 'mu'. Its columns: 'smiles', 'gap', 'dipole'"):
        run(folder, source, out, "--overwrite")
    assert (out / "old").is_dir()
    source = table(tmp_path / "both.csv", gap=range(len(SMILES)), mu=range(len(SMILES)))
    run(folder, source, out, "--overwrite")
    assert not (out / "old").exists()
    assert out.is_symlink()
    with pytest.raises(ValueError, match=r"has no target 'dipole'. Its targets: gap, mu.*name the columns"):
        run(folder, source, tmp_path / "other", "--targets", "gap,dipole")


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    MoleBlendForPreTraining(without_dropout()).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"has no weights for 4 parts of its MoleBlendForSequenceClassification.*finetune\.py"
    ):
        run(tmp_path / "model", tmp_path / "new.csv", tmp_path / "out")


def test_targets_of_molecules_are_not_taken_for_those_of_atoms(tmp_path):
    folder = saved(tmp_path / "model", MoleBlendForTokenClassification, **REGRESSION)
    source = table(tmp_path / "new.csv", gap=range(len(SMILES)), mu=range(len(SMILES)))
    preprocess.main(["--source", "csv", "--input", str(source), "--output", str(tmp_path / "data"),
                     "--targets", "gap,mu", "--modality", "2d"])  # fmt: skip
    with pytest.raises(
        ValueError, match=r"predicts for atoms, but gap, mu of .* are targets of molecules\. Preprocess"
    ):
        run(folder, tmp_path / "data", tmp_path / "out")


def test_a_dataset_in_other_units_is_refused(tmp_path, folder):
    source = table(tmp_path / "new.csv", gap=range(len(SMILES)), mu=range(len(SMILES)))
    with pytest.raises(
        ValueError, match=r"labels of 'gap' are in hartree, but the model predicts eV.*--convert gap=eV"
    ):
        run(folder, source, tmp_path / "out", "--preprocessing", "units={gap: hartree}")
    flags = ["--preprocessing", "units={gap: hartree}", "convert={gap: eV}"]
    results = run(folder, source, tmp_path / "converted", *flags)
    assert results["models"]["MoleBLEND"]["runs"][0]["test"]["targets"]["gap"]["mae"] > 27


def test_labels_of_another_kind_are_refused(tmp_path):
    folder = saved(tmp_path / "model", **BINARY)
    source = table(tmp_path / "new.csv", active=[2] * len(SMILES), toxic=[0] * len(SMILES))
    preprocess.main(["--source", "csv", "--input", str(source), "--output", str(tmp_path / "data"),
                     "--targets", "active,toxic", "--modality", "2d"])  # fmt: skip
    with pytest.raises(ValueError, match="Target 'active' has the label 2, but the model knows the classes 0 to 1"):
        run(folder, tmp_path / "data", tmp_path / "out")


def test_a_part_without_labels_is_refused(tmp_path, folder):
    nothing: list = [None] * len(SMILES)
    with pytest.raises(ValueError, match=r"No molecule in part 'train' of .* has a label of gap, mu"):
        run(folder, table(tmp_path / "new.csv", gap=nothing, mu=nothing), tmp_path / "out")


def test_a_folder_that_holds_something_is_not_overwritten_unasked(tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match=r"The output, .*, holds model"):
        evaluate.main(["--model", str(folder), "--input", "t.csv", "--output_dir", str(folder), "--overwrite"])
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(FileExistsError, match=r"out is not empty. Choose another --output_dir"):
        run(folder, tmp_path / "new.csv", tmp_path / "out")


def test_what_zero_and_one_mean_is_the_models_word(tmp_path):
    words = {"id2label": {0: "active"}, "num_labels": 1, "problem_type": "multi_label_classification"}
    folder = saved(tmp_path / "model", **words, target_class_names=[["inert", "active"]])
    new = table(tmp_path / "new.csv", active=["active", "inert"] * (len(SMILES) // 2) + ["active"] * (len(SMILES) % 2))
    results = run(folder, new, tmp_path / "out")
    assert results["binary_class_names"] == {"active": ["inert", "active"]}
    with pytest.raises(ValueError, match=r"0 for 'active' and 1 for 'inert', but for the model 0 is 'inert'"):
        run(folder, new, tmp_path / "out", "--overwrite", "--preprocessing", "class_names=active,inert")
    assert (tmp_path / "out" / "README.md").exists()


def test_a_card_says_which_part_was_measured(tmp_path, folder):
    new = table(tmp_path / "new.csv", gap=list(range(len(SMILES))), mu=list(range(len(SMILES))))
    run(folder, new, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "labels of the input the model" in card
    assert "test part" not in card
    data = tmp_path / "data"
    flags = ["--targets", "gap,mu", "--split", "random", "--split_fractions", "0.4,0.3,0.3"]
    preprocess.main(["--source", "csv", "--input", str(new), "--output", str(data), *flags])
    run(folder, data, tmp_path / "train", "--split", "train")
    card = (tmp_path / "train" / "README.md").read_text()
    assert "labels of the train part the model" in card
    assert "test part" not in card
