"""moleblend_hf.prediction_moleblend: the model's numbers, averaged and ordered, whatever the batches and the memory."""

import numpy as np
import pytest
import torch
from tiny import SMILES, tiny_config
from torch.multiprocessing.reductions import StorageWeakRef

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendModel,
    MoleBlendProcessor,
    embed_graphs,
    predict_graphs,
)
from moleblend_hf.graphs_moleblend import Budget
from moleblend_hf.prediction_moleblend import GraphMemoryError

SPREADS = {"initializer_range": 0.3}  # weights large enough that molecules and members differ


def fine_tuned(**changes) -> MoleBlendForSequenceClassification:
    return MoleBlendForSequenceClassification(
        tiny_config(**{"problem_type": "regression", **SPREADS, **changes})
    ).eval()


def conformers_of(model, processor, graph) -> np.ndarray:
    """Logits (C, T) of each conformer of a graph, one at a time."""
    batches = [processor.pad([graph], conformer_index=index) for index in range(len(graph.coordinates))]
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches]).double().numpy()


@pytest.mark.parametrize("budget", [None, Budget(1, 400_000), Budget(30, 200)])
def test_values_are_the_models_own_in_the_order_of_the_input_for_any_budget(budget):
    model, processor = fine_tuned(num_labels=3, target_means=[1, 2, 3], target_scales=[4, 5, 6]), MoleBlendProcessor()
    graphs = processor.featurize_many(SMILES)
    with torch.no_grad():
        expected = model(**processor.pad(graphs)).logits
    predictions = predict_graphs(model, processor, graphs, budget)
    torch.testing.assert_close(torch.from_numpy(predictions.values), expected, rtol=1e-5, atol=1e-5)
    assert predictions.modalities == ["2d"] * len(graphs)
    assert predictions.ensemble_spread is predictions.conformer_spread is predictions.lower is None
    np.testing.assert_allclose(
        predict_graphs(model, processor, graphs[::-1], budget).values[::-1], predictions.values, atol=1e-5
    )


def test_the_model_is_left_as_it_was():
    model, processor = fine_tuned().train(), MoleBlendProcessor()
    model.moleblend.eval()  # a frozen encoder
    graphs = processor.featurize_many(SMILES)
    first, second = (predict_graphs(model, processor, graphs).values for _ in range(2))
    assert model.training
    assert model.classifier.training
    assert not any(module.training for module in model.moleblend.modules())
    assert (first == second).all()  # so dropout was off


def test_conformers_are_averaged_and_their_spread_is_that_of_the_sample():
    model, processor = fine_tuned(num_labels=2), MoleBlendProcessor(modality="2d+3d", num_conformers=3)
    graphs = [*processor.featurize_many(["CCCCO", "CC(N)CC=O"]), MoleBlendProcessor().featurize("CCO")]
    predictions = predict_graphs(model, processor, graphs)
    for index, graph in enumerate(graphs[:2]):
        each = conformers_of(model, processor, graph)
        np.testing.assert_allclose(predictions.values[index], each.mean(0), atol=1e-6)
        np.testing.assert_allclose(predictions.conformer_spread[index], each.std(0, ddof=1), atol=1e-6)
    assert np.isnan(predictions.conformer_spread[2]).all()
    assert predictions.modalities == ["2d+3d", "2d+3d", "2d"]


def test_a_2d_model_is_shown_no_conformer():
    model, graphs = fine_tuned(), MoleBlendProcessor(modality="2d+3d", num_conformers=2).featurize_many(SMILES)
    flat = predict_graphs(model, MoleBlendProcessor(modality="2d"), graphs)
    assert flat.conformer_spread is None
    assert set(flat.modalities) == {"2d"}
    expected = predict_graphs(model, MoleBlendProcessor(), MoleBlendProcessor().featurize_many(SMILES))
    np.testing.assert_allclose(flat.values, expected.values, atol=1e-6)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_an_ensemble_is_the_mean_of_its_members_with_the_spread_of_the_sample(problem_type):
    models = [fine_tuned(num_labels=3, problem_type=problem_type) for _ in range(3)]
    processor = MoleBlendProcessor(modality="2d+3d", num_conformers=2)
    graphs = processor.featurize_many(SMILES)
    alone = np.stack([predict_graphs(model, processor, graphs).values for model in models])
    predictions = predict_graphs(MoleBlendEnsembleForSequenceClassification.from_members(models), processor, graphs)
    np.testing.assert_allclose(predictions.values, alone.mean(0), atol=1e-6)
    np.testing.assert_allclose(predictions.ensemble_spread, alone.std(0, ddof=1), atol=1e-6)
    if problem_type == "single_label_classification":
        np.testing.assert_allclose(predictions.values.sum(1), 1)
    elif problem_type == "multi_label_classification":
        assert ((predictions.values > 0) & (predictions.values < 1)).all()


def test_intervals_are_of_one_width_where_the_targets_are_transformed():
    model = fine_tuned(
        num_labels=3,
        target_transforms=["log10", "signed_log10", "none"],
        conformal_coverage=0.9,
        conformal_quantiles=[0.3, None, 2.0],
    )
    processor = MoleBlendProcessor()
    predictions = predict_graphs(model, processor, processor.featurize_many(SMILES))
    values, lower, upper = predictions.values, predictions.lower, predictions.upper
    np.testing.assert_allclose(np.log10(upper[:, 0]) - np.log10(values[:, 0]), 0.3)
    np.testing.assert_allclose(np.log10(values[:, 0]) - np.log10(lower[:, 0]), 0.3)
    assert np.isnan(lower[:, 1]).all()
    np.testing.assert_allclose((upper - lower)[:, 2], 4.0)
    assert predictions.prediction_sets is None


def test_prediction_sets_hold_the_classes_that_are_likely_enough():
    processor = MoleBlendProcessor()
    graphs = processor.featurize_many(SMILES)
    binary = fine_tuned(
        num_labels=2,
        problem_type="multi_label_classification",
        conformal_coverage=0.9,
        conformal_quantiles=[0.45, None],
    )
    predictions = predict_graphs(binary, processor, graphs)
    probability = predictions.values[:, 0]
    np.testing.assert_array_equal(predictions.prediction_sets[:, 0, 1], 1 - probability <= 0.45)
    np.testing.assert_array_equal(predictions.prediction_sets[:, 0, 0], probability <= 0.45)
    assert predictions.prediction_sets[:, 1].all()  # not calibrated: nothing is excluded
    classes = fine_tuned(
        num_labels=3,
        problem_type="single_label_classification",
        conformal_coverage=0.9,
        conformal_quantiles=[0.7],
    )
    predictions = predict_graphs(classes, processor, graphs)
    np.testing.assert_array_equal(predictions.prediction_sets, 1 - predictions.values <= 0.7)
    assert predictions.lower is None
    classes.config.conformal_quantiles = [None]  # of too few labels to calibrate on
    assert predict_graphs(classes, processor, graphs).prediction_sets is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 2.00 GiB"),
    ],
    ids=["cuda", "cpu", "numpy"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, error):
    model, processor = fine_tuned(), MoleBlendProcessor()
    graphs = processor.featurize_many(SMILES * 3)
    expected = predict_graphs(model, processor, graphs).values
    sizes, forward = [], model.forward

    def limited(**inputs):
        sizes.append(len(inputs["atom_features"]))
        if sizes[-1] > 2:
            raise error
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    # Other batches: a processor rounds by their shapes.
    np.testing.assert_allclose(predict_graphs(model, processor, graphs).values, expected, atol=1e-5)
    assert sizes[:4] == [15, 7, 3, 1]

    monkeypatch.setattr(model, "forward", lambda **inputs: (_ for _ in ()).throw(error))
    with pytest.raises(GraphMemoryError, match="Graph 0 has 13 atoms, which do not fit into the memory of cpu alone"):
        predict_graphs(model, processor, graphs)


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory(monkeypatch):
    model, processor = fine_tuned(), MoleBlendProcessor()
    monkeypatch.setattr(model, "forward", lambda **inputs: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch"):
        predict_graphs(model, processor, processor.featurize_many(SMILES))


def test_embeddings_are_the_states_of_the_encoder():
    model, processor = MoleBlendModel(tiny_config()).eval(), MoleBlendProcessor()
    graphs = processor.featurize_many(SMILES)
    expected = model.embed(SMILES, processor)
    molecules, atoms = embed_graphs(model, processor, graphs), embed_graphs(model, processor, graphs, atoms=True)
    np.testing.assert_allclose(np.stack(molecules), expected.molecule_embeddings.numpy(), atol=1e-5)
    for found, states, graph in zip(atoms, expected.atom_embeddings, graphs, strict=True):
        assert found.shape == (graph.num_atoms, model.config.hidden_size)
        np.testing.assert_allclose(found, states.numpy(), atol=1e-5)


def test_embeddings_are_means_over_conformers_however_they_are_made():
    model, processor = MoleBlendModel(tiny_config(**SPREADS)).eval(), MoleBlendProcessor(num_conformers=3)
    for modality in ("2d", "2d+3d"):
        processor.modality = modality
        graphs = processor.featurize_many(["CCCCO", "C", "CC(N)CC=O"], modality="2d+3d")
        found = model.embed(["CCCCO", "C", "CC(N)CC=O"], processor, batch_size=2)
        np.testing.assert_allclose(found.molecule_embeddings, embed_graphs(model, processor, graphs), atol=1e-5)
        for states, expected in zip(
            found.atom_embeddings, embed_graphs(model, processor, graphs, atoms=True), strict=True
        ):
            np.testing.assert_allclose(states, expected, atol=1e-5)


@pytest.mark.parametrize("atoms", [False, True])
def test_embeddings_keep_no_batch_alive(monkeypatch, atoms):
    model, processor = MoleBlendModel(tiny_config()).eval(), MoleBlendProcessor()
    batches, forward = [], model.forward

    def watched(**inputs):
        assert all(batch.expired() for batch in batches)
        outputs = forward(**inputs)
        batches.append(StorageWeakRef(outputs.last_hidden_state.untyped_storage()))
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    assert len(embed_graphs(model, processor, processor.featurize_many(SMILES), atoms, Budget(1, 400_000))) == len(
        batches
    )


@pytest.mark.parametrize(
    ("config", "modality", "num_graphs", "message"),
    [
        ({"num_labels": 2, "problem_type": None}, "2d", 5, "`problem_type` of the config is None with 2 labels"),
        ({}, "3d", 5, "Graph 0 has no coordinates, which modality='3d' needs"),
        ({}, "2d", 0, "There are no graphs to predict for"),
    ],
)
def test_what_cannot_be_predicted_is_said(config, modality, num_graphs, message):
    graphs = MoleBlendProcessor().featurize_many(SMILES)[:num_graphs]
    with pytest.raises(ValueError, match=message):
        predict_graphs(fine_tuned(**config), MoleBlendProcessor(modality=modality), graphs)


def test_an_ensemble_has_no_embedding():
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned(), fine_tuned()])
    with pytest.raises(ValueError, match="An ensemble of 2 models has no embedding"):
        embed_graphs(ensemble, MoleBlendProcessor(), MoleBlendProcessor().featurize_many(SMILES))


def test_a_member_of_an_ensemble_embeds_as_it_does_alone():
    models, processor = [fine_tuned(), fine_tuned()], MoleBlendProcessor()
    ensemble, graphs = (
        MoleBlendEnsembleForSequenceClassification.from_members(models),
        processor.featurize_many(SMILES),
    )
    for member, model in zip(ensemble.members, models, strict=True):
        np.testing.assert_array_equal(embed_graphs(member, processor, graphs), embed_graphs(model, processor, graphs))
