"""Metrics: values worked out by hand, gaps, what is undefined and said to be, and spreads over seeds."""

import numpy as np
import pytest

from calibration import calibrated_sets
from metrics import binary_metrics, class_metrics, over_seeds, regression_metrics, score

NAN = np.nan


def test_regression_by_hand_and_labels_that_are_missing_do_not_count():
    labels = np.array([[0.0, NAN], [1.0, 2.0], [2.0, 4.0], [3.0, NAN]])
    values = np.array([[1.0, 9.0], [1.0, 2.0], [2.0, 3.0], [5.0, 9.0]])
    found = regression_metrics(labels, values, ["one", "two"])
    one = found["targets"]["one"]
    assert one["mae"] == pytest.approx(3 / 4)
    assert one["rmse"] == pytest.approx((5 / 4) ** 0.5)
    assert one["r2"] == pytest.approx(1 - 5 / 5)  # squared errors 1 + 4, and about the mean 1.5: 5
    assert one["spearman"] == pytest.approx(0.9486833)  # ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4
    assert one["num"] == 4
    expected = {"mae": 0.5, "rmse": 0.5**0.5, "r2": 0.5, "spearman": 1.0, "num": 2}
    assert found["targets"]["two"] == pytest.approx(expected)
    assert found["mean"]["mae"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["undefined"] == []


def test_binary_by_hand():
    labels = np.array([[0.0], [0.0], [1.0], [1.0], [NAN]])
    probabilities = np.array([[0.1], [0.6], [0.5], [0.9], [0.9]])
    found = binary_metrics(labels, probabilities, ["active"])["targets"]["active"]
    assert found["roc_auc"] == pytest.approx(3 / 4)  # of four pairs, 0.5 is below 0.6
    assert found["pr_auc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["accuracy"] == found["balanced_accuracy"] == pytest.approx(3 / 4)  # 0.5 is called 1
    assert found["num"] == 4


def test_classes_are_ranked_one_against_the_rest():
    labels = np.array([0.0, 1.0, 2.0, 2.0, NAN])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.5, 0.1, 0.4], [0.4, 0.3, 0.3]])
    found = class_metrics(labels, probabilities, "phase")["targets"]["phase"]
    assert (found["roc_auc"], found["pr_auc"], found["accuracy"]) == pytest.approx((1.0, 1.0, 0.75))
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_two_classes_are_a_binary_task():
    generator = np.random.default_rng(0)
    labels, probability = generator.integers(0, 2, 50).astype(float), generator.random(50)
    as_classes = class_metrics(labels, np.column_stack([1 - probability, probability]), "x")["targets"]["x"]
    as_binary = binary_metrics(labels[:, None], probability[:, None], ["x"])["targets"]["x"]
    for metric in ("roc_auc", "accuracy", "balanced_accuracy"):
        assert as_classes[metric] == pytest.approx(as_binary[metric])


@pytest.mark.parametrize(
    ("labels", "values", "undefined"),
    [
        ([1.0], [1.0], {"r2": "fewer than 2 labels", "spearman": "fewer than 2 labels"}),
        ([2.0, 2.0], [1.0, 2.0], {"r2": "all labels are equal", "spearman": "all labels are equal"}),
        ([1.0, 2.0], [3.0, 3.0], {"spearman": "all predictions are equal"}),
        ([NAN, NAN], [3.0, 3.0], dict.fromkeys(("mae", "rmse", "r2", "spearman"), "no labels with a prediction")),
    ],
)
def test_what_regression_labels_do_not_define_is_none_with_its_reason(labels, values, undefined):
    found = regression_metrics(np.array(labels)[:, None], np.array(values)[:, None], ["x"])
    assert {entry["metric"]: entry["reason"] for entry in found["undefined"]} == undefined
    assert {metric for metric, value in found["targets"]["x"].items() if value is None} == set(undefined)
    assert all(found["mean"][metric] is None for metric in undefined)


def test_a_single_class_defines_the_accuracy_alone_and_is_in_no_other_mean():
    labels = np.array([[0.0, 0.0], [1.0, 0.0], [NAN, 0.0]])
    probabilities = np.array([[0.2, 0.2], [0.8, 0.8], [0.5, 0.2]])
    found = binary_metrics(labels, probabilities, ["both", "one"])
    assert {(entry["target"], entry["metric"], entry["reason"]) for entry in found["undefined"]} == {
        ("one", metric, "all labels are 0") for metric in ("roc_auc", "pr_auc", "balanced_accuracy")
    }
    assert found["mean"]["roc_auc"] == 1.0
    assert found["mean"]["accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["mean"]["num_targets"] == {"roc_auc": 1, "pr_auc": 1, "accuracy": 2, "balanced_accuracy": 1}


def test_a_class_without_labels_leaves_the_areas_undefined():
    found = class_metrics(np.array([0.0, 1.0]), np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), "phase")
    assert {entry["reason"] for entry in found["undefined"]} == {"no label is 2"}
    assert found["targets"]["phase"]["accuracy"] == 1.0


def test_errors_in_different_units_have_no_mean():
    labels, values = np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 2.0]])
    mixed = regression_metrics(labels, values, ["gap", "mu"], ["eV", "D"])
    alike = regression_metrics(labels, values, ["gap", "mu"], ["eV", "eV"])
    assert mixed["mean"]["mae"] is None
    assert alike["mean"]["mae"] == 0.25
    assert mixed["mean"]["r2"] == alike["mean"]["r2"]
    assert {"target": None, "metric": "mae", "reason": "the targets have different units"} in mixed["undefined"]


def test_coverage_and_width_of_intervals_of_the_targets_that_have_them():
    labels = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, NAN]])
    lower, upper = np.array([[-1.0, NAN]] * 3), np.array([[1.0, NAN]] * 3)
    found = regression_metrics(labels, labels.copy(), ["a", "b"], lower=lower, upper=upper)
    assert found["targets"]["a"]["coverage"] == pytest.approx(2 / 3)
    assert found["targets"]["a"]["interval_width"] == 2.0
    assert found["targets"]["b"]["coverage"] is None
    assert found["mean"]["num_targets"]["coverage"] == 1


def test_coverage_and_size_of_prediction_sets():
    sets = np.array([[[True, False]], [[True, True]], [[True, False]], [[False, False]]])
    found = binary_metrics(np.array([[0.0], [1.0], [1.0], [0.0]]), np.full((4, 1), 0.5), ["x"], sets)["targets"]["x"]
    assert (found["coverage"], found["set_size"]) == (0.5, 1.0)
    found = class_metrics(np.array([0.0, 1.0, 1.0, 0.0]), np.full((4, 2), 0.5), "x", sets[:, 0])["targets"]["x"]
    assert (found["coverage"], found["set_size"]) == (0.5, 1.0)


def test_a_target_that_is_not_calibrated_has_no_coverage():
    labels, everything = np.array([[0.0, 0.0], [1.0, 1.0]]), np.ones((2, 2, 2), dtype=bool)
    sets = calibrated_sets(everything, [0.5, None])
    found = binary_metrics(labels, labels, ["x", "y"], sets)
    assert [found["targets"][name]["coverage"] for name in ("x", "y")] == [1.0, None]
    assert found["mean"]["num_targets"]["set_size"] == 1
    found = class_metrics(labels[:, 0], np.full((2, 2), 0.5), "x", calibrated_sets(everything[0], [None]))
    assert {"target": "x", "metric": "coverage", "reason": "no sets"} in found["undefined"]


def test_a_target_that_was_not_predicted_is_undefined_but_single_gaps_are_refused():
    labels = np.array([[0.0, 1.0], [1.0, 2.0]])
    found = regression_metrics(labels, np.array([[NAN, 1.0], [NAN, 2.0]]), ["x", "y"])
    assert found["targets"]["x"] == {"mae": None, "rmse": None, "r2": None, "spearman": None, "num": 0}
    with pytest.raises(ValueError, match=r"Target 'x': 1 of the rows with a label have no finite prediction.*row 1"):
        regression_metrics(labels, np.array([[0.0, 1.0], [NAN, 2.0]]), ["x", "y"])
    with pytest.raises(ValueError, match=r"Target 'x': 1 of the rows .* first is row 0"):
        class_metrics(np.array([0.0, 1.0]), np.array([[NAN, 0.5], [0.5, 0.5]]), "x")


def test_labels_and_predictions_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Labels \(3, 1\) and predictions \(2, 1\) were expected .* for each of 'x'"):
        regression_metrics(np.zeros((3, 1)), np.zeros((2, 1)), ["x"])


def test_score_is_the_mean_and_an_undefined_one_is_an_error():
    labels = np.array([[0.0, 0.0], [1.0, 0.0]])
    assert score("multi_label_classification", labels, labels.copy(), "roc_auc") == 1.0
    with pytest.raises(
        ValueError, match=r"ROC-AUC is undefined for every target of these 2 .*all labels are 0.*Split"
    ):
        score("multi_label_classification", labels[:, 1:], labels[:, 1:], "roc_auc")


def test_mean_and_sample_deviation_over_seeds():
    labels = np.array([[0.0], [2.0]])
    results = [regression_metrics(labels, labels + shift, ["x"]) for shift in (1.0, 2.0, 3.0)]
    assert over_seeds(results)["mean"]["mae"] == {"mean": 2.0, "std": 1.0, "num_seeds": 3}
    assert over_seeds(results[:1])["targets"]["x"]["mae"] == {"mean": 1.0, "std": None, "num_seeds": 1}
    constant = regression_metrics(labels, np.ones_like(labels), ["x"])
    assert over_seeds([*results[:2], constant])["mean"]["spearman"] == pytest.approx(
        {"mean": 1.0, "std": 0.0, "num_seeds": 2}
    )


@pytest.mark.parametrize(
    ("units", "has"), [((None,), True), ((None, None), False), (("eV", "eV"), True), (("eV", "D"), False)]
)
def test_errors_have_a_mean_where_their_unit_is_one(units, has):
    labels = np.arange(12.0).reshape(6, 2)[:, : len(units)]
    found = regression_metrics(labels, labels + 1, [f"t{index}" for index in range(len(units))], units)
    assert (found["mean"]["mae"] is not None) == has
