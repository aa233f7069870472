"""What a fine-tuning or an evaluation found -> metrics.json, plots and a model card that says it as it is."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig

from data import PreprocessedDataset
from data import column as column_of
from metrics import (
    BINARY,
    CLASSES,
    IN_UNITS,
    LOWER_IS_BETTER,
    METRICS,
    REGRESSION,
    TITLES,
    all_metrics,
    have_mean,
    over_seeds,
)
from moleblend_hf.prediction_moleblend import predicts_atoms
from reporting import CARDS, dataset_id, render
from result_plots import MAX_PANELS, plot_coverage, plot_parity, plot_reliability, plot_roc
from splits import SPLITS, split_hash

# Names of the runs, which are the rows of the tables. Runs of one name differ in their seeds.
MODEL = "MoleBLEND"
ENSEMBLE = "MoleBLEND, ensemble"  # of the runs above, as one model
FROM_SCRATCH = "MoleBLEND from scratch"
BASELINE = "ECFP4 + random forest"

SPLIT_DEFINITIONS = {
    "random": "each row is drawn on its own",
    "scaffold": "the molecules of a Bemis-Murcko scaffold stay together, the largest sets are trained on (as in MoleculeNet)",
    "scaffold-unimol": "as `scaffold`, but the stereoisomers of a scaffold are told apart (as in Uni-Mol)",
    "scaffold-balanced": "the molecules of a Bemis-Murcko scaffold stay together, their order is drawn (as in chemprop 1)",
    "given": "the source says which row is in which part",
    "none": "nothing was split: all rows of the input",
}
DRAWN_SPLITS = ("random", "scaffold-balanced")
MAX_TARGETS_IN_CARD = 40
NUM_EXAMPLES = 2
FEW_LABELS = 200  # of the test part, below which the card warns


@dataclass(frozen=True)
class SplitPredictions:
    """Labels of the n rows of a part and what was predicted, in the targets' own units."""

    ids: list[str]
    smiles: list[str]
    labels: np.ndarray  # (n, T) with NaN where missing; single_label_classification: (n, 1), the class's index
    values: np.ndarray  # (n, T) in own units or probabilities of class 1; single_label_classification: (n, C)
    lower: np.ndarray | None = None  # (n, T) conformal intervals of regression; NaN for a target without one
    upper: np.ndarray | None = None
    prediction_sets: np.ndarray | None = (
        None  # conformal sets: (n, T, 2) or (n, C), 1 for the classes in them, likewise
    )


@dataclass(frozen=True)
class Run:
    """One trained model, at the epoch that validation selected."""

    name: str  # MODEL, ENSEMBLE, FROM_SCRATCH or BASELINE
    seed: int | None  # None: has none, as an ensemble
    test: SplitPredictions
    validation: SplitPredictions | None = None  # None: an evaluation of a model that was selected elsewhere
    seconds: float | None = None  # of training
    epochs: int | None = None  # after which the model was taken


@dataclass(frozen=True)
class DatasetFacts:
    """What became of the rows of the source."""

    name: str
    source: str
    num_read: int
    num_kept: int
    rejected_by_reason: dict[str, int]
    content_sha256: str

    @classmethod
    def of(cls, dataset: PreprocessedDataset, name: str | None = None) -> "DatasetFacts":
        """As the dataset says; `name` is that of the raw file, say."""
        about = dataset.about
        return cls(
            name=name or dataset.name,
            **{key: about[key] for key in ("source", "num_read", "num_kept", "rejected_by_reason", "content_sha256")},
        )


@dataclass(frozen=True)
class SplitFacts:
    """Which rows are in which part."""

    name: str  # a key of SPLIT_DEFINITIONS
    parts: dict[str, dict[str, Any]]  # by part: "rows" and the "sha256" of its ids
    leakage: dict[str, int] | None  # by pair of parts: molecules (InChIKeys) in both; None: nobody looked
    seed: int | None = None  # of a split that draws
    fractions: list[float] | None = None
    tested: str = "test"  # part that the figures are of; "all": all rows of the input

    @property
    def what_is_tested(self) -> str:
        """As a sentence has it."""
        return "the input" if self.tested == "all" else f"the {self.tested} part"

    @classmethod
    def of(
        cls,
        name: str,
        parts: Mapping[str, datasets.Dataset],
        seed: int | None = None,
        fractions: list[float] | None = None,
        tested: str = "test",
    ) -> "SplitFacts":
        """From the rows of each part, which have an `id` and, for the leakage, an `inchikey`."""
        keys = {
            part: set(pc.unique(column_of(rows, "inchikey")).drop_null().to_pylist())
            for part, rows in parts.items()
            if "inchikey" in rows.column_names
        }
        return cls(
            name=name,
            parts={part: {"rows": len(rows), "sha256": split_hash(rows["id"])} for part, rows in parts.items()},
            leakage={
                f"{one} and {other}": len(keys[one] & keys[other]) for one, other in itertools.combinations(keys, 2)
            }
            if len(keys) == len(parts)
            else None,
            seed=seed if name in DRAWN_SPLITS else None,
            fractions=fractions if name in SPLITS else None,
            tested=tested,
        )


@dataclass(frozen=True)
class Experiment:
    """All that the report tells."""

    problem_type: str  # of the config: regression, multi_label_classification or single_label_classification
    target_names: list[str]  # single_label_classification: the one target
    target_units: list[str | None]
    runs: list[Run]  # in the order of the table's rows
    reported: str  # name of the runs that the card is about; the folder has the weights of the first of them
    dataset: DatasetFacts
    split: SplitFacts
    settings: dict[str, Any]
    command: str
    environment: dict[str, Any]  # `reporting.environment`
    num_parameters: int
    class_names: list[str] | None = None  # single_label_classification
    binary_class_names: dict[str, list[str]] = field(
        default_factory=dict
    )  # of 0 and 1, by target, where they have names
    selected_by: str | None = None  # figure of the validation set that chose the epoch: "rmse"; None: an evaluation
    conformal_coverage: float | None = None  # nominal
    base_model: str | None = None  # what was fine-tuned; None: from scratch
    model: str = "path/to/this/folder"  # what to load in the example
    notes: list[str] = field(default_factory=list)  # what else has to be known, a sentence each

    @property
    def names(self) -> list[str]:
        """Of the models, in the order of their first runs."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def reported_run(self) -> Run:
        """That of the folder's weights."""
        return next(run for run in self.runs if run.name == self.reported)


def write_report(experiment: Experiment, output_dir: str | Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Write metrics.json, the plots and README.md into a folder, and return the content of metrics.json."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = results_of(experiment)
    (folder / "metrics.json").write_text(
        json.dumps(results, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8"
    )
    plots = write_plots(experiment, results, folder)
    (folder / "README.md").write_text(card(experiment, results, plots, config), encoding="utf-8")
    return results


def results_of(experiment: Experiment) -> dict[str, Any]:
    """The content of metrics.json: every figure of every run, their spread over seeds, and all facts about the data."""
    if all(run.name != experiment.reported for run in experiment.runs):
        raise ValueError(
            f"The report is to be about {experiment.reported!r}, but the runs are of {', '.join(experiment.names) or 'none'}."
        )
    models = {}
    for name in experiment.names:
        runs = [run for run in experiment.runs if run.name == name]
        figures: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            for part, predictions in (("validation", run.validation), ("test", run.test)):
                if predictions is not None:
                    figures[part].append(_metrics(experiment, predictions))
        models[name] = {
            **{part: over_seeds(found) for part, found in figures.items()},
            "runs": [
                {"seed": run.seed, "epochs": run.epochs, "seconds": run.seconds}
                | {part: found[index] for part, found in figures.items() if len(found) == len(runs)}
                for index, run in enumerate(runs)
            ],
        }
    results = {
        "problem_type": experiment.problem_type,
        "targets": dict(zip(experiment.target_names, experiment.target_units, strict=True)),
        "class_names": experiment.class_names,
        "binary_class_names": experiment.binary_class_names,
        "reported": experiment.reported,
        "selected_by": experiment.selected_by,
        "conformal_coverage": experiment.conformal_coverage,
        "models": models,
        "dataset": asdict(experiment.dataset),
        "split": asdict(experiment.split),
        "base_model": experiment.base_model,
        "num_parameters": experiment.num_parameters,
        "notes": experiment.notes,
        "command": experiment.command,
        "settings": experiment.settings,
        "environment": experiment.environment,
    }
    return results | {"comparison": list(comparisons(experiment, results))}


def _metrics(experiment: Experiment, predictions: SplitPredictions) -> dict[str, Any]:
    return all_metrics(
        experiment.problem_type,
        predictions.labels,
        predictions.values,
        experiment.target_names,
        experiment.target_units,
        predictions.lower,
        predictions.upper,
        predictions.prediction_sets,
    )


def comparisons(experiment: Experiment, results: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each metric and each other model: which of the two is better on the test part."""
    single = MODEL if MODEL in experiment.names else FROM_SCRATCH
    for other in (BASELINE, FROM_SCRATCH):
        # From scratch there are single models: an ensemble would win by being one.
        # So are random forests of folds, each of which has seen a part of what the ensemble has.
        is_single = other == FROM_SCRATCH or experiment.settings.get("folds")
        name = single if is_single and single in experiment.names else experiment.reported
        if other not in experiment.names or other == name:
            continue
        for metric in METRICS[experiment.problem_type]:
            if metric in IN_UNITS and not have_mean(experiment.target_units):
                found = _compared_by_target(results["models"], name, other, metric)
            else:
                runs = "folds" if experiment.settings.get("folds") else "seeds"
                found = _compared(results["models"], name, other, metric, runs)
            yield f"{TITLES[metric]}: {found}"


def _compared_by_target(models: Mapping[str, Any], name: str, other: str, metric: str) -> str:
    """For errors in different units, which have no mean."""
    ours, theirs = (
        {key: found[metric]["mean"] for key, found in models[each]["test"]["targets"].items()}
        for each in (name, other)
    )
    both = [target for target in ours if ours[target] is not None and theirs[target] is not None]
    if not both:
        return "undefined, so there is nothing to compare."
    lower = [target for target in both if ours[target] < theirs[target]]
    if len(lower) == len(both):
        return f"{name} is better than {other} for all {len(both)} targets."
    rest = _escaped(", ".join(target for target in both if target not in lower))
    return f"{name} is better than {other} for {len(lower)} of {len(both)} targets, and not for {rest}."


def _compared(models: Mapping[str, Any], name: str, other: str, metric: str, runs: str) -> str:
    """By the mean over the targets; `runs` is what the runs of a model differ in."""
    ours, theirs = (models[each]["test"]["mean"][metric] for each in (name, other))
    if ours["mean"] is None or theirs["mean"] is None:
        undefined = " and ".join(each for each, found in ((name, ours), (other, theirs)) if found["mean"] is None)
        return f"undefined for {undefined}, so there is nothing to compare."
    counts = {run["test"]["mean"]["num_targets"][metric] for each in (name, other) for run in models[each]["runs"]}
    if len(counts) > 1:
        return f"the means run over different targets ({min(counts)} to {max(counts)}), so they cannot be compared."
    figures = f"{shown(ours, metric)} against {shown(theirs, metric)}"
    difference = ours["mean"] - theirs["mean"]
    if difference == 0:
        return f"{name} and {other} are equal, {figures}."
    if (difference < 0) == (metric in LOWER_IS_BETTER):
        verdict = f"{name} is better than {other}, {figures}"
    else:
        verdict = f"{name} is worse than {other}, {figures}"
    spreads = [found["std"] for found in (ours, theirs) if found["std"] is not None]
    if spreads and abs(difference) < max(spreads):
        verdict += f"; the difference is smaller than the spread over {runs}"
    return verdict + "."


def shown(spread: Mapping[str, Any], metric: str) -> str:
    """A mean, with its standard deviation where there is one, as text."""
    if spread["mean"] is None:
        return "undefined"
    decimals = 3
    if metric in IN_UNITS and spread["mean"]:  # three digits, whatever the unit
        decimals = min(max(2 - math.floor(math.log10(abs(spread["mean"]))), 0), 12)
    text = f"{spread['mean']:.{decimals}f}"
    return text if spread["std"] is None else f"{text} ± {spread['std']:.{decimals}f}"


def write_plots(experiment: Experiment, results: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw the tested part as the reported run predicts it; return the caption and the file of each plot."""
    test, names = experiment.reported_run.test, experiment.target_names
    of_what = experiment.split.what_is_tested.removeprefix("the ")
    if experiment.problem_type == REGRESSION:
        some = f" (the first {MAX_PANELS} of {len(names)} targets)" if len(names) > MAX_PANELS else ""
        plots = [(f"Predicted against measured, {of_what}{some}", "parity.png")]
        plot_parity(test.labels, test.values, names, experiment.target_units, folder / "parity.png")
    else:
        labels, curves = test.labels, names
        if experiment.problem_type == CLASSES:  # each class against the rest
            curves = experiment.class_names or []
            labels = np.where(np.isnan(labels), np.nan, labels == np.arange(test.values.shape[1]))
        plots = [
            (f"ROC curves, {of_what}", "roc.png"),
            (f"Calibration of the probabilities, {of_what}", "reliability.png"),
        ]
        plot_roc(labels, test.values, curves, folder / "roc.png")
        plot_reliability(labels, test.values, folder / "reliability.png")
    covered = _covered(experiment, results)
    if covered and experiment.conformal_coverage is not None:
        coverage = {name: figures["coverage"] for name, figures in covered.items()}
        chance = {name: _chance(experiment, name, figures["num"]) for name, figures in covered.items()}
        plot_coverage(coverage, chance, experiment.conformal_coverage, folder / "coverage.png")
        plots.append((f"Conformal coverage, {of_what}", "coverage.png"))
    return plots


def _reported(experiment: Experiment, results: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the folder's weights on the test part."""
    return results["models"][experiment.reported]["runs"][0]["test"]


def _covered(experiment: Experiment, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of the targets that have conformal intervals or sets."""
    targets = _reported(experiment, results)["targets"]
    return {name: figures for name, figures in targets.items() if figures.get("coverage") is not None}


# The card


def card(
    experiment: Experiment, results: Mapping[str, Any], plots: list[tuple[str, str]], config: PreTrainedConfig
) -> str:
    """The text of README.md."""
    found = _reported(experiment, results)
    num_labels = [figures["num"] for figures in found["targets"].values()]
    of_atoms = predicts_atoms(config)
    base_model = experiment.base_model
    if base_model is not None and Path(base_model).exists():  # nobody else has this path
        base_model = Path(base_model).resolve().name
    examples = list(dict.fromkeys(sorted(experiment.reported_run.test.smiles, key=len)))
    return render(
        CARDS / "finetuned.md.jinja",
        metadata=_metadata(experiment, results, base_model).to_yaml(),
        experiment=experiment,
        results=results,
        config=config,
        base_model=base_model,
        title=f"MoleBLEND {'evaluated' if experiment.selected_by is None else 'fine-tuned'} on {experiment.dataset.name}",
        auto_class=f"AutoModelFor{'Token' if of_atoms else 'Sequence'}Classification",
        of_atoms=of_atoms,
        num_used=_num_used(experiment),
        class_meanings=_class_meanings(experiment),
        reading={REGRESSION: "", BINARY: ".sigmoid()", CLASSES: ".softmax(-1)"}[experiment.problem_type],
        columns=", ".join(
            experiment.class_names or list(map(_with_unit, *zip(*results["targets"].items(), strict=True)))
        ),
        examples=examples[len(examples) // 4 :][:NUM_EXAMPLES],  # neither the smallest nor the large ones
        plain_words=list(plain_words(experiment, results, of_atoms)),
        models_table=_models_table(experiment, results),
        targets_table=_targets_table(experiment, results),
        num_targets_left_out=max(0, len(experiment.target_names) - MAX_TARGETS_IN_CARD),
        mixed_units=experiment.problem_type == REGRESSION and not have_mean(experiment.target_units),
        undefined=list(_undefined(experiment, results)),
        titles=TITLES,
        split_definition=SPLIT_DEFINITIONS.get(experiment.split.name, "see the command"),
        coverage_table=_coverage_table(experiment, results),
        plots=plots,
        fewest_labels=min(num_labels),
        few_labels=FEW_LABELS,
        has_spread=any(len(model["runs"]) > 1 for name, model in results["models"].items() if name != BASELINE),
    )


def _num_used(experiment: Experiment) -> int:
    """Molecules that were trained on, validated or tested with; an evaluation reads one part of those there are."""
    split = experiment.split
    parts = split.parts if experiment.selected_by is not None else [split.tested]
    return sum(split.parts[part]["rows"] for part in parts)


def _class_meanings(experiment: Experiment) -> str:
    """What 0 and 1 mean, in brackets, where somebody said."""
    names = experiment.binary_class_names
    meanings = {target: f"0 = {zero}, 1 = {one}" for target, (zero, one) in names.items()}
    if not meanings:
        return ""
    if len(meanings) == len(experiment.target_names) and len(set(meanings.values())) == 1:
        return f" ({next(iter(meanings.values()))})"
    return f" ({'; '.join(f'{target}: {meaning}' for target, meaning in meanings.items())})"


def plain_words(experiment: Experiment, results: Mapping[str, Any], of_atoms: bool = False) -> Iterator[str]:
    """What the figures of the folder's weights mean, for a reader who does not know the metrics."""
    found, test = _reported(experiment, results), experiment.reported_run.test
    mean = found["mean"]
    one, article = ("atom", "an") if of_atoms else ("molecule", "a")
    of_what = experiment.split.what_is_tested
    if experiment.problem_type == REGRESSION:
        for column, (name, unit) in itertools.islice(enumerate(results["targets"].items()), MAX_PANELS):
            figures, unit = found["targets"][name], f" {unit}" if unit else ""
            if figures["mae"] is None:
                yield f"{name}: nothing could be measured, no {one} of {of_what} has a label."
                continue
            labels = test.labels[:, column]
            of_median = float(np.nanmean(np.abs(labels - np.nanmedian(labels))))
            yield (
                f"{name}: on the {figures['num']:,} labels of {of_what} the model is off by {_one(figures['mae'], 'mae')}"
                f"{unit} on average. Whoever named their median for every {one} would be off by {_one(of_median, 'mae')}{unit}."
            )
        return
    if experiment.problem_type == BINARY:
        known = [column[~np.isnan(column)] for column in test.labels.T]
        shares = [max(np.mean(column), 1 - np.mean(column)) for column in known if len(column)]
    else:
        labels = test.labels[~np.isnan(test.labels)].astype(int)
        shares = [np.bincount(labels).max() / len(labels)] if len(labels) else []
    if mean["roc_auc"] is not None:
        if experiment.problem_type == BINARY:
            what = f"one {one} of each class, the model gives the one of class 1 the higher probability"
        else:
            what = f"{article} {one} of a class and one of another, the model gives the first the higher probability of its class"
        yield f"Given {what} in {mean['roc_auc']:.0%} of the cases{_over_targets(experiment, mean, 'roc_auc')}. Guessing: 50%."
    if mean["accuracy"] is not None:
        yield (
            f"The class that it names is right for {mean['accuracy']:.1%} of the labels"
            f"{_over_targets(experiment, mean, 'accuracy')}. Whoever always names the more frequent class is right for "
            f"{np.mean(shares):.1%}."
        )


def _over_targets(experiment: Experiment, mean: Mapping[str, Any], metric: str) -> str:
    num = len(experiment.target_names)
    return f", on average over {mean['num_targets'][metric]} of {num} targets" if num > 1 else ""


Table = tuple[list[str], list[list[str]]]  # header, rows


def _models_table(experiment: Experiment, results: Mapping[str, Any]) -> Table:
    """Each model's mean over the targets, on the test part and the validation part."""
    metrics = [
        metric
        for metric in METRICS[experiment.problem_type]
        if metric not in IN_UNITS or have_mean(experiment.target_units)
    ]
    unit = experiment.target_units[0]
    num, counts = len(experiment.target_names), _reported(experiment, results)["mean"]["num_targets"]
    parts = [part for part in ("test", "validation") if any(part in model for model in results["models"].values())]
    header = ["Model", "Runs"]
    for metric in metrics:
        title = f"{TITLES[metric]} ({unit})" if metric in IN_UNITS and unit else TITLES[metric]
        title += f" of {counts[metric]} of {num} targets" if counts[metric] < num else ""
        header += [f"{title}, {experiment.split.tested}", *parts[1:]]
    cells = list(itertools.product(metrics, parts))
    rows = []
    for name, model in results["models"].items():
        figures = [shown(model[part]["mean"][metric], metric) if part in model else "" for metric, part in cells]
        rows.append([name, str(len(model["runs"])), *figures])
        if name == experiment.reported and len(model["runs"]) > 1:
            first = model["runs"][0]
            figures = [_one(first[part]["mean"][metric], metric) if part in first else "" for metric, part in cells]
            rows.append([f"&nbsp; of which this folder, seed {first['seed']}", "1", *figures])
    return header, rows


def _targets_table(experiment: Experiment, results: Mapping[str, Any]) -> Table | None:
    """Every metric of each target on the test part, and the first metric of the other models."""
    if len(experiment.target_names) == 1:
        return None
    metrics = METRICS[experiment.problem_type]
    others = [name for name in experiment.names if name != experiment.reported]
    header = [
        "Target",
        "Labels",
        *(TITLES[metric] for metric in metrics),
        *(f"{TITLES[metrics[0]]}, {name}" for name in others),
    ]
    nums = {name: figures["num"] for name, figures in _reported(experiment, results)["targets"].items()}
    rows = []
    for target, unit in itertools.islice(results["targets"].items(), MAX_TARGETS_IN_CARD):
        of = {name: model["test"]["targets"][target] for name, model in results["models"].items()}
        figures = [shown(of[experiment.reported][metric], metric) for metric in metrics]
        beside = [shown(of[name][metrics[0]], metrics[0]) for name in others]
        rows.append([_escaped(_with_unit(target, unit)), f"{nums[target]:,}", *figures, *beside])
    return header, rows


def _coverage_table(experiment: Experiment, results: Mapping[str, Any]) -> Table | None:
    """Share of the test labels in the conformal intervals or sets, and how far chance may take it from the nominal one."""
    nominal, covered = experiment.conformal_coverage, _covered(experiment, results)
    if nominal is None or not covered:
        return None
    size = "interval_width" if experiment.problem_type == REGRESSION else "set_size"
    rows = []
    for name, figures in itertools.islice(covered.items(), MAX_TARGETS_IN_CARD):
        chance = _chance(experiment, name, figures["num"])
        title = _with_unit(name, results["targets"][name])
        row = [_escaped(title), f"{figures['num']:,}", f"{figures['coverage']:.1%}", f"{nominal:.0%} ± {chance:.1%}"]
        rows.append([*row, _one(figures[size], size)])
    return ["Target", "Labels", "Covered", "Nominal ± chance (95%)", f"Mean {TITLES[size]}"], rows


def _chance(experiment: Experiment, name: str, num: int) -> float:
    """Half of the 95 % range around the nominal coverage for so many exchangeable test and calibration labels.

    The coverage of an interval from n labels is Beta distributed (arXiv:2107.07511, section 3.2), which adds its variance to
    that of counting `num` test labels.
    """
    nominal, validation = experiment.conformal_coverage or 0.0, experiment.reported_run.validation
    variance = 1 / num
    if validation is not None:
        column = experiment.target_names.index(name)
        variance += 1 / (np.sum(~np.isnan(validation.labels[:, column])) + 2)
    return 1.96 * math.sqrt(nominal * (1 - nominal) * variance)


def _undefined(experiment: Experiment, results: Mapping[str, Any]) -> Iterator[str]:
    """What could not be measured on the test part, for which targets and why."""
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in _reported(experiment, results)["undefined"]:
        if entry["target"] is not None:
            grouped[entry["metric"], entry["reason"]].append(entry["target"])
    for (metric, reason), names in grouped.items():
        more = f" and {len(names) - MAX_PANELS} more" if len(names) > MAX_PANELS else ""
        yield (
            f"{TITLES[metric]} is undefined for {len(names)} of {len(experiment.target_names)} targets, because {reason}: "
            f"{_escaped(', '.join(names[:MAX_PANELS]))}{more}."
        )


def _metadata(experiment: Experiment, results: Mapping[str, Any], base_model: str | None) -> ModelCardData:
    """The front matter, with the figures of the folder's weights on the test part as the model-index."""
    found, split = _reported(experiment, results), experiment.split
    measured = []
    for metric in METRICS[experiment.problem_type]:
        if (value := found["mean"][metric]) is not None:
            count = found["mean"]["num_targets"][metric]
            measured.append((metric, TITLES[metric] + (f", mean over {count} targets" if count > 1 else ""), value))
        elif found["mean"]["num_targets"][metric]:  # of different units
            for name, unit in results["targets"].items():
                if (value := found["targets"][name][metric]) is not None:
                    measured.append((metric, f"{TITLES[metric]} of {_with_unit(name, unit)}", value))
    arguments = {"split": split.name, "split_seed": split.seed, "sha256_of_ids": split.parts[split.tested]["sha256"]}
    return ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        pipeline_tag="graph-ml",
        tags=["chemistry", "molecules", "moleblend", "molecular-property-prediction"],
        datasets=[dataset_id(experiment.dataset.name)],
        base_model=base_model if experiment.base_model == base_model and (base_model or "").count("/") == 1 else None,
        model_name=f"MoleBLEND on {experiment.dataset.name}",
        eval_results=[
            EvalResult(
                task_type="graph-ml",
                task_name="molecular property prediction",
                dataset_type=dataset_id(experiment.dataset.name),
                dataset_name=experiment.dataset.name,
                dataset_split=split.tested,
                dataset_args=arguments,
                metric_type=metric,
                metric_name=title,
                metric_value=value,
            )
            for metric, title, value in measured
        ]
        or None,
    )


def _one(value: float | None, metric: str) -> str:
    return shown({"mean": value, "std": None}, metric)


def _with_unit(name: str, unit: str | None) -> str:
    return f"{name} ({unit})" if unit else name


def _escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
