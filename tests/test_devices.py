"""A step of pretraining on a device is that of the CPU, also in half precision, compiled, and without waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import SMILES, without_dropout

from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor
from objective import count_targets, drawn, molecule_seeds

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@contextmanager
def not_waiting_for(device: str) -> Iterator[None]:
    """An error where the CPU waits for a GPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def batch() -> dict[str, torch.Tensor]:
    """Molecules, every other one without its geometry."""
    padded = dict(MoleBlendProcessor()(SMILES, modality="2d+3d"))
    return padded | {"coordinates_mask": torch.arange(len(SMILES)) % 2 == 0}


def step(device: str, compiled: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the same model on the same batch, as training computes them."""
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(without_dropout()).to(device).train()
    run = torch.compile(model, dynamic=True) if compiled else model
    part = {name: values.to(device) for name, values in batch().items()}
    seeds = torch.from_numpy(molecule_seeds(0, 0, torch.arange(len(SMILES)).numpy())).to(device)
    if compiled:  # which compiling may wait for
        run(**part, **drawn(part, seeds, model.config)).loss.backward()
        model.zero_grad()
    with not_waiting_for(device):
        draws = drawn(part, seeds, model.config)
        targets = count_targets(part, draws["atom_modality_ids"], model.config)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = run(**part, **draws, num_targets=targets).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().float().cpu() for name, value in {"loss": loss, **gradients}.items()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to the norm of each tensor, or of the mean one where that is more."""
    usual = sum(value.norm() for value in expected.values()) / len(expected)
    return max(float((found[name] - value).norm() / max(value.norm(), usual)) for name, value in expected.items())


@on_each_device
def test_a_step_is_that_of_the_cpu(device):
    assert largest_difference(step(device), step("cpu")) < 1e-4


@pytest.mark.gpu  # on a CPU it takes minutes; tests/test_modeling.py compiles there, without inductor
def test_a_compiled_step_is_that_of_the_cpu():
    assert largest_difference(step("cuda", compiled=True), step("cpu")) < 1e-4


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_close(device, dtype):
    found, expected = step(device, dtype=dtype), step("cpu")
    assert all(value.isfinite().all() for value in found.values())
    assert abs(found["loss"] - expected["loss"]) < 0.01 * expected["loss"]
    assert largest_difference(found, expected) < 0.1


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_computes_about_the_same(device, dtype):
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(without_dropout()).eval()
    with torch.no_grad():
        expected = model.moleblend(**batch()).last_hidden_state
        part = {name: values.to(device) for name, values in batch().items()}
        found = model.to(device, dtype).moleblend(**part).last_hidden_state
    assert found.dtype == dtype
    assert (found.float().cpu() - expected).abs().max() < 0.05 * expected.abs().max()
