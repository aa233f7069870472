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


def constant(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`like.new_tensor(values, dtype=dtype)`, which would wait until the device has done all that it was asked for."""
    return torch.tensor(values, dtype=dtype or like.dtype, device="cpu").to(like.device, non_blocking=True)


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


def molecules_with_coordinates(
    atom_features: torch.Tensor, coordinates: torch.Tensor | None, coordinates_mask: torch.Tensor | None
) -> torch.Tensor:
    """Which molecules of a batch have a geometry, `(batch_size,)` bool."""
    if coordinates is not None and coordinates_mask is not None:
        return coordinates_mask.bool()
    return atom_features.new_full(atom_features.shape[:1], coordinates is not None, dtype=torch.bool)


def available_modalities(
    atom_mask: torch.Tensor,
    has_coordinates: torch.Tensor,
    degree: torch.Tensor | None,
    shortest_path_distance: torch.Tensor | None,
    path_bond_types: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which relations the pairs of a molecule can show `(batch_size, 3)`, and which features its atoms `(batch_size, 2)`.

    An atom alone has no distance to show. (The original asks for its noise, which nothing tells: what is predicted is the bias of
    the head, at 0 to begin with, where the gradient of a cosine has no bound.)
    """
    everyone = torch.ones_like(has_coordinates)
    pairs = (
        everyone & (shortest_path_distance is not None),
        everyone & (path_bond_types is not None),
        has_coordinates,
    )
    atoms = (everyone & (degree is not None), has_coordinates & (atom_mask.sum(-1) > 1))
    return torch.stack(pairs, dim=-1), torch.stack(atoms, dim=-1)


def pair_modalities(available: torch.Tensor, probabilities: Sequence[float], draws: torch.Tensor) -> torch.Tensor:
    """The relation that each ordered pair of atoms shows.

    Args:
        available (`torch.BoolTensor` of shape `(batch_size, 3)`):
            Which relations a molecule has; the probabilities are renormalised over them.
        probabilities (`list[float]`): of the three relations.
        draws (`torch.FloatTensor` of shape `(batch_size or 1, N, N)`): uniform in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(batch_size, N, N)`
    """
    cumulative = (available * constant(probabilities, available, torch.float32)).cumsum(-1)
    # In [0, total): the first relation whose cumulative probability exceeds the draw.
    draws = draws * cumulative[:, -1, None, None]
    return (draws.unsqueeze(-1) >= cumulative[:, None, None, :]).sum(-1).clamp(max=PAIR_DISTANCE)


def atom_modalities(available: torch.Tensor, probabilities: Sequence[float], draws: torch.Tensor) -> torch.Tensor:
    """The feature that each atom shows, `(batch_size, N)` long; `draws` `(batch_size, N)`, else as `pair_modalities`."""
    weights = available * constant(probabilities, available, torch.float32)
    degree, distance = weights.unsqueeze(1).unbind(-1)  # (B, 1) each
    return ((draws * (degree + distance) >= degree) & (distance > 0)).long()


def shortest_path_labels(
    shortest_path_distance: torch.Tensor, pair_mask: torch.Tensor, num_classes: int, unreachable: int
) -> torch.Tensor:
    """Class of each pair: 0 is 1 bond, the last class `num_classes` bonds or more; an atom itself and what is unreachable
    have none. `(batch_size, N, N)` long."""
    has_label = pair_mask & (shortest_path_distance > 0) & (shortest_path_distance < unreachable)
    return (shortest_path_distance.long() - 1).clamp(max=num_classes - 1).masked_fill(~has_label, IGNORED_LABEL)


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
    index = path_bond_types.long() - 1
    bond_type = index // (stereo_size * conjugation_size)
    stereo = index // conjugation_size % stereo_size
    conjugated = index % conjugation_size
    has_class = (bond_type < type_classes) & (stereo < stereo_classes) & (conjugated < conjugation_classes)
    labels = (bond_type * stereo_classes + stereo) * conjugation_classes + conjugated
    return labels.masked_fill(~(exists & has_class), IGNORED_LABEL), (exists & ~has_class).sum()
