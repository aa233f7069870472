"""Our model equals the original, depth by depth, from raw SMILES and coordinates (golden/README.md says how those came about).

Tolerance 2e-5: a float64 evaluation of the original differs from its float32 values by up to 5e-6 in the logits.
"""

import pytest
import torch
from tiny import golden_losses, golden_model, golden_molecules, golden_tensors

from moleblend_hf import MoleBlendProcessor
from moleblend_hf.rows_moleblend import RowSelection

ENCODER = "encoder.molecule_encoder."
ATOL = 2e-5


def assert_close(ours: torch.Tensor, original: torch.Tensor, mask: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours[mask], original[mask], atol=ATOL, rtol=0, msg=lambda message: f"{name}: {message}")


def featurize(run: str, modality: str = "auto") -> dict[str, torch.Tensor]:
    smiles, coordinates = golden_molecules(run)
    return dict(MoleBlendProcessor(canonical_atom_order=False)(smiles, coordinates=coordinates, modality=modality))


@pytest.fixture(scope="module")
def pretraining():
    """Model after a backward pass of the weighted loss, its inputs and outputs, the original's tensors, and masks."""
    model, batch, golden = golden_model("pretrain"), featurize("pretrain"), golden_tensors("pretrain")
    outputs = model(
        **batch,
        # The original draws one matrix for the whole batch.
        pair_modality_ids=golden["draw.blend_matrix"].expand(len(batch["degree"]), -1, -1),
        atom_modality_ids=golden["draw.atom_assignment"],
        coordinate_noise=model.config.noise_std * golden["draw.noise_randn"],
        output_hidden_states=True,
    )
    outputs.loss.backward()
    atoms = batch["attention_mask"].bool()
    return model, batch, outputs, golden, atoms, atoms[:, :, None] & atoms[:, None, :]


def test_inputs_equal_the_originals(pretraining):
    _, batch, _, golden, atoms, pairs = pretraining
    stride = 512 * torch.arange(9)
    assert torch.equal(batch["atom_features"][atoms], (golden["x"] - 1 - stride)[atoms])
    assert torch.equal(batch["degree"][atoms], (golden["in_degree"] - 1)[atoms])
    assert torch.equal(batch["shortest_path_distance"][pairs], (golden["spatial_pos"] - 1)[pairs])
    bonds = golden["edge_input"] - 3 - 512 * torch.arange(3)
    joint = 1 + 12 * bonds[..., 0] + 2 * bonds[..., 1] + bonds[..., 2]
    assert torch.equal(batch["path_bond_types"][pairs], joint.masked_fill(golden["edge_input"][..., 0] == 0, 0)[pairs])


def test_each_bias_before_blending(pretraining):
    model, batch, _, golden, _, pairs = pretraining
    encoder, rows = model.moleblend, RowSelection(pairs, gather=True)
    positions = golden["noisy_pos"]
    distances = (positions.unsqueeze(1) - positions.unsqueeze(2)).norm(dim=-1)
    with torch.no_grad():
        gaussians = encoder.distance_embedding(batch["atom_features"][..., 0], distances, rows)
        biases = {
            "mid.spd_bias": encoder.attention_bias.shortest_path_bias(rows.take(batch["shortest_path_distance"])),
            "mid.edge_bias": encoder.attention_bias.bond_path_bias(rows.take(batch["path_bond_types"])),
            "mid.bias3d": encoder.attention_bias.distance_bias(gaussians),
        }
        for name, bias in biases.items():
            assert_close(rows.put(bias), golden[name].permute(0, 2, 3, 1), pairs, name)
        features = encoder.atom_distance_proj(rows.sum_last(gaussians))
        assert_close(features, golden["mid.merged_edge_features"], batch["attention_mask"].bool(), "atom feature")


def test_total_attention_bias(pretraining):
    model, batch, outputs, golden, atoms, _ = pretraining
    encoder_inputs = {name: batch[name] for name in ("degree", "shortest_path_distance", "path_bond_types")}
    with torch.no_grad():
        bias = model.moleblend(
            batch["atom_features"],
            **encoder_inputs,
            coordinates=golden["noisy_pos"],
            pair_modality_ids=outputs.pair_modality_ids,
            atom_modality_ids=outputs.atom_modality_ids,
            output_attention_bias=True,
        ).attention_bias
    original = golden["mid.attn_bias_total"]
    tokens = torch.nn.functional.pad(atoms, (1, 0), value=True)
    assert torch.equal(bias.isinf(), ~tokens[:, None, None, :].expand(bias.shape))
    real = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(bias.shape)
    assert_close(bias, original, real, "total bias")


def test_hidden_states_at_every_depth(pretraining):
    _, _, outputs, golden, atoms, _ = pretraining
    tokens = torch.nn.functional.pad(atoms, (1, 0), value=True)
    assert len(outputs.hidden_states) == len(golden["out.inner_states"]) == 3
    for depth, (ours, original) in enumerate(zip(outputs.hidden_states, golden["out.inner_states"], strict=True)):
        assert_close(ours, original, tokens, f"hidden state {depth}")


def test_every_head(pretraining):
    _, _, outputs, golden, atoms, pairs = pretraining
    assert_close(outputs.shortest_path_logits, golden["out.spd_logits"], pairs, "shortest path")
    assert_close(outputs.bond_path_logits, golden["out.edge_logits"], pairs, "bond path")
    assert_close(outputs.predicted_relative_positions, golden["out.pos3d_pred"], pairs, "relative position")
    assert_close(outputs.predicted_coordinate_noise, golden["out.denoise"], atoms, "denoising")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("shortest_path_loss", "spd"),
        ("bond_path_loss", "edge"),
        ("relative_position_loss", "pos3d"),
        ("coordinate_denoising_loss", "denoise"),
        ("loss", "weighted_total"),
    ],
)
def test_every_loss(pretraining, field, name):
    _, _, outputs, golden, *_ = pretraining
    torch.testing.assert_close(getattr(outputs, field), golden[f"loss.{name}"].squeeze(), atol=ATOL, rtol=0)


def original_names(parameter: str) -> list[str]:
    """The original's parameters that one of ours stands for, written down in full."""
    if parameter.startswith("classifier."):
        return [f"encoder.proj_out.{parameter.removeprefix('classifier.')}"]
    name = parameter.removeprefix("moleblend.")
    bias, gaussian = ENCODER + "molecule_attn_bias.", ENCODER + "molecule_3d_bias.gbf."
    table = {
        "graph_token": [ENCODER + "atom_feature.graph_token.weight"],
        "embeddings.atom_embedding.weight": [ENCODER + "atom_feature.atom_encoder.weight"],
        "distance_embedding.means": [gaussian + "means.weight"],
        "distance_embedding.stds": [gaussian + "stds.weight"],
        "attention_bias.shortest_path_embedding.weight": [bias + "spatial_pos_encoder.weight"],
        "attention_bias.bond_embedding.weight": [bias + "edge_encoder.weight"],
        "attention_bias.bond_path_weight": [bias + "edge_dis_encoder.weight"],
        "attention_bias.graph_token_bias": [bias + "graph_token_virtual_distance.weight"],
    }
    if name in table:
        return table[name]
    stem, part = name.rsplit(".", 1)
    modules = {
        "atom_distance_proj": ["molecule_3d_bias.edge_proj"],
        "embedding_norm": ["emb_layer_norm"],
        "attention_bias.distance_dense": ["molecule_3d_bias.gbf_proj.layer1"],
        "attention_bias.distance_proj": ["molecule_3d_bias.gbf_proj.layer2"],
        "shortest_path_head.out_proj": ["blend_spd_pred_head.linear"],
        "bond_path_head.out_proj": ["blend_edge_pred_head.linear_map_feature"],
        "relative_position_head.dense": ["blend_3d_pred_head.linear"],
        "relative_position_head.out_proj": [f"blend_3d_pred_head.force_proj{axis}" for axis in (1, 2, 3)],
        "coordinate_denoising_head.query_proj": ["atom_proc.q_proj"],
        "coordinate_denoising_head.key_proj": ["atom_proc.k_proj"],
        "coordinate_denoising_head.value_proj": ["atom_proc.v_proj"],
        "coordinate_denoising_head.out_proj": [f"atom_proc.force_proj{axis}" for axis in (1, 2, 3)],
    }
    for layer in range(2):
        modules |= {
            f"layers.{layer}.attention.qkv_proj": [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"],
            f"layers.{layer}.attention.out_proj": [f"layers.{layer}.self_attn.out_proj"],
            f"layers.{layer}.attention_norm": [f"layers.{layer}.self_attn_layer_norm"],
            f"layers.{layer}.mlp.dense_in": [f"layers.{layer}.fc1"],
            f"layers.{layer}.mlp.dense_out": [f"layers.{layer}.fc2"],
            f"layers.{layer}.mlp_norm": [f"layers.{layer}.final_layer_norm"],
        }
    for ours, original in (("shortest_path", "spd"), ("bond_path", "edge"), ("relative_position", "3d")):
        for order, old in (("first", "row"), ("second", "column")):
            source = f"blend_{original}_pred_head.transform_n2_head.{old}_"
            modules[f"{ours}_head.projection.{order}_dense"] = [source + "head"]
            modules[f"{ours}_head.projection.{order}_norm"] = [source + "LayerNorm"]
    return [f"{ENCODER}{module}.{part}" for module in modules[stem]]


def assert_gradient_norms(model, norms: dict[str, float | None]) -> None:
    """Stacked tensors: root of the sum of squares. The Gaussians' factors and offsets are compared by the caller."""
    parameters = dict(model.named_parameters())
    compared = set()
    for name, parameter in parameters.items():
        if "_atom_affine" in name:
            continue
        if name.endswith("degree_embedding.weight"):
            # Two tables were added into one: the gradient of each of the original's is ours.
            expected = [norms[ENCODER + f"atom_feature.{kind}_degree_encoder.weight"] for kind in ("in", "out")]
            assert expected[0] == pytest.approx(expected[1], rel=1e-6)
            expected = expected[0]
            compared |= {ENCODER + f"atom_feature.{kind}_degree_encoder.weight" for kind in ("in", "out")}
        else:
            originals = original_names(name)
            compared |= set(originals)
            present = [norms[original] for original in originals if norms[original] is not None]
            expected = sum(norm**2 for norm in present) ** 0.5
        ours = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    # Factor and offset are columns of two tables; the original's rows of both atoms lie in one table each.
    for column, kind in enumerate(("mul", "bias")):
        ours = [parameters[name].grad for name in parameters if "_atom_affine" in name]
        norm = sum(grad[:, column].norm().item() ** 2 for grad in ours if grad is not None) ** 0.5
        original = f"{ENCODER}molecule_3d_bias.gbf.{kind}.weight"
        assert norm == pytest.approx(norms[original] or 0.0, rel=1e-4, abs=1e-6), original
        compared.add(original)
    # Whatever is left has no gradient in the original either.
    assert all(not norms[name] for name in set(norms) - compared), set(norms) - compared


def test_gradient_norm_of_every_pretraining_parameter(pretraining):
    model, *_ = pretraining
    golden = golden_losses("pretrain")
    assert_gradient_norms(model, golden["grad_norm"])


@pytest.fixture(scope="module")
def finetuning():
    golden = golden_tensors("finetune")
    atoms = featurize("finetune")["attention_mask"].bool()
    return golden_model("finetune"), golden, atoms, torch.nn.functional.pad(atoms, (1, 0), value=True)


@pytest.mark.parametrize(("modality", "name"), [("2d", "out_2d"), ("auto", "out_3d")])
def test_finetuning_hidden_states_and_token_outputs(finetuning, modality, name):
    model, golden, _, tokens = finetuning
    with torch.no_grad():
        states = model.moleblend(**featurize("finetune", modality)).last_hidden_state
        assert_close(states, golden[f"{name}.last_hidden"], tokens, "last hidden state")
        assert_close(model.classifier(states), golden[f"{name}.logits"], tokens, "output of each token")


@pytest.mark.parametrize(("readout", "name"), [("graph_token", "cls"), ("mean", "mean"), ("sum", "sum")])
def test_finetuning_readouts(finetuning, readout, name):
    model, golden, atoms, _ = finetuning
    original = golden[f"out_3d.readout_{name}"]
    if readout == "mean":  # the original divides by the padded length, ours by the atoms
        original = original * atoms.shape[1] / atoms.sum(1, keepdim=True)
    model.config.readout = readout
    with torch.no_grad():
        logits = model(**featurize("finetune")).logits
    model.config.readout = "graph_token"
    torch.testing.assert_close(logits, original, atol=ATOL, rtol=1e-5)


def test_finetuning_loss_and_gradient_norms(finetuning):
    model, golden, _, _ = finetuning
    labels = golden["labels"].masked_fill(golden["label_weights"] == 0, float("nan"))
    model.config.problem_type = "multi_label_classification"
    model.zero_grad()
    loss = model(**featurize("finetune"), labels=labels).loss
    torch.testing.assert_close(loss, golden["loss.bce_cls"].squeeze(), atol=ATOL, rtol=0)
    loss.backward()
    assert_gradient_norms(model, golden_losses("finetune")["grad_norm_bce_cls"])


def test_mixed_batch_gives_each_molecule_its_own_modality(finetuning):
    """The original gives molecules without coordinates distance 0; ours gives them what they get in a 2D batch."""
    model, golden, _, tokens = finetuning
    smiles, coordinates = golden_molecules("finetune")
    without = golden_losses("finetune")["mixed_zero_pos_rows"]
    mixed = [None if index in without else xyz for index, xyz in enumerate(coordinates)]
    batch = MoleBlendProcessor(canonical_atom_order=False)(smiles, coordinates=mixed)
    assert batch["coordinates_mask"].tolist() == [index not in without for index in range(len(smiles))]
    with torch.no_grad():
        states = model.moleblend(**batch).last_hidden_state
    flat = torch.zeros(len(smiles), dtype=torch.bool)
    flat[without] = True
    assert_close(states, golden["out_2d.last_hidden"], tokens & flat[:, None], "molecules without coordinates")
    assert_close(states, golden["out_mixed.last_hidden"], tokens & ~flat[:, None], "molecules with coordinates")
