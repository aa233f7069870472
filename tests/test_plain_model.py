"""The plain model that the benchmarks compare with is the same function as ours: loss and every gradient."""

import sys
from pathlib import Path

import torch
from tiny import SMILES, without_dropout

from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from plain_model import PlainMoleBlendForPreTraining


def test_plain_and_fast_pretraining_steps_are_one_function():
    batch = MoleBlendProcessor()(SMILES, modality="2d+3d")
    ours = MoleBlendForPreTraining(without_dropout()).train()
    plain = PlainMoleBlendForPreTraining(without_dropout()).train()
    plain.load_state_dict(ours.state_dict())
    outputs = ours(**batch)
    draws = {name: getattr(outputs, name) for name in ("pair_modality_ids", "atom_modality_ids", "coordinate_noise")}
    loss = plain(**batch, **draws)
    torch.testing.assert_close(outputs.loss, loss, atol=1e-5, rtol=1e-6)
    outputs.loss.backward()
    loss.backward()
    for (name, fast), slow in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-4, msg=name)
