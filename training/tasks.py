"""What a fine-tuned model is to predict: targets, their units and transforms, and how a prediction is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moleblend_hf import MoleBlendConfig
from moleblend_hf.targets_moleblend import transformed, untransformed

# What a user calls a task, and what a config calls it.
PROBLEM_TYPES = {
    "regression": "regression",
    "classification": "multi_label_classification",  # each target is a binary task
    "classes": "single_label_classification",  # one target with several classes
}


@dataclass(frozen=True)
class Task:
    """The targets of a fine-tuning."""

    kind: str  # a key of PROBLEM_TYPES
    names: tuple[str, ...]
    units: tuple[str | None, ...]
    transforms: tuple[str, ...] = ()  # of regression targets, as in MoleBlendConfig; (): none
    class_names: tuple[str, ...] = ()  # of the one target of the kind "classes"
    binary_class_names: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # of 0 and 1, by target, where they are known

    @property
    def problem_type(self) -> str:
        """As `config.problem_type` has it."""
        return PROBLEM_TYPES[self.kind]

    def config_values(self, labels: np.ndarray) -> dict[str, Any]:
        """What a config says about these targets.

        Args:
            labels: (n, T) of the training molecules, NaN where missing; regression is scaled by their mean and standard
                deviation, after the transform.
        """
        values = self.config_values_of(self.class_names or self.names)
        if self.kind != "regression":
            return values
        learned = self.learned(labels)
        values["target_means"] = np.nanmean(learned, axis=0).tolist()
        values["target_scales"] = spreads(learned).tolist()
        return values

    def config_values_of(self, names: Sequence[str]) -> dict[str, Any]:
        """The same but for what only labels tell; `names` are those of the outputs: targets or classes."""
        values: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": self.problem_type,
            "target_means": None,
            "target_scales": None,
            "target_units": None,
            "target_transforms": None,
            "target_class_names": None,
            "conformal_coverage": None,
            "conformal_quantiles": None,
        }
        if self.kind == "regression":
            values["target_units"] = [unit or "" for unit in self.units] if any(self.units) else None
            values["target_transforms"] = list(self.transforms) or None
        elif self.binary_class_names:
            values["target_class_names"] = [self.binary_class_names.get(name) for name in self.names]
        return values

    def learned(self, values: np.ndarray) -> np.ndarray:
        """Values (n, T) in own units on the scale that is learned, after the transforms; as they are where there are none."""
        return transformed(torch.from_numpy(values), self._transforming()).numpy()

    def in_own_units(self, learned: np.ndarray) -> np.ndarray:
        """The inverse of `learned`."""
        return untransformed(torch.from_numpy(learned), self._transforming()).numpy()

    def _transforming(self) -> MoleBlendConfig:
        return MoleBlendConfig(id2label=dict(enumerate(self.names)), target_transforms=list(self.transforms) or None)


def spreads(values: np.ndarray) -> np.ndarray:
    """Standard deviation (T,) of each target of (n, T); 1 for one that never varies, and is predicted as its one value."""
    deviations, sizes = np.nanstd(values, axis=0), np.nanmax(np.abs(values), axis=0)
    return np.where(deviations > 1e-12 * sizes, deviations, 1.0)  # a mean of equal numbers may be off by a rounding


def check_class_meanings(config: Any, names: Mapping[str, Sequence[str]]) -> None:
    """Raise where labels have 0 and 1 the other way round than a model that predicts the same target.

    Args:
        config: of the model.
        names: of 0 and 1, by target.
    """
    for index, known in enumerate(config.target_class_names or ()):
        target = config.id2label[index]
        given = names.get(target)
        # Other words for them say nothing about the order.
        if known and given and [name.lower() for name in known] == [name.lower() for name in given][::-1]:
            raise ValueError(
                f"For target {target!r} the labels are 0 for {given[0]!r} and 1 for {given[1]!r}, but for the model 0 is "
                f"{known[0]!r} and 1 {known[1]!r}. Preprocess them with class_names={','.join(known)}."
            )


def check_transforms(task: Task, labels: np.ndarray) -> None:
    """Raise where a label has no logarithm."""
    for name, transform, values in zip(task.names, task.transforms, labels.T, strict=False):
        smallest = np.nanmin(values, initial=np.inf)
        if transform == "log10" and smallest <= 0:
            raise ValueError(
                f"Target {name!r} has the value {smallest:g}, of which there is no log10. Use --transforms "
                f"{name}=signed_log10, which takes values of either sign, or leave it out."
            )
