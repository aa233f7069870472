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
"""Checkpoints of any kind, opened so that nothing in them is random."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel

from .pipeline_moleblend import MoleBlendPipeline
from .verification import MODEL_CLASSES


def class_of(config: Any, model: str) -> Any:
    """Returns the class of the model that a config describes."""
    name = (getattr(config, "architectures", None) or ["model without a class"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(f"{model} holds a {name}, but has to hold one of {', '.join(MODEL_CLASSES)}.")
    return MODEL_CLASSES[name]


def open_checkpoint(
    model: str, revision: str | None = None, device: str | None = None, **settings: Any
) -> MoleBlendPipeline:
    """Returns a checkpoint with its processor, all of whose weights were there.

    Args:
        model: a folder, or the name of a repository on the Hub.
        revision: branch, tag or commit on the Hub.
        device: left out: cuda if there is one, else cpu.
        settings: of the processor; those that are None stay as the checkpoint has them.
    """
    check_is_there(model)
    config = AutoConfig.from_pretrained(model, revision=revision)
    model_class = class_of(config, model)
    given = {name: value for name, value in settings.items() if value is not None}
    processor = AutoFeatureExtractor.from_pretrained(model, revision=revision, **given)
    check_conformers(given.get("num_conformers"), processor.modality)
    if processor.max_path_bonds != config.max_path_bonds:
        raise ValueError(
            f"The processor of {model} tells {processor.max_path_bonds} bonds of a path apart, but its model "
            f"{config.max_path_bonds}. Save the processor that the model was trained with."
        )
    loaded = load_whole(model_class, model, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {device!r}: {str(error).splitlines()[0]}") from error
    return MoleBlendPipeline(model=loaded.eval(), feature_extractor=processor, device=device)


def check_is_there(model: str) -> None:
    """Raises FileNotFoundError for the path of a folder that is not there, of which the Hub would be asked many times."""
    path = Path(model)
    is_path = path.is_absolute() or model.startswith(".") or len(path.parts) > 2
    if not path.exists() and (is_path or (len(path.parts) == 2 and path.parent.is_dir())):
        raise FileNotFoundError(
            f"There is no {path.name!r} in {str(path.parent)!r}. Name the folder of a checkpoint, or one on the Hub: USER/NAME."
        )


def load_whole(model_class: Any, model: str, revision: str | None = None) -> PreTrainedModel:
    """Returns the model of a checkpoint; raises ValueError if some of its weights are not there, which would be random.

    Args:
        model_class: of a model, or an auto class.
        model: a folder, or the name of a repository on the Hub.
        revision: branch, tag or commit on the Hub.
    """
    loaded, report = model_class.from_pretrained(
        model, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if random := sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]})):
        raise ValueError(
            f"{model} has no weights for {len(random)} parts of its {type(loaded).__name__}, the first {random[0]}, which would be "
            "random numbers. Fetch or save the checkpoint again, or fine-tune it with training/finetune.py."
        )
    return loaded


def check_conformers(num_conformers: int | None, modality: str) -> None:
    """Raises ValueError if conformers are asked for where none are made."""
    if (num_conformers or 1) > 1 and modality not in ("3d", "2d+3d"):
        raise ValueError(
            f"num_conformers is {num_conformers}, but with modality={modality!r} none are made. Say modality 2d+3d or 3d, too."
        )


def check_layers(layers: int, config: PreTrainedConfig) -> None:
    """Raises ValueError if a model of this config does not have so many layers to keep."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}, but the model has {config.num_hidden_layers}. Give 1 to so many.")


def keep_lowest_layers(model: PreTrainedModel, layers: int) -> None:
    """Takes all but the lowest layers out of the encoder of a loaded model, for embeddings."""
    check_layers(layers, model.config)
    encoder: Any = model.base_model
    encoder.layers = encoder.layers[:layers]


__all__ = [
    "check_conformers",
    "check_is_there",
    "check_layers",
    "class_of",
    "keep_lowest_layers",
    "load_whole",
    "open_checkpoint",
]
