"""Small models for the tests: a config factory, and the original's weights of the golden fixture in our models."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from moleblend_hf import MoleBlendConfig
from moleblend_hf.convert_original_checkpoint import convert_state, load_original

GOLDEN = Path(__file__).parent / "golden"
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].CC(=O)[O-]", "C/C=C/C(=O)/C=C\\CCl", "OCC[C@H](N)C#N"]

CARD_METADATA = """---
license: apache-2.0
library_name: transformers
pipeline_tag: graph-ml
tags: [chemistry]
datasets: [qm9]
model-index:
- name: tiny
  results:
  - task: {type: regression}
    dataset: {type: qm9, name: QM9}
    metrics: [{type: mae, value: 0.1}]
---
"""
# For another process: what a model says about some molecules.
OUTPUTS = """
import json, torch
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].CC(=O)[O-]"]
def outputs_of(model, processor):
    draws = {"generator": torch.Generator().manual_seed(0)} if "PreTraining" in type(model).__name__ else {}
    with torch.no_grad():
        outputs = model.eval()(**processor(SMILES, return_tensors="pt"), **draws)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
"""


def tiny_config(**changes) -> MoleBlendConfig:
    """A config of a model that runs in milliseconds."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_distance_kernels": 16,
        "pair_head_size": 8,
        "relative_position_hidden_size": 24,
    }
    return MoleBlendConfig(**{**sizes, **changes})


def without_dropout(**changes) -> MoleBlendConfig:
    """`tiny_config` whose forward is the same function in training and evaluation."""
    return tiny_config(attention_dropout=0.0, activation_dropout=0.0, drop_path_rate=0.0, **changes)


def golden_model(run: str) -> PreTrainedModel:
    """The original's weights of the run "pretrain" or "finetune"."""
    return convert_state(load_original(GOLDEN / f"{run}_state.safetensors"))[0]


def golden_tensors(run: str) -> dict[str, torch.Tensor]:
    """The original's inputs and outputs; integers as int64."""
    tensors = load_file(GOLDEN / f"{run}.safetensors")
    return {name: tensor.long() if tensor.dtype == torch.int16 else tensor for name, tensor in tensors.items()}


def golden_molecules(run: str) -> tuple[list[str], list[np.ndarray]]:
    """SMILES, and coordinates in angstrom in the order of their atoms."""
    molecules = json.loads((GOLDEN / f"{run}_molecules.json").read_text())
    return [molecule["smiles"] for molecule in molecules], [np.array(molecule["coords"]) for molecule in molecules]


def golden_losses(run: str) -> dict:
    """Losses and gradient norms of the original."""
    return json.loads((GOLDEN / f"{run}_losses_grads.json").read_text())
