"""MoleBLEND's pretraining step written plainly, as the yardstick of `training_step.py`.

The same function on the same parameters as `MoleBlendForPreTraining`, without its algebra: every pair of every padded
molecule is computed, all three relations before one is chosen, bond embeddings are gathered and multiplied hop by hop, a
pair's Gaussians are gathered by its two elements, outer products and vector-valued attention are built. Equality is tested in
`tests/test_plain_model.py`.
"""

import torch
import torch.nn.functional as F

from moleblend_hf.blending_moleblend import (
    ATOM_DEGREE,
    IGNORED_LABEL,
    PAIR_BOND_PATH,
    PAIR_DISTANCE,
    PAIR_SHORTEST_PATH,
    bond_path_labels,
    shortest_path_labels,
)
from moleblend_hf.heads_moleblend import MoleBlendPairProjection
from moleblend_hf.modeling_moleblend import DIRECTION_EPS, MoleBlendForPreTraining, MoleBlendLayer
from moleblend_hf.relations_moleblend import GAUSSIAN_PI, GAUSSIAN_WIDTH_OFFSET


def _split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class PlainMoleBlendForPreTraining(MoleBlendForPreTraining):
    """`MoleBlendForPreTraining` with a plain forward for 2D + 3D batches whose draws are given; returns the loss."""

    def forward(  # type: ignore[override]
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor,
        degree: torch.Tensor,
        shortest_path_distance: torch.Tensor,
        path_bond_types: torch.Tensor,
        coordinates: torch.Tensor,
        coordinates_mask: torch.Tensor,
        pair_modality_ids: torch.Tensor,
        atom_modality_ids: torch.Tensor,
        coordinate_noise: torch.Tensor,
    ) -> torch.Tensor:
        """Arguments as in `MoleBlendForPreTraining.forward`; returns the weighted loss."""
        atom_mask = attention_mask.bool()
        pair_mask = atom_mask[:, None, :] & atom_mask[:, :, None]
        positions = coordinates + coordinate_noise
        differences = positions.unsqueeze(1) - positions.unsqueeze(2)  # (B, N, N, 3)
        distances = differences.norm(dim=-1)
        directions = differences / (distances.unsqueeze(-1) + DIRECTION_EPS)

        gaussians = self._gaussians(atom_features[..., 0], distances)  # (B, N, N, K)
        attention_bias = self._attention_bias(
            shortest_path_distance, path_bond_types, gaussians, pair_modality_ids, atom_mask
        )
        states = self._embeddings(atom_features, degree, gaussians, atom_modality_ids, pair_mask)
        for layer in self.moleblend.layers:
            if self.moleblend.gradient_checkpointing and self.training:
                states = torch.utils.checkpoint.checkpoint(
                    self._layer, layer, states, attention_bias, use_reentrant=False
                )
            else:
                states = self._layer(layer, states, attention_bias)
        atom_states = states[:, 1:]

        # Heads and losses.
        spd_head, bond_head, position_head = self.shortest_path_head, self.bond_path_head, self.relative_position_head
        spd_logits = spd_head.out_proj(self._outer_products(spd_head.projection, atom_states))
        bond_logits = bond_head.out_proj(self._outer_products(bond_head.projection, atom_states))
        hidden = position_head.dense(self._outer_products(position_head.projection, atom_states))
        relative_positions = position_head.out_proj(hidden)
        predicted_noise = self._denoise(atom_states, attention_bias[:, :, 1:, 1:], directions)

        spd_labels = shortest_path_labels(
            shortest_path_distance, pair_mask, spd_logits.shape[-1], self.config.num_shortest_path_distances - 2
        )
        spd_loss = F.cross_entropy(spd_logits.float().flatten(0, 2), spd_labels.flatten(), ignore_index=IGNORED_LABEL)
        bond_labels, _ = bond_path_labels(
            path_bond_types, pair_mask, self.config.bond_vocabulary_sizes, self.config.bond_class_sizes
        )
        bond_logits = bond_logits.float().unflatten(-1, (self.config.max_path_bonds, -1))
        bond_loss = F.cross_entropy(bond_logits.flatten(0, 3), bond_labels.flatten(), ignore_index=IGNORED_LABEL)
        clean_differences = coordinates.unsqueeze(1) - coordinates.unsqueeze(2)
        has_target = pair_mask & (clean_differences.norm(dim=-1) > 0)
        pair_losses = 1 - F.cosine_similarity(relative_positions.float(), clean_differences, dim=-1)
        molecule_losses = (pair_losses * has_target).sum((1, 2)) / has_target.sum((1, 2)).clamp(min=1)
        position_loss = molecule_losses.sum() / has_target.any(-1).any(-1).sum().clamp(min=1)
        atom_losses = 1 - F.cosine_similarity(predicted_noise.float(), coordinate_noise, dim=-1)
        denoised = atom_mask & (atom_modality_ids != ATOM_DEGREE)
        denoising_loss = (atom_losses * denoised).sum() / denoised.sum().clamp(min=1)
        losses = (spd_loss, bond_loss, position_loss, denoising_loss)
        return sum(weight * loss for weight, loss in zip(self.config.loss_weights, losses, strict=True))

    def _gaussians(self, elements: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        module = self.moleblend.distance_embedding
        num_atoms = elements.shape[1]
        first = elements.unsqueeze(2).expand(-1, -1, num_atoms)
        second = elements.unsqueeze(1).expand(-1, num_atoms, -1)
        affine = module.first_atom_affine(first) + module.second_atom_affine(second)  # gathered for each pair
        factor, offset = affine.unbind(-1)
        values = (factor * distances + offset).unsqueeze(-1).expand(*distances.shape, module.means.shape[0])
        widths = module.stds.abs() + GAUSSIAN_WIDTH_OFFSET
        normalizer = (2 * GAUSSIAN_PI) ** 0.5 * widths
        return torch.exp(-0.5 * ((values - module.means) / widths) ** 2) / normalizer

    def _attention_bias(self, shortest_path_distance, path_bond_types, gaussians, pair_modality_ids, atom_mask):  # type: ignore[no-untyped-def]
        module = self.moleblend.attention_bias
        spd_bias = module.shortest_path_embedding(shortest_path_distance + 1)  # (B, N, N, H)
        # Three table rows a hop, their mean, one matrix a hop.
        _, stereo_size, conjugation_size = self.config.bond_vocabulary_sizes
        index = (path_bond_types - 1).clamp(min=0)
        features = torch.stack(
            [
                index // (stereo_size * conjugation_size),
                index // conjugation_size % stereo_size + self.config.bond_vocabulary_sizes[0],
                index % conjugation_size + sum(self.config.bond_vocabulary_sizes[:2]),
            ],
            dim=-1,
        )  # (B, N, N, P, 3)
        bonds = module.bond_embedding(features).mean(-2) * (path_bond_types > 0).unsqueeze(-1)  # (B, N, N, P, H)
        num_hops, num_heads = bonds.shape[-2:]
        by_hop = bonds.permute(3, 0, 1, 2, 4).reshape(num_hops, -1, num_heads)
        bond_sums = torch.bmm(by_hop, module.bond_path_weight).reshape(num_hops, *bonds.shape[:3], num_heads).sum(0)
        hops = shortest_path_distance.clamp(1, num_hops)
        bond_bias = bond_sums / hops.unsqueeze(-1)
        distance_bias = module.distance_proj(F.gelu(module.distance_dense(gaussians)))
        shown = pair_modality_ids.unsqueeze(-1)
        bias = (
            spd_bias * (shown == PAIR_SHORTEST_PATH)
            + bond_bias * (shown == PAIR_BOND_PATH)
            + distance_bias * (shown == PAIR_DISTANCE)
        )
        batch_size, num_atoms = atom_mask.shape
        total = bias.new_zeros(batch_size, num_heads, num_atoms + 1, num_atoms + 1)
        total[:, :, 1:, 1:] = bias.permute(0, 3, 1, 2)
        token_bias = module.graph_token_bias.view(1, -1, 1)
        total[:, :, 1:, 0] = total[:, :, 1:, 0] + token_bias
        total[:, :, 0, :] = total[:, :, 0, :] + token_bias
        return total.masked_fill(~F.pad(atom_mask, (1, 0), value=True)[:, None, None, :], float("-inf"))

    def _embeddings(self, atom_features, degree, gaussians, atom_modality_ids, pair_mask):  # type: ignore[no-untyped-def]
        model = self.moleblend
        offsets = atom_features.new_tensor(model.embeddings.atom_offsets)
        index = torch.where(atom_features > 0, atom_features + offsets, 0)
        table = model.embeddings.atom_embedding.weight
        atoms = F.embedding(index, table, padding_idx=0).sum(-2)  # (B, N, 9, D) gathered
        degrees = model.embeddings.degree_embedding(degree)
        sums = gaussians.masked_fill(~pair_mask.unsqueeze(-1), 0).sum(2)
        distances = self.config.distance_feature_scale * model.atom_distance_proj(sums)
        shown = (atom_modality_ids == ATOM_DEGREE).unsqueeze(-1)
        atoms = atoms + degrees * shown + distances * ~shown
        tokens = torch.cat([model.graph_token.expand(atoms.shape[0], 1, -1), atoms], dim=1)
        return model.embedding_norm(tokens)

    def _layer(self, layer: MoleBlendLayer, states: torch.Tensor, attention_bias: torch.Tensor) -> torch.Tensor:
        attention, num_heads = layer.attention, layer.attention.num_heads
        weights, biases = attention.qkv_proj.weight.chunk(3), attention.qkv_proj.bias.chunk(3)
        query, key, value = (
            _split_heads(F.linear(states, weight, bias), num_heads)
            for weight, bias in zip(weights, biases, strict=True)
        )
        scores = (query * attention.scaling) @ key.transpose(-1, -2) + attention_bias
        probabilities = F.softmax(scores.float(), dim=-1).to(query.dtype)
        probabilities = F.dropout(probabilities, attention.attention_dropout, self.training)
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        states = layer.attention_norm(states + self._drop_path(attention.out_proj(context), layer.drop_path_rate))
        return layer.mlp_norm(states + self._drop_path(layer.mlp(states), layer.drop_path_rate))

    def _drop_path(self, branch: torch.Tensor, rate: float) -> torch.Tensor:
        if not self.training or rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
        return branch * kept / (1 - rate)

    def _outer_products(self, projection: MoleBlendPairProjection, atom_states: torch.Tensor) -> torch.Tensor:
        first, second = projection(atom_states)
        return (first[:, :, None, :, None] * second[:, None, :, None, :]).flatten(3)  # (B, N, N, p * p)

    def _denoise(
        self, atom_states: torch.Tensor, attention_bias: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        head = self.coordinate_denoising_head
        query, key, value = (
            _split_heads(proj(atom_states), head.num_heads)
            for proj in (head.query_proj, head.key_proj, head.value_proj)
        )
        scores = (query * head.scaling) @ key.transpose(-1, -2) + attention_bias
        probabilities = F.softmax(scores.float(), dim=-1).to(query.dtype)
        probabilities = F.dropout(probabilities, head.attention_dropout, self.training)
        rotated = probabilities.unsqueeze(-1) * directions.unsqueeze(1).to(query.dtype)  # (B, H, N, N, 3)
        vectors = rotated.permute(0, 1, 4, 2, 3) @ value.unsqueeze(2)  # (B, H, 3, N, D / H)
        vectors = vectors.permute(0, 3, 2, 1, 4).flatten(3)  # (B, N, 3, D)
        weight = head.out_proj.weight
        return (
            torch.stack([F.linear(vectors[:, :, axis], weight[axis]) for axis in range(3)], dim=-1)
            + head.out_proj.bias
        )
