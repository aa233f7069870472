"""A checkpoint that is not the model that was saved does not pass, and the report says where it departs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendProcessor,
)
from moleblend_hf.verification import _deviation, verify, write_reference_outputs

REGRESSION = {
    "num_labels": 2,
    "problem_type": "regression",
    "target_means": [0.5, 1.0],
    "target_scales": [2.0, 0.3],
    "target_transforms": ["none", "log10"],
}
LAYER = "moleblend.layers.1.mlp.dense_in.weight"


def fine_tuned() -> MoleBlendForSequenceClassification:
    return MoleBlendForSequenceClassification(tiny_config(**REGRESSION))


MODELS: dict[str, Callable] = {
    "base": lambda: MoleBlendModel(tiny_config()),
    "pretraining": lambda: MoleBlendForPreTraining(tiny_config()),
    "fine-tuned": fine_tuned,
    "atoms": lambda: MoleBlendForTokenClassification(tiny_config(**REGRESSION)),
    "ensemble": lambda: MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned(), fine_tuned()]),
}


def saved(model, folder: Path, **settings) -> Path:
    processor = MoleBlendProcessor(**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_reference_outputs(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return saved(fine_tuned(), tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "folder"))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_checkpoint_is_the_model_that_was_saved(name, tmp_path):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = verify(saved(model, tmp_path))
    assert report.ok, report
    assert max(report.deviations.values()) < 1e-6
    assert model.training  # left as it was
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    depths = [*report.deviations]
    assert depths[0].startswith("processor.")
    prefix = "members.1." if name == "ensemble" else ""
    order = [f"{prefix}{depth}" for depth in ("embeddings", "attention_bias", "layers.0", "layers.1")]
    assert sorted(order, key=depths.index) == order
    heads = {"base": 0, "pretraining": 4, "fine-tuned": 1, "atoms": 1, "ensemble": 2}
    assert sum(depth.startswith("heads.") for depth in depths) == heads[name]
    assert sum(depth.startswith("draws.") for depth in depths) == (3 if name == "pretraining" else 0)
    assert str(report).startswith(f"{tmp_path} is the model that was saved")


@pytest.mark.parametrize("modality", ["2d", "3d", "2d+3d"])
@pytest.mark.parametrize("hydrogens", ["drop", "keep", "add"])
def test_it_holds_for_each_kind_of_processor(modality, hydrogens, tmp_path):
    """Also for one that refuses molecules of the size of the reference molecules."""
    report = verify(saved(fine_tuned(), tmp_path, modality=modality, hydrogens=hydrogens, max_atoms=2))
    assert report.ok, report


def test_weights_in_several_files_are_looked_at_in_all(tmp_path):
    model, processor = fine_tuned(), MoleBlendProcessor()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    write_reference_outputs(model, processor, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert verify(tmp_path).ok


def test_half_precision_is_told_apart_but_rounding_is_not(tmp_path):
    folder = saved(fine_tuned().to(torch.bfloat16), tmp_path / "half")
    assert verify(folder).ok
    report = verify(saved_again(folder, tmp_path / "whole"))
    assert report.first_departure is None
    assert report.changed_weights


def test_outputs_may_be_of_another_precision_than_those_that_were_saved(folder):
    """As where a later version computes in float64."""
    path = folder / "reference_outputs.safetensors"
    outputs = load_file(path)
    assert outputs["heads.logits"].dtype == torch.float64
    save_file(outputs | {"heads.logits": outputs["heads.logits"].float()}, path)
    assert verify(folder).ok


def saved_again(folder: Path, target: Path) -> Path:
    """The same checkpoint in float32."""
    shutil.copytree(folder, target)
    MoleBlendForSequenceClassification.from_pretrained(folder, dtype=torch.float32).save_pretrained(target)
    return target


def test_one_changed_weight_is_named_and_the_depth_that_it_reaches(folder):
    def edit(weights):
        weights[LAYER][3, 5] += 0.5

    edit_weights(folder, edit)
    report = verify(folder)
    assert not report.ok
    assert report.changed_weights == [LAYER]
    assert report.first_departure[0] == "layers.1"
    assert report.first_departure[1] > 1e-3
    assert f"weights changed: 1 ({LAYER})" in str(report)
    assert "first departs at layers.1: by" in str(report)


def test_a_changed_weight_that_no_reference_molecule_reaches_is_named(folder):
    name = "moleblend.embeddings.atom_embedding.weight"

    def edit(weights):
        weights[name][92, 0] += 1e-3  # of uranium

    edit_weights(folder, edit)
    report = verify(folder)
    assert (report.ok, report.first_departure, report.changed_weights) == (False, None, [name])


def test_a_renamed_key_is_missing_unexpected_and_newly_initialized(folder):
    edit_weights(folder, lambda weights: weights.update({"moleblend.layers.1.mlp.renamed": weights.pop(LAYER)}))
    report = verify(folder)
    assert not report.ok
    assert report.missing_keys == report.newly_initialized_keys == [LAYER]
    assert report.unexpected_keys == ["moleblend.layers.1.mlp.renamed"]
    assert report.first_departure[0] == "layers.1"
    assert "weights missing, newly initialised: 1" in str(report)


def test_a_renamed_key_of_a_pretraining_head_is_not_overlooked(tmp_path):
    """Models without these heads ignore such keys."""
    folder = saved(MoleBlendForPreTraining(tiny_config()), tmp_path)
    key = "bond_path_head.out_proj.weight"
    edit_weights(folder, lambda weights: weights.update({f"{key}s": weights.pop(key)}))
    report = verify(folder)
    assert (report.missing_keys, report.unexpected_keys) == ([key], [f"{key}s"])
    assert report.first_departure[0] == "heads.bond_path_logits"


def test_a_reinitialized_layer_is_found(folder):
    def edit(weights):
        for name, tensor in weights.items():
            if name.startswith("moleblend.layers.0."):
                tensor.normal_(std=0.02)

    edit_weights(folder, edit)
    report = verify(folder)
    assert report.first_departure[0] == "layers.0"
    assert all(name.startswith("moleblend.layers.0.") for name in report.changed_weights)
    assert len(report.changed_weights) == 12


def test_a_weight_of_another_shape_is_named(folder):
    edit_weights(folder, lambda weights: weights.update({LAYER: torch.zeros(3, 32)}))
    report = verify(folder)
    assert report.mismatched_keys == report.newly_initialized_keys == [LAYER]
    assert not report.ok
    assert "of another shape" in str(report)


@pytest.mark.parametrize(
    ("changes", "departs"),
    [
        ({"hydrogens": "keep"}, "processor.atom_features"),
        ({"modality": "2d"}, "processor.coordinates"),
        ({"max_path_bonds": 3}, "processor.path_bond_types"),
        ({"num_conformers": 3}, None),
        ({"max_atoms": 4}, None),
    ],
)
def test_another_processor_setting_is_found(folder, changes, departs):
    """Whether or not it makes a difference for the reference molecules; the model is not blamed for it."""
    before = json.loads((folder / "preprocessor_config.json").read_text())
    edit_json(folder / "preprocessor_config.json", **changes)
    report = verify(folder)
    assert not report.ok
    assert report.processor_differences == {name: (before[name], value) for name, value in changes.items()}
    departing = [depth for depth, deviation in report.deviations.items() if deviation > report.tolerance]
    assert (departs in departing) == (departs is not None)
    assert all(depth.startswith("processor.") for depth in departing)
    name, value = next(iter(changes.items()))
    assert f"processor setting {name}: {before[name]!r} was saved, {value!r} was loaded" in str(report)


def test_another_config_is_found_also_where_no_weight_depends_on_it(folder):
    edit_json(folder / "config.json", target_means=[0.6, 1.0], target_units=["eV", "s"])
    report = verify(folder)
    assert report.first_departure[0] == "heads.logits"
    assert report.config_differences == {
        "target_means": ([0.5, 1.0], [0.6, 1.0]),
        "target_units": (None, ["eV", "s"]),
    }
    assert "config setting target_units: None was saved, ['eV', 's'] was loaded" in str(report)


def test_outputs_that_are_never_finite_can_be_equal():
    found = torch.tensor([float("nan"), float("inf")])
    assert _deviation(found, found.clone()) == 0
    assert _deviation(found, -found) == float("inf")


def test_without_reference_outputs_there_is_nothing_to_verify(folder):
    (folder / "reference_outputs.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no reference_outputs.json.*write_reference_outputs"):
        verify(folder)


def test_a_checkpoint_of_another_class_is_refused(folder):
    edit_json(folder / "config.json", architectures=["Other"])
    with pytest.raises(
        ValueError, match="holds a Other, but has to hold one of MoleBlendModel, MoleBlendForPreTraining"
    ):
        verify(folder)
    with pytest.raises(TypeError, match="There are no reference outputs of a Linear"):
        write_reference_outputs(torch.nn.Linear(1, 1), MoleBlendProcessor(), folder)
