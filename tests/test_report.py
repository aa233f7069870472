"""The report: what metrics.json holds, and that the card says it as it is, also where the baseline is better."""

import dataclasses
import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny import tiny_config

from report import (
    BASELINE,
    ENSEMBLE,
    MODEL,
    DatasetFacts,
    Experiment,
    Run,
    SplitFacts,
    SplitPredictions,
    card,
    results_of,
    shown,
    write_report,
)
from reporting import environment
from result_plots import plot_learning_curves, plot_roc
from splits import split_hash

NUM = 24
SMILES = [f"{'C' * length}O" for length in range(1, NUM + 1)]
DATASET = DatasetFacts("my set.csv", "csv", 30, 28, {"parse: could not be parsed": 2}, "0" * 64)
SPLIT = SplitFacts(
    "scaffold",
    {part: {"rows": rows, "sha256": letter * 64} for part, rows, letter in (("train", 4, "a"), ("test", NUM, "b"))},
    {"train and test": 3},
)


def predictions(labels: np.ndarray, error: float, seed: int, **others) -> SplitPredictions:
    """Labels with an error of that size."""
    noise = np.random.default_rng(seed).choice([-1.0, 1.0], labels.shape)
    values = np.nan_to_num(labels) + error * (1 + 0.1 * seed) * noise
    return SplitPredictions([f"mol{row}" for row in range(NUM)], SMILES, labels, values, **others)


def regression(model_error=0.5, baseline_error=0.1, **changes) -> Experiment:
    """Three seeds each of a model and of the baseline, with gaps in the second target."""
    labels = np.random.default_rng(0).normal(size=(NUM, 2))
    labels[::3, 1] = np.nan
    runs = [
        Run(name, seed, predictions(labels, error, seed), predictions(labels, error / 2, seed), seconds=1.5)
        for name, error in ((MODEL, model_error), (BASELINE, baseline_error))
        for seed in range(3)
    ]
    values = {
        "problem_type": "regression",
        "target_names": ["gap", "a|b"],
        "target_units": ["eV", "eV"],
        "runs": runs,
        "reported": MODEL,
        "dataset": DATASET,
        "split": SPLIT,
        "settings": {"epochs": 3},
        "command": "python training/finetune.py --input 'my set.csv'",
        "environment": environment(torch.device("cpu")),
        "num_parameters": 12345,
        "selected_by": "rmse",
        "base_model": "someone/moleblend",
    }
    return Experiment(**values | changes)


def binary(**changes) -> Experiment:
    """Two tasks, one of a single class, with prediction sets."""
    labels = np.zeros((NUM, 2))
    labels[::2, 0] = 1
    values = np.where(labels == 1, 0.8, 0.3)
    values[:4, 0] = 0.45, 0.55, 0.4, 0.2  # one molecule of class 1 is ranked below one of class 0, and so on
    sets = np.stack([values < 0.7, values > 0.3], axis=-1)
    test = SplitPredictions([str(row) for row in range(NUM)], SMILES, labels, values, prediction_sets=sets)
    return regression(
        **{
            "problem_type": "multi_label_classification",
            "target_names": ["active", "toxic"],
            "target_units": [None, None],
            "runs": [Run(MODEL, 0, test, test)],
            "selected_by": "roc_auc",
            "conformal_coverage": 0.9,
        }
        | changes
    )


def told(experiment: Experiment) -> tuple[dict, str]:
    """What metrics.json and the card hold; the plots, which take longest, are not drawn."""
    results = results_of(experiment)
    return results, card(experiment, results, [], tiny_config(num_labels=2))


@pytest.mark.parametrize(
    ("kind", "plots"),
    [("regression", {"parity.png"}), ("binary", {"roc.png", "reliability.png", "coverage.png"})],
)
def test_the_folder_holds_the_figures_the_card_and_the_plots_in_it(tmp_path, kind, plots):
    experiment = {"regression": regression, "binary": binary}[kind]()
    results = write_report(experiment, tmp_path, tiny_config(num_labels=2))
    assert json.loads((tmp_path / "metrics.json").read_text()) == results == told(experiment)[0]
    text = (tmp_path / "README.md").read_text()
    assert set(re.findall(r"!\[[^]]+\]\((\S+)\)", text)) == plots
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "README.md", *plots}
    assert all(imread(tmp_path / image).std() > 0 for image in plots)


def test_metrics_json_has_every_run_and_the_spread_over_seeds():
    results, _ = told(regression())
    runs = results["models"][MODEL]["runs"]
    maes = [run["test"]["mean"]["mae"] for run in runs]
    assert maes == pytest.approx([0.5, 0.55, 0.6])
    assert results["models"][MODEL]["test"]["mean"]["mae"] == pytest.approx(
        {"mean": np.mean(maes), "std": np.std(maes, ddof=1), "num_seeds": 3}
    )
    assert [run["validation"]["mean"]["mae"] for run in runs] == pytest.approx([0.25, 0.275, 0.3])
    assert results["split"]["parts"]["test"]["sha256"] == "b" * 64
    assert results["dataset"]["rejected_by_reason"] == DATASET.rejected_by_reason
    assert runs[0]["test"]["targets"]["a|b"]["num"] == 16


def test_the_card_says_that_the_baseline_is_better():
    _, text = told(regression())
    assert f"- MAE: {MODEL} is worse than {BASELINE}, 0.550 ± 0.050 against 0.110 ± 0.010." in text
    assert f"- RMSE: {MODEL} is worse than {BASELINE}" in text
    assert f"- R2: {MODEL} is worse than {BASELINE}" in text
    assert "is better than" not in text


def test_the_card_says_that_the_model_is_better():
    _, text = told(regression(0.1, 0.5))
    assert f"- MAE: {MODEL} is better than {BASELINE}, 0.110 ± 0.010 against 0.550 ± 0.050." in text
    assert "is worse than" not in text


def test_a_difference_within_the_spread_is_said_to_be():
    _, text = told(regression(0.5, 0.49))
    assert re.search(r"- MAE: .* is worse than .*; the difference is smaller than the spread over seeds\.", text)


def test_without_another_model_the_card_makes_no_claim():
    experiment = regression()
    alone = dataclasses.replace(experiment, runs=[run for run in experiment.runs if run.name == MODEL])
    _, text = told(alone)
    assert "cannot say whether a simpler method does better" in text


def test_errors_in_different_units_are_compared_by_target():
    results, text = told(regression(target_units=["eV", "D"]))
    assert results["models"][MODEL]["test"]["mean"]["mae"]["mean"] is None
    assert f"- MAE: {MODEL} is better than {BASELINE} for 0 of 2 targets, and not for gap, a\\|b." in text
    assert "errors have no mean" in text


def test_the_table_has_validation_beside_test_and_the_row_of_this_folder():
    _, text = told(regression())
    rows = [line for line in text.splitlines() if line.startswith(("| Model |", f"| {MODEL} |", "| &nbsp; of which"))]
    assert rows[0].startswith("| Model | Runs | MAE (eV), test | validation | RMSE (eV), test | validation |")
    assert rows[1].startswith("| MoleBLEND | 3 | 0.550 ± 0.050 | 0.275 ± 0.025 |")
    assert rows[2].startswith("| &nbsp; of which this folder, seed 0 | 1 | 0.500 | 0.250 |")


def test_the_ensemble_is_a_row_of_its_own_and_what_the_card_is_about():
    experiment = regression()
    ensemble = dataclasses.replace(experiment.runs[0], name=ENSEMBLE, seed=None)
    results, text = told(dataclasses.replace(experiment, runs=[ensemble, *experiment.runs], reported=ENSEMBLE))
    assert list(results["models"]) == [ENSEMBLE, MODEL, BASELINE]
    assert f"| {ENSEMBLE} | 1 | 0.500 | 0.250 |" in text
    assert f"- MAE: {ENSEMBLE} is worse than {BASELINE}, 0.500 against 0.110 ± 0.010." in text


def test_model_index_has_the_figures_of_this_folder_and_the_split_they_are_of():
    results, text = told(regression())
    data = ModelCard(text).data
    mae = next(result for result in data.eval_results if result.metric_type == "mae")
    assert mae.metric_value == results["models"][MODEL]["runs"][0]["test"]["mean"]["mae"]
    assert mae.metric_name == "MAE, mean over 2 targets"
    assert (mae.dataset_name, mae.dataset_split) == ("my set.csv", "test")
    assert mae.dataset_args == {"split": "scaffold", "sha256_of_ids": "b" * 64}
    assert (data.base_model, data.license) == ("someone/moleblend", "apache-2.0")


def test_facts_of_the_data_are_in_the_card():
    _, text = told(regression())
    assert "| rejected | 2 |" in text
    assert "| &nbsp; parse: could not be parsed | 2 |" in text
    assert "| test | 24 | `" + "b" * 64 + "` |" in text
    assert "several parts: train and test 3. Figures of the test part flatter by those that were trained on." in text
    assert "Split `scaffold`: the molecules of a Bemis-Murcko scaffold stay together" in text
    assert "python training/finetune.py --input 'my set.csv'" in text


def test_what_is_undefined_is_said_with_the_number_of_targets_in_the_mean():
    results, text = told(binary())
    assert results["models"][MODEL]["runs"][0]["test"]["mean"]["num_targets"]["roc_auc"] == 1
    assert "- ROC-AUC is undefined for 1 of 2 targets, because all labels are 0: toxic." in text
    assert "| Model | Runs | ROC-AUC of 1 of 2 targets, test | validation |" in text
    assert "| toxic | 24 | undefined | undefined | 1.000 | undefined |" in text
    assert "Whoever always names the more frequent class is right for 75.0%." in text


def test_a_single_class_everywhere_is_reported_without_figures():
    labels = np.zeros((NUM, 1))
    test = SplitPredictions(["x"] * NUM, SMILES, labels, np.full((NUM, 1), 0.1))
    _, text = told(binary(target_names=["toxic"], target_units=[None], runs=[Run(MODEL, 0, test)]))
    assert "ROC-AUC is undefined for 1 of 1 targets" in text
    assert "| MoleBLEND | 1 | undefined |" in text


def test_coverage_is_measured_and_stands_beside_the_nominal_one():
    labels = np.linspace(0, 1, NUM)[:, None]
    half_width = np.where(np.arange(NUM) < 18, 0.2, 0.05)[:, None]  # 18 of 24 labels are inside
    test = SplitPredictions(
        ["x"] * NUM, SMILES, labels, labels + 0.1, lower=labels + 0.1 - half_width, upper=labels + 0.1 + half_width
    )
    experiment = regression(
        target_names=["gap"], target_units=["eV"], runs=[Run(MODEL, 0, test, test)], conformal_coverage=0.9
    )
    _, text = told(experiment)
    assert f"| gap (eV) | 24 | 75.0% | 90% ± {1.96 * math.sqrt(0.09 / 24 + 0.09 / 26):.1%} | 0.325 |" in text
    assert "| active | 24 | " in told(binary())[1]


def test_classes_are_reported():
    labels = (np.arange(NUM) % 3)[:, None].astype(float)
    values = np.where(labels == np.arange(3), 0.6, 0.2)
    test = SplitPredictions(["x"] * NUM, SMILES, labels, values, prediction_sets=values > 0.5)
    changes = {"target_names": ["phase"], "target_units": [None], "class_names": ["gas", "liquid", "solid"]}
    experiment = binary(
        problem_type="single_label_classification", runs=[Run(MODEL, 0, test)], selected_by="accuracy", **changes
    )
    results, text = told(experiment)
    assert results["models"][MODEL]["test"]["mean"]["roc_auc"]["mean"] == 1.0
    assert (
        "is right for 100.0% of the labels. Whoever always names the more frequent class is right for 33.3%." in text
    )
    assert "logits.softmax(-1)  # a row for each molecule: gas, liquid, solid" in text
    assert "classes of phase." in text


def test_the_card_says_what_the_classes_of_a_binary_task_are_called():
    names = {"active": ["active", "inactive"]}
    assert "probabilities of class 1 (active: 0 = active, 1 = inactive)." in told(binary(binary_class_names=names))[1]
    both = {name: ["no", "yes"] for name in ("active", "toxic")}
    assert "probabilities of class 1 (0 = no, 1 = yes)." in told(binary(binary_class_names=both))[1]


def test_names_of_curves_stand_in_the_legend_as_they_are(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **flags: figures.append(figure) or save(figure, path))
    labels = np.array([[0.0, 1.0], [1.0, 0.0]])
    plot_roc(labels, labels, ["IC50 $x^$", "_hidden"], tmp_path / "roc.png")
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == [r"IC50 \$x^\$", " _hidden"]


def test_the_examples_are_molecules_of_the_test_part_and_valid_python():
    _, text = told(regression())
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "README.md", "exec")
        named = re.findall(r"'(C+O)'", snippet)
        assert len(named) == 2
        assert set(named) <= set(SMILES)


def test_few_labels_one_seed_and_notes_are_limits():
    _, text = told(binary(notes=["Target 'toxic' has the same class in all of the training set (0)."]))
    limits = text.split("## Limits")[1].split("## How")[0]
    assert "as few as 24 labels" in limits
    assert "One run has no spread over seeds" in limits
    assert "- Target 'toxic' has the same class" in limits
    assert "no spread over seeds" not in told(regression())[1]


def test_a_path_of_this_machine_is_not_in_the_metadata(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    _, text = told(regression(base_model=str(base)))
    assert "fine-tuned from `base`" in text
    assert ModelCard(text).data.base_model is None


def test_many_targets_are_cut_in_the_card_and_whole_in_metrics_json():
    labels = np.random.default_rng(0).normal(size=(NUM, 50))
    names = [f"t{column}" for column in range(50)]
    experiment = regression(
        target_names=names, target_units=[None] * 50, runs=[Run(MODEL, 0, predictions(labels, 0.1, 0))]
    )
    results, text = told(experiment)
    assert len(results["models"][MODEL]["test"]["targets"]) == 50
    assert "10 more targets: `metrics.json`." in text
    assert "50 targets, which `config.json` names." in text


def test_runs_of_the_reported_model_have_to_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"about 'MoleBLEND, ensemble', but the runs are of MoleBLEND, ECFP4"):
        write_report(regression(reported=ENSEMBLE), tmp_path, tiny_config(num_labels=2))


@pytest.mark.parametrize(
    ("mean", "std", "metric", "text"),
    [
        (123.456, 1.25, "mae", "123 ± 1"),
        (0.0123456, None, "rmse", "0.0123"),
        (0.0, None, "mae", "0.000"),
        (0.98765, 0.0123, "roc_auc", "0.988 ± 0.012"),
        (None, None, "r2", "undefined"),
    ],
)
def test_figures_in_units_have_three_digits_and_others_three_decimals(mean, std, metric, text):
    assert shown({"mean": mean, "std": std}, metric) == text


def test_split_facts_count_molecules_in_several_parts_by_inchikey():
    parts = {
        "train": datasets.Dataset.from_dict({"id": ["a", "b", "c"], "inchikey": ["K", "L", None]}),
        "test": datasets.Dataset.from_dict({"id": ["d", "e", "f"], "inchikey": ["K", "K", None]}),
    }
    facts = SplitFacts.of("random", parts, seed=7, fractions=[0.5, 0.0, 0.5])
    assert facts.leakage == {"train and test": 1}
    assert facts.parts["train"] == {"rows": 3, "sha256": split_hash("abc")}
    assert (facts.seed, facts.fractions) == (7, [0.5, 0.0, 0.5])
    without = SplitFacts.of("given", {name: rows.remove_columns("inchikey") for name, rows in parts.items()}, seed=7)
    assert (without.leakage, without.seed) == (None, None)


def test_learning_curves_are_drawn(tmp_path):
    curves = {"2D": {100: [0.5, 0.6], 1000: [0.2]}, "3D": {100: [0.3], 1000: [0.1, 0.12]}}
    plot_learning_curves(curves, "MAE (eV)", tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").std() > 0
