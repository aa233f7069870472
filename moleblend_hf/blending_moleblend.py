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
"""What MoleBLEND's pretraining shows and what it predicts back: the draws of blending and the labels (Yu et al. 2024)."""

from collections.abc import Callable, Sequence

import torch

# Values of `pair_modality_ids`: the relation that a pair of atoms shows.
PAIR_SHORTEST_PATH, PAIR_BOND_PATH, PAIR_DISTANCE = 0, 1, 2
# Values of `atom_modality_ids`: the feature that an atom shows.
ATOM_DEGREE, ATOM_DISTANCE = 0, 1
# Value of a label that is no target.
IGNORED_LABEL = -100


def draw(
    sampler: Callable[..., torch.Tensor],
    shape: Sequence[int],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """`sampler(shape)`, `torch.rand` or `torch.randn`, from a generator if there is one.

    `generator=None` cannot be spelled out: torch.compile with dynamic shapes fails on it.
    """
    return sampler(shape, device=device, **({} if generator is None else {"generator": generator}))


def draw_pair_modalities(
    available: torch.Tensor,
    num_atoms: int,
    probabilities: Sequence[float],
    per_molecule: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws the relation that each ordered pair of atoms shows.

    Args:
        available (`torch.BoolTensor` of shape `(batch_size, 3)`):
            Which relations a molecule has; the probabilities are renormalised over them.
        num_atoms (`int`): padded number of atoms, N.
        probabilities (`list[float]`): of the three relations.
        per_molecule (`bool`): whether each molecule has its own draw, or one is shared by the batch.
        generator (`torch.Generator`, *optional*): source of the draw, on the device of `available`.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N, N)`
    """
    cumulative = (available * available.new_tensor(probabilities, dtype=torch.float32)).cumsum(-1)
    num_draws = available.shape[0] if per_molecule else 1
    draws = draw(torch.rand, (num_draws, num_atoms, num_atoms), available.device, generator)
    # In [0, total): the first relation whose cumulative probability exceeds the draw.
    draws = draws * cumulative[:, -1, None, None]
    return (draws.unsqueeze(-1) >= cumulative[:, None, None, :]).sum(-1).clamp(max=PAIR_DISTANCE)


def draw_atom_modalities(
    available: torch.Tensor,
    num_atoms: int,
    probabilities: Sequence[float],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws the feature that each atom shows, `(batch_size, N)` long; arguments as in `draw_pair_modalities`."""
    weights = available * available.new_tensor(probabilities, dtype=torch.float32)
    degree, distance = weights.unsqueeze(1).unbind(-1)  # (B, 1) each
    draws = draw(torch.rand, (available.shape[0], num_atoms), available.device, generator)
    return (draws * (degree + distance) >= degree).long()


def shortest_path_labels(
    shortest_path_distance: torch.Tensor, pair_mask: torch.Tensor, num_classes: int, unreachable: int
) -> torch.Tensor:
    """Class of each pair: 0 is 1 bond, the last class `num_classes` bonds or more; an atom itself and what is unreachable
    have none. `(batch_size, N, N)` long."""
    has_label = pair_mask & (shortest_path_distance > 0) & (shortest_path_distance < unreachable)
    return (shortest_path_distance - 1).clamp(max=num_classes - 1).masked_fill(~has_label, IGNORED_LABEL)


def bond_path_labels(
    path_bond_types: torch.Tensor,
    pair_mask: torch.Tensor,
    vocabulary_sizes: Sequence[int],
    class_sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class of each hop, and the number of hops whose bond lies outside the classes and has none.

    Not the input's joint index: with the released class sizes (4, 3, 2), `6 * type + 2 * stereo + conjugated`.

    Args:
        path_bond_types (`torch.LongTensor` of shape `(batch_size, N, N, P)`): 1 + joint index of a bond, 0 = no hop.
        pair_mask (`torch.BoolTensor` of shape `(batch_size, N, N)`): pairs of real atoms.
        vocabulary_sizes (`list[int]`): bond types, stereo values and conjugation values of the input.
        class_sizes (`list[int]`): those that are told apart.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N, N, P)` and a scalar `torch.LongTensor`
    """
    _, stereo_size, conjugation_size = vocabulary_sizes
    type_classes, stereo_classes, conjugation_classes = class_sizes
    exists = pair_mask.unsqueeze(-1) & (path_bond_types > 0)
    index = path_bond_types - 1
    bond_type = index // (stereo_size * conjugation_size)
    stereo = index // conjugation_size % stereo_size
    conjugated = index % conjugation_size
    has_class = (bond_type < type_classes) & (stereo < stereo_classes) & (conjugated < conjugation_classes)
    labels = (bond_type * stereo_classes + stereo) * conjugation_classes + conjugated
    return labels.masked_fill(~(exists & has_class), IGNORED_LABEL), (exists & ~has_class).sum()
