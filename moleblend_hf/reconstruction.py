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
"""How well the bonds and the geometry of a molecule predict each other: scores of a pretrained model, one a molecule.

The model is shown one relation of all pairs and predicts the others back, as in pretraining, where a pair shows one of three
at random. A geometry that does not belong to its bonds, or bonds that do not belong to their geometry, are predicted badly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .blending_moleblend import ATOM_DEGREE, ATOM_DISTANCE, IGNORED_LABEL, PAIR_BOND_PATH, PAIR_DISTANCE
from .eval_mode_moleblend import eval_mode
from .modeling_moleblend import MoleBlendForPreTraining
from .molecules_moleblend import MoleculeError, describe_molecule
from .processing_moleblend import MoleBlendProcessor


@dataclass(frozen=True, eq=False)
class ReconstructionScores:
    """Losses of each molecule, `(num_molecules,)` float64: lower means better predicted, NaN that there is nothing to predict.

    They share no unit, and molecules differ in them more than the geometries of one molecule do: compare geometries of the
    same molecule, or a molecule with others of its kind.

    Attributes:
        shortest_path_loss: only distances shown; mean negative log-likelihood of the shortest-path class of a pair, in nats.
        bond_path_loss: only distances shown; mean negative log-likelihood of the bond class of a hop, in nats.
        graph_loss: both together, in nats a pair: `-log p(bonds | geometry) / number of pairs`, if classes are independent.
        relative_position_loss: only bonds shown; mean over pairs of `1 - cosine` of predicted and true direction, for the
            rotation of the molecule that suits the prediction best (0 to 1), as the frame of a geometry is arbitrary. With
            `relative_position_target="distance"`, smooth L1 of the distance in angstrom.
        coordinate_denoising_loss: only distances shown, of noisy coordinates; mean over atoms of `1 - cosine` of predicted and
            true noise. The one that depends on frame and atom order, as the noise does.
    """

    shortest_path_loss: np.ndarray
    bond_path_loss: np.ndarray
    graph_loss: np.ndarray
    relative_position_loss: np.ndarray
    coordinate_denoising_loss: np.ndarray


@torch.no_grad()
def reconstruction_scores(
    model: MoleBlendForPreTraining,
    processor: MoleBlendProcessor,
    molecules: Sequence[Any],
    coordinates: Sequence[Any] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> ReconstructionScores:
    """Returns how well shown geometry and bonds predict each other, computed in eval mode.

    Scores do not depend on the batch. Those without noise do not depend on atom order and orientation either.

    Args:
        model: with the heads of pretraining.
        processor: that of the checkpoint. What is scored is the geometry that was given, the first where there are several;
            none is generated.
        molecules: in any form that the processor takes; each with bonds and a geometry.
        coordinates: as the processor takes them, in angstrom.
        batch_size: molecules in a forward pass.
        seed: of the noise, which is the same for molecules of the same number of atoms.

    Raises:
        MoleculeError: if a molecule cannot be read or has no geometry.
    """
    if not hasattr(model, "shortest_path_head"):
        raise TypeError(
            f"Reconstruction is scored by the heads of pretraining, which {type(model).__name__} does not have. Load the "
            "checkpoint as MoleBlendForPreTraining."
        )
    graphs = processor.featurize_many(molecules, coordinates, modality="auto")
    for index, graph in enumerate(graphs):
        if len(graph.coordinates) == 0:
            raise MoleculeError(
                "has no geometry, so there is none to score",
                "coordinates",
                "Pass `coordinates`, or RDKit molecules with a 3D conformer",
                describe_molecule(molecules[index]),
                index,
            )
    by_size = sorted(range(len(graphs)), key=lambda index: graphs[index].num_atoms)
    scores = np.empty((5, len(graphs)))
    with eval_mode(model):
        for start in range(0, len(graphs), batch_size):
            indices = by_size[start : start + batch_size]  # molecules of like size share a batch
            batch = processor.pad([graphs[index] for index in indices], modality="auto").to(model.device)
            scores[:, indices] = torch.stack(_scores(model, batch, seed)).cpu().double().numpy()
    return ReconstructionScores(*scores)


def _scores(model: MoleBlendForPreTraining, batch: Any, seed: int) -> list[torch.Tensor]:
    """The fields of `ReconstructionScores` for a batch, `(B,)` each."""
    coordinates = batch["coordinates"]
    (batch_size, num_atoms), device = coordinates.shape[:2], coordinates.device
    atom_mask = batch["attention_mask"].bool()
    noise = torch.zeros(batch_size, num_atoms, 3)
    for row, size in enumerate(
        atom_mask.sum(1).tolist()
    ):  # from the start for each molecule: the batch does not matter
        noise[row, :size] = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(device) * model.config.noise_std

    def shown(pair_modality: int, atom_modality: int, coordinate_noise: torch.Tensor) -> Any:
        pair_modality_ids = torch.full((batch_size, num_atoms, num_atoms), pair_modality, device=device)
        atom_modality_ids = torch.full((batch_size, num_atoms), atom_modality, device=device)
        return model(
            **batch,
            pair_modality_ids=pair_modality_ids,
            atom_modality_ids=atom_modality_ids,
            coordinate_noise=coordinate_noise,
        )

    from_geometry = shown(PAIR_DISTANCE, ATOM_DISTANCE, torch.zeros_like(noise))
    from_bonds = shown(PAIR_BOND_PATH, ATOM_DEGREE, torch.zeros_like(noise))
    from_noisy = shown(PAIR_DISTANCE, ATOM_DISTANCE, noise)

    paths, num_paths = _cross_entropy(from_geometry.shortest_path_logits, from_geometry.shortest_path_labels)
    hops, num_hops = _cross_entropy(from_geometry.bond_path_logits, from_geometry.bond_path_labels)
    noise_losses = 1 - F.cosine_similarity(from_noisy.predicted_coordinate_noise.float(), noise, dim=-1)
    return [
        paths / num_paths,
        hops / num_hops,
        (paths + hops) / num_paths,
        _relative_position_loss(from_bonds.predicted_relative_positions.float(), coordinates, atom_mask),
        # An atom alone shows nothing of its noise.
        (noise_losses.masked_fill(~atom_mask, 0).sum(1) / atom_mask.sum(1)).masked_fill(
            atom_mask.sum(1) < 2, torch.nan
        ),
    ]


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of `logits (B, ..., C)`, summed over the labels of each molecule, and how many those are; `(B,)` twice."""
    losses = F.cross_entropy(logits.float().movedim(-1, 1), labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.flatten(1).sum(1), (labels != IGNORED_LABEL).flatten(1).sum(1)


def _relative_position_loss(
    predicted: torch.Tensor, coordinates: torch.Tensor, atom_mask: torch.Tensor
) -> torch.Tensor:
    """Mean over pairs of what `relative_position_target` compares, `(B,)`; directions after the best rotation."""
    positions = coordinates.unsqueeze(1) - coordinates.unsqueeze(2)  # (B, N, N, 3)
    distances = torch.linalg.vector_norm(positions, dim=-1)
    has_target = atom_mask.unsqueeze(2) & atom_mask.unsqueeze(1) & (distances > 0)
    num_targets = has_target.sum((1, 2))
    # CODEPATH: as in the model's loss, "direction" is the paper's checkpoints and "distance" an ablation.
    if predicted.shape[-1] == 1:
        losses = F.smooth_l1_loss(predicted.squeeze(-1), distances, reduction="none")
        return losses.masked_fill(~has_target, 0).sum((1, 2)) / num_targets
    # The largest sum of cosines over all rotations follows from the singular values of the covariance (Kabsch 1976).
    directions = F.normalize(positions, dim=-1).masked_fill(~has_target.unsqueeze(-1), 0)
    covariance = torch.einsum("bijc,bijd->bcd", F.normalize(predicted, dim=-1), directions)
    left, values, right = torch.linalg.svd(covariance)
    handedness = torch.sign(torch.linalg.det(left @ right))  # a reflection is no rotation
    cosines = values[:, 0] + values[:, 1] + handedness * values[:, 2]
    return 1 - cosines / num_targets
