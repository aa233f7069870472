"""What MoleBLEND's models promise: invariances, modalities, blending, losses, and one function however it is computed."""

import copy
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from rdkit import Chem
from scipy.spatial.transform import Rotation
from tiny import SMILES, golden_model, tiny_config, without_dropout
from torch.fx.experimental import _config as symbolic_shapes
from transformers import AttentionInterface

from compilation import keep_equal_sizes_apart
from moleblend_hf import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendProcessor,
)
from moleblend_hf import blending_moleblend as blending
from moleblend_hf import modeling_moleblend as modeling
from moleblend_hf import rows_moleblend as rows

SAMPLE = Path(__file__).parents[1] / "training" / "sample" / "data" / "train-00000-of-00001.parquet"
RELATIONS = ("degree", "shortest_path_distance", "path_bond_types")


@pytest.fixture(scope="module")
def processor():
    return MoleBlendProcessor()


@pytest.fixture(scope="module")
def batch(processor):
    """Five molecules of 1 to 13 atoms; the second has no coordinates."""
    mols = [Chem.MolFromSmiles(smiles) for smiles in SMILES]
    generator = np.random.default_rng(0)
    coordinates = [generator.normal(scale=3, size=(mol.GetNumAtoms(), 3)) for mol in mols]
    coordinates[1] = None
    return dict(processor(SMILES, coordinates=coordinates))


@pytest.fixture(scope="module")
def real_molecules():
    """200 molecules of QM9: SMILES and DFT coordinates in angstrom."""
    rows = pq.read_table(SAMPLE).to_pylist()[::10]
    assert len(rows) >= 200
    rows = rows[:200]
    return [row["smiles"] for row in rows], [
        np.array(row["coordinates"], dtype=np.float64).reshape(-1, 3) for row in rows
    ]


@pytest.fixture(scope="module")
def encoder():
    """The golden weights: drawn wide, so that every input moves the output."""
    return golden_model("pretrain").moleblend.eval()


def states(model, batch) -> list[torch.Tensor]:
    """Graph token and atoms of each molecule, without padding."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return [state[: size + 1] for state, size in zip(hidden, batch["attention_mask"].sum(1), strict=True)]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for index, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=f"molecule {index}")


# Invariance on 200 real molecules.


def test_rotation_and_translation_change_nothing(encoder, processor, real_molecules):
    smiles, coordinates = real_molecules
    rotation = Rotation.from_euler("xyz", [25, 130, -70], degrees=True).as_matrix()
    moved = [xyz @ rotation.T + [1.5, -0.7, 2.2] for xyz in coordinates]
    assert_same(
        states(encoder, processor(smiles, coordinates=coordinates)),
        states(encoder, processor(smiles, coordinates=moved)),
    )


def test_atom_order_changes_nothing(encoder, processor, real_molecules):
    smiles, coordinates = real_molecules
    generator = np.random.default_rng(0)
    mols = [Chem.MolFromSmiles(one) for one in smiles]
    orders = [generator.permutation(mol.GetNumAtoms()).tolist() for mol in mols]
    renumbered = [Chem.RenumberAtoms(mol, order) for mol, order in zip(mols, orders, strict=True)]
    permuted = [xyz[order] for xyz, order in zip(coordinates, orders, strict=True)]
    before = states(encoder, processor(mols, coordinates=coordinates))
    after = states(encoder, processor(renumbered, coordinates=permuted))
    assert_same([state[[0, *(np.array(order) + 1)]] for state, order in zip(before, orders, strict=True)], after)


def test_another_smiles_of_the_molecule_changes_nothing(encoder, processor, real_molecules):
    smiles, coordinates = real_molecules
    others, permuted, orders = [], [], []
    for one, xyz in zip(smiles, coordinates, strict=True):
        mol = Chem.MolFromSmiles(one)
        others.append(Chem.MolToSmiles(mol, doRandom=True))
        order = list(mol.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"])
        permuted.append(xyz[order])
        orders.append(order)
    before = states(encoder, processor(smiles, coordinates=coordinates))
    after = states(encoder, processor(others, coordinates=permuted))
    assert_same([state[[0, *(np.array(order) + 1)]] for state, order in zip(before, orders, strict=True)], after)


def test_padding_and_batch_composition_change_nothing(encoder, processor, real_molecules):
    smiles, coordinates = real_molecules
    together = states(encoder, processor(smiles, coordinates=coordinates))
    alone = [states(encoder, processor(one, coordinates=xyz))[0] for one, xyz in zip(smiles, coordinates, strict=True)]
    assert_same(together, alone)


def test_embed_returns_molecules_and_atoms_in_order(encoder, processor, real_molecules):
    smiles, coordinates = (values[:20] for values in real_molecules)
    embedded = encoder.embed(smiles, processor, batch_size=7, coordinates=coordinates)
    together = states(encoder, processor(smiles, coordinates=coordinates))
    torch.testing.assert_close(
        embedded.molecule_embeddings, torch.stack([state[0] for state in together]), atol=1e-5, rtol=0
    )
    assert_same(embedded.atom_embeddings, [state[1:] for state in together])


def test_fewer_layers_of_a_checkpoint_are_its_lowest(batch, tmp_path):
    model = MoleBlendForPreTraining(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    lowest = MoleBlendModel.from_pretrained(tmp_path, num_hidden_layers=1)
    expected = model.moleblend(**batch, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(lowest(**batch).last_hidden_state, expected)


def test_embed_leaves_out_what_was_rejected(encoder, processor):
    embedded = encoder.embed(["CCO", "C1CC", "C"], processor, on_error="skip")
    assert len(embedded.molecule_embeddings) == 2
    assert [len(atoms) for atoms in embedded.atom_embeddings] == [3, 1]
    assert [rejection.index for rejection in processor.rejected] == [1]


def test_embed_says_when_all_were_rejected(encoder, processor):
    with pytest.raises(ValueError, match=r"None of the 2 molecules could be featurized. See `processor.rejected`"):
        encoder.embed(["C1CC", "c1cc"], processor, on_error="skip")


# Modalities.


def test_a_missing_relation_is_a_modality_switched_off(encoder, batch):
    """Each relation moves the output, alone and together; a batch without any still runs."""
    everything = states(encoder, batch)
    for name in (*RELATIONS, "coordinates"):
        left = {key: value for key, value in batch.items() if key not in (name, "coordinates_mask")}
        if name != "coordinates":
            left["coordinates_mask"] = batch["coordinates_mask"]
        assert not torch.allclose(states(encoder, left)[0], everything[0], atol=1e-3), name
    atoms_only = encoder(batch["atom_features"]).last_hidden_state
    assert torch.isfinite(atoms_only).all()


def test_molecules_without_coordinates_in_a_mixed_batch_are_2d(encoder, batch):
    two_dimensional = {name: batch[name] for name in ("atom_features", "attention_mask", *RELATIONS)}
    assert_same([states(encoder, batch)[1]], [states(encoder, two_dimensional)[1]])
    garbage = batch["coordinates"].clone()
    garbage[1] = float("nan")
    assert_same(states(encoder, {**batch, "coordinates": garbage}), states(encoder, batch))
    model = MoleBlendForPreTraining(tiny_config())
    model(**{**batch, "coordinates": garbage}).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_of_integers_is_one_of_booleans(encoder, batch):
    assert_same(
        states(encoder, {**batch, "coordinates_mask": batch["coordinates_mask"].long()}), states(encoder, batch)
    )


def test_shapes_that_do_not_fit_are_an_error_with_the_expected_shape(encoder, batch):
    with pytest.raises(ValueError, match=r"`coordinates` has shape \(5, 12, 3\); expected \(5, 13, 3\)"):
        encoder(**{**batch, "coordinates": batch["coordinates"][:, :12]})
    with pytest.raises(ValueError, match=r"`atom_features` has shape \(5, 13\)"):
        encoder(batch["atom_features"][..., 0])


def test_a_misspelt_argument_is_an_error(batch):
    """Swallowed, it would switch a modality off without a word."""
    for model in (MoleBlendModel(tiny_config()), MoleBlendForPreTraining(tiny_config())):
        with pytest.raises(TypeError, match=r"Unexpected arguments \['coords'\]"):
            model(batch["atom_features"], coords=batch["coordinates"])


def test_values_beyond_a_vocabulary_take_its_last_row(encoder, batch):
    features = batch["atom_features"].clone()
    features[..., 0] = torch.where(features[..., 0] > 0, 119, 0)
    beyond = torch.where(features[..., :1] > 0, torch.cat([features[..., :1] + 400, features[..., 1:]], -1), features)
    inputs = {**batch, "degree": batch["degree"] + 63}
    assert_same(
        states(encoder, {**inputs, "atom_features": features}),
        states(encoder, {**inputs, "atom_features": beyond, "degree": batch["degree"] + 10_000}),
    )


# One function, however it is computed.


@pytest.mark.parametrize("max_scores", [1, 2000, rows.MAX_SCORES_IN_GROUP])  # five groups of molecules, some, one
@pytest.mark.parametrize("training", [False, True])
def test_gathering_rows_is_the_same_function_as_masking_them(monkeypatch, batch, training, max_scores):
    """Outputs and gradients; the masked form is what compilation, export and accelerators run."""
    monkeypatch.setattr(rows, "MAX_SCORES_IN_GROUP", max_scores)
    model = MoleBlendForPreTraining(without_dropout()).train(training)
    results = []
    for gathers in (modeling.gathers, lambda tensor: False):
        monkeypatch.setattr(modeling, "gathers", gathers)
        model.zero_grad()
        outputs = model(**batch, generator=torch.Generator().manual_seed(0), output_hidden_states=True)
        outputs.loss.backward()
        grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        results.append((outputs.loss, *outputs.hidden_states, *grads))
    for gathered, masked in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked, atol=1e-6, rtol=1e-5)


def test_groups_hold_each_token_and_pair_once_molecules_of_like_size_together(monkeypatch):
    monkeypatch.setattr(rows, "MAX_SCORES_IN_GROUP", 2 * 2 * 7**2)
    mask = torch.arange(9) < torch.tensor([[7], [2], [9], [6], [3]])
    mask[0, 4] = False  # a hole counts for the length
    values, pairs = torch.randn(5, 9, 4), torch.randn(5, 2, 9, 9)
    tokens = rows.TokenSelection(mask, num_heads=2, gather=True, grouped=True)
    assert [group.shape for group in tokens.groups] == [(2, 3), (2, 7), (1, 9)]
    taken = tokens.take(values)
    assert torch.equal(tokens.put(taken), values * mask.unsqueeze(-1))
    split = tokens.split(taken)
    assert torch.equal(tokens.join(split), taken)
    for group, own, own_pairs, molecules in zip(
        tokens.groups, split, tokens.split_pairs(pairs), ([1, 4], [3, 0], [2]), strict=True
    ):
        length = group.shape[1]
        assert torch.equal(group.put(own), (values * mask.unsqueeze(-1))[molecules, :length])
        assert torch.equal(own_pairs, pairs[molecules, :, :length, :length])


@pytest.mark.parametrize("model_class", [MoleBlendModel, MoleBlendForSequenceClassification])
def test_attention_probabilities_come_for_the_whole_batch(monkeypatch, batch, model_class):
    monkeypatch.setattr(rows, "MAX_SCORES_IN_GROUP", 1)
    model = model_class._from_config(without_dropout(), attn_implementation="eager").eval()
    tokens = torch.nn.functional.pad(batch["attention_mask"].bool(), (1, 0), value=True)
    for probabilities in model(**batch, output_attentions=True).attentions:
        assert probabilities.shape == (len(tokens), model.config.num_attention_heads, *2 * tokens.shape[1:])
        sums = (probabilities * tokens[:, None, None, :]).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (probabilities * ~tokens[:, None, None, :] == 0).all()
    assert model(**batch).attentions is None


def test_no_molecules_have_no_states():
    assert MoleBlendModel(tiny_config())(torch.zeros(0, 4, 9, dtype=torch.long)).last_hidden_state.shape == (0, 5, 32)


def test_sdpa_equals_eager(monkeypatch, batch):
    """With gradients, where SDPA has kernels for them: not on a CPU, which takes the eager one."""
    monkeypatch.setattr(modeling, "gathers", lambda tensor: False)
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(without_dropout()).train()
    assert model.config._attn_implementation == "sdpa"
    eager = MoleBlendForPreTraining._from_config(without_dropout(), attn_implementation="eager").train()
    eager.load_state_dict(model.state_dict())
    losses = []
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused:
        for one in (model, eager):
            outputs = one(**batch, generator=torch.Generator().manual_seed(0))
            outputs.loss.backward()
            losses.append(outputs.loss)
            assert fused.call_count == model.config.num_hidden_layers
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_an_attention_of_ones_own_is_what_runs(batch, training):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["dropout"])
        return modeling.eager_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", counted)
    model = MoleBlendModel(tiny_config(attention_dropout=0.25)).train(training)
    model.set_attn_implementation("counted")
    model(**batch).last_hidden_state.sum().backward()
    assert calls == [0.25 if training else 0.0] * model.config.num_hidden_layers


def test_sdpa_equals_eager_without_gradients(batch):
    """With them a CPU takes the eager one, which is faster there."""
    losses = []
    with (
        torch.no_grad(),
        mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused,
    ):
        for implementation in ("sdpa", "eager"):
            model = golden_model("pretrain").eval()
            model.set_attn_implementation(implementation)
            losses.append(model(**batch, generator=torch.Generator().manual_seed(0)).loss)
            assert fused.call_count == model.config.num_hidden_layers
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_the_same_function(monkeypatch, batch, use_reentrant):
    monkeypatch.setattr(rows, "MAX_SCORES_IN_GROUP", 2000)  # several groups of molecules
    model = MoleBlendForPreTraining(tiny_config()).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        results.append(
            [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
        )
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_bf16_autocast_stays_close_and_losses_are_fp32(batch):
    model = MoleBlendForPreTraining(without_dropout())
    exact = model(**batch, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, generator=torch.Generator().manual_seed(0))
    outputs.loss.backward()
    for name in (
        "loss",
        "shortest_path_loss",
        "bond_path_loss",
        "relative_position_loss",
        "coordinate_denoising_loss",
    ):
        assert getattr(outputs, name).dtype == torch.float32
        torch.testing.assert_close(getattr(outputs, name), getattr(exact, name), atol=0, rtol=0.05, msg=name)


def test_bf16_weights_run(batch):
    model = MoleBlendForSequenceClassification(tiny_config(num_labels=1)).to(torch.bfloat16)
    outputs = model(**batch, labels=torch.zeros(len(batch["degree"]), 1))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_with_dropout_on_a_cpu_keeps_the_dtype_of_the_model(batch, dtype):
    """It is computed in float32, or better where the model is."""
    model = MoleBlendModel(tiny_config(attention_dropout=0.1, output_attentions=True)).to(dtype).train()
    outputs = model(**batch)
    assert outputs.last_hidden_state.dtype == dtype
    assert outputs.attentions[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_kernels_far_from_a_distance_are_no_denormal_numbers(batch):
    """Those take a processor a hundred times longer, and so do products in which they arise."""
    model = MoleBlendModel(tiny_config())
    kernels = model.distance_embedding
    with torch.no_grad():
        kernels.stds.fill_(0.05)  # 13.2 kernel widths from the mean exp(-z^2 / 2) is 1e-38
        kernels.means.copy_(torch.linspace(0, 9, len(kernels.means)))
    elements = batch["atom_features"][..., 0]
    distances = torch.linspace(0, 9, elements.numel() * elements.shape[1]).view(*elements.shape, -1)
    pairs = rows.RowSelection(torch.ones_like(distances, dtype=torch.bool), gather=True)
    values = kernels(elements, distances, pairs)
    assert 0 < values.min() < 1e-25
    assert values.min() > 1e6 * torch.finfo(torch.float32).tiny


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """A copy as `torch.nn.DataParallel` makes it for each GPU: its weights are attributes, but no parameters."""
    copied = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(copied, name, replica(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copied, name, parameter.detach())
    return copied


def test_replicas_of_data_parallel_are_the_same_function(batch):
    model = MoleBlendForPreTraining(without_dropout()).eval()
    losses = [one(**batch, generator=torch.Generator().manual_seed(0)).loss for one in (model, replica(model))]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)


def test_a_model_stays_on_one_device(tmp_path):
    """Spread over several it would stop at the first sum of two modules' tensors."""
    MoleBlendForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    load = MoleBlendForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"over \['cpu', 'disk'\], but it computes on one device. Load it whole"):
        load(tmp_path, device_map={"moleblend": "cpu", "classifier": "disk"}, offload_folder=tmp_path / "offload")
    assert load(tmp_path, device_map="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_has_no_graph_breaks(batch, dynamic):
    """`backend="eager"` traces the whole graph; code generation is not ours."""
    torch._dynamo.reset()
    model = MoleBlendForPreTraining(without_dropout(num_hidden_layers=1))
    draws = model(**batch, generator=torch.Generator().manual_seed(0))
    given = {name: getattr(draws, name) for name in ("pair_modality_ids", "atom_modality_ids", "coordinate_noise")}
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(**batch, **given).loss, draws.loss, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(compiled(**batch).loss)  # draws inside
    training = torch.compile(
        MoleBlendForPreTraining(tiny_config(num_hidden_layers=1)).train(), backend="eager", fullgraph=True
    )
    training(**batch).loss.backward()


def test_one_compilation_serves_all_sizes(processor):
    """Also where the first batch has as many atoms as an atom has features."""
    torch._dynamo.reset()
    graphs = []
    model = torch.compile(
        MoleBlendForPreTraining(tiny_config(num_hidden_layers=1)).train(),
        backend=lambda graph, inputs: graphs.append(graph) or graph,
        dynamic=True,
    )
    with symbolic_shapes.patch(use_duck_shape=True):  # torch's own, and back to it
        keep_equal_sizes_apart()
        for molecules in (["CCCCCCCCC", "CC", "C"], ["CCCCCCCC", "CC"], ["CCCCC", "C", "C", "C", "C"]):
            sizes = [len(smiles) for smiles in molecules]
            model(**processor(molecules, coordinates=[np.eye(size, 3) + np.arange(size)[:, None] for size in sizes]))
    assert len(graphs) == 1


def test_torch_export_of_the_encoder_takes_other_sizes(batch, processor):
    model = MoleBlendModel(without_dropout()).eval()
    names = ("atom_features", "attention_mask", *RELATIONS, "coordinates", "coordinates_mask")
    inputs = {name: batch[name] for name in names}
    batch_size, num_atoms = torch.export.Dim("batch", max=64), torch.export.Dim("atoms", min=2, max=128)
    pairs = {0: batch_size, 1: num_atoms, 2: num_atoms}
    shapes = {name: {0: batch_size, 1: num_atoms} for name in names}
    shapes |= {"shortest_path_distance": pairs, "path_bond_types": pairs, "coordinates_mask": {0: batch_size}}
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    other = dict(processor(["CCOC", "CN"], coordinates=[np.eye(4, 3) * 2, np.eye(2, 3)]))
    torch.testing.assert_close(
        program.module()(**other).last_hidden_state, model(**other).last_hidden_state, atol=1e-5, rtol=0
    )


def test_drop_path_drops_molecules(batch):
    tokens = rows.RowSelection(torch.nn.functional.pad(batch["attention_mask"].bool(), (1, 0), value=True), True)
    ones = torch.ones(int(tokens.mask.sum()), 3)
    dropped = tokens.put(rows.drop_path(ones, 0.5, tokens))
    for molecule, mask in zip(dropped, tokens.mask, strict=True):
        values = molecule[mask]
        assert (values == values[0]).all()
        assert values[0, 0] in (0.0, 2.0)


def test_dropout_on_cpu_drops_at_its_rate_and_keeps_the_mean():
    values = torch.ones(1001, 999)
    dropped = rows.drop_values(values, 0.1, training=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=1e-3)
    assert dropped.mean().item() == pytest.approx(1, abs=1e-3)
    assert dropped.unique().numel() == 2
    assert rows.drop_values(values, 0.1, training=False) is values
    assert rows.drop_values(values, 1 - 1e-9, training=True).isfinite().all()
    torch.manual_seed(0)
    first = rows.drop_values(values, 0.5, training=True)
    torch.manual_seed(0)
    assert torch.equal(first, rows.drop_values(values, 0.5, training=True))


# Blending.


def test_draws_follow_the_blend_probabilities(batch, processor):
    model = MoleBlendForPreTraining(tiny_config())
    chain = processor(["C" * 200], coordinates=[np.arange(600).reshape(200, 3)])
    outputs = model(**chain, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(outputs.pair_modality_ids.flatten(), minlength=3) / 200**2
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.2, 0.6]), atol=0.01, rtol=0)
    share = (outputs.atom_modality_ids == blending.ATOM_DISTANCE).float().mean()
    assert share.item() == pytest.approx(0.6, abs=0.1)
    assert outputs.coordinate_noise.std().item() == pytest.approx(0.2, rel=0.1)
    assert not torch.equal(outputs.pair_modality_ids, outputs.pair_modality_ids.transpose(1, 2))


def test_a_relation_that_a_molecule_lacks_is_never_drawn(batch):
    model = MoleBlendForPreTraining(tiny_config())
    outputs = model(**batch)
    assert (outputs.pair_modality_ids[1] != blending.PAIR_DISTANCE).all()
    assert (outputs.atom_modality_ids[1] == blending.ATOM_DEGREE).all()
    three_dimensional = {name: value for name, value in batch.items() if name not in RELATIONS}
    outputs = model(**three_dimensional)
    assert (outputs.pair_modality_ids[0] == blending.PAIR_DISTANCE).all()
    assert outputs.shortest_path_loss == outputs.bond_path_loss == 0


@pytest.mark.parametrize("per_molecule", [True, False])
def test_blend_per_molecule(batch, per_molecule):
    pairs = MoleBlendForPreTraining(tiny_config(blend_per_molecule=per_molecule))(**batch).pair_modality_ids
    assert torch.equal(pairs[0], pairs[3]) is not per_molecule


def test_a_generator_seeds_every_draw(batch):
    model = MoleBlendForPreTraining(without_dropout())
    first, second, other = (model(**batch, generator=torch.Generator().manual_seed(seed)).loss for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_hidden_relations_do_not_reach_the_encoder(batch):
    """A pair that shows its distance says nothing of its bonds, and the other way round."""
    model = MoleBlendForPreTraining(without_dropout()).eval()
    num_molecules, num_atoms = batch["degree"].shape
    pairs, atoms = (
        torch.zeros(num_molecules, num_atoms, num_atoms).long(),
        torch.zeros(num_molecules, num_atoms).long(),
    )
    noise = torch.zeros_like(batch["coordinates"])

    def logits(modality: int, **changes) -> torch.Tensor:
        draws = {
            "pair_modality_ids": pairs + modality,
            "atom_modality_ids": atoms + (modality == blending.PAIR_DISTANCE),
            "coordinate_noise": noise,
        }
        return model(**{**batch, **changes}, **draws).shortest_path_logits[0]

    other_bonds = {"shortest_path_distance": batch["shortest_path_distance"].flip(0)}
    other_bonds["path_bond_types"] = batch["path_bond_types"].flip(0)
    distance = blending.PAIR_DISTANCE
    torch.testing.assert_close(logits(distance, **other_bonds), logits(distance), atol=0, rtol=0)
    other_geometry = {"coordinates": 2 * batch["coordinates"]}
    for modality in (blending.PAIR_SHORTEST_PATH, blending.PAIR_BOND_PATH):
        torch.testing.assert_close(logits(modality, **other_geometry), logits(modality), atol=0, rtol=0)


# Losses.


def test_losses_without_a_target_are_zero_with_zero_gradient(processor):
    """Single atoms have no pairs, 2D molecules no geometry: no NaN, and every parameter keeps a finite gradient."""
    model = MoleBlendForPreTraining(without_dropout())
    outputs = model(**processor(["C", "[Na+]"]))
    outputs.loss.backward()
    names = ("loss", "shortest_path_loss", "bond_path_loss", "relative_position_loss", "coordinate_denoising_loss")
    assert [getattr(outputs, name).item() for name in names] == [0.0] * 5
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("gather", [True, False])
def test_a_molecule_that_is_all_padding_changes_nothing(monkeypatch, batch, gather):
    monkeypatch.setattr(modeling, "gathers", lambda tensor: gather)
    model = MoleBlendForPreTraining(without_dropout())
    draws = model(**batch, generator=torch.Generator().manual_seed(0))
    names = ("pair_modality_ids", "atom_modality_ids", "coordinate_noise")
    inputs = {**batch, **{name: getattr(draws, name) for name in names}}
    shorter = {name: values[1:] for name, values in inputs.items()}
    emptied = inputs | {"attention_mask": batch["attention_mask"].index_fill(0, torch.tensor(0), 0)}
    found = []
    for given in (shorter, emptied):
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        found.append((loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("modality", ["2d+3d", "3d"])
def test_the_noise_of_an_atom_alone_is_never_drawn(modality):
    """Nothing tells it, and where the head begins, at 0, the gradient of a cosine has no bound."""
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(without_dropout(atom_blend_probabilities=(0.0, 1.0)))
    inputs = MoleBlendProcessor(modality=modality)(["CO", "C"], coordinates=[np.eye(3)[:2], np.ones((1, 3))])
    outputs = model(**inputs)
    outputs.loss.backward()
    assert inputs["coordinates_mask"].all()
    assert outputs.atom_modality_ids[:, 0].tolist() == [blending.ATOM_DISTANCE, blending.ATOM_DEGREE]
    assert outputs.num_targets[3] == 2
    assert model.coordinate_denoising_head.out_proj.bias.grad.norm() < 1e5  # with it 2e8


@pytest.mark.parametrize("model_class", [MoleBlendForPreTraining, MoleBlendForSequenceClassification])
def test_a_config_may_ask_for_tuples(batch, processor, model_class):
    torch.manual_seed(0)
    model = model_class(tiny_config(num_labels=2, return_dict=False)).eval()
    with torch.no_grad():
        given, asked = (
            model(**batch, generator=torch.Generator().manual_seed(0), **changes)
            if model_class is MoleBlendForPreTraining
            else model(**batch, **changes)
            for changes in ({}, {"return_dict": True})
        )
    assert isinstance(given, tuple)
    torch.testing.assert_close(given[0], asked[0])
    assert len(model.moleblend.embed(SMILES, processor).molecule_embeddings) == len(SMILES)


def test_relations_may_be_small_integers(batch):
    model = MoleBlendForPreTraining(without_dropout())
    small = {name: batch[name].int() for name in RELATIONS}
    losses = [model(**values, generator=torch.Generator().manual_seed(0)).loss for values in (batch, batch | small)]
    assert torch.equal(*losses)


def test_an_atom_at_the_origin_is_an_atom(processor):
    """The original takes an atom at (0, 0, 0) for one without coordinates."""
    model = MoleBlendForPreTraining(without_dropout()).eval()
    xyz = np.array([[0.0, 0, 0], [1.5, 0, 0], [2.1, 1.3, 0]])
    draws = {"pair_modality_ids": torch.full((1, 3, 3), 2), "atom_modality_ids": torch.ones(1, 3).long()}
    noise = torch.randn(1, 3, 3)
    at_origin = model(**processor("CCO", coordinates=xyz), **draws, coordinate_noise=noise)
    moved = model(**processor("CCO", coordinates=xyz + 3), **draws, coordinate_noise=noise)
    torch.testing.assert_close(at_origin.loss, moved.loss, atol=1e-5, rtol=0)


def test_bonds_outside_the_classes_are_no_target_and_counted(processor):
    """A quadruple bond is misc in OGB's vocabulary; the released heads have no class for it, nor for CIS / TRANS."""
    model = MoleBlendForPreTraining(tiny_config())
    outputs = model(**processor(["[Re]$[Re]", "CCCC"]))
    assert outputs.num_unclassified_bonds == 2
    assert (outputs.bond_path_labels[0] == blending.IGNORED_LABEL).all()
    assert torch.isfinite(outputs.loss)


def test_long_paths_and_unreachable_pairs(processor):
    """The original crashes beyond 20 bonds; the last class takes them, and fragments are no target for each other."""
    model = MoleBlendForPreTraining(tiny_config())
    outputs = model(**processor(["C" * 40 + ".[Na+]"]))
    labels = outputs.shortest_path_labels[0]
    assert labels[0, :13].tolist() == [-100, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    assert (labels[40] == blending.IGNORED_LABEL).all()
    assert torch.isfinite(outputs.loss)


def test_distance_target_is_blind_to_the_frame(batch):
    config = without_dropout(relative_position_target="distance")
    model = MoleBlendForPreTraining(config).eval()
    rotation = torch.tensor(Rotation.from_euler("xyz", [25, 130, -70], degrees=True).as_matrix(), dtype=torch.float32)
    draws = model(**batch)
    given = {name: getattr(draws, name) for name in ("pair_modality_ids", "atom_modality_ids")}
    noise = draws.coordinate_noise
    before = model(**batch, **given, coordinate_noise=noise)
    turned = {**batch, "coordinates": batch["coordinates"] @ rotation.T}
    after = model(**turned, **given, coordinate_noise=noise @ rotation.T)
    assert before.predicted_relative_positions.shape == (*batch["shortest_path_distance"].shape, 1)
    torch.testing.assert_close(before.relative_position_loss, after.relative_position_loss, atol=1e-5, rtol=0)


def test_pretraining_overfits_a_small_batch(batch):
    model = MoleBlendForPreTraining(without_dropout(num_hidden_layers=3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    outputs = model(**batch, generator=torch.Generator().manual_seed(0))
    given = {name: getattr(outputs, name) for name in ("pair_modality_ids", "atom_modality_ids", "coordinate_noise")}
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(**batch, **given)
        loss.loss.backward()
        optimizer.step()
    assert loss.shortest_path_loss < 0.1 * outputs.shortest_path_loss
    assert loss.bond_path_loss < 0.1 * outputs.bond_path_loss
    assert loss.coordinate_denoising_loss < 0.5 * outputs.coordinate_denoising_loss


# Property prediction.


def test_regression_is_in_original_units_and_its_loss_in_standard_deviations(batch):
    scaled = tiny_config(num_labels=2, problem_type="regression", target_means=[5.0, -3.0], target_scales=[2.0, 0.5])
    model = MoleBlendForSequenceClassification(scaled).eval()
    plain = copy.deepcopy(model)
    plain.config.target_means = plain.config.target_scales = None
    raw = plain(**batch).logits.double()
    outputs = model(**batch, labels=raw * torch.tensor([2.0, 0.5]) + torch.tensor([7.0, -3.5]))
    torch.testing.assert_close(outputs.logits, raw * torch.tensor([2.0, 0.5]) + torch.tensor([5.0, -3.0]))
    torch.testing.assert_close(outputs.loss, torch.tensor(1.0))


def test_a_mean_that_is_large_beside_the_spread_takes_no_digits_away(batch):
    shifted = tiny_config(num_labels=1, problem_type="regression", target_means=[-4e6], target_scales=[1.0])
    model = MoleBlendForSequenceClassification(shifted).eval()
    plain = copy.deepcopy(model)
    plain.config.target_means = [0.0]
    raw = plain(**batch).logits
    torch.testing.assert_close(model(**batch).logits + 4e6, raw, atol=1e-7, rtol=0)
    torch.testing.assert_close(model(**batch, labels=raw - 4e6 + 0.5).loss, torch.tensor(0.25))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_missing_labels_count_for_nothing(batch, problem_type):
    model = MoleBlendForSequenceClassification(tiny_config(num_labels=3, problem_type=problem_type)).eval()
    labels = torch.randint(0, 2, (len(batch["degree"]), 3)).float()
    labels[0, 1] = labels[3] = float("nan")
    present = ~labels.isnan()
    logits = model(**batch).logits
    function = torch.nn.functional.mse_loss if problem_type == "regression" else None
    function = function or torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(model(**batch, labels=labels).loss, function(logits[present], labels[present]))
    loss = model(**batch, labels=torch.full_like(labels, float("nan"))).loss
    loss.backward()
    assert loss == 0


def test_classes_and_missing_classes(batch):
    model = MoleBlendForSequenceClassification(tiny_config(num_labels=3)).eval()
    labels = torch.tensor([0, 2, -100, 1, 1])
    outputs = model(**batch, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    assert model.config.problem_type is None  # forward writes nothing


@pytest.mark.parametrize("readout", ["graph_token", "mean", "sum"])
def test_readouts_ignore_padding(batch, processor, readout):
    model = MoleBlendForSequenceClassification(tiny_config(num_labels=2, readout=readout)).eval()
    alone = {name: value[3:4] for name, value in batch.items()}
    size = int(alone["attention_mask"].sum())
    alone = {
        name: value[:, :size, :size] if name in RELATIONS[1:] else value[:, :size] if value.dim() > 1 else value
        for name, value in alone.items()
    }
    torch.testing.assert_close(model(**alone).logits[0], model(**batch).logits[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("readout", ["graph_token", "mean"])
def test_weighted_layer_sum_begins_as_the_mean_and_learns(batch, readout):
    config = tiny_config(num_labels=2, readout=readout, use_weighted_layer_sum=True)
    model = MoleBlendForSequenceClassification(config).eval()
    outputs = model(**batch, output_hidden_states=True)
    mean = torch.stack(outputs.hidden_states).mean(0)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    expected = model.classifier(mean[:, 0])
    if readout == "mean":
        mask = batch["attention_mask"].unsqueeze(-1)
        expected = (model.classifier(mean[:, 1:]) * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(outputs.logits, expected)
    assert model(**batch).hidden_states is None
    outputs.logits.sum().backward()
    assert model.layer_sum.layer_weights.grad.abs().min() > 0
    # All weight on the last layer: the model without the sum.
    with torch.no_grad():
        model.layer_sum.layer_weights[-1] = 100
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("layer_sum.")}
    plain = MoleBlendForSequenceClassification(tiny_config(num_labels=2, readout=readout)).eval()
    plain.load_state_dict(state)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_weighted_layer_sum_is_saved_and_begins_anew_from_a_checkpoint_without_it(batch, tmp_path):
    plain = MoleBlendForTokenClassification(tiny_config(num_labels=1))
    plain.save_pretrained(tmp_path / "plain")
    model = MoleBlendForTokenClassification.from_pretrained(tmp_path / "plain", use_weighted_layer_sum=True)
    assert model.layer_sum.layer_weights.tolist() == [0.0] * (model.config.num_hidden_layers + 1)
    torch.nn.init.normal_(model.layer_sum.layer_weights)
    model.save_pretrained(tmp_path / "mixed")
    again = MoleBlendForTokenClassification.from_pretrained(tmp_path / "mixed")
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_weights_of_labels_reach_the_loss(batch):
    model = MoleBlendForSequenceClassification(tiny_config(num_labels=2, problem_type="regression")).eval()
    labels = torch.randn(len(batch["degree"]), 2)
    only_first = torch.tensor([1.0, 0.0]).expand_as(labels)
    expected = torch.nn.functional.mse_loss(model(**batch).logits[:, 0], labels[:, 0])
    torch.testing.assert_close(model(**batch, labels=labels, label_weights=only_first).loss, expected)


# Atoms.


@pytest.fixture(scope="module")
def atom_model():
    """Two targets of each atom, over the golden weights, with a head drawn wide."""
    config = copy.deepcopy(golden_model("pretrain").config)
    config.num_labels, config.problem_type = 2, "regression"
    config.target_means, config.target_scales = [0.3, 0.1], [0.5, 0.2]
    config.target_transforms = ["none", "signed_log10"]
    torch.manual_seed(0)
    model = MoleBlendForTokenClassification(config).eval()
    model.moleblend.load_state_dict(golden_model("pretrain").moleblend.state_dict())
    torch.nn.init.normal_(model.classifier.out_proj.weight, std=0.3)
    return model


def atom_values(model, batch) -> list[torch.Tensor]:
    """Logits of the atoms of each molecule, without padding."""
    with torch.no_grad():
        logits = model(**batch).logits
    return [values[:size] for values, size in zip(logits, batch["attention_mask"].sum(1), strict=True)]


def test_values_of_atoms_move_with_the_atoms(atom_model, processor, real_molecules):
    smiles, coordinates = (values[:50] for values in real_molecules)
    generator = np.random.default_rng(0)
    mols = [Chem.MolFromSmiles(one) for one in smiles]
    orders = [generator.permutation(mol.GetNumAtoms()).tolist() for mol in mols]
    renumbered = [Chem.RenumberAtoms(mol, order) for mol, order in zip(mols, orders, strict=True)]
    permuted = [xyz[order] for xyz, order in zip(coordinates, orders, strict=True)]
    before = atom_values(atom_model, processor(mols, coordinates=coordinates))
    after = atom_values(atom_model, processor(renumbered, coordinates=permuted))
    assert_same([values[order] for values, order in zip(before, orders, strict=True)], after)
    assert max(values.std(0).min() for values in before) > 1e-3  # atoms differ by far more than the tolerance


def test_values_and_loss_of_atoms_ignore_padding(atom_model, processor, real_molecules):
    smiles, coordinates = (values[:50] for values in real_molecules)
    together = processor(smiles, coordinates=coordinates)
    alone = [
        atom_values(atom_model, processor(one, coordinates=xyz))[0]
        for one, xyz in zip(smiles, coordinates, strict=True)
    ]
    assert_same(atom_values(atom_model, together), alone)
    labels = torch.full((*together["attention_mask"].shape, 2), float("nan"))
    for row, values in enumerate(alone):
        labels[row, : len(values)] = values
    labels[0, 0] = float("nan")
    torch.testing.assert_close(atom_model(**together, labels=labels).loss, torch.tensor(0.0), atol=1e-8, rtol=0)


def test_one_target_and_classes_of_atoms(batch):
    """`(B, N)` labels for one target; class indices with -100 in gaps and padding."""
    mask = batch["attention_mask"].bool()
    model = MoleBlendForTokenClassification(tiny_config(num_labels=1)).eval()
    outputs = model(**batch, labels=torch.ones(mask.shape).masked_fill(~mask, float("nan")))
    assert outputs.logits.shape == (*mask.shape, 1)
    torch.testing.assert_close(outputs.loss, (outputs.logits[mask] - 1).square().mean())
    model = MoleBlendForTokenClassification(tiny_config(num_labels=3)).eval()
    labels = torch.randint(0, 3, mask.shape).masked_fill(~mask, -100)
    labels[0, 0] = -100
    outputs = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_integer_labels_of_atoms_do_not_train_on_padding(processor, problem_type):
    model = MoleBlendForTokenClassification(tiny_config(num_labels=1, problem_type=problem_type)).eval()
    losses = []
    for dtype in (int, float):
        inputs = processor(["CCO", "C"], atom_labels=[np.array([1, 0, 1], dtype), np.array([1], dtype)])
        assert inputs["labels"].is_floating_point() == (dtype is float)
        losses.append(model(**inputs).loss)
    torch.testing.assert_close(*losses)


# Initialisation.


@pytest.mark.parametrize("how", ["uniform", "normal"])
def test_gaussian_initialization(how):
    module = MoleBlendModel(tiny_config(gaussian_initialization=how, num_distance_kernels=256)).distance_embedding
    affine = module.first_atom_affine.weight
    if how == "uniform":
        assert module.means.min() >= 0
        assert 2 < module.means.max() <= 3
        assert (affine[:, 0] == 1).all()
        assert (affine[:, 1] == 0).all()
    else:
        assert module.means.abs().max() < 0.2
        assert affine.std().item() == pytest.approx(0.02, rel=0.3)


def test_loading_changes_no_weight(tmp_path):
    model = golden_model("pretrain")
    model.save_pretrained(tmp_path)
    loaded, report = MoleBlendForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    encoder, report = MoleBlendModel.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(encoder.graph_token, model.moleblend.graph_token)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
