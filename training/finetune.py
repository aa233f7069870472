r"""Fine-tune MoleBLEND on measured or computed properties, and report honestly how good it is.

A table        python training/finetune.py --input my.csv --smiles_column SMILES --targets pIC50 --output_dir OUT
A checkpoint   ... --model FOLDER                                      (else model_cards/moleblend-small)
Binary tasks   ... --task classification --targets active,toxic        (cells 0 or 1, empty where not measured)
Geometries     ... --input my.sdf --targets gap                        (an SDF with 3D; or --modality 2d+3d to make conformers)
A dataset      ... --input data/qm9 --targets gap,mu                   (a folder that preprocess.py wrote, or its name on the Hub)
Three seeds    ... --seeds 3 --from_scratch also                       (an ensemble of three; the same from random weights beside it)
A recipe       ... --config training/configs/finetuning/moleculenet.yaml
Eight GPUs     accelerate launch --multi_gpu --num_processes 8 training/finetune.py ...

Every choice (the epoch, with --search_trials the learning rate and others) is made on the validation part. The test part is
predicted once, by what validation chose; a random forest on ECFP4 fingerprints is trained on the same parts and stands beside
it. OUT is a folder for the Hub: model (an ensemble if there are several), processor, card, metrics.json, pictures. Every
setting below is a key of the YAML file and a flag; a flag wins.
"""

import dataclasses
import importlib.util
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object, set_seed
from sklearn.model_selection import GroupKFold
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from batches import StepBatches
from calibration import calibrated_sets, conformal_quantiles
from data import GraphRows, PreprocessedDataset, is_preprocessed, open_dataset
from files import check_may_be_emptied, empty
from fingerprints import fingerprint_baseline
from inputs import checked_source, preprocess_into, preprocessing_of
from labels import Labelled, atom_names, check_classes, check_labels, graphs_of, labelled
from metrics import score
from moleblend_hf import (
    MoleBlendConfig,
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendPipeline,
    MoleBlendProcessor,
)
from moleblend_hf.checkpoints import check_is_there
from moleblend_hf.graphs_moleblend import Budget
from moleblend_hf.molecules_moleblend import MODALITIES
from moleblend_hf.prediction_moleblend import predict_graphs
from moleblend_hf.targets_moleblend import units_dtype
from moleblend_hf.verification import write_reference_outputs
from objective import CONFORMER, molecule_seeds, uniform
from optimization import freeze, parameter_groups
from parts import makes_conformers
from preprocess import PreprocessingSettings
from report import (
    BASELINE,
    ENSEMBLE,
    FROM_SCRATCH,
    MODEL,
    DatasetFacts,
    Experiment,
    Run,
    SplitFacts,
    SplitPredictions,
    write_report,
)
from reporting import environment, without_places
from settings import load_settings, setting
from splits import SPLITS
from tasks import PROBLEM_TYPES, Task, check_class_meanings, check_transforms

HERE = Path(__file__).parent
NO_WEIGHTS = (
    "{!r} gives no weights for {} parts of the encoder, the first {}. It is no checkpoint of this model, or model_settings "
    "change its sizes; those work with --from_scratch only."
)
PARTS = ("train", "validation", "test")
NOT_OF_DATASETS = ("bonds", "max_path_bonds", "max_bond_order_iterations")  # settings of a processor
SELECTED_BY = {"regression": "rmse", "classification": "roc_auc", "classes": "accuracy"}
SHOWN = SELECTED_BY | {"regression": "rmse / spread"}  # of the training labels, so that targets can be added


@dataclasses.dataclass(kw_only=True)
class FinetuningSettings:
    """Settings of a fine-tuning; those without a default stand in the recipe, or have to be given."""

    description: str = setting("run", "what this recipe is; printed before it starts", "")
    output_dir: str = setting("run", "where everything is written", "outputs/finetune")
    overwrite: bool = setting("run", "delete what is in OUTPUT_DIR", False)
    num_proc: int = setting("run", "processes that featurize", 1)

    model: str = setting(
        "model",
        "checkpoint folder, or its name on the Hub: pretrained, or fine-tuned before",
        str(HERE.parent / "model_cards" / "moleblend-small"),
    )
    model_settings: dict[str, Any] = setting(
        "model", "fields of MoleBlendConfig to change, e.g. readout=mean classifier_dropout=0.1", {}
    )
    from_scratch: str = setting(
        "model", "the same model from random weights: not at all, for comparison, or nothing else",
        "no", choices=("no", "also", "only"),
    )  # fmt: skip
    frozen_layers: int = setting("model", "leave the embeddings and so many of the lowest layers as they are", 0)

    input: str = setting("data", "CSV, TSV, SDF or Parquet file, or a preprocessed dataset (folder, Hub name)")
    source: str | None = setting("data", "layout of a file, as in preprocess.py; else by its ending", None)
    smiles_column: str | None = setting("data", "column of the SMILES; else guessed from its name", None)
    targets: list[str] | None = setting("data", "columns to predict, A,B; else all targets of the dataset", None)
    atom_targets: list[str] | None = setting(
        "data", "instead: lists of a value for each atom, as in preprocess.py", None
    )
    task: str | None = setting("data", "what they are; else what the dataset says", None, choices=tuple(PROBLEM_TYPES))
    transforms: dict[str, str] = setting(
        "data", "learn a target on another scale: --transforms ic50=log10, or signed_log10", {}
    )
    modality: str | None = setting(
        "data",
        "auto: given geometries, else 2D; 2d; 2d+3d: conformers where there are none; 3d; else as a dataset was made, "
        "auto for a file",
        None,
        choices=MODALITIES,
    )
    num_conformers: int | None = setting(
        "data",
        "conformers to make, of which training draws one and predictions average over all; else as many as a dataset has, "
        "1 for a file",
        None,
    )
    split: str | None = setting(
        "data", "of a file into training, validation and test", "scaffold", choices=("given", *SPLITS)
    )
    split_seed: int = setting("data", "seed of the splits that draw, and of the folds", 0)
    preprocessing: dict[str, Any] = setting(
        "data", "further settings of preprocess.py for a file, e.g. split_column=set units='{gap: hartree}'", {}
    )
    max_training_molecules: int | None = setting("data", "train on so many, drawn with SPLIT_SEED", None)
    max_validation_molecules: int | None = setting("data", "validate on so many, drawn with SPLIT_SEED", None)

    seeds: int = setting("optimization", "models to train, with the seeds SEED, SEED + 1 ...; saved as an ensemble", 1)
    folds: int | None = setting(
        "optimization", "instead: one model a fold of training and validation molecules, validated on its fold", None
    )
    seed: int = setting("optimization", "of new weights, batch order, dropout and conformers", 0)
    epochs: int = setting("optimization", "at most; the schedule is made for them")
    patience: int = setting("optimization", "epochs without a better validation score, then stop")
    max_minutes: float | None = setting("optimization", "of training for each model, then stop", None)
    batch_size: int = setting("optimization", "molecules an optimizer step, over all processes")
    learning_rate: float = setting("optimization", "peak, of the head")
    layer_decay: float = setting("optimization", "each layer learns so many times as fast as the one above", 1.0)
    warmup_fraction: float = setting("optimization", "of the steps, from 0 to the peak; then cosine to 0", 0.1)
    weight_decay: float = setting("optimization", "AdamW's, of matrices", 0.0)
    max_grad_norm: float = setting("optimization", "clip the gradient to this norm", 5.0)
    class_weights: str = setting(
        "optimization", "balanced: both classes of a task weigh as much", "none", choices=("none", "balanced")
    )
    mixed_precision: str | None = setting(
        "optimization", "arithmetic; left out, what accelerate launch says", None, choices=("no", "fp16", "bf16")
    )
    max_tokens: int | None = setting(
        "optimization",
        "padded tokens (atoms + 1) of the molecules in one forward; left out: what suits the device",
        None,
    )
    max_pairs: int | None = setting("optimization", "padded pairs of tokens in one forward, likewise", None)
    search_trials: int = setting("optimization", "settings that Optuna tries first, judged on validation", 0)

    baseline: bool = setting("evaluation", "train a random forest on ECFP4 fingerprints beside it", True)
    coverage: float = setting("evaluation", "of the conformal intervals or sets, calibrated on validation", 0.9)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        for name in ("seeds", "epochs", "patience", "batch_size", "num_conformers", "num_proc"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("max_training_molecules", "max_validation_molecules"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}. Leave it out to take all.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}.")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie between 0 and 1, got {self.warmup_fraction}.")
        if self.folds is not None and (self.folds < 2 or self.seeds > 1):
            raise ValueError(
                f"folds must be 2 or more, with one model for each, got {self.folds} and {self.seeds} seeds."
            )
        if self.targets and self.atom_targets:
            raise ValueError("A model predicts targets of molecules or of atoms. Give --targets or --atom_targets.")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {self.coverage}.")


def parse_args(argv: list[str] | None = None) -> FinetuningSettings:
    """Settings from the YAML file and the flags."""
    return load_settings(FinetuningSettings, __doc__, HERE / "configs" / "finetuning" / "default.yaml", argv)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """All rows of a dataset, which of them are in which part, and their labels."""

    rows: datasets.Dataset
    labelled: Labelled
    parts: dict[str, np.ndarray]

    @classmethod
    def of(cls, dataset: PreprocessedDataset, names: tuple[str, ...]) -> "Data":
        """The training, validation and test rows, one part after the other."""
        if missing := [part for part in PARTS if part not in dataset.splits]:
            split, num = dataset.about["settings"]["split"] or "given", dataset.about["num_kept"]
            remedy = (
                "Preprocess it with --split scaffold (or another), or name the column that holds the part with --split_column."
                if split == "given"
                else f"The {split} split puts none of its {num:,} molecules there: take more of them, or another split or split_fractions."
            )
            raise ValueError(
                f"The dataset {dataset.name!r} has no part {missing[0]!r}; it has {', '.join(dataset.splits)}. {remedy}"
            )
        rows = datasets.concatenate_datasets([dataset.splits[part] for part in PARTS])
        stops = np.cumsum([0, *(len(dataset.splits[part]) for part in PARTS)])
        parts = {part: np.arange(*stops[index : index + 2]) for index, part in enumerate(PARTS)}
        return cls(rows, labelled(rows, names), parts)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """(n, T) of some rows; of their atoms one after the other if the targets are of atoms."""
        if self.labelled.num_atoms is None:
            return self.labelled.labels[rows]
        of_molecules = self.labelled.of_atoms()
        return np.concatenate([of_molecules[row] for row in rows])

    def some(self, rows: np.ndarray) -> Labelled:
        """What is known about some rows."""
        everything = self.labelled
        ids, smiles, inchikeys = (
            [column[row] for row in rows] for column in (everything.ids, everything.smiles, everything.inchikeys)
        )
        num_atoms = None if everything.num_atoms is None else everything.num_atoms[rows]
        return Labelled(everything.names, ids, smiles, inchikeys, self.labels(rows), num_atoms)

    def with_labels(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that have any label."""
        return rows[self.labelled.known()[rows]]

    def predicted(self, rows: np.ndarray, values: np.ndarray, **intervals: np.ndarray | None) -> SplitPredictions:
        """What was predicted for some rows, with their labels, as the report takes it."""
        ids, smiles = ([column[row] for row in rows] for column in (self.labelled.ids, self.labelled.smiles))
        if self.labelled.num_atoms is not None:
            ids, smiles = atom_names(ids, smiles, self.labelled.num_atoms[rows])
        return SplitPredictions(ids=ids, smiles=smiles, labels=self.labels(rows), values=values, **intervals)


class DivergedError(ValueError):
    """Weights or predictions are no numbers any more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model with the weights that validation chose."""

    model: PreTrainedModel
    score: float  # of validation; higher is better
    epochs: int  # after which it was taken
    seconds: float
    ended_by_time: int | None = None  # after how many epochs, if max_minutes did


@dataclasses.dataclass(frozen=True, eq=False)
class Finetuning:
    """What the models of a run share."""

    accelerator: Accelerator
    settings: FinetuningSettings
    data: Data
    task: Task
    processor: MoleBlendProcessor
    target_values: dict[str, Any]  # of the config: the members of an ensemble share scales

    def budget(self) -> Budget:
        """Of one forward; a molecule that exceeds it is a part of its own."""
        return Budget.on(self.accelerator.device.type, self.settings.max_tokens, self.settings.max_pairs)

    def new_model(self, seed: int, from_scratch: bool) -> PreTrainedModel:
        """The model to train, from the checkpoint or from random weights; what is not from the checkpoint is printed."""
        settings, values = self.settings, self.target_values
        stored = MoleBlendConfig.from_pretrained(settings.model)
        same = ("id2label", "problem_type", "target_transforms")
        # A unit that nobody has named is taken for the same, as in an evaluation.
        units = zip(stored.target_units or [], values["target_units"] or [], strict=False)
        continued = (
            not from_scratch
            and all(getattr(stored, name) == values[name] for name in same)
            and all(before == now for before, now in units if before and now)
        )
        if continued:  # the head goes on in the units, and with the classes, that it has learned
            values = values | {"target_means": stored.target_means, "target_scales": stored.target_scales}
            values["target_class_names"] = values["target_class_names"] or stored.target_class_names
        config = changed_config(stored, settings, values)
        of_atoms = self.data.labelled.num_atoms is not None
        model_class = MoleBlendForTokenClassification if of_atoms else MoleBlendForSequenceClassification
        set_seed(seed)
        if from_scratch:
            return model_class(config)
        model, loading = model_class.from_pretrained(  # type: ignore[misc]  # a pair with output_loading_info
            settings.model,
            config=config,
            dtype=torch.float32,  # what is trained, however it was saved
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        new = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
        if lost := [name for name in new if name.startswith("moleblend.")]:
            raise ValueError(NO_WEIGHTS.format(settings.model, len(lost), lost[0]))
        head = {f"classifier.{name}" for name in model.classifier.state_dict()}
        if not continued and head - set(new):  # of other targets, though of the same shape
            model.classifier = model_class(config).classifier
            new = sorted({*new, *head})
        self.accelerator.print(
            f"  not in the checkpoint, or of other targets, so new: {', '.join(new) or 'nothing; its head is continued'}"
        )
        return model

    def parts_of_step(self, rows: GraphRows, positions: list[list[int]], seed: int, epoch: int) -> Iterator[dict]:
        """The batches of this process for an optimizer step, each molecule with one of its conformers drawn."""
        for graphs, numbers in rows.__getitems__(positions):
            draws = uniform(torch.from_numpy(molecule_seeds(seed, epoch, numbers)), CONFORMER, torch.zeros(1).long())
            drawn = (draws[:, 0].numpy() * graphs.num_conformers).astype(int)
            batch = dict(self.processor.pad(graphs, conformer_index=drawn))
            labels = self.data.labels(numbers)
            if self.data.labelled.num_atoms is not None:
                padded = np.full((*batch["attention_mask"].shape, labels.shape[1]), np.nan)
                padded[batch["attention_mask"].bool().numpy()] = labels
                labels = padded
            batch["labels"] = torch.from_numpy(labels).to(units_dtype(self.accelerator.device))
            batch["label_weights"] = torch.ones_like(batch["labels"], dtype=torch.float32)
            yield batch

    def weigh(self, batch: dict[str, torch.Tensor], class_weights: np.ndarray | None) -> float:
        """Give each label its weight, classes the form that the model takes, and return the sum of the weights."""
        labels = batch["labels"]
        known = ~labels.isnan()
        if class_weights is not None:
            indices = labels.nan_to_num().long()
            targets = torch.arange(labels.shape[-1]).expand_as(indices)
            batch["label_weights"] = torch.from_numpy(class_weights).float()[targets, indices]
        if self.task.kind == "classes":
            batch["labels"] = torch.where(known, labels, -100).long().squeeze(-1)
        return float(batch["label_weights"][known].sum())

    def class_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """(T, C) weight of each class of each target: n / (C n_class), so that classes weigh as much as each other."""
        if self.settings.class_weights == "none" or self.task.kind == "regression":
            return None
        num_classes = max(2, len(self.task.class_names))
        counts = np.stack([(labels == index).sum(0) for index in range(num_classes)], axis=1)
        return counts.sum(1, keepdims=True) / (num_classes * np.maximum(counts, 1))

    def predict(self, model: PreTrainedModel, rows: np.ndarray) -> np.ndarray:
        """Predictions for some rows, averaged over their conformers; the processes share the work."""
        accelerator, budget = self.accelerator, self.budget()

        def predicted(share: np.ndarray) -> np.ndarray:
            return predict_graphs(model, self.processor, graphs_of(self.data.rows, rows[share]), budget).values

        if accelerator.num_processes == 1:
            return predicted(np.arange(len(rows)))
        share = np.arange(accelerator.process_index, len(rows), accelerator.num_processes)
        found = predicted(share) if len(share) else None  # with fewer molecules than processes
        shares = [(positions, part) for positions, part in gather_object([(share, found)]) if part is not None]
        values = np.empty((len(rows), shares[0][1].shape[1]))
        for positions, part in shares:
            values[positions] = part
        return values

    def score(self, labels: np.ndarray, values: np.ndarray, scales: np.ndarray) -> float:
        """What the epoch is chosen by; higher is better. Errors of several targets are added in units of their spread."""
        name = SELECTED_BY[self.task.kind]
        if self.task.kind == "regression":
            labels, values = (self.task.learned(each) / scales for each in (labels, values))
            return -score(self.task.problem_type, labels, values, name)
        return score(self.task.problem_type, labels, values, name)

    def train(
        self, training_rows: np.ndarray, validation_rows: np.ndarray, seed: int, from_scratch: bool, title: str
    ) -> Trained:
        """Train a model and return it as it was after the epoch with the best validation score."""
        accelerator, settings, device = self.accelerator, self.settings, self.accelerator.device
        training_rows, validation_rows = map(self.data.with_labels, (training_rows, validation_rows))
        training_labels, validation_labels = map(self.data.labels, (training_rows, validation_rows))
        # Those of all members, as a target may have no label in a fold.
        scales = np.array(self.target_values["target_scales"] or [1.0])
        class_weights = self.class_weights(training_labels)
        rows = GraphRows(self.data.rows, training_rows)
        batches = StepBatches(
            rows.sizes(),
            min(settings.batch_size, len(rows) // accelerator.num_processes * accelerator.num_processes),
            self.budget(),
            seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        model = self.new_model(seed, from_scratch)
        freeze(model, 0 if from_scratch else settings.frozen_layers)
        layer_decay = 1.0 if from_scratch else settings.layer_decay  # which is for layers that know something
        set_seed(seed, device_specific=True)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.learning_rate, layer_decay, settings.weight_decay), fused=True
        )
        num_steps = settings.epochs * batches.steps_per_epoch
        scheduler = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup_fraction * num_steps), num_steps)
        wrapped, optimizer = accelerator.prepare(model, optimizer)

        best = Trained(model, -np.inf, 0, 0.0)
        weights: dict[str, torch.Tensor] = {}
        started = time.perf_counter()
        steps = iter(batches)
        progress = tqdm(total=num_steps, desc=title, unit="step", disable=not accelerator.is_main_process, leave=False)
        for epoch in range(1, settings.epochs + 1):
            wrapped.train()
            for _ in range(batches.steps_per_epoch):
                parts = list(self.parts_of_step(rows, next(steps), seed, epoch))
                shares = torch.tensor([self.weigh(part, class_weights) for part in parts], device=device)
                # The mean over the labels of the step, however it is cut; the gradients of the processes are averaged.
                total = accelerator.reduce(shares.sum(), "sum").clamp(min=1e-12) / accelerator.num_processes
                for index, part in enumerate(parts):
                    part = {name: values.to(device, non_blocking=True) for name, values in part.items()}
                    is_last = index == len(parts) - 1
                    with nullcontext() if is_last else accelerator.no_sync(wrapped):
                        accelerator.backward(wrapped(**part).loss * (shares[index] / total))
                accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                progress.update()

            values = self.predict(model, validation_rows)
            if not np.isfinite(values).all():
                accelerator.free_memory(wrapped, optimizer)
                raise DivergedError(
                    f"{title} diverged: after epoch {epoch} its predictions are no finite numbers. Lower learning_rate "
                    f"({settings.learning_rate:g}) or max_grad_norm ({settings.max_grad_norm:g})."
                )
            score = self.score(validation_labels, values, scales)
            # One time for all processes, which have to stop together.
            seconds = accelerator.reduce(torch.tensor(time.perf_counter() - started, device=device), "mean").item()
            if score > best.score:
                best = Trained(model, score, epoch, seconds)
                weights = {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}
            progress.set_postfix_str(
                f"validation {SHOWN[self.task.kind]} {abs(score):.4f}, best {abs(best.score):.4f}"
            )
            if epoch - best.epochs >= settings.patience:
                break
            if settings.max_minutes is not None and seconds > 60 * settings.max_minutes and epoch < settings.epochs:
                best = dataclasses.replace(best, ended_by_time=epoch)
                break
        progress.close()
        model.load_state_dict(weights)
        # Without the autocast that `prepare` put around its forward: what is measured is what the saved folder computes.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory(wrapped, optimizer)
        accelerator.print(
            f"{title}: epoch {best.epochs} of {epoch}, validation {SHOWN[self.task.kind]} {abs(best.score):.4f}, {seconds:.0f} s"
        )
        return dataclasses.replace(best, seconds=seconds)


def preprocessing(settings: FinetuningSettings, checkpoint: MoleBlendProcessor) -> PreprocessingSettings:
    """How the input, a file, becomes a dataset: as the checkpoint's processor featurizes, but for the modality."""
    values: dict[str, Any] = {
        "source": settings.source,
        "smiles_column": settings.smiles_column,
        "targets": settings.targets or None,
        "atom_targets": settings.atom_targets,
        "modality": settings.modality or "auto",
        "num_conformers": settings.num_conformers or 1,
        "split": "given" if settings.preprocessing.get("split_column") else settings.split,
        "split_seed": settings.split_seed,
        "num_proc": settings.num_proc,
    }
    if settings.task is not None:
        values["tasks"] = dict.fromkeys(settings.atom_targets or settings.targets or (), settings.task)
    return preprocessing_of(settings.input, settings.output_dir, checkpoint, values, settings.preprocessing)


def processor_of(
    settings: FinetuningSettings, dataset: PreprocessedDataset, checkpoint: MoleBlendProcessor
) -> MoleBlendProcessor:
    """The processor to save with the model: it featurizes as the dataset was made, of which it shows what the settings say."""
    dataset.check(checkpoint)
    processor = dataset.processor(**{name: getattr(checkpoint, name) for name in NOT_OF_DATASETS})
    made, num_conformers = processor.modality, settings.num_conformers
    shown = settings.modality or made
    if num_conformers not in (None, processor.num_conformers):
        raise ValueError(
            f"The dataset {dataset.name!r} was made with num_conformers={processor.num_conformers}, but {num_conformers} are "
            f"asked for. Preprocess it with --num_conformers {num_conformers}, or leave the setting out."
        )
    dataset.check_geometries(shown)
    if shown == "auto" and makes_conformers(made):
        raise ValueError(
            f"The dataset {dataset.name!r} was made with modality={made!r}, so that it may have conformers, of which a "
            "model with modality='auto' would make none in prediction. Preprocess it with --modality auto, or leave the setting out."
        )
    # Without any geometry, one that is given in prediction would be the first that the model sees.
    processor.modality = shown if dataset.about["num_with_coordinates"] else "2d"
    return processor


def changed_config(
    stored: MoleBlendConfig, settings: FinetuningSettings, values: Mapping[str, Any]
) -> MoleBlendConfig:
    """The config of the model to train: as stored, with values for the targets and what the settings change."""
    # The architecture that is stored is another one than is made of it here.
    return MoleBlendConfig(**{**stored.to_dict(), **values, **settings.model_settings, "architectures": None})


def encoder_shapes(config: MoleBlendConfig) -> dict[str, torch.Size]:
    """The weights of the encoder that a config describes."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in MoleBlendModel(config).state_dict().items()}


def check_model(settings: FinetuningSettings, task: Task) -> None:
    """Raise if no model for the task can be made of the checkpoint and the settings."""
    stored = MoleBlendConfig.from_pretrained(settings.model)
    if stored.model_type != MoleBlendConfig.model_type:
        raise ValueError(f"{settings.model!r} is an ensemble. Choose one of its members in its folder members/.")
    names = task.class_names or ("0", "1") if task.kind == "classes" else task.names
    config = changed_config(stored, settings, task.config_values_of(names))
    if settings.from_scratch != "only":
        check_class_meanings(stored, task.binary_class_names)
        known = encoder_shapes(stored)
        if lost := sorted(name for name, shape in encoder_shapes(config).items() if known.get(name) != shape):
            raise ValueError(NO_WEIGHTS.format(settings.model, len(lost), lost[0]))
    if not 0 <= settings.frozen_layers <= config.num_hidden_layers:
        raise ValueError(
            f"frozen_layers must lie between 0 and the model's {config.num_hidden_layers} layers, got {settings.frozen_layers}."
        )


def task_of(settings: FinetuningSettings, dataset: str, targets: Sequence[Mapping[str, Any]]) -> Task:
    """The task that the settings name, or that the targets of a dataset have."""
    stored = {target["name"]: target for target in targets}
    names = settings.atom_targets or settings.targets or list(stored)
    if unknown := [name for name in [*names, *settings.transforms] if name not in stored]:
        raise ValueError(
            f"The dataset {dataset!r} has no target {unknown[0]!r}. Its targets: {', '.join(stored) or 'none'}. Name "
            "them with --targets."
        )
    if not names:
        raise ValueError(
            f"No target is named, and {dataset!r} has none. Name the columns of a file with --targets; a dataset has to be "
            "preprocessed with them."
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"The target {twice[0]!r} is named {names.count(twice[0])} times. Name it once.")
    kinds = {stored[name]["task"] for name in names}
    if settings.task is None and len(kinds) > 1:
        raise ValueError(
            f"The targets are of several tasks: {', '.join(sorted(kinds))}. Choose with --targets or --task."
        )
    kind = settings.task or kinds.pop()
    if kind != "regression" and settings.transforms:
        raise ValueError(f"transforms are for regression, but the task is {kind!r}. Leave them out.")
    classes = {name: found for name in names if (found := stored[name].get("class_names"))}
    return Task(
        kind,
        tuple(names),
        tuple(stored[name]["unit"] for name in names),
        tuple(settings.transforms.get(name, "none") for name in names) if settings.transforms else (),
        tuple(classes.get(names[0], ())) if kind == "classes" else (),
        {name: found for name, found in classes.items() if len(found) == 2} if kind == "classification" else {},
    )


def number_of_classes(labels: np.ndarray, target: str) -> int:
    """How many classes there are where nobody named them: indices from 0, each of which some label has."""
    found = np.unique(labels[~np.isnan(labels)]).astype(int)
    if missing := sorted(set(range(found[-1])) - set(found.tolist())):
        raise ValueError(
            f"Target {target!r} has labels up to {found[-1]}, but no molecule has {missing[0]}. Classes are counted from 0; "
            f"if others are meant, name them: class_names={','.join(map(str, found))} in --preprocessing of a file, or "
            "--class_names of preprocess.py."
        )
    return len(found)


def check_epochs_can_be_chosen(task: Task, labels: np.ndarray) -> None:
    """Raise if the validation labels (n, T) allow no score: known before the first step, not after the first epoch."""
    num_outputs = len(task.class_names) or labels.shape[1]
    score(task.problem_type, labels, np.zeros((len(labels), num_outputs)), SELECTED_BY[task.kind])


def some_of(rows: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """So many of the rows at most, in their order."""
    return rows if most is None else np.sort(rows[np.random.default_rng(seed).permutation(len(rows))[:most]])


def fold_rows(data: Data, rows: np.ndarray, num_folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training and validation rows of each fold; the rows of one molecule are in one fold."""
    keys = [data.labelled.inchikeys[row] or data.labelled.smiles[row] for row in rows]
    if (num_molecules := len(set(keys))) < num_folds:
        raise ValueError(
            f"There are {num_molecules} molecules with a label for {num_folds} folds. Take fewer --folds."
        )
    folds = GroupKFold(num_folds, shuffle=True, random_state=seed)
    for training, validation in folds.split(rows, groups=keys):
        yield rows[training], rows[validation]


def searched(finetuning: Finetuning, training: np.ndarray, validation: np.ndarray) -> dict[str, Any]:
    """The settings with the best validation score among those that Optuna tried."""
    import optuna

    def objective(trial: optuna.Trial) -> float:
        tried: dict[str, Any] = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
            "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64, 128]),
            "layer_decay": trial.suggest_float("layer_decay", 0.6, 1.0),
            "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
        }
        one = dataclasses.replace(finetuning, settings=dataclasses.replace(finetuning.settings, **tried))
        title = f"trial {trial.number + 1} of {finetuning.settings.search_trials}"
        from_scratch = finetuning.settings.from_scratch == "only"
        try:
            return one.train(training, validation, finetuning.settings.seed, from_scratch, title).score
        except DivergedError as error:  # the sampler learns from it that these settings are bad
            raise optuna.TrialPruned(str(error)) from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=finetuning.settings.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=finetuning.settings.search_trials)
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise DivergedError(
            f"All {len(study.trials)} trials diverged: with none of the settings that were tried are the predictions finite "
            "numbers. Lower max_grad_norm, or look for labels of another order of magnitude than the rest."
        )
    finetuning.accelerator.print(f"best of {finetuning.settings.search_trials} trials: {study.best_params}")
    return study.best_params


def baseline_run(
    finetuning: Finetuning, training: np.ndarray, validation: np.ndarray, test: np.ndarray, seed: int
) -> Run:
    """A random forest on fingerprints, trained on the same rows."""
    data, task = finetuning.data, finetuning.task
    smiles = np.array(data.labelled.smiles, dtype=object)
    started = time.perf_counter()
    values = fingerprint_baseline(
        list(smiles[training]),
        task.learned(data.labels(training)),
        list(smiles[np.concatenate([validation, test])]),
        task.problem_type,
        seed,
        num_classes=len(task.class_names) or None,
    )
    seconds = time.perf_counter() - started
    parts = np.split(task.in_own_units(values), [len(validation)])
    predicted = [data.predicted(rows, part) for rows, part in zip((validation, test), parts, strict=True)]
    return Run(BASELINE, seed, validation=predicted[0], test=predicted[1], seconds=seconds)


def calibrate(config: MoleBlendConfig, labels: np.ndarray, values: np.ndarray, task: Task, coverage: float) -> None:
    """Write into a config how wide its intervals, or how large its sets have to be."""
    config.conformal_quantiles = conformal_quantiles(
        task.problem_type, task.learned(labels), task.learned(values), coverage
    )
    config.conformal_coverage = coverage


def save(model: PreTrainedModel, processor: MoleBlendProcessor, folder: Path) -> None:
    """Write a folder that loads with the auto classes and with `pipeline`."""
    MoleBlendPipeline(model=model, feature_extractor=processor, device=model.device).save_pretrained(folder)
    write_reference_outputs(model, processor, folder)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tune as the arguments say, and return what metrics.json holds."""
    settings = parse_args(argv)
    output_dir = Path(settings.output_dir)
    check_is_there(settings.model)
    check_may_be_emptied(output_dir, settings.overwrite, model=settings.model, input=settings.input)
    # Without geometries, the parameters of the distances get no gradient.
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # for who waits while one process makes conformers
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "Fine-tuning keeps whole weights on each process. Launch it with --multi_gpu, without sharding."
        )
    if settings.search_trials and accelerator.num_processes > 1:
        raise ValueError("search_trials needs one process. Search on one, then train with what it found.")
    if settings.search_trials and importlib.util.find_spec("optuna") is None:
        raise ImportError("search_trials needs Optuna: pip install optuna, or this package with [search].")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    # Data: the input becomes a dataset whose graphs are those that the processor makes which is saved with the model.
    checkpoint = MoleBlendProcessor.from_pretrained(settings.model)
    making = None if is_preprocessed(settings.input) else preprocessing(settings, checkpoint)
    with accelerator.main_process_first():
        if making is not None and accelerator.is_main_process:
            targets = [dataclasses.asdict(target) for target in checked_source(making, checkpoint, output_dir).targets]
            check_model(settings, task_of(settings, making.input, targets))  # raises before anything is deleted
            preprocess_into(output_dir, making)
        dataset = open_dataset(settings.input if making is None else making.output)
    processor = processor_of(settings, dataset, checkpoint)
    task = task_of(settings, dataset.name, dataset.about["targets"])
    check_model(settings, task)
    data = Data.of(dataset, task.names)
    if data.labelled.num_atoms is not None and accelerator.num_processes > 1:
        raise ValueError("Targets of atoms are trained on one process. Launch it without --multi_gpu.")
    training, validation, test = (data.with_labels(data.parts[part]) for part in PARTS)
    if not any(map(len, (training, validation, test))):
        raise ValueError(
            f"No molecule of {dataset.name!r} has a label of {', '.join(task.names)}: all cells are empty. Name other --targets."
        )
    training = some_of(training, settings.max_training_molecules, settings.split_seed)
    validation = some_of(validation, settings.max_validation_molecules, settings.split_seed)
    for part, rows in zip(PARTS, (training, validation, test), strict=True):
        if not len(rows):
            raise ValueError(f"No molecule of the {part} part has a label. Split the data another way with --split.")
    both = np.sort(np.concatenate([training, validation]))
    learned_from = training if settings.folds is None else both
    warnings = check_labels(task.kind, data.some(learned_from))
    check_classes(task.kind, data.some(np.concatenate([both, test])))
    check_transforms(task, data.labels(both))
    if processor.modality == "auto":
        about = dataset.about
        warnings.append(
            f"{about['num_with_coordinates']:,} of {about['num_kept']:,} molecules have a geometry, and the model is shown it. A SMILES "
            "alone shows less than the figures are of: predict with geometries, or let --modality 2d+3d make conformers."
        )
    if set(task.transforms) - {"none"}:
        warnings.append("Epochs were chosen by the error after the transforms, on the scale that is learned.")
    if task.kind == "classes" and not task.class_names:
        num_classes = number_of_classes(data.labelled.labels, task.names[0])
        task = dataclasses.replace(task, class_names=tuple(map(str, range(num_classes))))
    # The models: one a seed, or one a fold, with its training and its validation molecules.
    if settings.folds is None:
        cuts = [(settings.seed + index, training, validation) for index in range(settings.seeds)]
    else:
        cuts = [
            (settings.seed + index, *rows)
            for index, rows in enumerate(fold_rows(data, both, settings.folds, settings.split_seed))
        ]
    for _, _, rows in cuts:
        check_epochs_can_be_chosen(task, data.labels(rows))
    if making is None and accelerator.is_main_process:
        empty(output_dir)
    finetuning = Finetuning(
        accelerator, settings, data, task, processor, task.config_values(data.labels(learned_from))
    )
    accelerator.print(
        f"{settings.description or 'Fine-tuning'}\n"
        f"  data     {len(training):,} molecules to train on, {len(validation):,} for validation, {len(test):,} for the test, "
        f"of {settings.input}\n"
        f"  targets  {', '.join(task.names[:8])}{' ...' if len(task.names) > 8 else ''} ({task.kind})\n"
        + "".join(f"  note     {text}\n" for text in warnings)
        + f"  output   {output_dir}/"
    )

    if settings.search_trials:
        found = searched(finetuning, training, validation)
        settings = dataclasses.replace(settings, **found)
        finetuning = dataclasses.replace(finetuning, settings=settings)

    runs: list[Run] = []
    members: list[PreTrainedModel] = []
    names = {"no": [MODEL], "also": [MODEL, FROM_SCRATCH], "only": [FROM_SCRATCH]}[settings.from_scratch]
    unseen: list[np.ndarray] = []  # what each member predicts for its validation rows
    for name in names:
        for index, (seed, training_rows, validation_rows) in enumerate(cuts):
            title = f"{name}, fold {index}" if settings.folds else f"{name}, seed {seed}"
            trained = finetuning.train(training_rows, validation_rows, seed, name == FROM_SCRATCH, title)
            if trained.ended_by_time is not None:
                warnings.append(
                    f"{title}: ended by max_minutes after {trained.ended_by_time} of {settings.epochs} epochs, so another machine "
                    "may come to other figures."
                )
            values = [finetuning.predict(trained.model, rows) for rows in (validation_rows, test)]
            predicted = [
                data.predicted(rows, part) for rows, part in zip((validation_rows, test), values, strict=True)
            ]
            runs.append(Run(name, seed, predicted[1], predicted[0], seconds=trained.seconds, epochs=trained.epochs))
            if name == names[0]:
                members.append(trained.model.cpu())
                unseen.append(values[0])
    if not accelerator.is_main_process:
        return {}

    # One model of all members, calibrated on what they have not been trained on.
    final, reported = members[0], names[0]
    if len(members) > 1 and data.labelled.num_atoms is None:
        final, reported = MoleBlendEnsembleForSequenceClassification.from_members(members), ENSEMBLE  # type: ignore[arg-type]
    final = final.to(accelerator.device)
    if settings.folds is None:
        # Not `finetuning.predict`, which would wait for the other processes.
        graphs = graphs_of(data.rows, validation)
        calibration_rows = validation
        calibration_values = predict_graphs(final, processor, graphs, finetuning.budget()).values
    else:
        calibration_rows = np.concatenate([rows for _, _, rows in cuts])
        calibration_values = np.concatenate(unseen)
    calibrate(final.config, data.labels(calibration_rows), calibration_values, task, settings.coverage)
    found_test = predict_graphs(final, processor, graphs_of(data.rows, test), finetuning.budget())
    intervals = {
        "lower": found_test.lower,
        "upper": found_test.upper,
        "prediction_sets": calibrated_sets(found_test.prediction_sets, final.config.conformal_quantiles),
    }
    final_run = Run(
        reported,
        None if reported == ENSEMBLE else settings.seed,
        data.predicted(test, found_test.values, **intervals),
        data.predicted(calibration_rows, calibration_values),
        seconds=sum(run.seconds or 0 for run in runs if run.name == names[0]),
    )
    runs = (
        [final_run, *runs] if reported == ENSEMBLE else [dataclasses.replace(runs[0], test=final_run.test), *runs[1:]]
    )
    if settings.baseline and data.labelled.num_atoms is None:
        runs += [baseline_run(finetuning, trained_on, chosen_on, test, seed) for seed, trained_on, chosen_on in cuts]

    for index, ((seed, _, _), member) in enumerate(zip(cuts, members, strict=True)):
        if final is not member:
            save(member, processor, output_dir / "members" / str(index if settings.folds else seed))
    save(final, processor, output_dir)
    arguments = sys.argv[1:] if argv is None else argv
    experiment = Experiment(
        problem_type=task.problem_type,
        target_names=list(task.names),
        target_units=list(task.units),
        class_names=list(task.class_names) or None,
        binary_class_names={name: list(pair) for name, pair in task.binary_class_names.items()},
        runs=runs,
        reported=reported,
        dataset=DatasetFacts.of(dataset, Path(settings.input).name),
        split=SplitFacts.of(
            dataset.about["settings"]["split"] or "given",
            {part: data.rows.select(rows) for part, rows in zip(PARTS, (training, validation, test), strict=True)},
            dataset.about["settings"]["split_seed"],
            dataset.about["settings"]["split_fractions"],
        ),
        settings=without_places(dataclasses.asdict(settings)),
        command=shlex.join(["python", "training/finetune.py", *without_places(arguments)]),
        environment=environment(accelerator.device),
        num_parameters=sum(parameter.numel() for parameter in final.parameters()),
        selected_by=SELECTED_BY[task.kind],
        conformal_coverage=settings.coverage,
        base_model=None if settings.from_scratch == "only" else without_places(settings.model),
        notes=warnings,
    )
    results = write_report(experiment, output_dir, final.config)
    print(f"Done. {output_dir}/ is a folder for the Hub; README.md in it says how good the model is.")
    return results


if __name__ == "__main__":
    main()
