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
"""MoleBLEND: one transformer over the 2D graph and the 3D geometry of a molecule (arXiv 2307.06235).

Read downward: embeddings, attention, layer, encoder, models. Tensors are named and shaped as the processor returns them.
"""
# B molecules, N padded atoms, L = N + 1 tokens (graph token first), H heads, D hidden size, K distance kernels.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .blending_moleblend import (
    ATOM_DEGREE,
    ATOM_DISTANCE,
    IGNORED_LABEL,
    PAIR_BOND_PATH,
    PAIR_DISTANCE,
    PAIR_SHORTEST_PATH,
    atom_modalities,
    available_modalities,
    bond_path_labels,
    constant,
    draw,
    molecules_with_coordinates,
    pair_modalities,
    shortest_path_labels,
)
from .configuration_moleblend import MoleBlendConfig
from .eval_mode_moleblend import eval_mode
from .heads_moleblend import (
    MoleBlendCoordinateDenoisingHead,
    MoleBlendLayerNorm,
    MoleBlendOuterProductPairHead,
    MoleBlendPropertyHead,
    MoleBlendRelativePositionHead,
    MoleBlendWeightedLayerSum,
)
from .relations_moleblend import MoleBlendAttentionBias, MoleBlendGaussianDistanceEmbedding
from .rows_moleblend import (
    RowSelection,
    TokenSelection,
    cross_entropy_sum,
    drop_path,
    drop_values,
    gathers,
    masked_mean,
    masked_sum,
    widen,
)
from .targets_moleblend import PropertyKwargs, in_target_units, property_loss

DIRECTION_EPS = 1e-5

MODEL_INPUTS_DOCSTRING = r"""
    atom_features (`torch.LongTensor` of shape `(batch_size, num_atoms, 9)`):
        OGB atom features plus 1; 0 is padding.
    attention_mask (`torch.Tensor` of shape `(batch_size, num_atoms)`, *optional*):
        1 for atoms, 0 for padding. Left out, an atom is where the first feature is not 0.
    degree (`torch.LongTensor` of shape `(batch_size, num_atoms)`, *optional*):
        Number of neighbours of each atom.
    shortest_path_distance (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms)`, *optional*):
        Bonds on the shortest path between two atoms, 0 on the diagonal, 510 where there is none.
    path_bond_types (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms, max_path_bonds)`, *optional*):
        `1 + 12 * type + 2 * stereo + conjugated` of each bond along one shortest path; 0 = no such hop.
    coordinates (`torch.FloatTensor` of shape `(batch_size, num_atoms, 3)`, *optional*):
        Coordinates in angstrom. Left out, the model sees no geometry; a relation that is left out is a modality
        switched off.
    coordinates_mask (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
        Which molecules have coordinates. Left out, all have.
"""


class MoleBlendAtomEmbedding(nn.Embedding):
    """Sum over the features of an atom, `(B, N, F)` rows of the table to `(B, N, D)`, without building the terms."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        rows = F.embedding_bag(index.flatten(0, 1), self.weight, mode="sum", padding_idx=self.padding_idx)
        return rows.unflatten(0, index.shape[:2])


class MoleBlendEmbeddings(nn.Module):
    """Atom features summed over one table, and the degree ("centrality") embedding."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.atom_vocabulary_sizes = tuple(config.atom_vocabulary_sizes)
        # Row 0 is padding; the values of feature f take the rows after offset f.
        self.atom_offsets = tuple(accumulate(self.atom_vocabulary_sizes[:-1], initial=0))
        self.atom_embedding = MoleBlendAtomEmbedding(1 + sum(self.atom_vocabulary_sizes), config.hidden_size, 0)
        self.degree_embedding = nn.Embedding(config.num_degrees, config.hidden_size)

    def forward(self, atom_features: torch.Tensor) -> torch.Tensor:
        """`(B, N, num_features)` to `(B, N, D)`; padding is 0, a value beyond a vocabulary takes its last row."""
        largest = constant(self.atom_vocabulary_sizes, atom_features)
        offsets = constant(self.atom_offsets, atom_features)
        return self.atom_embedding(torch.where(atom_features > 0, torch.minimum(atom_features, largest) + offsets, 0))

    def embed_degree(self, degree: torch.Tensor) -> torch.Tensor:
        """`(B, N)` to `(B, N, D)`."""
        return self.degree_embedding(degree.clamp(0, len(self.degree_embedding.weight) - 1))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(query.device.type, enabled=False):  # in the dtype of the query
        scores = torch.baddbmm(
            attention_mask.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scaling
        )
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype).view(attention_mask.shape)
        probabilities = drop_values(probabilities, dropout, module.training)
        return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class MoleBlendAttention(nn.Module):
    """Multi-head self-attention with an additive bias."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: TokenSelection,
        *attention_biases: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (rows, D)` and an attention bias of each group of molecules, `(molecules, H, length, length)`, to
        `(rows, D)` and the attention probabilities, None of several groups."""
        qkv = tokens.split(self.qkv_proj(hidden_states))
        attended = map(partial(self._attend, **kwargs), qkv, tokens.groups, attention_biases)
        contexts, probabilities = zip(*attended, strict=True)
        context = self.out_proj(tokens.join(contexts).to(hidden_states.dtype))
        return context, probabilities[0] if len(probabilities) == 1 else None

    def _attend(
        self, qkv: torch.Tensor, tokens: RowSelection, attention_bias: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = tokens.put(qkv).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, D / H)
        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        has_no_kernel = gathers(qkv) and (attention_bias.requires_grad or dropout > 0)
        if has_no_kernel and implementation in ("sdpa", "eager"):
            # On CPU there is no fused kernel with dropout or a gradient of the bias: SDPA would compute the same, slower.
            attention_interface = eager_attention_forward
            qkv = widen(qkv)
        query, key, value = qkv.unbind(0)
        context, probabilities = attention_interface(
            self,
            query,
            key,
            value,
            attention_bias.to(query.dtype),
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return tokens.take(context.flatten(2)), probabilities


class MoleBlendMLP(nn.Module):
    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.dense_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.activation_dropout = config.activation_dropout
        self.dense_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = drop_values(self.act_fn(self.dense_in(hidden_states)), self.activation_dropout, self.training)
        return self.dense_out(hidden_states)


class MoleBlendLayer(GradientCheckpointingLayer):
    """Post-norm transformer layer on the rows of real tokens."""

    def __init__(self, config: MoleBlendConfig, layer_idx: int):
        super().__init__()
        self.attention = MoleBlendAttention(config)
        self.attention_norm = MoleBlendLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MoleBlendMLP(config)
        self.mlp_norm = MoleBlendLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path_rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)

    def _residual(self, hidden_states: torch.Tensor, branch: torch.Tensor, tokens: RowSelection) -> torch.Tensor:
        branch = self.dropout(branch)
        if self.training and self.drop_path_rate > 0:
            branch = drop_path(branch, self.drop_path_rate, tokens)
        return hidden_states + branch

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: TokenSelection,
        *attention_biases: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # Each bias is an argument of its own: reentrant checkpointing does not look into tuples.
        branch, _ = self.attention(hidden_states, tokens, *attention_biases, **kwargs)
        hidden_states = self.attention_norm(self._residual(hidden_states, branch, tokens))
        return self.mlp_norm(self._residual(hidden_states, self.mlp(hidden_states), tokens))


@auto_docstring
class MoleBlendPreTrainedModel(PreTrainedModel):
    config: MoleBlendConfig
    base_model_prefix = "moleblend"
    main_input_name = "atom_features"
    supports_gradient_checkpointing = True
    # The losses are means over what a batch has; the Trainer would take `**kwargs` for a loss over `num_items_in_batch`.
    accepts_loss_kwargs = False
    _no_split_modules = ["MoleBlendLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # The heads of pretraining; other models leave them behind.
    _keys_to_ignore_on_load_unexpected = [r"^(shortest_path|bond_path|relative_position|coordinate_denoising)_head"]
    _can_record_outputs = {"attentions": OutputRecorder(MoleBlendAttention, index=1)}

    def __setattr__(self, name: str, value: Any) -> None:
        # Accelerate sets it on a model that it has spread. This one adds and multiplies tensors of many modules, and weights
        # that no module's own forward reads; it is small enough to stay whole.
        if name == "hf_device_map" and len(devices := {str(device) for device in value.values()}) > 1:
            raise ValueError(
                f"The device map spreads {type(self).__name__} over {sorted(devices)}, but it computes on one device. Load it "
                'whole: `device_map="cuda:0"`, say.'
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoleBlendGaussianDistanceEmbedding):
            # CODEPATH: "uniform" trains new checkpoints; "normal" is how the original's released ones began.
            if self.config.gaussian_initialization == "uniform":
                init.uniform_(module.means, 0, 3)
                init.uniform_(module.stds, 0, 3)
                for affine in (module.first_atom_affine, module.second_atom_affine):
                    init.copy_(affine.weight, affine.weight.new_tensor([1.0, 0.0]).expand_as(affine.weight))
            else:
                init.normal_(module.means, std=std)
                init.normal_(module.stds, std=std)
        elif isinstance(module, MoleBlendAttentionBias):
            init.normal_(module.bond_path_weight, std=std)
            init.normal_(module.graph_token_bias, std=std)
        elif isinstance(module, MoleBlendModel):
            init.normal_(module.graph_token, std=std)
        elif isinstance(module, MoleBlendWeightedLayerSum):
            init.zeros_(module.layer_weights)


@auto_docstring(custom_intro="Output of [`MoleBlendModel`].")
@dataclass
class MoleBlendModelOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_atoms + 1, hidden_size)`):
            States after the last layer: the graph token first, then the atoms; padding is 0.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            State of the graph token, the molecule embedding.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            The embeddings after their layer norm, then the states after each layer, shaped as `last_hidden_state`.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention probabilities of each layer, `(batch_size, num_heads, num_atoms + 1, num_atoms + 1)`.
        attention_bias (`torch.FloatTensor` of shape `(batch_size, num_heads, num_atoms + 1, num_atoms + 1)`, *optional*):
            What is added to the attention scores of every layer, `-inf` in columns of padding (`output_attention_bias`).
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    attention_bias: torch.Tensor | None = None


class MoleBlendEmbeddingsOutput(NamedTuple):
    """What [`MoleBlendModel.embed`] returns, in the order of the molecules given.

    `molecule_embeddings` are the states of the graph tokens, `(num_molecules, hidden_size)`; `atom_embeddings` holds for each
    molecule the states of its atoms, `(num_atoms, hidden_size)`, in the molecule's own atom order. Both are means over the
    conformers of a molecule.
    """

    molecule_embeddings: torch.Tensor
    atom_embeddings: list[torch.Tensor]


@auto_docstring
class MoleBlendModel(MoleBlendPreTrainedModel):
    def __init__(self, config: MoleBlendConfig):
        super().__init__(config)
        self.graph_token = nn.Parameter(torch.empty(config.hidden_size))
        self.embeddings = MoleBlendEmbeddings(config)
        self.distance_embedding = MoleBlendGaussianDistanceEmbedding(config)
        self.atom_distance_proj = nn.Linear(config.num_distance_kernels, config.hidden_size)
        self.embedding_norm = MoleBlendLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout)
        self.attention_bias = MoleBlendAttentionBias(config)
        self.layers = nn.ModuleList(MoleBlendLayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.atom_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.add_module("atom_embedding", value)

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(
        custom_args=MODEL_INPUTS_DOCSTRING
        + r"""
    pair_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms)`, *optional*):
        The one relation that a pair shows: 0 shortest path, 1 bond path, 2 distance. Left out, a pair shows all.
    atom_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms)`, *optional*):
        The one feature that an atom shows: 0 degree, 1 distance feature. Left out, an atom shows both.
    output_attention_bias (`bool`, *optional*, defaults to `False`):
        Whether to return the attention bias.
"""
    )
    def forward(
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        degree: torch.Tensor | None = None,
        shortest_path_distance: torch.Tensor | None = None,
        path_bond_types: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        coordinates_mask: torch.Tensor | None = None,
        pair_modality_ids: torch.Tensor | None = None,
        atom_modality_ids: torch.Tensor | None = None,
        output_attention_bias: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoleBlendModelOutput:
        r"""
        Example:

        ```python
        >>> from moleblend_hf import MoleBlendConfig, MoleBlendModel, MoleBlendProcessor

        >>> processor, model = MoleBlendProcessor(), MoleBlendModel(MoleBlendConfig())
        >>> outputs = model(**processor(["CCO", "c1ccccc1"], return_tensors="pt"))
        >>> outputs.last_hidden_state.shape
        torch.Size([2, 7, 768])
        ```
        """
        # PEFT passes `input_ids=None` and the like to every model.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # type: ignore[assignment]
        if unknown := sorted(set(kwargs) - set(TransformersKwargs.__annotations__) - {"use_cache"}):
            raise TypeError(f"Unexpected arguments {unknown}. Pass what the processor returns, no `kept_indices`.")
        if atom_features.dim() != 3 or atom_features.shape[2] != len(self.config.atom_vocabulary_sizes):
            raise ValueError(
                f"`atom_features` has shape {tuple(atom_features.shape)}; expected (batch_size, num_atoms, "
                f"{len(self.config.atom_vocabulary_sizes)}), as the processor returns it."
            )
        batch_size, num_atoms, _ = atom_features.shape
        expected_shapes = {
            "attention_mask": (attention_mask, (batch_size, num_atoms)),
            "degree": (degree, (batch_size, num_atoms)),
            "shortest_path_distance": (shortest_path_distance, (batch_size, num_atoms, num_atoms)),
            "path_bond_types": (path_bond_types, (batch_size, num_atoms, num_atoms, self.config.max_path_bonds)),
            "coordinates": (coordinates, (batch_size, num_atoms, 3)),
            "coordinates_mask": (coordinates_mask, (batch_size,)),
            "pair_modality_ids": (pair_modality_ids, (batch_size, num_atoms, num_atoms)),
            "atom_modality_ids": (atom_modality_ids, (batch_size, num_atoms)),
        }
        for name, (tensor, shape) in expected_shapes.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)}; expected {shape} to go with `atom_features`. Pad molecules "
                    "together, with the processor of this checkpoint."
                )
        # The layers work on rows, so their hooks cannot record padded states; they are put back here.
        output_hidden_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)

        # Which atoms, tokens and pairs are real, and which pairs have a distance.
        atom_mask = (atom_features[..., 0] > 0) if attention_mask is None else attention_mask.bool()
        token_mask = F.pad(atom_mask, (1, 0), value=True)  # (B, L)
        pair_mask = atom_mask.unsqueeze(2) & atom_mask.unsqueeze(1)  # (B, N, N)
        gather = gathers(atom_features)
        # Attention probabilities are returned padded to one size.
        grouped = gather and not kwargs.get("output_attentions", self.config.output_attentions)
        tokens = TokenSelection(token_mask, self.config.num_attention_heads, gather, grouped)

        def shown(mask: torch.Tensor, modality: int) -> torch.Tensor:
            return mask if pair_modality_ids is None else mask & (pair_modality_ids == modality)

        # Atoms and pairs, one relation after the other; each term is computed only where it is shown.
        atom_states = self.embeddings(atom_features)  # (B, N, D)
        num_heads = self.config.num_attention_heads
        pair_bias = torch.zeros(*pair_mask.shape, num_heads, device=atom_features.device)  # (B, N, N, H)
        if degree is not None:
            degree_states = self.embeddings.embed_degree(degree)
            if atom_modality_ids is not None:
                degree_states = degree_states.masked_fill((atom_modality_ids != ATOM_DEGREE).unsqueeze(-1), 0)
            atom_states = atom_states + degree_states
        if shortest_path_distance is not None:
            pairs = RowSelection(shown(pair_mask, PAIR_SHORTEST_PATH), gather)
            pair_bias = pair_bias + pairs.put(
                self.attention_bias.shortest_path_bias(pairs.take(shortest_path_distance))
            )
        if path_bond_types is not None:
            pairs = RowSelection(shown(pair_mask, PAIR_BOND_PATH), gather)
            pair_bias = pair_bias + pairs.put(self.attention_bias.bond_path_bias(pairs.take(path_bond_types)))
        if coordinates is not None:
            has_coordinates = molecules_with_coordinates(atom_features, coordinates, coordinates_mask)[:, None, None]
            coordinates = coordinates.float().masked_fill(~has_coordinates, 0)
            has_distance = pair_mask & has_coordinates
            pairs = RowSelection(has_distance, gather)
            distances = torch.linalg.vector_norm(coordinates.unsqueeze(1) - coordinates.unsqueeze(2), dim=-1)
            distance_embeddings = self.distance_embedding(atom_features[..., 0], distances, pairs)  # (rows, K)
            dtype = self.graph_token.dtype  # not `self.dtype`: a replica of DataParallel has no parameters
            distance_states = self.atom_distance_proj(pairs.sum_last(distance_embeddings).to(dtype))
            has_state = has_distance.any(-1)
            if atom_modality_ids is not None:
                has_state = has_state & (atom_modality_ids == ATOM_DISTANCE)
            distance_states = distance_states.masked_fill(~has_state.unsqueeze(-1), 0)
            atom_states = atom_states + self.config.distance_feature_scale * distance_states
            shown_rows = RowSelection(pairs.take(shown(has_distance, PAIR_DISTANCE)), gather)
            distance_bias = self.attention_bias.distance_bias(shown_rows.take(distance_embeddings).to(dtype))
            pair_bias = pair_bias + pairs.put(shown_rows.put(distance_bias))
        attention_bias = self.attention_bias(pair_bias, token_mask)
        attention_biases = tokens.split_pairs(attention_bias)

        graph_token = self.graph_token.expand(batch_size, 1, -1)
        hidden_states = self.embedding_norm(tokens.take(torch.cat([graph_token, atom_states], dim=1)))
        hidden_states = self.embedding_dropout(hidden_states)
        all_hidden_states = []
        for layer in [*self.layers, None]:
            if output_hidden_states:
                # In the graph, so that gradients reach them.
                all_hidden_states.append(tokens.put(hidden_states))
                hidden_states = tokens.take(all_hidden_states[-1])
            if layer is not None:
                hidden_states = layer(hidden_states, tokens, *attention_biases, **kwargs)

        last_hidden_state = tokens.put(hidden_states)
        return MoleBlendModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            hidden_states=tuple(all_hidden_states) or None,
            attention_bias=attention_bias if output_attention_bias else None,
        )

    @torch.no_grad()
    def embed(
        self, molecules: Sequence[Any], processor: Any, batch_size: int = 32, **processor_kwargs: Any
    ) -> MoleBlendEmbeddingsOutput:
        """Embeddings of a list of molecules and of their atoms, in eval mode without gradients; means over conformers.

        Args:
            molecules (`list`): molecules in any form that the processor takes.
            processor (`MoleBlendProcessor`): the processor of this checkpoint.
            batch_size (`int`, *optional*, defaults to 32): molecules in a forward pass.
            processor_kwargs: further arguments of the processor (`modality`, `on_error` ...). With `on_error="skip"`,
                rejected molecules have no embedding and are listed in `processor.rejected`.

        Raises:
            ValueError: if all molecules are rejected.
        """
        with eval_mode(self):
            graphs = processor.featurize_many(molecules, **processor_kwargs)
            if not graphs:
                raise ValueError(
                    f"None of the {len(molecules)} molecules could be featurized. See `processor.rejected` and fix the input."
                )
            modality = processor_kwargs.get("modality") or processor.modality
            # A 2D model is shown no conformer, however many a graph has.
            counts = [1 if modality == "2d" else max(1, len(graph.coordinates)) for graph in graphs]
            owners = [(index, conformer) for index, count in enumerate(counts) for conformer in range(count)]
            owners.sort(key=lambda owner: graphs[owner[0]].num_atoms)  # molecules of like size share a batch
            sums: dict[int, torch.Tensor] = {}
            for start in range(0, len(owners), batch_size):
                indices, conformers = zip(*owners[start : start + batch_size], strict=True)
                batch = processor.pad(
                    [graphs[index] for index in indices], modality=modality, conformer_index=conformers
                )
                states = self(**batch.to(self.device), return_dict=True).last_hidden_state
                for index, state in zip(indices, states, strict=True):
                    sums[index] = sums.get(index, 0) + state[: graphs[index].num_atoms + 1]
        in_order = [sums[index] / count for index, count in enumerate(counts)]
        return MoleBlendEmbeddingsOutput(
            molecule_embeddings=torch.stack([state[0] for state in in_order]),
            atom_embeddings=[state[1:] for state in in_order],
        )


@auto_docstring(custom_intro="Output of [`MoleBlendForPreTraining`].")
@dataclass
class MoleBlendForPreTrainingOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`):
            Sum of the four losses, weighted by `config.loss_weights`.
        shortest_path_loss (`torch.FloatTensor` of shape `(1,)`):
            Cross entropy of the shortest-path classes, mean over pairs.
        bond_path_loss (`torch.FloatTensor` of shape `(1,)`):
            Cross entropy of the bond classes along paths, mean over hops.
        relative_position_loss (`torch.FloatTensor` of shape `(1,)`):
            `1 - cosine` of predicted and true relative position, or smooth L1 of the distance in angstrom; mean over the
            pairs of a molecule, then over molecules.
        coordinate_denoising_loss (`torch.FloatTensor` of shape `(1,)`):
            `1 - cosine` of predicted and true noise, mean over the atoms that showed their distance feature.
        num_targets (`torch.LongTensor` of shape `(4,)`):
            What the four losses are means over: pairs, hops, molecules and atoms of this batch that have a target.
        shortest_path_logits (`torch.FloatTensor` of shape `(batch_size, num_atoms, num_atoms, num_shortest_path_classes)`):
            Class 0 is 1 bond; the last class is `num_shortest_path_classes` bonds or more.
        bond_path_logits (`torch.FloatTensor` of shape `(batch_size, num_atoms, num_atoms, max_path_bonds, num_bond_classes)`):
            Class `6 * type + 2 * stereo + conjugated` (with the default `bond_class_sizes`) of each hop.
        predicted_relative_positions (`torch.FloatTensor` of shape `(batch_size, num_atoms, num_atoms, 3)`):
            Direction from atom i to atom j; with `relative_position_target="distance"` the distance in angstrom, `(..., 1)`.
        predicted_coordinate_noise (`torch.FloatTensor` of shape `(batch_size, num_atoms, 3)`):
            Direction of the noise on each atom.
        shortest_path_labels (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms)`):
            Class of each pair; -100 = no target.
        bond_path_labels (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms, max_path_bonds)`):
            Class of each hop; -100 = no target.
        num_unclassified_bonds (`torch.LongTensor` of shape `(1,)`):
            Hops whose bond lies outside `bond_class_sizes`: no target, counted here.
        pair_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms)`):
            The relation that each pair showed.
        atom_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms)`):
            The feature that each atom showed.
        coordinate_noise (`torch.FloatTensor` of shape `(batch_size, num_atoms, 3)`, *optional*):
            The noise that was added to the coordinates, in angstrom.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States after the embeddings and after each layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention probabilities of each layer.
    """

    loss: torch.Tensor | None = None
    shortest_path_loss: torch.Tensor | None = None
    bond_path_loss: torch.Tensor | None = None
    relative_position_loss: torch.Tensor | None = None
    coordinate_denoising_loss: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None
    shortest_path_logits: torch.Tensor | None = None
    bond_path_logits: torch.Tensor | None = None
    predicted_relative_positions: torch.Tensor | None = None
    predicted_coordinate_noise: torch.Tensor | None = None
    shortest_path_labels: torch.Tensor | None = None
    bond_path_labels: torch.Tensor | None = None
    num_unclassified_bonds: torch.Tensor | None = None
    pair_modality_ids: torch.Tensor | None = None
    atom_modality_ids: torch.Tensor | None = None
    coordinate_noise: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(
    custom_intro="""
    MoleBLEND pretraining, blend then predict: each pair of atoms shows one of its three relations, drawn at random; all
    three, and the noise on the coordinates, are predicted back. The targets are the inputs, so there are no labels.
    """
)
class MoleBlendForPreTraining(MoleBlendPreTrainedModel):
    def __init__(self, config: MoleBlendConfig):
        super().__init__(config)
        type_classes, stereo_classes, conjugation_classes = config.bond_class_sizes
        num_bond_classes = type_classes * stereo_classes * conjugation_classes
        self.moleblend = MoleBlendModel(config)
        self.shortest_path_head = MoleBlendOuterProductPairHead(config, config.num_shortest_path_classes)
        self.bond_path_head = MoleBlendOuterProductPairHead(config, config.max_path_bonds * num_bond_classes)
        self.relative_position_head = MoleBlendRelativePositionHead(config)
        self.coordinate_denoising_head = MoleBlendCoordinateDenoisingHead(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(
        custom_args=MODEL_INPUTS_DOCSTRING
        + r"""
    pair_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms, num_atoms)`, *optional*):
        The one relation that a pair shows: 0 shortest path, 1 bond path, 2 distance. Left out, it is drawn.
    atom_modality_ids (`torch.LongTensor` of shape `(batch_size, num_atoms)`, *optional*):
        The one feature that an atom shows: 0 degree, 1 distance feature. Left out, it is drawn.
    coordinate_noise (`torch.FloatTensor` of shape `(batch_size, num_atoms, 3)`, *optional*):
        Noise in angstrom. Left out, it is drawn with standard deviation `config.noise_std`.
    num_targets (`torch.Tensor` of shape `(4,)`, *optional*):
        What the four losses are means over, where this is a part of a larger batch. Left out, what this batch has.
    generator (`torch.Generator`, *optional*):
        Source of the draws, on the device of the inputs. Left out, torch's default generator.
    return_loss (`bool`, *optional*, defaults to `True`):
        Whether the output has `loss`, the sum. By this argument the Trainer knows that the loss needs no labels.
"""
    )
    def forward(
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        degree: torch.Tensor | None = None,
        shortest_path_distance: torch.Tensor | None = None,
        path_bond_types: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        coordinates_mask: torch.Tensor | None = None,
        pair_modality_ids: torch.Tensor | None = None,
        atom_modality_ids: torch.Tensor | None = None,
        coordinate_noise: torch.Tensor | None = None,
        num_targets: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoleBlendForPreTrainingOutput:
        (batch_size, num_atoms), device = atom_features.shape[:2], atom_features.device
        config, gather = self.config, gathers(atom_features)
        atom_mask = (atom_features[..., 0] > 0) if attention_mask is None else attention_mask.bool()
        pair_mask = atom_mask.unsqueeze(2) & atom_mask.unsqueeze(1)
        has_coordinates = molecules_with_coordinates(atom_features, coordinates, coordinates_mask)

        # Draw what is shown, and the noise.
        available = available_modalities(atom_mask, has_coordinates, degree, shortest_path_distance, path_bond_types)
        if pair_modality_ids is None:
            rows = batch_size if config.blend_per_molecule else 1  # CODEPATH: the original shares one draw
            draws = draw(torch.rand, (rows, num_atoms, num_atoms), device, generator)
            pair_modality_ids = pair_modalities(available[0], config.blend_probabilities, draws)
        if atom_modality_ids is None:
            draws = draw(torch.rand, (batch_size, num_atoms), device, generator)
            atom_modality_ids = atom_modalities(available[1], config.atom_blend_probabilities, draws)
        noisy_coordinates = None
        if coordinates is not None:
            coordinates = coordinates.float().masked_fill(~has_coordinates[:, None, None], 0)
            if coordinate_noise is None:
                coordinate_noise = draw(torch.randn, coordinates.shape, device, generator) * config.noise_std
            noisy_coordinates = coordinates + coordinate_noise

        outputs = self.moleblend(
            atom_features,
            attention_mask=attention_mask,
            degree=degree,
            shortest_path_distance=shortest_path_distance,
            path_bond_types=path_bond_types,
            coordinates=noisy_coordinates,
            coordinates_mask=coordinates_mask,
            pair_modality_ids=pair_modality_ids,
            atom_modality_ids=atom_modality_ids,
            output_attention_bias=True,
            return_dict=True,
            **kwargs,
        )

        # Predict all relations back, and the noise. Vectors are at [i, j]: from atom i to atom j.
        atom_states = outputs.last_hidden_state[:, 1:]
        shortest_path_logits = self.shortest_path_head(atom_states)
        bond_path_logits = self.bond_path_head(atom_states).unflatten(-1, (self.config.max_path_bonds, -1))
        predicted_relative_positions = self.relative_position_head(atom_states)
        if coordinates is None or noisy_coordinates is None:
            relative_positions = relative_directions = atom_states.new_zeros(batch_size, num_atoms, num_atoms, 3)
        else:
            relative_positions = coordinates.unsqueeze(1) - coordinates.unsqueeze(2)
            noisy_positions = noisy_coordinates.unsqueeze(1) - noisy_coordinates.unsqueeze(2)
            noisy_distances = torch.linalg.vector_norm(noisy_positions, dim=-1, keepdim=True)
            relative_directions = noisy_positions / (noisy_distances + DIRECTION_EPS)
            relative_directions = relative_directions.masked_fill(~has_coordinates[:, None, None, None], 0)
        predicted_coordinate_noise = self.coordinate_denoising_head(
            atom_states, outputs.attention_bias[:, :, 1:, 1:], relative_directions, RowSelection(atom_mask, gather)
        )

        # Losses: all pairs, hidden or shown. Each is a mean over what has a target, and 0 where nothing has.
        path_labels = torch.full_like(pair_modality_ids, IGNORED_LABEL)
        bond_labels = path_labels.unsqueeze(-1).expand(bond_path_logits.shape[:-1])
        num_unclassified_bonds = torch.zeros((), dtype=torch.long, device=device)
        if shortest_path_distance is not None:
            num_classes, unreachable = shortest_path_logits.shape[-1], self.config.num_shortest_path_distances - 2
            path_labels = shortest_path_labels(shortest_path_distance, pair_mask, num_classes, unreachable)
        if path_bond_types is not None:
            bond_labels, num_unclassified_bonds = bond_path_labels(
                path_bond_types, pair_mask, self.config.bond_vocabulary_sizes, self.config.bond_class_sizes
            )
        distances = torch.linalg.vector_norm(relative_positions, dim=-1)
        has_target = pair_mask & has_coordinates[:, None, None] & (distances > 0)
        # CODEPATH: as in the head, "direction" is the paper's checkpoints and "distance" an ablation.
        if self.config.relative_position_target == "direction":
            pair_losses = 1 - F.cosine_similarity(predicted_relative_positions.float(), relative_positions, dim=-1)
        else:
            predicted_distances = predicted_relative_positions.float().squeeze(-1)
            pair_losses = F.smooth_l1_loss(predicted_distances, distances, reduction="none")
        molecule_losses = masked_mean(pair_losses, has_target, dim=(1, 2))
        noise = torch.zeros_like(predicted_coordinate_noise) if coordinate_noise is None else coordinate_noise
        atom_losses = 1 - F.cosine_similarity(predicted_coordinate_noise.float(), noise.float(), dim=-1)
        shows_distance = atom_mask & has_coordinates.unsqueeze(1) & (atom_modality_ids == ATOM_DISTANCE)
        terms = (
            cross_entropy_sum(shortest_path_logits, path_labels, gather),
            cross_entropy_sum(bond_path_logits, bond_labels, gather),
            masked_sum(molecule_losses, has_target.any(-1).any(-1)),
            masked_sum(atom_losses, shows_distance),
        )
        totals, counts = (torch.stack(values) for values in zip(*terms, strict=True))
        losses = totals / (counts if num_targets is None else num_targets).clamp(min=1)
        return MoleBlendForPreTrainingOutput(
            loss=(losses * constant(self.config.loss_weights, losses)).sum() if return_loss else None,
            shortest_path_loss=losses[0],
            bond_path_loss=losses[1],
            relative_position_loss=losses[2],
            coordinate_denoising_loss=losses[3],
            num_targets=counts,
            shortest_path_logits=shortest_path_logits,
            bond_path_logits=bond_path_logits,
            predicted_relative_positions=predicted_relative_positions,
            predicted_coordinate_noise=predicted_coordinate_noise,
            shortest_path_labels=path_labels,
            bond_path_labels=bond_labels,
            num_unclassified_bonds=num_unclassified_bonds,
            pair_modality_ids=pair_modality_ids,
            atom_modality_ids=atom_modality_ids,
            coordinate_noise=coordinate_noise,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="What the models of properties share: the encoder, the head, and which states the head reads."
)
class MoleBlendPropertyModel(MoleBlendPreTrainedModel):
    def __init__(self, config: MoleBlendConfig):
        super().__init__(config)
        self.moleblend = MoleBlendModel(config)
        # CODEPATH: without, the original's fine-tuned checkpoints, whose head reads the last layer.
        self.layer_sum = MoleBlendWeightedLayerSum(config) if config.use_weighted_layer_sum else None
        self.classifier = MoleBlendPropertyHead(config)
        self.post_init()

    def encode(self, atom_features: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, MoleBlendModelOutput]:
        """The states that the head reads, `(B, L, D)`, and the encoder's output."""
        if self.layer_sum is None:
            outputs = self.moleblend(atom_features, return_dict=True, **kwargs)
            return outputs.last_hidden_state, outputs
        asked_for = kwargs.pop("output_hidden_states", None)
        outputs = self.moleblend(atom_features, output_hidden_states=True, return_dict=True, **kwargs)
        states = self.layer_sum(outputs.hidden_states)
        if not (self.config.output_hidden_states if asked_for is None else asked_for):
            outputs.hidden_states = None
        return states, outputs


@auto_docstring(
    custom_intro="""
    MoleBLEND for molecular property prediction: regression with one or several targets, binary classification with one
    or several tasks (`problem_type="multi_label_classification"`), or classes. Missing labels are NaN, or -100 where labels are
    integers.
    """
)
class MoleBlendForSequenceClassification(MoleBlendPropertyModel):
    @can_return_tuple
    @auto_docstring(
        custom_args=MODEL_INPUTS_DOCSTRING
        + r"""
    labels (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
        Targets in their own units, or 0 / 1; for classes `(batch_size,)`. Missing ones are NaN, or -100 where labels are
        integers.
        `label_weights`, a tensor of the same shape, weighs each label in the loss.
"""
    )
    def forward(
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        degree: torch.Tensor | None = None,
        shortest_path_distance: torch.Tensor | None = None,
        path_bond_types: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        coordinates_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[PropertyKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        `logits` are in the targets' own units for regression (`config.target_means`, `target_scales`, `target_transforms`).

        Example:

        ```python
        >>> from moleblend_hf import MoleBlendConfig, MoleBlendForSequenceClassification, MoleBlendProcessor

        >>> config = MoleBlendConfig(num_labels=2, problem_type="regression")
        >>> processor, model = MoleBlendProcessor(), MoleBlendForSequenceClassification(config)
        >>> inputs = processor(["CCO", "c1ccccc1"], labels=[[0.1, float("nan")], [1.3, 2.0]], return_tensors="pt")
        >>> model(**inputs).loss.backward()
        ```
        """
        label_weights = kwargs.pop("label_weights", None)
        states, outputs = self.encode(
            atom_features,
            attention_mask=attention_mask,
            degree=degree,
            shortest_path_distance=shortest_path_distance,
            path_bond_types=path_bond_types,
            coordinates=coordinates,
            coordinates_mask=coordinates_mask,
            **kwargs,
        )
        # CODEPATH: "graph_token" is the original's fine-tuned checkpoints; its code offers the others, where the head
        # reads each atom and its outputs are pooled.
        if self.config.readout == "graph_token":
            logits = self.classifier(states[:, 0])
        else:
            atom_mask = (atom_features[..., 0] > 0) if attention_mask is None else attention_mask.bool()
            logits = self.classifier(states[:, 1:]).masked_fill(~atom_mask.unsqueeze(-1), 0).sum(1)
            # CODEPATH: "mean" divides by the atoms, not by the padded length as the original does; "sum" does not.
            if self.config.readout == "mean":
                logits = logits / atom_mask.sum(1, keepdim=True).clamp(min=1)
        loss = None if labels is None else property_loss(logits, labels, self.config, label_weights)
        return SequenceClassifierOutput(
            loss=loss,
            logits=in_target_units(logits, self.config),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    MoleBLEND for the properties of atoms, charges or NMR shifts, say: regression, binary tasks or classes as in
    [`MoleBlendForSequenceClassification`], for each atom. Missing labels, and those of padding, are NaN, or -100 where
    labels are integers. The Trainer joins batches of different sizes with -100, labels and predictions alike: its
    `compute_metrics` has to leave out both NaN and -100.
    """
)
class MoleBlendForTokenClassification(MoleBlendPropertyModel):
    @can_return_tuple
    @auto_docstring(
        custom_args=MODEL_INPUTS_DOCSTRING
        + r"""
    labels (`torch.Tensor` of shape `(batch_size, num_atoms, num_labels)`, *optional*):
        Targets of each atom in their own units, or 0 / 1; `(batch_size, num_atoms)` for classes, and will do for one target.
        Missing ones and those of padding are NaN, or -100 where labels are integers.
        `label_weights`, a tensor of the same shape, weighs each label in the loss.
"""
    )
    def forward(
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        degree: torch.Tensor | None = None,
        shortest_path_distance: torch.Tensor | None = None,
        path_bond_types: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        coordinates_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[PropertyKwargs],
    ) -> TokenClassifierOutput:
        r"""
        `logits (batch_size, num_atoms, num_labels)` are in the order of the atoms given, in the targets' own units for
        regression. Those of padding mean nothing.

        Example:

        ```python
        >>> from moleblend_hf import MoleBlendConfig, MoleBlendForTokenClassification, MoleBlendProcessor

        >>> config = MoleBlendConfig(num_labels=1, problem_type="regression")
        >>> processor, model = MoleBlendProcessor(), MoleBlendForTokenClassification(config)
        >>> model(**processor(["CCO", "c1ccccc1"], return_tensors="pt")).logits.shape
        torch.Size([2, 6, 1])
        ```
        """
        label_weights = kwargs.pop("label_weights", None)
        states, outputs = self.encode(
            atom_features,
            attention_mask=attention_mask,
            degree=degree,
            shortest_path_distance=shortest_path_distance,
            path_bond_types=path_bond_types,
            coordinates=coordinates,
            coordinates_mask=coordinates_mask,
            **kwargs,
        )
        logits = self.classifier(states[:, 1:])
        loss = None if labels is None else property_loss(logits, labels, self.config, label_weights)
        return TokenClassifierOutput(
            loss=loss,
            logits=in_target_units(logits, self.config),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "MoleBlendForPreTraining",
    "MoleBlendForPreTrainingOutput",
    "MoleBlendForSequenceClassification",
    "MoleBlendForTokenClassification",
    "MoleBlendModel",
    "MoleBlendModelOutput",
    "MoleBlendPreTrainedModel",
]
