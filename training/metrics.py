"""How good predictions are: a figure for each target, their mean over the targets, and which are undefined and why.

Every function returns `{"targets": {name: {metric: value, ..., "num": labels}}, "mean": {metric: value, ..., "num_targets":
{metric: targets}}, "undefined": [{"target", "metric", "reason"}]}`. A metric that the labels at hand do not define is None
and listed: it is in no mean, and nothing is put in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

THRESHOLD = 0.5  # probability from which a class is called 1
REGRESSION = "regression"
BINARY = "multi_label_classification"
CLASSES = "single_label_classification"
METRICS = {
    REGRESSION: ("mae", "rmse", "r2", "spearman"),
    BINARY: ("roc_auc", "pr_auc", "accuracy", "balanced_accuracy"),
    CLASSES: ("roc_auc", "pr_auc", "accuracy", "balanced_accuracy"),
}
TITLES = {
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R2",
    "spearman": "Spearman",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "coverage": "coverage",
    "interval_width": "interval width",
    "set_size": "classes in a set",
}
LOWER_IS_BETTER = frozenset(("mae", "rmse"))
IN_UNITS = frozenset(("mae", "rmse", "interval_width"))  # of the target


def have_mean(units: Sequence[str | None]) -> bool:
    """Whether errors of targets in these units have a mean: they do in one unit, which somebody named if there are several."""
    return len(units) == 1 or (len(set(units)) == 1 and units[0] is not None)


def regression_metrics(
    labels: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    units: Sequence[str | None] | None = None,
    lower: np.ndarray | None = None,
    upper: np.ndarray | None = None,
) -> dict[str, Any]:
    """MAE, RMSE, R2 and Spearman's rank correlation; with intervals the share of labels inside and their mean width.

    Args:
        labels: (n, T), NaN where missing.
        values: (n, T) predictions, in the units of the labels.
        names: of the T targets.
        units: of the T targets; errors in different or unknown units have no mean; None: nobody asks.
        lower: (n, T) ends of the intervals, NaN for a target without.
        upper: the other ends.
    """
    found = {}
    for name, column, known in _targets(labels, values, names):
        label, value = labels[known, column], values[known, column]
        found[name] = _regression(label, value) | {"num": len(label)}
        if lower is not None and upper is not None:
            found[name] |= _intervals(label, lower[known, column], upper[known, column])
    return _summary(found, IN_UNITS if units is not None and not have_mean(units) else frozenset())


def binary_metrics(
    labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], prediction_sets: np.ndarray | None = None
) -> dict[str, Any]:
    """ROC-AUC, PR-AUC (average precision), accuracy and balanced accuracy at `THRESHOLD`; with sets their coverage and size.

    Args:
        labels: (n, T) of 0 and 1, NaN where missing.
        probabilities: (n, T) of class 1.
        names: of the T targets.
        prediction_sets: (n, T, 2), 1 for the classes in a conformal set, NaN for a target without.
    """
    found = {}
    for name, column, known in _targets(labels, probabilities, names):
        label, probability = labels[known, column].astype(int), probabilities[known, column]
        one_hot, both = np.eye(2, dtype=int)[label], np.column_stack([1 - probability, probability])
        found[name] = _classification(label, both, label, probability) | {"num": len(label)}
        found[name] |= {} if prediction_sets is None else _sets(one_hot, prediction_sets[known, column])
    return _summary(found)


def class_metrics(
    labels: np.ndarray, probabilities: np.ndarray, name: str, prediction_sets: np.ndarray | None = None
) -> dict[str, Any]:
    """The same of C classes, of which each molecule has one; the areas are means over the classes, each against the rest.

    Args:
        labels: (n,) of 0 to C - 1, NaN where missing.
        probabilities: (n, C).
        name: of the target.
        prediction_sets: (n, C), 1 for the classes in a conformal set, NaN if there are none.
    """
    known = ~np.isnan(labels)
    if np.isnan(probabilities).all():  # as in `_targets`
        known = np.zeros_like(known)
    label, probability = labels[known].astype(int), probabilities[known]
    if not np.isfinite(probability).all():
        raise _not_predicted(name, known & ~np.isfinite(probabilities).all(-1))
    one_hot = np.eye(probabilities.shape[1], dtype=int)[label]
    found = _classification(label, probability, one_hot, probability) | {"num": len(label)}
    found |= {} if prediction_sets is None else _sets(one_hot, prediction_sets[known])
    return _summary({name: found})


def score(problem_type: str, labels: np.ndarray, values: np.ndarray, metric: str) -> float:
    """The mean of one metric over the targets, by which an epoch can be chosen; an error where it is undefined.

    Args:
        problem_type: of the config.
        labels: (n, T), NaN where missing.
        values: (n, T) or, of classes, (n, C).
        metric: of `METRICS`.
    """
    found = all_metrics(problem_type, labels, values, [f"target {column}" for column in range(labels.shape[1])])
    if (value := found["mean"][metric]) is None:
        reasons = sorted({entry["reason"] for entry in found["undefined"] if entry["metric"] == metric})
        raise ValueError(
            f"{TITLES[metric]} is undefined for every target of these {len(labels)} molecules ({'; '.join(reasons)}). "
            "Split the data another way, so that each part has labels of both kinds."
        )
    return float(value)


def all_metrics(
    problem_type: str,
    labels: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    units: Sequence[str | None] | None = None,
    lower: np.ndarray | None = None,
    upper: np.ndarray | None = None,
    prediction_sets: np.ndarray | None = None,
) -> dict[str, Any]:
    """The metrics of a problem type, as the functions above give them."""
    if problem_type == REGRESSION:
        return regression_metrics(labels, values, names, units, lower, upper)
    if problem_type == BINARY:
        return binary_metrics(labels, values, names, prediction_sets)
    return class_metrics(labels[:, 0], values, names[0], prediction_sets)


def over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one seed) of each figure over results of the functions above."""
    return {
        "targets": {name: _spreads([result["targets"][name] for result in results]) for name in results[0]["targets"]},
        "mean": _spreads([result["mean"] for result in results]),
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and number of the values that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "num_seeds": len(defined),
    }


def _spreads(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = [name for name in figures[0] if name in TITLES and all(name in figure for figure in figures)]
    return {name: spread([figure[name] for figure in figures]) for name in metrics}


def _targets(labels: np.ndarray, values: np.ndarray, names: Sequence[str]) -> list[tuple[str, int, np.ndarray]]:
    """Name, column and labelled rows of each target that is predicted; rows without a prediction must have no label."""
    if labels.shape != values.shape or labels.shape[1:] != (len(names),):
        raise ValueError(
            f"Labels {labels.shape} and predictions {values.shape} were expected to be (molecules, {len(names)}), a column "
            f"for each of {', '.join(map(repr, names))}. Give both for the same molecules and targets."
        )
    found = []
    for column, name in enumerate(names):
        known = ~np.isnan(labels[:, column])
        missing = known & ~np.isfinite(values[:, column])
        if missing.any():
            if not np.isnan(values[:, column]).all():
                raise _not_predicted(name, missing)
            known = np.zeros_like(known)  # a target that a model could not learn: nothing is measured
        found.append((name, column, known))
    return found


def _not_predicted(name: str, missing: np.ndarray) -> ValueError:
    return ValueError(
        f"Target {name!r}: {missing.sum()} of the rows with a label have no finite prediction, the first is row "
        f"{np.flatnonzero(missing)[0]}. Predict all of them, or leave their labels out."
    )


# Each figure is a number, or the reason why there is none.


def _regression(label: np.ndarray, value: np.ndarray) -> dict[str, Any]:
    if not len(label):
        return dict.fromkeys(METRICS[REGRESSION], "no labels with a prediction")
    found: dict[str, Any] = {
        "mae": mean_absolute_error(label, value),
        "rmse": root_mean_squared_error(label, value),
    }
    reason = "fewer than 2 labels" if len(label) < 2 else "all labels are equal" if np.ptp(label) == 0 else None
    found["r2"] = reason or r2_score(label, value)
    reason = reason or ("all predictions are equal" if np.ptp(value) == 0 else None)
    found["spearman"] = reason or spearmanr(label, value).statistic
    return found


def _intervals(label: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> dict[str, Any]:
    known = ~(np.isnan(lower) | np.isnan(upper))
    if not known.any():
        return {"coverage": "no intervals", "interval_width": "no intervals"}
    label, lower, upper = label[known], lower[known], upper[known]
    return {"coverage": ((lower <= label) & (label <= upper)).mean(), "interval_width": (upper - lower).mean()}


def _classification(
    label: np.ndarray, probabilities: np.ndarray, against_rest: np.ndarray, scores: np.ndarray
) -> dict[str, Any]:
    """Of labels (n,) and probabilities (n, C); the areas are of `scores` for the 0 and 1 of `against_rest`."""
    if not len(label):
        return dict.fromkeys(METRICS[BINARY], "no labels with a prediction")
    num_classes = probabilities.shape[1]
    called = probabilities.argmax(-1)
    if num_classes == 2:
        called = (probabilities[:, 1] >= THRESHOLD).astype(int)
    found: dict[str, Any] = {"accuracy": accuracy_score(label, called)}
    absent = sorted(set(range(num_classes)) - set(label.tolist()))
    if absent:
        what = "all labels are " + str(label[0]) if len(set(label.tolist())) == 1 else f"no label is {absent[0]}"
        return {**dict.fromkeys(METRICS[BINARY], what), **found}
    return {
        "roc_auc": roc_auc_score(against_rest, scores),
        "pr_auc": average_precision_score(against_rest, scores),
        **found,
        "balanced_accuracy": balanced_accuracy_score(label, called),
    }


def _sets(one_hot: np.ndarray, prediction_sets: np.ndarray) -> dict[str, Any]:
    if not len(one_hot):
        return {"coverage": "no labels with a prediction", "set_size": "no labels with a prediction"}
    if np.isnan(prediction_sets).any():
        return {"coverage": "no sets", "set_size": "no sets"}
    return {
        "coverage": ((prediction_sets == 1) & (one_hot == 1)).any(-1).mean(),
        "set_size": prediction_sets.sum(-1).mean(),
    }


def _summary(found: dict[str, dict[str, Any]], no_mean: frozenset[str] = frozenset()) -> dict[str, Any]:
    targets: dict[str, dict[str, Any]] = {}
    undefined: list[dict[str, str | None]] = []
    for name, figures in found.items():
        targets[name] = {}
        for metric, figure in figures.items():
            if isinstance(figure, str):
                undefined.append({"target": name, "metric": metric, "reason": figure})
            targets[name][metric] = figure if metric == "num" else None if isinstance(figure, str) else float(figure)
    mean: dict[str, Any] = {"num_targets": {}}
    for metric in dict.fromkeys(metric for figures in found.values() for metric in figures if metric != "num"):
        defined = [figures[metric] for figures in targets.values() if figures[metric] is not None]
        mean[metric] = float(np.mean(defined)) if defined and metric not in no_mean else None
        mean["num_targets"][metric] = len(defined)
        if metric in no_mean:
            undefined.append({"target": None, "metric": metric, "reason": "the targets have different units"})
    return {"targets": targets, "mean": mean, "undefined": undefined}
