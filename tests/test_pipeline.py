"""The pipeline "molecular-property-prediction": named answers, and the model's numbers wherever it is loaded."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem
from tiny import SMILES, tiny_config
from transformers import pipeline

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendPipeline,
    MoleBlendProcessor,
)

TARGETS = {"id2label": {0: "gap", 1: "mu"}, "label2id": {"gap": 0, "mu": 1}}


def fine_tuned(model_class=MoleBlendForSequenceClassification, **changes):
    config = tiny_config(**{"problem_type": "regression", "initializer_range": 0.3, **TARGETS, **changes})
    return model_class(config).eval()


def of(model, **processor) -> MoleBlendPipeline:
    return MoleBlendPipeline(model=model, feature_extractor=MoleBlendProcessor(**processor), device="cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_in_order_and_an_unreadable_molecule_stops_nothing(batch_size):
    model = fine_tuned(target_units=["eV", "D"])
    molecules = ["C1CC", *SMILES, 3, Chem.MolFromSmiles("CCO"), "c1"]
    answers = of(model)(molecules, batch_size=batch_size)
    with torch.no_grad():
        expected = model(**MoleBlendProcessor()([*SMILES, "CCO"])).logits.double().numpy()
    readable = [*answers[1:6], answers[7]]
    found = [[answer["predictions"][name]["value"] for name in ("gap", "mu")] for answer in readable]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # other batches: a processor rounds by their shapes
    assert readable[0]["predictions"]["mu"]["unit"] == "D"
    assert {answer["modality"] for answer in readable} == {"2d"}
    assert {answer["error"] for answer in readable} == {None}
    errors = [answers[index] for index in (0, 6, 8)]
    assert [answer["predictions"] for answer in errors] == [None] * 3
    assert "could not be parsed by RDKit" in errors[0]["error"]
    assert "is of type int" in errors[1]["error"]


def test_one_molecule_has_one_answer_and_none_readable_is_no_problem():
    predict = of(fine_tuned())
    assert predict("CCO") == predict(["CCO"])[0]
    assert [answer["error"] is None for answer in predict(["C1CC", "c1"])] == [False, False]


def test_what_others_had_rejected_by_the_processor_is_neither_told_nor_changed():
    """Threads may share one."""
    predict = of(fine_tuned())
    predict.feature_extractor.featurize_many([3], on_error="skip")
    before = predict.feature_extractor.rejected
    assert "could not be parsed" in predict("C1CC")["error"]
    assert predict.feature_extractor.rejected == before


def test_spreads_and_intervals_are_named():
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned(), fine_tuned()])
    ensemble.config.conformal_coverage, ensemble.config.conformal_quantiles = 0.9, [0.5, None]
    flat, bent = of(ensemble, modality="2d+3d", num_conformers=3)(["C", "CCCO"])
    assert bent["modality"] == "2d+3d"
    gap, mu = bent["predictions"]["gap"], bent["predictions"]["mu"]
    assert gap["upper"] - gap["value"] == pytest.approx(0.5)
    assert mu["lower"] is mu["upper"] is None
    assert gap["ensemble_spread"] > 0
    assert gap["conformer_spread"] > 0
    assert flat["predictions"]["gap"]["ensemble_spread"] > 0


def test_classes_and_binary_targets_have_prediction_sets():
    names = {"id2label": {0: "low", 1: "mid", 2: "high"}, "label2id": {"low": 0, "mid": 1, "high": 2}}
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [1.0]}
    answer = of(fine_tuned(problem_type="single_label_classification", **names, **calibration))("CCO")
    probabilities = {name: value["value"] for name, value in answer["predictions"].items()}
    assert sum(probabilities.values()) == pytest.approx(1)
    assert answer["prediction"] == max(probabilities, key=probabilities.get)
    assert answer["prediction_set"] == ["low", "mid", "high"]
    calibration["conformal_quantiles"] = [1.0, 0.0]
    answer = of(fine_tuned(problem_type="multi_label_classification", **calibration))("CCO")
    assert answer["predictions"]["gap"]["prediction_set"] == [0, 1]
    assert answer["predictions"]["mu"]["prediction_set"] == []
    calibration["conformal_quantiles"] = [1.0, None]
    answer = of(fine_tuned(problem_type="multi_label_classification", **calibration))("CCO")
    assert answer["predictions"]["gap"]["prediction_set"] == [0, 1]
    assert "prediction_set" not in answer["predictions"]["mu"]


def test_a_model_of_atoms_has_lists_in_the_order_of_the_input():
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [0.5, None]}
    model = fine_tuned(MoleBlendForTokenClassification, target_units=["ppm", "e"], **calibration)
    molecules = ["OCC", "C", "C1CC", Chem.MolFromSmiles("[H]OC", sanitize=True), "C(O)C"]
    answers = of(model)(molecules, batch_size=2)
    readable = [answers[0], answers[1], answers[3], answers[4]]
    assert [len(answer["predictions"]["mu"]["value"]) for answer in readable] == [3, 1, 2, 3]
    assert answers[2]["predictions"] is None
    with torch.no_grad():
        expected = model(**MoleBlendProcessor()("OCC")).logits[0].double().numpy()
    gap = answers[0]["predictions"]["gap"]
    np.testing.assert_allclose(gap["value"], expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(np.subtract(gap["upper"], gap["value"]), 0.5)
    assert gap["unit"] == "ppm"
    assert answers[0]["predictions"]["mu"]["lower"] == [None] * 3
    other = answers[4]["predictions"]["gap"]["value"]
    np.testing.assert_allclose([other[1], other[0], other[2]], gap["value"], atol=1e-5)


def test_classes_of_atoms():
    names = {"id2label": {0: "low", 1: "mid", 2: "high"}, "label2id": {"low": 0, "mid": 1, "high": 2}}
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [1.0]}
    classes = {"problem_type": "single_label_classification", **names, **calibration}
    answer = of(fine_tuned(MoleBlendForTokenClassification, **classes))("CCO")
    probabilities = np.array([answer["predictions"][name]["value"] for name in ("low", "mid", "high")])
    np.testing.assert_allclose(probabilities.sum(0), 1)
    assert answer["prediction"] == [["low", "mid", "high"][index] for index in probabilities.argmax(0)]
    assert answer["prediction_set"] == [["low", "mid", "high"]] * 3
    calibration["conformal_quantiles"] = [1.0, 0.0]
    binary = {"problem_type": "multi_label_classification", **calibration}
    answer = of(fine_tuned(MoleBlendForTokenClassification, **binary))("CC")
    assert answer["predictions"]["gap"]["prediction_set"] == [[0, 1]] * 2
    assert answer["predictions"]["mu"]["prediction_set"] == [[]] * 2


def test_a_checkpoint_of_atoms_is_not_taken_for_one_of_molecules(tmp_path):
    fine_tuned(MoleBlendForTokenClassification).save_pretrained(tmp_path)
    MoleBlendProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"predicts for atoms, but was loaded as a model of molecules\. Load it with"):
        pipeline("molecular-property-prediction", model=str(tmp_path), device="cpu")


def test_embeddings_of_molecules_and_atoms():
    model = fine_tuned()
    embed, expected = of(model), model.moleblend.embed(SMILES, MoleBlendProcessor())
    molecules, atoms = (embed([*SMILES, "c1"], output=name) for name in ("molecule_embedding", "atom_embeddings"))
    for index in range(len(SMILES)):
        np.testing.assert_allclose(
            molecules[index]["molecule_embedding"], expected.molecule_embeddings[index], atol=1e-5
        )
        np.testing.assert_allclose(atoms[index]["atom_embeddings"], expected.atom_embeddings[index], atol=1e-5)
    assert molecules[-1]["molecule_embedding"] is atoms[-1]["atom_embeddings"] is None


def test_a_molecule_that_does_not_fit_into_memory_is_an_error_in_its_place(monkeypatch):
    model = fine_tuned()
    expected, forward = of(model)(SMILES), model.forward

    def limited(**inputs):
        if inputs["attention_mask"].sum() > 10:
            raise MemoryError
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    answers = of(model)(SMILES)
    assert "has 13 atoms, which do not fit into the memory" in answers[0]["error"]
    for answer, other in zip(answers[1:], expected[1:], strict=True):
        assert answer["predictions"]["gap"]["value"] == pytest.approx(other["predictions"]["gap"]["value"], abs=1e-6)


def test_unknown_parameters_are_said():
    predict = of(fine_tuned())
    with pytest.raises(ValueError, match="has no parameter 'outputs'"):
        predict("C", outputs="prediction")
    with pytest.raises(ValueError, match="`output` is 'embedding', but has to be one of 'prediction'"):
        predict("C", output="embedding")


def test_it_is_registered_by_its_name():
    predict = pipeline(
        "molecular-property-prediction", model=fine_tuned(), feature_extractor=MoleBlendProcessor(), device="cpu"
    )
    # By its name: it is the class of a folder's code if one was loaded in this process before.
    assert type(predict).__name__ == MoleBlendPipeline.__name__
    assert predict("C")["error"] is None


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["moleblend_hf"] = None
from transformers import pipeline
folder, again, smiles = json.loads(sys.argv[1])
for source in (folder, again):
    predict = pipeline(model=source, trust_remote_code=True, device="cpu")
    answers = predict(smiles)
    predict.save_pretrained(again)
    predict.model.save_pretrained(again + "-model")
    print(json.dumps([[t["value"] for t in answer["predictions"].values()] for answer in answers]))
"""


@pytest.mark.parametrize("kind", ["molecules", "ensemble", "atoms"])
def test_a_saved_folder_predicts_the_same_without_the_package_and_saved_again(tmp_path, kind):
    model_class = MoleBlendForTokenClassification if kind == "atoms" else MoleBlendForSequenceClassification
    members = [fine_tuned(model_class, target_transforms=["log10", "none"]) for _ in range(2)]
    model = MoleBlendEnsembleForSequenceClassification.from_members(members) if kind == "ensemble" else members[0]
    folder, again = str(tmp_path / "saved"), str(tmp_path / "again")
    of(model, max_atoms=77).save_pretrained(folder)
    with torch.no_grad():
        batch = MoleBlendProcessor()(SMILES)
        expected = list(model(**batch).logits.double().numpy())
    if kind == "atoms":
        sizes = batch["attention_mask"].sum(1)
        expected = [logits[:size].T for logits, size in zip(expected, sizes, strict=True)]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, json.dumps([folder, again, SMILES])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for line in result.stdout.splitlines()[-2:]:
        for found, values in zip(json.loads(line), expected, strict=True):
            np.testing.assert_allclose(found, values, atol=1e-6, rtol=1e-6)


def test_columns_are_many_molecules_and_an_empty_list_is_none():
    predict = MoleBlendPipeline(model=fine_tuned(), feature_extractor=MoleBlendProcessor())
    expected = predict(SMILES)
    column = datasets.Dataset.from_dict({"smiles": SMILES})["smiles"]
    for many in (np.array(SMILES), pd.Series(SMILES), column):
        assert predict(many) == expected
    assert predict([]) == []
    with pytest.raises(ValueError, match=r"is a table of shape \(2, 1\)\. Pass the column"):
        predict(pd.DataFrame({"C": SMILES[:2]}))
