"""The converter: every key converted or dropped for a stated reason, sizes from the shapes, nothing unpickled but plain values."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import GOLDEN, SMILES, golden_model

from moleblend_hf import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendModel,
    MoleBlendProcessor,
)
from moleblend_hf.convert_original_checkpoint import DROPPED, ENCODER, convert, convert_state, load_original, main


@pytest.fixture
def pretraining_state():
    return load_original(GOLDEN / "pretrain_state.safetensors")


def test_sizes_are_read_from_the_shapes():
    config, golden = golden_model("pretrain").config, json.loads((GOLDEN / "config.json").read_text())
    assert config.num_hidden_layers == golden["encoder_layers"]
    assert config.hidden_size == golden["encoder_embed_dim"]
    assert config.intermediate_size == golden["encoder_ffn_embed_dim"]
    assert config.num_attention_heads == golden["encoder_attention_heads"]
    assert config.num_distance_kernels == golden["num_3d_bias_kernel"]
    assert config.relative_position_hidden_size == golden["blend_pred_3d_hidden_dim"]
    assert config.max_path_bonds == golden["multi_hop_max_dist"]
    assert config.num_shortest_path_classes == golden["spd_num_classes"]
    assert golden_model("finetune").config.num_labels == golden["num_tasks"]


def test_pretraining_and_finetuning_states_are_told_apart():
    assert isinstance(golden_model("pretrain"), MoleBlendForPreTraining)
    finetuned = golden_model("finetune")
    assert isinstance(finetuned, MoleBlendForSequenceClassification)
    assert finetuned.config.readout == "graph_token"


def test_dropped_keys_are_listed_with_a_reason(pretraining_state):
    _, dropped = convert_state(pretraining_state)
    assert dropped == DROPPED


def test_transformer_m_gives_the_encoder(pretraining_state):
    """Its checkpoints have the encoder and a denoising head under the same names, and none of the blend heads."""
    state = {name: tensor for name, tensor in pretraining_state.items() if ".blend_" not in name}
    model, dropped = convert_state(state)
    assert isinstance(model, MoleBlendModel)
    assert torch.equal(model.graph_token, golden_model("pretrain").moleblend.graph_token)
    assert set(dropped) - set(DROPPED) == {name for name in state if name.startswith(ENCODER + "atom_proc.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, r"head.bias' of the checkpoint is of type NoneType, but weights are floating-point"),
        (torch.Tensor.int, r"head.bias' of the checkpoint is of type torch\.int32, but weights are"),
        (lambda tensor: tensor[:-1], r"tensors of the checkpoint do not fit together .*size mismatch"),
    ],
)
def test_tensors_that_are_changed_are_an_error(pretraining_state, change, message):
    name = ENCODER + "blend_spd_pred_head.transform_n2_head.row_head.bias"
    pretraining_state[name] = change(pretraining_state[name])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_state(pretraining_state)


def test_a_state_whose_sizes_make_no_model_is_an_error(pretraining_state):
    name = ENCODER + "molecule_attn_bias.spatial_pos_encoder.weight"
    pretraining_state[name] = pretraining_state[name][:, :3]
    with pytest.raises(ValueError, match=r"(?s)do not fit together .*is not a multiple of `num_attention_heads`"):
        convert_state(pretraining_state)


def test_an_unknown_key_is_an_error_that_names_it(pretraining_state):
    pretraining_state[ENCODER + "layers.0.self_attn_sandwich_layer_norm.weight"] = torch.ones(32)
    with pytest.raises(ValueError, match=r"self_attn_sandwich_layer_norm.*another model or variant"):
        convert_state(pretraining_state)


def test_a_missing_key_is_an_error_that_names_it(pretraining_state):
    del pretraining_state[ENCODER + "molecule_3d_bias.edge_proj.weight"]
    with pytest.raises(ValueError, match=r"no tensor .*molecule_3d_bias.edge_proj.weight"):
        convert_state(pretraining_state)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_converted_folder_gives_the_golden_outputs(tmp_path, pretraining_state, suffix):
    source, target = tmp_path / f"checkpoint_best{suffix}", tmp_path / "converted"
    if suffix == ".pt":
        torch.save({"model": pretraining_state, "args": argparse.Namespace(arch="moleblend_base", lr=[1e-5])}, source)
    else:
        save_file(pretraining_state, source)
    assert convert(source, target) == DROPPED
    model = MoleBlendForPreTraining.from_pretrained(target).eval()
    processor = MoleBlendProcessor.from_pretrained(target)
    assert processor.max_path_bonds == model.config.max_path_bonds
    with torch.no_grad():
        ours, golden = (
            one.eval().moleblend(**processor(SMILES)).last_hidden_state for one in (model, golden_model("pretrain"))
        )
    torch.testing.assert_close(ours, golden, atol=0, rtol=0)


class Payload:
    """What a checkpoint must not be able to run."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": {}, "args": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_original(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_file_without_a_state_dict_is_an_error(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_original(tmp_path / "list.pt")


def test_command_line_lists_what_it_dropped(tmp_path, capsys):
    main([str(GOLDEN / "finetune_state.safetensors"), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "dropped encoder.layer_norm.weight: " in printed
    assert (tmp_path / "out" / "model.safetensors").exists()
