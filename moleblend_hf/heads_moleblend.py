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
"""Heads of MoleBLEND on the states of its atoms and of the graph token, and the layer norm they share with the encoder."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.activations import ACT2FN

from .configuration_moleblend import MoleBlendConfig
from .rows_moleblend import RowSelection, drop_values, widen

PAIR_NORM_EPS = 1e-12


class MoleBlendLayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the dtype of its input, which it returns."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(hidden_states.dtype)


def pair_products(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`Linear(outer(first_i, second_j))` without the outer products: `(B, N, p)` twice to `(B, N, N, C)`.

    The map is bilinear, so `first` is contracted with `weight (C, p * p)` before it meets `second`.
    """
    contracted = first @ weight.unflatten(1, (first.shape[-1], -1)).permute(1, 0, 2).flatten(1).to(first.dtype)
    contracted = contracted.unflatten(-1, (weight.shape[0], -1))  # (B, N, C, p)
    return torch.matmul(second.unsqueeze(1), contracted.transpose(-1, -2)) + bias.to(contracted.dtype)


class MoleBlendPairProjection(nn.Module):
    """The two projections of the atom states that a pair head multiplies."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.first_dense = nn.Linear(config.hidden_size, config.pair_head_size)
        self.first_norm = MoleBlendLayerNorm(config.pair_head_size, eps=PAIR_NORM_EPS)
        self.second_dense = nn.Linear(config.hidden_size, config.pair_head_size)
        self.second_norm = MoleBlendLayerNorm(config.pair_head_size, eps=PAIR_NORM_EPS)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, atom_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, N, D)` to two times `(B, N, p)`."""
        first = self.first_norm(self.act_fn(self.first_dense(atom_states)))
        second = self.second_norm(self.act_fn(self.second_dense(atom_states)))
        return first, second


class MoleBlendOuterProductPairHead(nn.Module):
    """Logits of each ordered pair of atoms from the outer product of two projections of their states."""

    def __init__(self, config: MoleBlendConfig, num_classes: int):
        super().__init__()
        self.projection = MoleBlendPairProjection(config)
        self.out_proj = nn.Linear(config.pair_head_size**2, num_classes)

    def forward(self, atom_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, N, N, num_classes)`."""
        first, second = self.projection(atom_states)
        return pair_products(first, second, self.out_proj.weight, self.out_proj.bias)


class MoleBlendRelativePositionHead(nn.Module):
    """Relative position of each ordered pair: two linear maps with nothing between, so their weights are multiplied first."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.projection = MoleBlendPairProjection(config)
        self.dense = nn.Linear(config.pair_head_size**2, config.relative_position_hidden_size)
        # CODEPATH: "direction" is the paper's and the original's checkpoints; "distance" is an ablation.
        num_outputs = 3 if config.relative_position_target == "direction" else 1
        self.out_proj = nn.Linear(config.relative_position_hidden_size, num_outputs)

    def forward(self, atom_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, N, N, 3)` (direction) or `(B, N, N, 1)` (distance in angstrom)."""
        weight = self.out_proj.weight @ self.dense.weight
        bias = self.out_proj(self.dense.bias)
        first, second = self.projection(atom_states)
        return pair_products(first, second, weight, bias)


class MoleBlendCoordinateDenoisingHead(nn.Module):
    """A vector for each atom: attention over the atoms whose probabilities weigh the directions to them.

    `out_c = w_c . concat_h(sum_j p_hij u_ijc v_hj) + b_c` with values `v = W_v x`; `w_c` and `W_v` are contracted first, so
    that the `(B, H, N, N, 3)` products are never built.
    """

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, 3)

    def forward(
        self,
        atom_states: torch.Tensor,
        attention_bias: torch.Tensor,
        relative_directions: torch.Tensor,
        atoms: RowSelection,
    ) -> torch.Tensor:
        """`(B, N, D)`, `(B, H, N, N)`, `(B, N, N, 3)` and the real atoms to `(B, N, 3)`."""
        states = atoms.take(atom_states)
        out_weight = self.out_proj.weight.unflatten(1, (self.num_heads, -1))  # (3, H, D / H)
        value_weight = self.value_proj.weight.unflatten(0, (self.num_heads, -1))  # (H, D / H, D)
        value_bias = self.value_proj.bias.unflatten(0, (self.num_heads, -1))  # (H, D / H)
        weight = torch.einsum("chd,hde->hce", out_weight, value_weight).flatten(0, 1)
        bias = torch.einsum("chd,hd->hc", out_weight, value_bias).flatten()
        # Padding asks as well, though nothing reads the answer: the reference outputs of released checkpoints hold it.
        projected = (
            self.query_proj(atom_states),
            atoms.put(self.key_proj(states)),
            atoms.put(F.linear(states, weight.to(states.dtype), bias.to(states.dtype))),
        )
        # (B, N, H, D / H) twice, and (B, N, H, 3)
        query, key, values = (widen(tensor).unflatten(-1, (self.num_heads, -1)) for tensor in projected)
        with torch.autocast(query.device.type, enabled=False):  # in the dtype of the query
            scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1)) * self.scaling + attention_bias
            # A molecule without atoms hides all from each of its rows: finite, or its gradient would be no number.
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
            probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            probabilities = drop_values(probabilities, self.attention_dropout, self.training)
            # sum over the heads, a matrix product for each j: (B, j, i, H) @ (B, j, H, 3)
            pair_vectors = torch.matmul(probabilities.permute(0, 3, 2, 1), values).transpose(1, 2)
        return (pair_vectors * relative_directions).sum(2) + self.out_proj.bias


class MoleBlendWeightedLayerSum(nn.Module):
    """Mean of the states of all layers with learned weights, a softmax that begins as the plain mean (as in ELMo and SUPERB)."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))

    def forward(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The embeddings and what each layer makes of them, `(B, L, D)` each, to `(B, L, D)`."""
        weights = F.softmax(self.layer_weights, dim=0, dtype=torch.float32).to(hidden_states[0].dtype)
        return torch.einsum("k,kbld->bld", weights, torch.stack(hidden_states))


class MoleBlendPropertyHead(nn.Module):
    """Two dense layers (the RoBERTa classification head without its layer norm)."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, len(config.id2label or ()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.act_fn(self.dense(self.dropout(hidden_states)))))
