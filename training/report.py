"""What a fine-tuning or an evaluation found -> metrics.json, plots and a model card that says it as it is."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from data import PreprocessedDataset
from moleblend_hf import MoleBlendConfig
from splits import split_hash

# Names of the runs, which are the rows of the tables. Runs of one name differ in their seeds.
MODEL = "MoleBLEND"
ENSEMBLE = "MoleBLEND, ensemble"  # of the runs above, as one model
FROM_SCRATCH = "MoleBLEND from scratch"
BASELINE = "ECFP4 + random forest"


@dataclass(frozen=True)
class SplitPredictions:
    """Labels of the n rows of a part and what was predicted, in the targets' own units."""

    ids: list[str]
    smiles: list[str]
    labels: np.ndarray  # (n, T) with NaN where missing; single_label_classification: (n, 1), the class's index
    values: np.ndarray  # (n, T) in own units or probabilities of class 1; single_label_classification: (n, C)
    lower: np.ndarray | None = None  # (n, T) conformal intervals of regression; NaN for a target without one
    upper: np.ndarray | None = None
    prediction_sets: np.ndarray | None = None  # conformal sets: (n, T, 2) or (n, C), True for the classes in them


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

    name: str  # one of `splits.SPLITS`, "given", or None of them: what the user called it
    parts: dict[str, dict[str, Any]]  # by part: "rows" and the "sha256" of its ids
    leakage: dict[str, int] | None  # by pair of parts: molecules (InChIKeys) in both; None: nobody looked
    seed: int | None = None  # of a split that draws
    fractions: list[float] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        parts: Mapping[str, datasets.Dataset],
        seed: int | None = None,
        fractions: list[float] | None = None,
    ) -> "SplitFacts":
        """From the rows of each part, which have an `id` and, for the leakage, an `inchikey`."""
        keys = {
            part: set(pc.unique(rows.data["inchikey"]).drop_null().to_pylist())
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
            seed=seed,
            fractions=fractions,
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
    selected_by: str | None = None  # figure of the validation set that chose the epoch: "rmse"; None: an evaluation
    conformal_coverage: float | None = None  # nominal
    base_model: str | None = None  # what was fine-tuned; None: from scratch
    model: str = "path/to/this/folder"  # what to load in the example


def write_report(experiment: Experiment, output_dir: str | Path, config: MoleBlendConfig) -> dict[str, Any]:
    """Write metrics.json, the plots and README.md into a folder, and return the content of metrics.json."""
    raise NotImplementedError
