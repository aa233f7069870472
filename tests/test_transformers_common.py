"""transformers' own `ModelTesterMixin` on the models.

It lives in the source of transformers, not in its wheel:

    pip download --no-deps --no-binary :all: --no-build-isolation transformers==VERSION
    tar -xzf transformers-VERSION.tar.gz
    TRANSFORMERS_SOURCE=transformers-VERSION pytest tests/test_transformers_common.py

`.ci/run` does that at the pinned version; without TRANSFORMERS_SOURCE the module is skipped. It never looks at the attention
bias or at geometry, which test_modeling.py does.
"""

import os
import sys
import types
import unittest
from typing import ClassVar

import pytest
import torch
from tiny import tiny_config
from transformers.models.auto import modeling_auto

from moleblend_hf import (
    MoleBlendConfig,
    MoleBlendEnsembleConfig,
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
)

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("set TRANSFORMERS_SOURCE to an unpacked source of transformers", allow_module_level=True)
sys.path.insert(0, SOURCE)
# The source distribution leaves out the packages of tests that the common tests import for generation and exporters.
for name, mixin in (
    ("generation.test_utils", "GenerationTesterMixin"),
    ("exporters.test_export", "ExportTesterMixin"),
):
    package, _, _ = name.partition(".")
    sys.modules[f"tests.{package}"] = types.ModuleType(f"tests.{package}")
    sys.modules[f"tests.{name}"] = types.ModuleType(f"tests.{name}")
    setattr(sys.modules[f"tests.{name}"], mixin, type(mixin, (), {}))
# This repository's tests are no package, so that the name is free for those of transformers.
from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

# The tester asks transformers' own lists which models take labels and which have no loss.
modeling_auto.MODEL_MAPPING_NAMES["moleblend"] = "MoleBlendModel"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["moleblend"] = "MoleBlendForSequenceClassification"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["moleblend_ensemble"] = (
    "MoleBlendEnsembleForSequenceClassification"
)
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["moleblend"] = "MoleBlendForTokenClassification"


class MoleBlendModelTester:
    """Tiny batches of random atoms with all relations."""

    def __init__(self, parent, config_changes, batch_size=3, num_atoms=7):
        self.parent = parent
        self.config_changes = config_changes
        self.batch_size = batch_size
        self.num_atoms = num_atoms
        self.seq_length = num_atoms + 1  # the graph token
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.num_labels = config.num_labels
        self.is_training = True

    def get_config(self):
        config = tiny_config(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_labels=2)
        return self.parent.config_class(**{**config.to_diff_dict(), "auto_map": None, **self.config_changes})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        sizes = torch.tensor(config.atom_vocabulary_sizes)
        shape = (self.batch_size, self.num_atoms)
        atom_features = 1 + (torch.rand(*shape, len(sizes)) * sizes).long()
        distances = torch.randint(1, 6, (*shape, self.num_atoms))
        distances = distances.masked_fill(torch.eye(self.num_atoms, dtype=torch.bool), 0)
        hops = torch.arange(config.max_path_bonds) < distances.unsqueeze(-1)
        inputs = {
            "atom_features": atom_features,
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "degree": torch.randint(0, 5, shape),
            "shortest_path_distance": distances,
            "path_bond_types": torch.randint(1, 61, (*distances.shape, config.max_path_bonds)) * hops,
            "coordinates": 3 * torch.randn(*shape, 3),
        }
        return config, inputs


class MoleBlendCommonTest(ModelTesterMixin, unittest.TestCase):
    config_class = MoleBlendConfig
    config_changes: ClassVar = {}
    all_model_classes = (
        MoleBlendModel,
        MoleBlendForPreTraining,
        MoleBlendForSequenceClassification,
        MoleBlendForTokenClassification,
    )
    test_resize_embeddings = False
    test_missing_keys = False

    def setUp(self):
        self.model_tester = MoleBlendModelTester(self, self.config_changes)

    @unittest.skip("it resizes `vocab_size`, which MoleBLEND does not have; the next test changes `num_labels`")
    def test_load_with_mismatched_shapes(self):
        pass

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """With the draws of pretraining given, its model is as deterministic as the others; labels of atoms fit the atoms."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is MoleBlendForTokenClassification:
            inputs["labels"] = torch.zeros_like(inputs["attention_mask"])  # of atoms: the graph token has none
        if model_class is MoleBlendForPreTraining:
            generator = torch.Generator().manual_seed(0)
            size, num_atoms, _ = inputs["atom_features"].shape
            pairs = torch.randint(0, 3, (num_atoms, num_atoms), generator=generator)
            inputs["pair_modality_ids"] = pairs.repeat(size, 1, 1)
            inputs["atom_modality_ids"] = torch.randint(0, 2, (num_atoms,), generator=generator).repeat(size, 1)
            inputs["coordinate_noise"] = 0.2 * torch.randn(num_atoms, 3, generator=generator).repeat(size, 1, 1)
        return inputs


class MoleBlendEnsembleCommonTest(MoleBlendCommonTest):
    config_class = MoleBlendEnsembleConfig
    config_changes: ClassVar = {"num_members": 2, "problem_type": "single_label_classification"}
    all_model_classes = (MoleBlendEnsembleForSequenceClassification,)

    @unittest.skip("each member has embeddings of its own")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("the states returned are the members', stacked: no gradient passes through the copy")
    def test_retain_grad_hidden_states_attentions(self):
        pass
