"""MoleBlendConfig: round trip, and values that make no sense fail at construction with the remedy."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config

from moleblend_hf import MoleBlendConfig, MoleBlendEnsembleConfig, MoleBlendForSequenceClassification
from moleblend_hf.configuration_moleblend import MAX_PATH_BONDS
from moleblend_hf.featurization_moleblend import ATOM_FEATURE_SIZES, BOND_STEREO, BOND_TYPES
from moleblend_hf.graphs_moleblend import MAX_PATH_BONDS as MAX_PATH_BONDS_OF_THE_PROCESSOR


def test_defaults_are_the_base_model_of_the_paper():
    config = MoleBlendConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 768, 768)
    assert (config.num_attention_heads, config.num_distance_kernels) == (32, 128)
    assert config.blend_probabilities == [0.2, 0.2, 0.6]
    assert config.loss_weights == [0.1, 0.1, 0.5, 6.0]


def test_vocabularies_are_those_of_the_featurizer():
    config = MoleBlendConfig()
    assert tuple(config.atom_vocabulary_sizes) == ATOM_FEATURE_SIZES
    assert config.bond_vocabulary_sizes == [len(BOND_TYPES), len(BOND_STEREO), 2]
    assert MAX_PATH_BONDS == MAX_PATH_BONDS_OF_THE_PROCESSOR


def test_saved_and_loaded_configs_are_equal(tmp_path):
    targets = {
        "target_means": [1.0, 2.0],
        "target_scales": [0.5, 3.0],
        "target_units": ["eV", "debye"],
        "target_transforms": ("none", "log10"),
        "conformal_coverage": 0.9,
        "conformal_quantiles": [0.7, None],
    }
    config = tiny_config(id2label={0: "gap", 1: "mu"}, label2id={"gap": 0, "mu": 1}, **targets)
    config.save_pretrained(tmp_path)
    assert MoleBlendConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    json.dumps(config.to_dict())
    ensemble = MoleBlendEnsembleConfig(num_members=3, num_labels=2, **targets)
    ensemble.save_pretrained(tmp_path)
    assert MoleBlendEnsembleConfig.from_pretrained(tmp_path).to_dict() == ensemble.to_dict()
    assert ensemble.auto_map.keys() < config.auto_map.keys()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """Folder of a model of two targets, and the model."""
    folder = tmp_path_factory.mktemp("finetuned")
    model = MoleBlendForSequenceClassification(
        tiny_config(
            problem_type="regression",
            id2label={0: "gap", 1: "mu"},
            label2id={"gap": 0, "mu": 1},
            target_means=[1.0, 2.0],
            target_scales=[0.5, 3.0],
            target_units=["eV", "debye"],
            target_transforms=["none", "log10"],
            conformal_coverage=0.9,
            conformal_quantiles=[0.7, None],
        )
    )
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_labels": 3},
            {"target_means": None, "target_units": None, "id2label": {i: f"LABEL_{i}" for i in range(3)}},
        ),
        (
            {"num_labels": 1, "target_means": [7.0], "target_scales": [2.0], "target_units": ["mol/L"]},
            {"target_means": [7.0], "target_units": ["mol/L"], "id2label": {0: "LABEL_0"}},
        ),
        (
            {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
            {"target_means": None, "target_units": None, "id2label": {0: "a", 1: "b", 2: "c"}},
        ),
        (
            {"num_labels": 3, "problem_type": "single_label_classification"},
            {"target_means": None, "problem_type": "single_label_classification"},
        ),
    ],
    ids=["number", "number-and-scales", "names", "classes"],
)
def test_other_targets_leave_those_of_the_checkpoint_behind(finetuned, changes, expected):
    """The encoder and the inner layer of the head come along, and nothing that was true of the old targets does."""
    folder, trained = finetuned
    model = MoleBlendForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **changes)
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert (
        model.config.target_transforms is model.config.conformal_quantiles is model.config.conformal_coverage is None
    )
    assert torch.equal(model.classifier.dense.weight, trained.classifier.dense.weight)
    assert model.classifier.out_proj.out_features == model.config.num_labels != 2


def test_what_is_left_behind_is_said(finetuned, caplog):
    MoleBlendConfig.from_pretrained(finetuned[0], num_labels=3)
    assert "The checkpoint has 2 targets and is asked for 3" in caplog.text
    assert "target_means, target_scales, target_units, target_transforms, conformal_quantiles" in caplog.text
    caplog.clear()
    MoleBlendConfig.from_pretrained(finetuned[0], num_labels=2)
    tiny_config().save_pretrained(finetuned[0] / "base")
    MoleBlendConfig.from_pretrained(finetuned[0] / "base", num_labels=3)
    assert caplog.text == ""


def test_two_targets_without_names_leave_theirs_behind_too(tmp_path):
    """transformers does not save the names of two labels where they are its own."""
    tiny_config(num_labels=2, target_means=[0.0, 1.0], target_scales=[1.0, 1.0]).save_pretrained(tmp_path)
    config = MoleBlendConfig.from_pretrained(tmp_path, num_labels=1)
    assert (config.num_labels, config.target_means) == (1, None)


def test_as_many_targets_keep_what_the_checkpoint_says(finetuned):
    config = MoleBlendConfig.from_pretrained(finetuned[0], num_labels=2, target_means=(4.0, 5.0))
    assert (config.target_means, config.target_scales) == ([4.0, 5.0], [0.5, 3.0])
    assert config.id2label == {0: "gap", 1: "mu"}


def test_overrides_that_do_not_fit_the_checkpoint_are_an_error(finetuned):
    with pytest.raises((StrictDataclassError, ValueError), match="`target_transforms` is for regression targets"):
        MoleBlendConfig.from_pretrained(finetuned[0], problem_type="multi_label_classification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 100}, r"`hidden_size` \(100\) is not a multiple of `num_attention_heads` \(32\)"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; set it to 1 or more"),
        ({"hidden_size": "768"}, "expected int"),
        ({"attention_dropout": 1.0}, r"`attention_dropout` is 1.0; set it to a probability in \[0, 1\)"),
        ({"noise_std": -0.1}, "`noise_std` is -0.1; set it to a finite number of 0 or more"),
        ({"blend_probabilities": [0.5, 0.5]}, "give 3 probabilities that add up to 1"),
        ({"blend_probabilities": [0.5, 0.5, 0.5]}, "give 3 probabilities that add up to 1"),
        ({"atom_blend_probabilities": [1.5, -0.5]}, "give 2 probabilities that add up to 1"),
        ({"loss_weights": [1, 1.5, 1]}, "give 4 finite weights of 0 or more"),
        ({"bond_class_sizes": [4, 7, 2]}, "a class without a value to predict"),
        ({"bond_class_sizes": [4, 3]}, "give 3 positive sizes"),
        ({"bond_vocabulary_sizes": [5, 6]}, r"`bond_vocabulary_sizes` is \[5, 6\]; give \[5, 6, 2\]"),
        ({"bond_vocabulary_sizes": [5, 6, 3]}, r"`bond_vocabulary_sizes` is \[5, 6, 3\]; give \[5, 6, 2\]"),
        ({"max_path_bonds": 9}, "`max_path_bonds` is 9; set it to 8 or less"),
        ({"hidden_act": "gleu"}, '`hidden_act` is "gleu"; there are gelu, '),
        ({"distance_feature_scale": float("nan")}, "`distance_feature_scale` is nan; set it to a finite number"),
        ({"num_labels": 0}, "`num_labels` is 0; set it to 1 or more"),
        ({"readout": "max"}, "graph_token"),
        ({"relative_position_target": "angle"}, "direction"),
        ({"num_shortest_path_classes": 1}, "set it to 2 or more"),
        ({"num_shortest_path_distances": 3}, "at least 4 rows"),
        ({"num_shortest_path_distances": 513}, "at most 512: the processor writes 510 for unreachable"),
        ({"target_means": [0.0], "num_labels": 1}, "give both or neither"),
        ({"target_means": [0.0], "target_scales": [1.0], "num_labels": 2}, "has 1 entries for 2 labels"),
        ({"target_means": [0.0], "target_scales": [0.0], "num_labels": 1}, "each must be positive and finite"),
        ({"target_transforms": ["log10"]}, "`target_transforms` has 1 entries for 2 labels; give 2"),
        ({"target_transforms": ["log", "none"]}, '"log"; there are none, log10, signed_log10'),
        (
            {"target_transforms": ["log10", "none"], "problem_type": "multi_label_classification"},
            "`target_transforms` is for regression targets",
        ),
        ({"conformal_coverage": 0.9}, "`conformal_coverage` and `conformal_quantiles` belong together"),
        ({"conformal_coverage": 90.0, "conformal_quantiles": [1.0, 1.0]}, "between 0 and 1"),
        ({"conformal_coverage": 0.9, "conformal_quantiles": [1.0]}, "`conformal_quantiles` has 1 entries"),
        ({"conformal_coverage": 0.9, "conformal_quantiles": [None, -1.0]}, "a finite number of 0 or more, or None"),
        (
            {
                "conformal_coverage": 0.9,
                "conformal_quantiles": [0.5, 0.5],
                "problem_type": "single_label_classification",
            },
            "give 1, or drop it with None",
        ),
        (
            {
                "target_means": [0.0, 0.0],
                "target_scales": [1.0, 1.0],
                "num_labels": 2,
                "problem_type": "multi_label_classification",
            },
            "`target_means` is for regression targets",
        ),
    ],
)
def test_values_that_make_no_sense_are_an_error(changes, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        MoleBlendConfig(**changes)


def test_no_targets_are_an_error_for_a_checkpoint_too(finetuned):
    with pytest.raises((StrictDataclassError, ValueError), match="`num_labels` is 0; set it to 1 or more"):
        MoleBlendConfig.from_pretrained(finetuned[0], num_labels=0)


def test_an_ensemble_has_members():
    with pytest.raises((StrictDataclassError, ValueError), match="`num_members` is 0; set it to 1 or more"):
        MoleBlendEnsembleConfig(num_members=0)
