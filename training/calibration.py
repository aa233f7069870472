"""Split conformal prediction: how wide an interval, or how large a set, must be to hold the truth in a stated share of cases.

The scores of molecules that the model was not trained on are ranked; the quantile with the correction for finite samples
covers a new molecule with at least the stated probability if it is exchangeable with them (Vovk et al. 2005; Angelopoulos and
Bates 2021, arXiv:2107.07511, section 1). A scaffold split is chosen so that the test molecules are not: the report states the
coverage that was found.
"""

import math
from collections.abc import Sequence

import numpy as np


def conformal_quantile(scores: np.ndarray, coverage: float) -> float | None:
    """The ceil((n + 1) coverage)-th smallest score; None where n scores are too few for that coverage."""
    rank = math.ceil((len(scores) + 1) * coverage)
    return float(np.sort(scores)[rank - 1]) if 0 < rank <= len(scores) else None


def calibrated_sets(prediction_sets: np.ndarray | None, quantiles: Sequence[float | None] | None) -> np.ndarray | None:
    """Sets as `predict_graphs` makes them, NaN for a target without a quantile: that all classes are in it was not promised.

    Args:
        prediction_sets: (n, T, 2) of binary tasks, (n, C) of classes; None if there are none.
        quantiles: of the config, T or 1.
    """
    if prediction_sets is None:
        return None
    known = np.array([quantile is not None for quantile in quantiles or ()])
    return np.where(known[:, None] if prediction_sets.ndim == 3 else known, prediction_sets, np.nan)


def conformal_quantiles(
    problem_type: str, labels: np.ndarray, values: np.ndarray, coverage: float
) -> list[float | None]:
    """A quantile a target, or one for classes.

    Args:
        problem_type: of the config.
        labels: (n, T) NaN where missing; transformed for regression. (n, 1) class indices for classes.
        values: what was predicted for them: (n, T) transformed for regression, (n, T) probabilities of class 1, or (n, C).
        coverage: share of the cases that is to be covered, between 0 and 1.
    """
    if problem_type == "single_label_classification":
        known = ~np.isnan(labels[:, 0])
        probability = values[np.flatnonzero(known), labels[known, 0].astype(int)]
        return [conformal_quantile(1 - probability, coverage)]
    scores = np.abs(labels - values)  # of a binary task: 1 - the probability of the class that it is
    return [conformal_quantile(column[~np.isnan(column)], coverage) for column in scores.T]
