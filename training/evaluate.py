r"""Measure how good a fine-tuned checkpoint is on labelled molecules, and write the report that fine-tuning writes.

A table        python training/evaluate.py --model FOLDER --input new.csv --smiles_column SMILES --output_dir OUT
Some targets   ... --targets gap,mu                          (columns named like targets of the model; left out: all of them)
A dataset      ... --input data/qm9 --split validation       (a folder that preprocess.py wrote, or its name on the Hub)
Classes        ... --targets phase                           (the column whose cells are the model's classes)
Atoms          the same, for a model of atoms: a column of lists for each target, as --atom_targets of preprocess.py

The molecules are featurized as the checkpoint's processor says; rows that cannot be read are in OUT/data/rejected.parquet with
the reason. OUT/metrics.json has every figure, OUT/README.md says what they mean. Nothing is trained or chosen.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from calibration import calibrated_sets
from data import PreprocessedDataset, is_preprocessed, open_dataset
from files import check_may_be_emptied, empty
from inputs import checked_source, preprocess_into, preprocessing_of
from labels import atom_names, graphs_of, labelled
from metrics import BINARY, CLASSES, REGRESSION, TITLES
from moleblend_hf import MoleBlendProcessor
from moleblend_hf.checkpoints import check_is_there, load_whole
from moleblend_hf.prediction_moleblend import predict_graphs, prediction_type, predicts_atoms, target_names
from preprocess import PreprocessingSettings
from report import MODEL, DatasetFacts, Experiment, Run, SplitFacts, SplitPredictions, shown, write_report
from reporting import environment, without_places
from settings import load_settings, setting
from tasks import check_class_meanings

TASKS = {"multi_label_classification": "classification", "single_label_classification": "classes"}


@dataclasses.dataclass(kw_only=True)
class EvaluationSettings:
    """What to evaluate on what; model, input and output_dir have to be given."""

    model: str = setting("model", "folder of a fine-tuned checkpoint, or its name on the Hub")

    input: str = setting("data", "CSV, TSV, SDF or Parquet file, or a preprocessed dataset (folder, Hub name)")
    source: str | None = setting("data", "layout of a file, as in preprocess.py; else by its ending", None)
    smiles_column: str | None = setting("data", "column of the SMILES; else guessed from its name", None)
    targets: list[str] | None = setting("data", "columns to compare with, A,B; else all targets of the model", None)
    split: str | None = setting("data", "part of the dataset; else test, or all rows where there are no parts", None)
    preprocessing: dict[str, Any] = setting(
        "data", "further settings of preprocess.py for a file, e.g. split_column=set units='{gap: hartree}'", {}
    )

    output_dir: str = setting("output", "where everything is written")
    overwrite: bool = setting("output", "delete what is in OUTPUT_DIR", False)
    num_proc: int = setting("output", "processes that featurize", 1)


def parse_args(argv: list[str] | None = None) -> EvaluationSettings:
    """Settings from the flags, and from a YAML file if one is named."""
    return load_settings(EvaluationSettings, __doc__, None, argv)


def load_model(name: str) -> PreTrainedModel:
    """A model with a head that has been trained."""
    check_is_there(name)
    of_atoms = predicts_atoms(AutoConfig.from_pretrained(name))
    auto_class = AutoModelForTokenClassification if of_atoms else AutoModelForSequenceClassification
    model: Any = load_whole(auto_class, name)  # transformers' decorator hides what its `to` takes
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def chosen_targets(settings: EvaluationSettings, model: PreTrainedModel) -> tuple[list[str], list[int]]:
    """The targets to measure, and their columns among the outputs; of classes the one target, and all outputs."""
    names = target_names(model.config)
    if prediction_type(model.config) == CLASSES:
        if settings.targets is None or len(settings.targets) != 1:
            raise ValueError(
                f"{settings.model!r} predicts which of {', '.join(names)} {'an atom' if predicts_atoms(model.config) else 'a molecule'} is. Name the one column that says so with "
                "--targets."
            )
        return settings.targets, list(range(len(names)))
    chosen = settings.targets or names
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(
            f"{settings.model!r} has no target {unknown[0]!r}. Its targets: {', '.join(names)}. Choose of these with --targets, "
            "and name the columns of the input like them."
        )
    return chosen, [names.index(name) for name in chosen]


def preprocessing(
    settings: EvaluationSettings, processor: MoleBlendProcessor, model: PreTrainedModel, targets: Sequence[str]
) -> PreprocessingSettings:
    """How the input, a file, becomes a dataset, for the model's processor."""
    problem_type = prediction_type(model.config)
    values: dict[str, Any] = {
        "source": settings.source,
        "smiles_column": settings.smiles_column,
        "atom_targets" if predicts_atoms(model.config) else "targets": list(targets),
        "num_proc": settings.num_proc,
    }
    if problem_type != REGRESSION:
        values["tasks"] = dict.fromkeys(targets, TASKS[problem_type])
    if problem_type == CLASSES:
        values["class_names"] = target_names(model.config)
    if problem_type == BINARY:
        values["class_names"] = shared_class_names(model.config, targets)
    return preprocessing_of(settings.input, settings.output_dir, processor, values, settings.preprocessing)


def shared_class_names(config: Any, targets: Sequence[str]) -> list[str] | None:
    """The names of 0 and 1 for the model, if they are the same for all of the targets."""
    known = dict(zip(target_names(config), config.target_class_names or (), strict=False))
    pairs = [known.get(name) for name in targets]
    return list(pairs[0]) if pairs[0] is not None and all(pair == pairs[0] for pair in pairs) else None


def chosen_part(settings: EvaluationSettings, dataset: PreprocessedDataset) -> str:
    """Name of the part to evaluate on."""
    parts = list(dataset.about["splits"])
    part = settings.split or (parts[0] if len(parts) == 1 else "test")
    if part not in parts:
        raise ValueError(
            f"The dataset {dataset.name!r} has no part {part!r}. Choose of {', '.join(parts)} with --split."
        )
    return part


def check_units(dataset: PreprocessedDataset, units: dict[str, str | None]) -> None:
    """Raise where the dataset says that its labels have another unit than the model's predictions."""
    for target in dataset.about["targets"]:
        expected = units.get(target["name"])
        if expected and target["unit"] and target["unit"] != expected:
            raise ValueError(
                f"The labels of {target['name']!r} are in {target['unit']}, but the model predicts {expected}. Convert them in "
                f"preprocessing, with --convert {target['name']}={expected}."
            )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluate as the arguments say, and return what metrics.json holds."""
    settings = parse_args(argv)
    output_dir = Path(settings.output_dir)
    check_may_be_emptied(output_dir, settings.overwrite, model=settings.model, input=settings.input)
    model, processor = load_model(settings.model), MoleBlendProcessor.from_pretrained(settings.model)
    config, problem_type = model.config, prediction_type(model.config)
    targets, columns = chosen_targets(settings, model)
    all_units = dict(zip(target_names(config), config.target_units or [], strict=False))
    units = {name: all_units.get(name) or None for name in targets}

    making = None if is_preprocessed(settings.input) else preprocessing(settings, processor, model, targets)
    if making is not None:
        source = checked_source(making, processor, output_dir)  # raises before anything is deleted, as the next
        check_class_meanings(
            config, {target.name: target.class_names for target in source.targets if target.class_names}
        )
        preprocess_into(output_dir, making)
    dataset = open_dataset(settings.input if making is None else making.output)
    dataset.check(processor)
    check_units(dataset, units)
    binary_class_names = dataset.binary_class_names(targets) if problem_type == BINARY else {}
    check_class_meanings(config, binary_class_names)
    part = chosen_part(settings, dataset)
    rows = dataset.splits[part]
    data = labelled(rows, targets)
    of_atoms = predicts_atoms(config)
    if of_atoms != (data.num_atoms is not None):
        kinds = ("atoms", "molecules") if of_atoms else ("molecules", "atoms")
        raise ValueError(
            f"{settings.model!r} predicts for {kinds[0]}, but {', '.join(targets)} of {dataset.name!r} are targets of {kinds[1]}. "
            f"Preprocess them with {'--atom_targets' if of_atoms else '--targets'}."
        )
    known = np.flatnonzero(data.known())
    if not len(known):
        raise ValueError(
            f"No molecule in part {part!r} of {dataset.name!r} has a label of {', '.join(targets)}. Name other --targets, or "
            "another part with --split."
        )
    rows = rows.select(known)
    dataset.check_geometries(processor.modality, rows)
    data = labelled(rows, targets)
    class_names = dataset.class_names(targets[0]) if problem_type == CLASSES else []
    check_classes(data.labels, targets, problem_type, len(class_names or columns))
    labels = data.labels
    if class_names:
        labels = as_indices_of(target_names(config), labels, targets[0], class_names)
    if making is None:
        empty(output_dir)
    found = predict_graphs(model, processor, graphs_of(rows))
    sets = calibrated_sets(found.prediction_sets, config.conformal_quantiles)
    intervals = {
        name: None if array is None else array[:, columns]
        for name, array in (("lower", found.lower), ("upper", found.upper), ("prediction_sets", sets))
    }
    ids, smiles = data.ids, data.smiles
    if data.num_atoms is not None:
        ids, smiles = atom_names(ids, smiles, data.num_atoms)
    test = SplitPredictions(ids, smiles, labels, found.values[:, columns], **intervals)

    about = dataset.about["settings"]
    has_parts = len(dataset.splits) > 1
    experiment = Experiment(
        problem_type=problem_type,
        target_names=targets,
        target_units=list(units.values()),
        class_names=target_names(config) if problem_type == CLASSES else None,
        binary_class_names=binary_class_names,
        runs=[Run(MODEL, None, test)],
        reported=MODEL,
        dataset=DatasetFacts.of(dataset, Path(settings.input).name),
        split=SplitFacts.of(
            (about["split"] or "given") if has_parts else "none",
            {name: rows if name == part else dataset.splits[name] for name in dataset.about["splits"]}
            if has_parts
            else {"all": rows},
            about["split_seed"],
            about["split_fractions"],
            tested=part if has_parts else "all",
        ),
        settings=without_places(dataclasses.asdict(settings)),
        command=shlex.join(
            ["python", "training/evaluate.py", *without_places(sys.argv[1:] if argv is None else argv)]
        ),
        environment=environment(model.device),
        num_parameters=model.num_parameters(),
        conformal_coverage=config.conformal_coverage,
        model=settings.model,
    )
    results = write_report(experiment, output_dir, config)
    mean = results["models"][MODEL]["test"]["mean"]
    print(
        ", ".join(
            f"{TITLES[metric]} {shown(found, metric)}" for metric, found in mean.items() if found["mean"] is not None
        )
    )
    print(f"Done. {output_dir}/README.md says how good the model is.")
    return results


def check_classes(labels: np.ndarray, targets: Sequence[str], problem_type: str, num_classes: int) -> None:
    """Raise for labels that are none of the classes."""
    if problem_type == REGRESSION:
        return
    allowed = range(num_classes) if problem_type == CLASSES else range(2)
    for name, values in zip(targets, labels.T, strict=True):
        if wrong := sorted(set(values[~np.isnan(values)].tolist()) - set(allowed)):
            raise ValueError(
                f"Target {name!r} has the label {wrong[0]:g}, but the model knows the classes {allowed[0]} to {allowed[-1]}. "
                "Preprocess the labels as these classes."
            )


def as_indices_of(known: list[str], labels: np.ndarray, target: str, class_names: list[str]) -> np.ndarray:
    """Labels as indices of the classes that the model knows, which the dataset may list in another order."""
    if unknown := [name for name in class_names if name not in known]:
        raise ValueError(
            f"Target {target!r} of the dataset has the class {unknown[0]!r}, but the model knows {', '.join(known)}. "
            f"Preprocess the labels as these, with --class_names {','.join(known)}."
        )
    indices = np.array([known.index(name) for name in class_names], dtype=np.float64)
    return np.where(np.isnan(labels), np.nan, indices[np.nan_to_num(labels).astype(int)])


if __name__ == "__main__":
    main()
