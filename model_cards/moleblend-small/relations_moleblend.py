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
"""The three relations of a pair of atoms as an attention bias: shortest path, bonds along it, distance."""
# B molecules, N padded atoms, L = N + 1 tokens (graph token first), H heads, P bonds on a path, K kernels.

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.activations import ACT2FN

from .configuration_moleblend import MoleBlendConfig
from .rows_moleblend import RowSelection

# PARITY: the original, like Transformer-M, writes pi as 3.14159 in `gaussian` (tests/test_parity.py).
GAUSSIAN_PI = 3.14159
# Added to each kernel's width.
GAUSSIAN_WIDTH_OFFSET = 0.01
# Logarithm of the smallest value of a kernel, 1e-26. Far from a narrow kernel values are denormal numbers, or become so when they
# are multiplied; a processor takes up to a hundred times longer for those.
GAUSSIAN_LOG_FLOOR = -60.0


class MoleBlendGaussianDistanceEmbedding(nn.Module):
    """Distance of a pair of atoms to K Gaussian kernels, after an affine map that depends on the two elements.

    `x = (mul_i + mul_j) * d + (bias_i + bias_j)`, then `exp(-((x - mean) / width)^2 / 2) / (width * sqrt(2 pi))` with
    `width = |std| + 0.01`, in fp32 (method of Graphormer-3D and Transformer-M; Yu et al. 2024).
    """

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        num_elements = config.atom_vocabulary_sizes[0] + 1  # row 0 is padding
        # Columns: factor and offset.
        self.first_atom_affine = nn.Embedding(num_elements, 2)
        self.second_atom_affine = nn.Embedding(num_elements, 2)
        self.means = nn.Parameter(torch.empty(config.num_distance_kernels))
        self.stds = nn.Parameter(torch.empty(config.num_distance_kernels))

    def forward(self, elements: torch.Tensor, distances: torch.Tensor, pairs: RowSelection) -> torch.Tensor:
        """`elements (B, N)` (first atom feature) and `distances (B, N, N)` in angstrom to `(rows, K)`."""
        with torch.autocast(distances.device.type, enabled=False):
            elements = elements.clamp(max=self.first_atom_affine.num_embeddings - 1)
            first = self.first_atom_affine(elements).float().unsqueeze(2)  # (B, N, 1, 2)
            second = self.second_atom_affine(elements).float().unsqueeze(1)  # (B, 1, N, 2)
            factor, offset = (first + second).unbind(-1)
            values = pairs.take(factor * distances + offset).unsqueeze(-1)
            widths = self.stds.float().abs() + GAUSSIAN_WIDTH_OFFSET
            # exp(log c - z^2 / 2) with z = x / width - mean / width: few passes over the (rows, K) values.
            scores = torch.addcmul(-self.means.float() / widths, values, 1 / widths)
            log_scale = -torch.log(widths * (2 * GAUSSIAN_PI) ** 0.5)
            return torch.addcmul(log_scale, scores, scores, value=-0.5).clamp(min=GAUSSIAN_LOG_FLOOR).exp()


class MoleBlendAttentionBias(nn.Module):
    """The three pair relations as one learned attention bias a head, shared by all layers."""

    def __init__(self, config: MoleBlendConfig):
        super().__init__()
        num_heads, num_kernels = config.num_attention_heads, config.num_distance_kernels
        self.num_heads = num_heads
        self.bond_vocabulary_sizes = tuple(config.bond_vocabulary_sizes)
        self.shortest_path_embedding = nn.Embedding(config.num_shortest_path_distances, num_heads, padding_idx=0)
        self.bond_embedding = nn.Embedding(sum(config.bond_vocabulary_sizes), num_heads)
        self.bond_path_weight = nn.Parameter(torch.empty(config.max_path_bonds, num_heads, num_heads))
        self.distance_dense = nn.Linear(num_kernels, num_kernels)
        self.distance_proj = nn.Linear(num_kernels, num_heads)
        self.distance_act = ACT2FN["gelu"]
        self.graph_token_bias = nn.Parameter(torch.empty(num_heads))

    def shortest_path_bias(self, shortest_path_distance: torch.Tensor) -> torch.Tensor:
        """`(rows,)` in bonds to `(rows, H)`."""
        index = (shortest_path_distance + 1).clamp(max=len(self.shortest_path_embedding.weight) - 1)
        return self.shortest_path_embedding(index).float()

    def bond_path_bias(self, path_bond_types: torch.Tensor) -> torch.Tensor:
        """`(rows, P)` joint bond types to `(rows, H)`: the mean over the path of `bond embedding @ weight of its hop`.

        A bond has one of few joint types, so the product is folded into a table of every type at every hop first; a bond's
        embedding is the mean of its three features'. Type 0 (no such hop) has a row of zeros that is not trained.
        """
        bond_type, stereo, conjugated = self.bond_embedding.weight.float().split(self.bond_vocabulary_sizes)
        joint = (bond_type[:, None, None] + stereo[None, :, None] + conjugated[None, None, :]).flatten(0, 2) / 3
        with torch.autocast(joint.device.type, enabled=False):
            table = F.pad(joint @ self.bond_path_weight.float(), (0, 0, 1, 0))  # (P, joint types + 1, H)
        num_hops, num_types, _ = table.shape
        index = path_bond_types + num_types * torch.arange(num_hops, device=path_bond_types.device)
        sums = F.embedding_bag(index, table.flatten(0, 1), mode="sum")
        return sums / (path_bond_types > 0).sum(-1, keepdim=True).clamp(min=1)

    def distance_bias(self, distance_embeddings: torch.Tensor) -> torch.Tensor:
        """`(rows, K)` to `(rows, H)`."""
        return self.distance_proj(self.distance_act(self.distance_dense(distance_embeddings))).float()

    def forward(self, pair_bias: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """`pair_bias (B, N, N, H)` and `token_mask (B, L)` to `(B, H, L, L)`, `-inf` in the columns of padding."""
        bias = F.pad(pair_bias.permute(0, 3, 1, 2), (1, 0, 1, 0))
        on_graph_token = torch.zeros(bias.shape[-2:], dtype=torch.bool, device=bias.device)
        on_graph_token[0] = True
        on_graph_token[:, 0] = True
        bias = bias + self.graph_token_bias.float()[:, None, None] * on_graph_token
        return bias.masked_fill(~token_mask[:, None, None, :], float("-inf"))
