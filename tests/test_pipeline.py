"""The pipeline "molecular-property-prediction": named answers, and the model's numbers wherever it is loaded."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from rdkit import Chem
from tiny import SMILES, tiny_config
from transformers import pipeline

from moleblend_hf import (
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendPipeline,
    MoleBlendProcessor,
)

TARGETS = {"id2label": {0: "gap", 1: "mu"}, "label2id": {"gap": 0, "mu": 1}}


def fine_tuned(**changes) -> MoleBlendForSequenceClassification:
    config = tiny_config(**{"problem_type": "regression", "initializer_range": 0.3, **TARGETS, **changes})
    return MoleBlendForSequenceClassification(config).eval()


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
    np.testing.assert_allclose(found, expected, atol=1e-6)
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
    assert isinstance(predict, MoleBlendPipeline)
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


@pytest.mark.parametrize("num_members", [0, 2])
def test_a_saved_folder_predicts_the_same_without_the_package_and_saved_again(tmp_path, num_members):
    members = [fine_tuned(target_transforms=["log10", "none"]) for _ in range(max(1, num_members))]
    model = MoleBlendEnsembleForSequenceClassification.from_members(members) if num_members else members[0]
    folder, again = str(tmp_path / "saved"), str(tmp_path / "again")
    of(model, max_atoms=77).save_pretrained(folder)
    with torch.no_grad():
        expected = model(**MoleBlendProcessor()(SMILES)).logits.double().numpy()
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, json.dumps([folder, again, SMILES])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for line in result.stdout.splitlines()[-2:]:
        np.testing.assert_allclose(json.loads(line), expected, atol=1e-6, rtol=1e-6)
