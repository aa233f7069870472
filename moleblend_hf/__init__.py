# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MoleBLEND for Hugging Face transformers. Importing this package registers its classes with the auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
)

from .configuration_moleblend import MoleBlendConfig, MoleBlendEnsembleConfig
from .graphs_moleblend import FlatGraphs, MolecularGraph, PairRelations
from .modeling_moleblend import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendPreTrainedModel,
)
from .modeling_moleblend_ensemble import MoleBlendEnsembleForSequenceClassification
from .molecules_moleblend import MoleculeError, read_sdf
from .pipeline_moleblend import MoleBlendPipeline
from .prediction_moleblend import Predictions, embed_graphs, predict_graphs
from .processing_moleblend import MoleBlendProcessor
from .reconstruction import ReconstructionScores, reconstruction_scores

AutoConfig.register("moleblend", MoleBlendConfig)
AutoModel.register(MoleBlendConfig, MoleBlendModel)
AutoModelForPreTraining.register(MoleBlendConfig, MoleBlendForPreTraining)
AutoModelForSequenceClassification.register(MoleBlendConfig, MoleBlendForSequenceClassification)
AutoModelForTokenClassification.register(MoleBlendConfig, MoleBlendForTokenClassification)
AutoProcessor.register(MoleBlendConfig, MoleBlendProcessor)
AutoFeatureExtractor.register(MoleBlendConfig, MoleBlendProcessor)
AutoConfig.register("moleblend_ensemble", MoleBlendEnsembleConfig)
AutoModelForSequenceClassification.register(MoleBlendEnsembleConfig, MoleBlendEnsembleForSequenceClassification)
AutoProcessor.register(MoleBlendEnsembleConfig, MoleBlendProcessor)
AutoFeatureExtractor.register(MoleBlendEnsembleConfig, MoleBlendProcessor)

# A saved folder carries the code, so that it loads where this package is not installed.
MoleBlendConfig.register_for_auto_class()
MoleBlendModel.register_for_auto_class("AutoModel")
MoleBlendForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MoleBlendForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MoleBlendForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
MoleBlendEnsembleConfig.register_for_auto_class()
MoleBlendEnsembleForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MoleBlendProcessor.register_for_auto_class("AutoProcessor")

__version__ = "0.1.0"

__all__ = [
    "FlatGraphs",
    "MoleBlendConfig",
    "MoleBlendEnsembleConfig",
    "MoleBlendEnsembleForSequenceClassification",
    "MoleBlendForPreTraining",
    "MoleBlendForSequenceClassification",
    "MoleBlendForTokenClassification",
    "MoleBlendModel",
    "MoleBlendPipeline",
    "MoleBlendPreTrainedModel",
    "MoleBlendProcessor",
    "MolecularGraph",
    "MoleculeError",
    "PairRelations",
    "Predictions",
    "ReconstructionScores",
    "embed_graphs",
    "predict_graphs",
    "read_sdf",
    "reconstruction_scores",
]
