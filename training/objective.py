"""What a step draws, and what its losses are means over: both independent of how its batch is cut into parts.

The draws of a molecule depend on the seed of the run, the epoch and the molecule alone. They come from a counter, hashed, not
from a generator that moves on: nothing is to be stored, replayed or kept in step between processes. A loss of a step is a
mean over all of its pairs, hops, molecules or atoms, so the parts divide by the numbers of the whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moleblend_hf import MoleBlendConfig
from moleblend_hf.blending_moleblend import (
    ATOM_DISTANCE,
    IGNORED_LABEL,
    atom_modalities,
    available_modalities,
    bond_path_labels,
    molecules_with_coordinates,
    pair_modalities,
    shortest_path_labels,
)

ATOMS_AT_MOST = 1 << 12  # numbers of atoms go into a counter of that base, whatever a batch is padded to
PAIRS, ATOMS, NOISE, CONFORMER = 1, 2, 3, 4  # what is drawn; each has numbers of its own
HELD_OUT_EPOCH = 1 << 62  # whose draws no epoch of training has


def _signed(value: int) -> int:
    """The int64 of the same bits as a number of 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN_RATIO = 0x9E3779B97F4A7C15
MIXERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def molecule_seeds(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """A seed (n,) int64 for each molecule, by its row in the dataset."""
    run = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    return (np.asarray(rows, np.uint64) * np.uint64(0xD1342543DE82EF95) ^ np.uint64(run)).view(np.int64)


def uniform(seeds: torch.Tensor, kind: int, counters: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) of float32: the splitmix64 of each molecule's seed (B,) at the counters (...).

    Vigna's splitmix64 (https://prng.di.unimi.it/splitmix64.c), in int64, which wraps around as the unsigned one does.

    Returns:
        float32 of shape (B, ...), the same on every device.
    """
    start = _mix(seeds + _signed(kind * GOLDEN_RATIO))
    state = start.view(-1, *[1] * counters.dim()) + (counters + 1) * _signed(GOLDEN_RATIO)
    return _shifted(_mix(state), 40).float() * 2.0**-24


def _mix(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ _shifted(state, 30)) * MIXERS[0]
    state = (state ^ _shifted(state, 27)) * MIXERS[1]
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in: torch's shift of int64 brings in the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def drawn(batch: Mapping[str, torch.Tensor], seeds: torch.Tensor, config: MoleBlendConfig) -> dict[str, torch.Tensor]:
    """What the pairs and atoms of a batch show, and the noise on the coordinates: arguments of the model's forward."""
    atom_features, coordinates = batch["atom_features"], batch.get("coordinates")
    has_coordinates = molecules_with_coordinates(atom_features, coordinates, batch.get("coordinates_mask"))
    relations = (batch.get(name) for name in ("degree", "shortest_path_distance", "path_bond_types"))
    pairs_have, atoms_have = available_modalities(batch["attention_mask"], has_coordinates, *relations)
    atoms = torch.arange(atom_features.shape[1], device=atom_features.device)
    pairs = atoms[:, None] * ATOMS_AT_MOST + atoms
    found = {
        "pair_modality_ids": pair_modalities(pairs_have, config.blend_probabilities, uniform(seeds, PAIRS, pairs)),
        "atom_modality_ids": atom_modalities(
            atoms_have, config.atom_blend_probabilities, uniform(seeds, ATOMS, atoms)
        ),
    }
    if coordinates is not None:
        components = atoms[:, None] * 4 + torch.arange(3, device=atoms.device)
        # Box and Muller; 1 - u is never 0.
        radius = torch.sqrt(-2 * torch.log(1 - uniform(seeds, NOISE, 2 * components)))
        angle = 2 * math.pi * uniform(seeds, NOISE, 2 * components + 1)
        found["coordinate_noise"] = radius * torch.cos(angle) * config.noise_std
    return found


def count_targets(
    batch: Mapping[str, torch.Tensor], atom_modality_ids: torch.Tensor, config: MoleBlendConfig
) -> torch.Tensor:
    """What the four losses of a batch are means over, (4,) int64: `num_targets` of the model's output, before its forward."""
    atom_features = batch["atom_features"]
    atom_mask = batch["attention_mask"].bool()
    pair_mask = atom_mask.unsqueeze(2) & atom_mask.unsqueeze(1)
    coordinates: Any = batch.get("coordinates")
    has_coordinates = molecules_with_coordinates(atom_features, coordinates, batch.get("coordinates_mask"))
    counts = [atom_features.new_zeros(()) for _ in range(4)]
    if "shortest_path_distance" in batch:
        labels = shortest_path_labels(
            batch["shortest_path_distance"], pair_mask, 2, config.num_shortest_path_distances - 2
        )
        counts[0] = (labels != IGNORED_LABEL).sum()
    if "path_bond_types" in batch:
        labels, _ = bond_path_labels(
            batch["path_bond_types"], pair_mask, config.bond_vocabulary_sizes, config.bond_class_sizes
        )
        counts[1] = (labels != IGNORED_LABEL).sum()
    if coordinates is not None:
        # A molecule has a direction to predict if not all of its atoms are in one place.
        first = coordinates[:, :1]
        apart = (coordinates != first).any(-1) & atom_mask
        counts[2] = (apart.any(-1) & has_coordinates).sum()
        counts[3] = (atom_mask & has_coordinates.unsqueeze(1) & (atom_modality_ids == ATOM_DISTANCE)).sum()
    return torch.stack(counts)
