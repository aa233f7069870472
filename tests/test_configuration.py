"""MoleBlendConfig: round trip, and values that make no sense fail at construction with the remedy."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config

from moleblend_hf import MoleBlendConfig
from moleblend_hf.featurization_moleblend import ATOM_FEATURE_SIZES, BOND_STEREO, BOND_TYPES


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


def test_saved_and_loaded_configs_are_equal(tmp_path):
    config = tiny_config(num_labels=2, target_means=[1.0, 2.0], target_scales=[0.5, 3.0], target_units=["eV", "debye"])
    config.save_pretrained(tmp_path)
    assert MoleBlendConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    json.dumps(config.to_dict())


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
        ({"bond_vocabulary_sizes": [5, 6]}, "give 3 positive sizes"),
        ({"readout": "max"}, "graph_token"),
        ({"relative_position_target": "angle"}, "direction"),
        ({"num_shortest_path_classes": 1}, "set it to 2 or more"),
        ({"num_shortest_path_distances": 3}, "at least 4 rows"),
        ({"target_means": [0.0], "num_labels": 1}, "give both or neither"),
        ({"target_means": [0.0], "target_scales": [1.0], "num_labels": 2}, "has 1 entries for 2 labels"),
        ({"target_means": [0.0], "target_scales": [0.0], "num_labels": 1}, "each must be positive and finite"),
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
