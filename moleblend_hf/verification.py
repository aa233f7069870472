# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Proof that a checkpoint is the model it was: reference outputs written when it is saved, compared when it is loaded.

The outputs of three molecules are kept from the processor's tensors to the heads, in the order in which they are computed, so
that a model which is no longer the same shows where it departs. They do not reach every weight (no molecule has all elements);
the digests of the weights do.
"""

import copy
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from .modeling_moleblend import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
)
from .modeling_moleblend_ensemble import MoleBlendEnsembleForSequenceClassification
from .processing_moleblend import MoleBlendProcessor

OUTPUTS_FILE, FACTS_FILE = "reference_outputs.safetensors", "reference_outputs.json"
# Of the largest value at a depth. Arithmetic in float64, or by another attention kernel, departs by 3e-6 at most (base size).
TOLERANCE = 1e-4
# All hydrogens and coordinates in angstrom are given, so that no setting of the processor has anything to generate.
REFERENCE_MOLECULES: list[dict[str, Any]] = [
    {
        "smiles": "[H]/C(=C(\\[H])[C@@]([H])(C#N)N([H])[H])C([H])([H])[H]",
        "coordinates": [
            *([-1.23, 1.91, -1.19], [-0.99, 1.1, -0.51], [0.21, 0.5, -0.66], [0.84, 0.86, -1.46], [0.79, -0.63, 0.15]),
            *(
                [0.16, -0.87, 1.01],
                [0.92, -1.85, -0.69],
                [1.05, -2.81, -1.33],
                [2.09, -0.19, 0.69],
                [2.75, -0.08, -0.08],
            ),
            *([2.47, -0.94, 1.27], [-2.05, 0.8, 0.5], [-2.21, 1.68, 1.14], [-1.8, -0.05, 1.15], [-2.99, 0.57, -0.01]),
        ],
    },
    {
        "smiles": "[H]C([H])(C(=O)[O-])[N+]([H])([H])[H]",
        "coordinates": [
            *([0.33, -0.89, -1.23], [0.21, -0.59, -0.18], [0.19, -1.47, 0.47], [1.31, 0.41, 0.25], [2.49, 0.01, 0.22]),
            *(
                [0.77, 1.51, 0.57],
                [-1.14, 0.08, -0.07],
                [-1.73, -0.31, 0.66],
                [-1.61, 0.22, -0.96],
                [-0.84, 1.03, 0.27],
            ),
        ],
    },
    {
        "smiles": "[H]Sc1oc(Cl)nc1[H]",
        "coordinates": [
            *(
                [-2.38, -1.56, 0.24],
                [-2.38, -0.23, 0.43],
                [-0.69, 0.03, 0.14],
                [0.17, -0.98, -0.17],
                [1.38, -0.37, -0.32],
            ),
            *([2.82, -1.21, -0.72], [1.36, 0.94, -0.13], [0.04, 1.19, 0.16], [-0.31, 2.19, 0.38]),
        ],
    },
]
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    model_class.__name__: model_class
    for model_class in (
        MoleBlendModel,
        MoleBlendForPreTraining,
        MoleBlendForSequenceClassification,
        MoleBlendForTokenClassification,
        MoleBlendEnsembleForSequenceClassification,
    )
}
HEAD_OUTPUTS = (
    "shortest_path_logits",
    "bond_path_logits",
    "predicted_relative_positions",
    "predicted_coordinate_noise",
    "member_logits",
    "logits",
)
DRAWS = ("pair_modality_ids", "atom_modality_ids", "coordinate_noise")
# What a config says about the file, not about the model.
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version")
NOT_SETTINGS = ("auto_map", "feature_extractor_type", "processor_class")


@dataclass(frozen=True)
class VerificationReport:
    """How a loaded checkpoint compares to what was written when it was saved. `str()` of it is for people.

    Attributes:
        folder: what was loaded, and at which commit if it came from the Hub.
        deviations: for each depth, in the order of computation, the largest difference as a share of the largest value there;
            infinite where shapes differ. Without those of the model where a weight has another shape.
        tolerance: the largest deviation that is taken for rounding.
        missing_keys: weights of the model that the files do not have.
        unexpected_keys: weights in the files that the model does not have.
        mismatched_keys: weights that have another shape in the files.
        changed_weights: weights that are there and are not, bit for bit, those that were saved.
        processor_differences: settings of the processor that differ, (saved, loaded).
        config_differences: fields of the config that differ, (saved, loaded).
    """

    folder: str
    deviations: dict[str, float]
    tolerance: float
    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]
    changed_weights: list[str]
    processor_differences: dict[str, tuple[Any, Any]]
    config_differences: dict[str, tuple[Any, Any]]

    @property
    def first_departure(self) -> tuple[str, float] | None:
        """The first depth that departs and by how much; `None` if none does."""
        return next((item for item in self.deviations.items() if not item[1] <= self.tolerance), None)

    @property
    def newly_initialized_keys(self) -> list[str]:
        """Weights that are random numbers in the loaded model, because the files have none of this name and shape."""
        return sorted({*self.missing_keys, *self.mismatched_keys})

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is the model that was saved."""
        return self.first_departure is None and not any(
            (
                self.missing_keys,
                self.unexpected_keys,
                self.mismatched_keys,
                self.changed_weights,
                self.processor_differences,
                self.config_differences,
            )
        )

    def __str__(self) -> str:
        if self.ok:
            largest = max(self.deviations.values())
            close = f"to within {largest:.0e} of their largest value" if largest else "exactly"
            return f"{self.folder} is the model that was saved: all weights, and outputs at {len(self.deviations)} depths {close}."
        lines = [f"{self.folder} is not the model that was saved."]
        if self.first_departure is not None:
            name, deviation = self.first_departure
            lines.append(
                f"  first departs at {name}: by {deviation:.2g} of the largest value (tolerance {self.tolerance:g})"
            )
        for title, keys in (
            ("missing, newly initialised", self.missing_keys),
            ("of another shape, newly initialised", self.mismatched_keys),
            ("unexpected", self.unexpected_keys),
            ("changed", self.changed_weights),
        ):
            if keys:
                named = ", ".join(keys[:4]) + (" ..." if len(keys) > 4 else "")
                lines.append(f"  weights {title}: {len(keys)} ({named})")
        for title, differences in (("processor", self.processor_differences), ("config", self.config_differences)):
            for name, (saved, loaded) in differences.items():
                lines.append(f"  {title} setting {name}: {saved!r} was saved, {loaded!r} was loaded")
        return "\n".join(lines)


def write_reference_outputs(model: PreTrainedModel, processor: MoleBlendProcessor, folder: str | Path) -> None:
    """Write what `verify` compares with into the folder of a checkpoint, from the model as it is in memory.

    Args:
        model: the model that was saved in the folder, with its weights as they were saved; any device.
        processor: that of the checkpoint.
        folder: where `reference_outputs.safetensors` and `reference_outputs.json` go.

    Raises:
        TypeError: if the model is of no class of this package.
    """
    if type(model).__name__ not in MODEL_CLASSES:
        raise TypeError(
            f"There are no reference outputs of a {type(model).__name__}. Pass one of {', '.join(MODEL_CLASSES)}."
        )
    inputs = _inputs(processor, REFERENCE_MOLECULES)
    outputs = _outputs(model, inputs, draws=None)
    tensors = {f"processor.{name}": tensor for name, tensor in inputs.items()} | outputs
    facts = {
        "molecules": REFERENCE_MOLECULES,
        "tolerance": TOLERANCE,
        "depths": list(tensors),
        "model_class": type(model).__name__,
        "processor": _settings(processor),
        "config": _fields(model.config.to_diff_dict()),
        "weights": _digests(model),
        "versions": {
            package: importlib.metadata.version(package) for package in ("torch", "transformers", "numpy", "rdkit")
        },
    }
    folder = Path(folder)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / OUTPUTS_FILE)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def verify(folder_or_repo: str | Path, revision: str | None = None) -> VerificationReport:
    """Returns how a checkpoint, loaded by this package, compares to the model that was saved in it.

    Args:
        folder_or_repo: a folder, or the name of a repository on the Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: if the checkpoint carries no reference outputs.
        ValueError: if it is not of a class of this package.
    """
    folder, title = Path(folder_or_repo), str(folder_or_repo)
    if not folder.is_dir():
        # One commit, and no code of it.
        folder = Path(
            snapshot_download(str(folder_or_repo), revision=revision, allow_patterns=["*.json", "*.safetensors"])
        )
        title = f"{title} at {folder.name[:12]}"
    if absent := [name for name in (FACTS_FILE, OUTPUTS_FILE) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{title} has no {absent[0]}, so there is nothing to compare with. Write it with `write_reference_outputs(model, "
            "processor, folder)` from a model that you trust."
        )
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    expected = load_file(folder / OUTPUTS_FILE)
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["no class"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(f"{title} holds a {name}, but has to hold one of {', '.join(MODEL_CLASSES)}.")
    model_class: Any = MODEL_CLASSES[name]
    model, loading = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    processor = MoleBlendProcessor.from_pretrained(folder)

    found: dict[str, torch.Tensor] = {
        f"processor.{name}": tensor for name, tensor in _inputs(processor, facts["molecules"]).items()
    }
    mismatched = sorted({str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"]})
    if not mismatched and name == facts["model_class"]:
        # The model reads the tensors that were saved, so that a fault of the processor is not blamed on it, too.
        inputs = {
            key.removeprefix("processor."): value for key, value in expected.items() if key.startswith("processor.")
        }
        draws = {draw: expected[f"draws.{draw}"] for draw in DRAWS if f"draws.{draw}" in expected}
        found |= _outputs(model, inputs, draws)
    in_files: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            in_files.update(file.keys())
    in_model = set(model.state_dict())
    digests = _digests(model)
    shared = (in_files & in_model) - set(mismatched)
    saved_config = {"model_class": facts["model_class"], **facts["config"]}
    loaded_config = {"model_class": name, **_fields(model.config.to_dict())}
    return VerificationReport(
        folder=title,
        deviations={
            depth: _deviation(found.get(depth), expected[depth])
            for depth in facts["depths"]
            if depth in found or depth.startswith("processor.")
        },
        tolerance=facts["tolerance"],
        missing_keys=sorted(in_model - in_files),
        unexpected_keys=sorted(in_files - in_model),
        mismatched_keys=mismatched,
        changed_weights=sorted(key for key in shared if digests[key] != facts["weights"].get(key)),
        processor_differences=_differences(facts["processor"], _settings(processor)),
        config_differences=_differences(saved_config, loaded_config),
    )


def _inputs(processor: MoleBlendProcessor, molecules: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the processor makes of the reference molecules."""
    coordinates = [np.array(molecule["coordinates"]) for molecule in molecules]
    limit = max(processor.max_atoms, *map(len, coordinates))  # which says nothing about what a molecule looks like
    lenient = MoleBlendProcessor(**{**_settings(processor), "max_atoms": limit})
    return dict(lenient([molecule["smiles"] for molecule in molecules], coordinates))


@torch.no_grad()
def _outputs(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], draws: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """What the model makes of them by depth, on the CPU in float32; `draws` are those of pretraining, made if not given."""
    model = copy.deepcopy(model).cpu().float().eval()
    members: Any = model.members if isinstance(model, MoleBlendEnsembleForSequenceClassification) else [model]
    found: dict[str, torch.Tensor] = {}
    for index, member in enumerate(members):
        prefix = f"members.{index}." if member is not model else ""
        encoded = member.base_model(**inputs, output_hidden_states=True, output_attention_bias=True)
        embeddings, *layers = encoded.hidden_states
        found |= {f"{prefix}embeddings": embeddings, f"{prefix}attention_bias": encoded.attention_bias}
        found |= {f"{prefix}layers.{layer}": states for layer, states in enumerate(layers)}
    if isinstance(model, MoleBlendModel):
        return found
    given: dict[str, Any] = draws or {}
    if isinstance(model, MoleBlendForPreTraining) and draws is None:
        given = {"generator": torch.Generator().manual_seed(0)}
    outputs = model(**inputs, **given)
    found |= {f"draws.{name}": outputs[name] for name in DRAWS if outputs.get(name) is not None}
    return found | {f"heads.{name}": outputs[name] for name in HEAD_OUTPUTS if outputs.get(name) is not None}


def _deviation(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; integers and what is not finite have to be the same."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    if not (found.is_floating_point() and expected.is_floating_point()):
        return 0.0 if found.dtype == expected.dtype and torch.equal(found, expected) else float("inf")
    smallest = torch.finfo(expected.dtype).tiny
    found, expected = found.double(), expected.double()  # a later version may compute in another precision
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(
        found[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (found[finite] - expected[finite]).abs().max().item()
    return difference / max(expected[finite].abs().max().item(), smallest)


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """A digest of each weight in its own dtype."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:16]
        for name, tensor in model.state_dict().items()
    }


def _settings(processor: MoleBlendProcessor) -> dict[str, Any]:
    return {name: value for name, value in processor.to_dict().items() if name not in NOT_SETTINGS}


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config as JSON has them."""
    return json.loads(json.dumps({name: value for name, value in values.items() if name not in NOT_OF_THE_MODEL}))


def _differences(saved: dict[str, Any], loaded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs of what was saved; a setting that came later is not in there."""
    return {name: (value, loaded.get(name)) for name, value in saved.items() if loaded.get(name) != value}


__all__ = ["REFERENCE_MOLECULES", "VerificationReport", "verify", "write_reference_outputs"]
