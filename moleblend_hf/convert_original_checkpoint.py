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
"""Weights of the original MoleBLEND and of Transformer-M as a checkpoint folder of this package.

    python -m moleblend_hf.convert_original_checkpoint checkpoint_best.pt moleblend-base

takes a fairseq checkpoint (`.pt`, read with `weights_only=True`) or its bare state (`.safetensors`), of pretraining or of
fine-tuning; a Transformer-M checkpoint gives the encoder. Sizes are read from the tensors. Every key is either converted or
dropped for a stated reason; a key that is not known is an error.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .configuration_moleblend import MoleBlendConfig
from .modeling_moleblend import MoleBlendForPreTraining, MoleBlendForSequenceClassification, MoleBlendModel
from .processing_moleblend import MoleBlendProcessor

ENCODER = "encoder.molecule_encoder."
# Rows between the features of one of the original's tables, and the rows before the first value of a feature.
FEATURE_STRIDE = 512
ATOM_OFFSET, BOND_OFFSET, ELEMENT_OFFSET, DEGREE_OFFSET = 2, 3, 3, 1
# The original's heads learn nothing in pretraining and are not called in fine-tuning.
DROPPED = {
    "encoder.lm_head_transform_weight.weight": "no gradient in pretraining, not called in fine-tuning",
    "encoder.lm_head_transform_weight.bias": "no gradient in pretraining, not called in fine-tuning",
    "encoder.layer_norm.weight": "no gradient in pretraining, not called in fine-tuning",
    "encoder.layer_norm.bias": "no gradient in pretraining, not called in fine-tuning",
    "encoder.embed_out.weight": "no gradient in pretraining",
    "encoder.lm_output_learned_bias": "no gradient in pretraining",
}
TRANSFORMER_M_HEAD = "Transformer-M's denoising head, which has no place without MoleBLEND's other heads"


class _OriginalState:
    """Tensors of an original checkpoint, each of which is taken once."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise ValueError(
                f"The checkpoint has no tensor {name!r}, which MoleBLEND and Transformer-M both have. Pass a checkpoint of "
                "one of them, trained with --add-3d and --encoder-normalize-before."
            )
        return self.tensors.pop(name).float()

    def take_layer(self, name: str, target: str) -> dict[str, torch.Tensor]:
        return {f"{target}.{part}": self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def stack_layers(self, names: list[str], target: str) -> dict[str, torch.Tensor]:
        """Linear layers over one input as one layer."""
        return {
            f"{target}.{part}": torch.cat([self.take(f"{name}.{part}") for name in names])
            for part in ("weight", "bias")
        }


def _select_rows(table: torch.Tensor, sizes: Sequence[int], offset: int) -> torch.Tensor:
    """The rows of a table with one block of `FEATURE_STRIDE` rows a feature that stand for a value of a vocabulary."""
    index = [offset + FEATURE_STRIDE * feature + value for feature, size in enumerate(sizes) for value in range(size)]
    return table[index]


def _encoder(state: _OriginalState, config: MoleBlendConfig) -> dict[str, torch.Tensor]:
    atoms = state.take(ENCODER + "atom_feature.atom_encoder.weight")
    in_degrees, out_degrees = (
        state.take(ENCODER + f"atom_feature.{kind}_degree_encoder.weight") for kind in ("in", "out")
    )
    converted = {
        "graph_token": state.take(ENCODER + "atom_feature.graph_token.weight").flatten(),
        "embeddings.atom_embedding.weight": torch.cat(
            [torch.zeros(1, config.hidden_size), _select_rows(atoms, config.atom_vocabulary_sizes, ATOM_OFFSET)]
        ),
        # The original adds two tables indexed by one number.
        "embeddings.degree_embedding.weight": (in_degrees + out_degrees)[
            DEGREE_OFFSET : DEGREE_OFFSET + config.num_degrees
        ],
        **state.take_layer(ENCODER + "emb_layer_norm", "embedding_norm"),
    }
    num_heads = config.num_attention_heads
    bonds = state.take(ENCODER + "molecule_attn_bias.edge_encoder.weight")
    hops = state.take(ENCODER + "molecule_attn_bias.edge_dis_encoder.weight").view(-1, num_heads, num_heads)
    converted |= {
        "attention_bias.graph_token_bias": state.take(
            ENCODER + "molecule_attn_bias.graph_token_virtual_distance.weight"
        ).flatten(),
        "attention_bias.shortest_path_embedding.weight": state.take(
            ENCODER + "molecule_attn_bias.spatial_pos_encoder.weight"
        ),
        "attention_bias.bond_embedding.weight": _select_rows(bonds, config.bond_vocabulary_sizes, BOND_OFFSET),
        # The original has a matrix for each of 128 hops and reads the first `max_path_bonds`.
        "attention_bias.bond_path_weight": hops[: config.max_path_bonds],
        **state.take_layer(ENCODER + "molecule_3d_bias.gbf_proj.layer1", "attention_bias.distance_dense"),
        **state.take_layer(ENCODER + "molecule_3d_bias.gbf_proj.layer2", "attention_bias.distance_proj"),
        **state.take_layer(ENCODER + "molecule_3d_bias.edge_proj", "atom_distance_proj"),
    }
    # Factor and offset of a pair: an entry for atom i in the first block of elements, one for atom j in the second.
    affine = torch.cat(
        [state.take(ENCODER + f"molecule_3d_bias.gbf.{kind}.weight") for kind in ("mul", "bias")], dim=1
    )
    for name, start in (("first", ELEMENT_OFFSET), ("second", ELEMENT_OFFSET + FEATURE_STRIDE)):
        rows = affine[start : start + config.atom_vocabulary_sizes[0]]
        converted[f"distance_embedding.{name}_atom_affine.weight"] = torch.cat([torch.zeros(1, 2), rows])
    for kind in ("means", "stds"):
        converted[f"distance_embedding.{kind}"] = state.take(ENCODER + f"molecule_3d_bias.gbf.{kind}.weight").flatten()

    for layer in range(config.num_hidden_layers):
        source, target = ENCODER + f"layers.{layer}.", f"layers.{layer}."
        converted |= state.stack_layers(
            [source + f"self_attn.{part}_proj" for part in "qkv"], target + "attention.qkv_proj"
        )
        converted |= state.take_layer(source + "self_attn.out_proj", target + "attention.out_proj")
        converted |= state.take_layer(source + "self_attn_layer_norm", target + "attention_norm")
        converted |= state.take_layer(source + "fc1", target + "mlp.dense_in")
        converted |= state.take_layer(source + "fc2", target + "mlp.dense_out")
        converted |= state.take_layer(source + "final_layer_norm", target + "mlp_norm")
    return converted


def _pretraining_heads(state: _OriginalState) -> dict[str, torch.Tensor]:
    converted: dict[str, torch.Tensor] = {}
    heads = {"spd": "shortest_path_head", "edge": "bond_path_head", "3d": "relative_position_head"}
    for kind, head in heads.items():
        source, target = ENCODER + f"blend_{kind}_pred_head.transform_n2_head.", f"{head}.projection."
        for old, new in (("row", "first"), ("column", "second")):
            converted |= state.take_layer(source + f"{old}_head", target + f"{new}_dense")
            converted |= state.take_layer(source + f"{old}_LayerNorm", target + f"{new}_norm")
    converted |= state.take_layer(ENCODER + "blend_spd_pred_head.linear", "shortest_path_head.out_proj")
    converted |= state.take_layer(ENCODER + "blend_edge_pred_head.linear_map_feature", "bond_path_head.out_proj")
    converted |= state.take_layer(ENCODER + "blend_3d_pred_head.linear", "relative_position_head.dense")
    axes = (1, 2, 3)
    converted |= state.stack_layers(
        [ENCODER + f"blend_3d_pred_head.force_proj{axis}" for axis in axes], "relative_position_head.out_proj"
    )
    for old, new in (("q", "query"), ("k", "key"), ("v", "value")):
        converted |= state.take_layer(ENCODER + f"atom_proc.{old}_proj", f"coordinate_denoising_head.{new}_proj")
    converted |= state.stack_layers(
        [ENCODER + f"atom_proc.force_proj{axis}" for axis in axes], "coordinate_denoising_head.out_proj"
    )
    return converted


def convert_state(tensors: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, dict[str, str]]:
    """Returns the model that an original state describes, and the keys that were dropped, each with its reason.

    Args:
        tensors: the original's parameters under their original names.

    Raises:
        ValueError: if a key is missing or not known, or if the tensors do not fit together.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name!r} of the checkpoint is of type {kind}, but weights are floating-point tensors. Pass the state dict "
                "of one model."
            )
    try:
        return _converted(_OriginalState(tensors))
    except (IndexError, RuntimeError, StrictDataclassError) as error:  # what PyTorch and the config say about shapes
        raise ValueError(
            f"The tensors of the checkpoint do not fit together as those of MoleBLEND or Transformer-M: {error} Pass an "
            "unchanged checkpoint of one of them."
        ) from error


def _converted(state: _OriginalState) -> tuple[PreTrainedModel, dict[str, str]]:
    edge_head = ENCODER + "blend_edge_pred_head.linear_map_feature.weight"
    has_pretraining_heads = edge_head in state
    has_property_head = "encoder.proj_out.out_proj.weight" in state

    def shape(name: str) -> tuple[int, ...]:
        return tuple(state.tensors[name].shape) if name in state else tuple(state.take(name).shape)

    layers = {
        int(match[1]) for name in state.tensors if (match := re.match(re.escape(ENCODER) + r"layers\.(\d+)\.", name))
    }
    hidden_size = shape(ENCODER + "emb_layer_norm.weight")[0]
    num_distances, num_heads = shape(ENCODER + "molecule_attn_bias.spatial_pos_encoder.weight")
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": shape(ENCODER + "layers.0.fc1.weight")[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_heads,
        "num_shortest_path_distances": num_distances,
        "num_distance_kernels": shape(ENCODER + "molecule_3d_bias.gbf.means.weight")[1],
    }
    if has_pretraining_heads:
        type_classes, stereo_classes, conjugation_classes = MoleBlendConfig.bond_class_sizes
        num_bond_classes = type_classes * stereo_classes * conjugation_classes
        sizes |= {
            "pair_head_size": shape(ENCODER + "blend_spd_pred_head.transform_n2_head.row_head.weight")[0],
            "num_shortest_path_classes": shape(ENCODER + "blend_spd_pred_head.linear.weight")[0],
            "relative_position_hidden_size": shape(ENCODER + "blend_3d_pred_head.linear.weight")[0],
            "max_path_bonds": shape(edge_head)[0] // num_bond_classes,
        }
    if has_property_head:
        sizes["num_labels"] = shape("encoder.proj_out.out_proj.weight")[0]
    config = MoleBlendConfig(**sizes)

    converted = _encoder(state, config)
    model_class: type[PreTrainedModel] = MoleBlendModel
    if has_pretraining_heads or has_property_head:
        converted = {f"moleblend.{name}": tensor for name, tensor in converted.items()}
        model_class = MoleBlendForPreTraining if has_pretraining_heads else MoleBlendForSequenceClassification
    if has_pretraining_heads:
        converted |= _pretraining_heads(state)
    if has_property_head and not has_pretraining_heads:
        converted |= state.take_layer("encoder.proj_out.dense", "classifier.dense")
        converted |= state.take_layer("encoder.proj_out.out_proj", "classifier.out_proj")

    dropped = {}
    for name in list(state.tensors):
        reason = DROPPED.get(name)
        if name.startswith(ENCODER + "atom_proc.") and not has_pretraining_heads:
            reason = TRANSFORMER_M_HEAD
        if reason is not None:
            dropped[name] = reason
            del state.tensors[name]
    if state.tensors:
        raise ValueError(
            f"The checkpoint has {len(state.tensors)} tensors that neither MoleBLEND nor Transformer-M has, the first "
            f"{sorted(state.tensors)[0]!r}. It belongs to another model or variant (sandwich layer norms, say), which this "
            "package cannot represent."
        )
    model = model_class(config)
    # Strict: a parameter of ours that received nothing is an error.
    model.load_state_dict(converted, strict=True)
    return model.eval(), dropped


def load_original(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the parameters in a fairseq checkpoint (`.pt`) or a `.safetensors` file under their original names."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    # fairseq keeps its command line beside the weights; a namespace of plain values runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict; pass a fairseq checkpoint or a state dict of tensors.")
    return tensors


def convert(source: str | Path, target: str | Path) -> dict[str, str]:
    """Writes the checkpoint folder `target` (model, config, processor, code) from the file `source`.

    Returns:
        The keys that were dropped, each with its reason.
    """
    model, dropped = convert_state(load_original(source))
    model.save_pretrained(target)
    MoleBlendProcessor(max_path_bonds=model.config.max_path_bonds).save_pretrained(target)
    return dropped


def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="original checkpoint, .pt or .safetensors")
    parser.add_argument("target", type=Path, help="checkpoint folder to write")
    args = parser.parse_args(argv)
    dropped = convert(args.source, args.target)
    for name, reason in dropped.items():
        print(f"dropped {name}: {reason}")
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
