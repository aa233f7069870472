"""Plots of how good a model is, as PNG files; matplotlib's Figure alone, so no display and no global state."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

MAX_PANELS = 12  # targets with a panel of their own
MAX_NAMED = 10  # curves with a name in the legend
NUM_BINS = 10
DOTS_A_INCH = 110


def plot_parity(
    labels: np.ndarray, values: np.ndarray, names: Sequence[str], units: Sequence[str | None], path: Path
) -> None:
    """Predicted against measured, a panel for each of the first targets; on the diagonal lies what is right."""
    num = min(len(names), MAX_PANELS)
    columns = min(num, 4)
    rows = -(-num // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for column, axes in enumerate(panels):
        if column >= num:
            axes.set_axis_off()
            continue
        known = ~np.isnan(labels[:, column] + values[:, column])
        label, value = labels[known, column], values[known, column]
        axes.scatter(label, value, s=12, alpha=min(1.0, 30 / max(len(label), 1) ** 0.5), linewidths=0)
        if len(label):
            axes.axline((label.mean(), label.mean()), slope=1, color="gray", linewidth=1)
            low, high = min(label.min(), value.min()), max(label.max(), value.max())
            margin = 0.05 * (high - low) or 1.0
            axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        unit = units[column]
        _label(axes, names[column], *(f"{what} ({unit})" if unit else what for what in ("measured", "predicted")))
    figure.savefig(path, dpi=DOTS_A_INCH)


def plot_roc(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], path: Path) -> None:
    """The ROC curve of each column of 0 and 1 that has both; of many, all in gray."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = 0
    for column, name in enumerate(names):
        known = ~np.isnan(labels[:, column] + probabilities[:, column])
        label = labels[known, column]
        if len(np.unique(label)) < 2:
            continue
        shown = f" {name}" if name.startswith("_") else name  # which matplotlib leaves out of a legend
        few = len(names) <= MAX_NAMED
        style = {"label": _text(shown)} if few else {"color": "gray", "linewidth": 0.8, "alpha": 0.5}
        axes.plot(*roc_curve(label, probabilities[known, column])[:2], **style)
        drawn += 1
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    title = "" if drawn == len(names) else f"{drawn} of {len(names)} curves are defined"
    _label(axes, title, "false positive rate", "true positive rate")
    if drawn and len(names) <= MAX_NAMED:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=DOTS_A_INCH)


def plot_reliability(labels: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """How often class 1 is met where it is predicted with some probability; all columns of (n, T) together."""
    known = ~np.isnan(labels + probabilities)
    label, probability = labels[known], probabilities[known].clip(0, 1)
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    if len(label):
        met, predicted = calibration_curve(label, probability, n_bins=NUM_BINS, pos_label=1)
        axes.plot(predicted, met, marker="o")
        below.hist(probability, bins=NUM_BINS, range=(0, 1))
    _label(axes, "calibration", "", "share of class 1")
    _label(below, "", "predicted probability", "predictions")
    figure.savefig(path, dpi=DOTS_A_INCH)


def plot_coverage(coverage: Mapping[str, float], chance: Mapping[str, float], nominal: float, path: Path) -> None:
    """Share of labels in their conformal intervals or sets, by target, with half the range that chance explains."""
    names = list(coverage)[:MAX_PANELS]
    errors = [chance[name] for name in names]
    figure = Figure(figsize=(4.6, 1.4 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(nominal, color="black", linestyle=":", linewidth=1)
    places = np.arange(len(names))
    axes.errorbar(
        [nominal] * len(names), places, xerr=errors, fmt="none", color="gray", capsize=4, label="chance (95 %)"
    )
    axes.plot([coverage[name] for name in names], places, "o", label="measured")
    axes.set_yticks(places, [_text(name, 20) for name in names])
    axes.invert_yaxis()
    _label(axes, f"coverage, nominal {nominal:.0%}", "share of labels inside", "")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=DOTS_A_INCH)


def plot_learning_curves(
    curves: Mapping[str, Mapping[int, Sequence[float]]], metric: str, path: Path, title: str = ""
) -> None:
    """Error against the number of training molecules: for each name of a model, the errors of its seeds by that number."""
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, errors in curves.items():
        sizes = sorted(errors)
        means = [float(np.mean(errors[size])) for size in sizes]
        stds = [float(np.std(errors[size], ddof=1)) if len(errors[size]) > 1 else 0.0 for size in sizes]
        axes.errorbar(sizes, means, yerr=stds, marker="o", capsize=3, label=name)
    axes.set(xscale="log", yscale="log")
    _label(axes, title, "training molecules", metric)
    axes.legend()
    figure.savefig(path, dpi=DOTS_A_INCH)


def _text(name: str, width: int = 36) -> str:
    """A name as it is written in a plot: a "$" would start a formula, and a long name takes several lines."""
    return textwrap.fill(name.replace("$", r"\$"), width)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=_text(title), xlabel=_text(x), ylabel=_text(y))
    axes.grid(alpha=0.3)
