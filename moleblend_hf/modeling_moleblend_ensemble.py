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
"""An ensemble of fine-tuned MoleBLEND models as one model: one folder, one forward, the members' mean and their spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import auto_docstring, can_return_tuple

from .configuration_moleblend import MoleBlendEnsembleConfig
from .modeling_moleblend import MODEL_INPUTS_DOCSTRING, MoleBlendForSequenceClassification, MoleBlendPreTrainedModel
from .targets_moleblend import ProblemType, PropertyKwargs, problem_type_of

# What members may differ in: where they come from, and their own calibration, which says nothing about the ensemble's.
NOT_SHARED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "conformal_coverage",
    "conformal_quantiles",
    "custom_pipelines",
    "dtype",
    "model_type",
    "transformers_version",
)


@auto_docstring(custom_intro="Output of [`MoleBlendEnsembleForSequenceClassification`].")
@dataclass
class MoleBlendEnsembleOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Mean of the members' losses.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Regression: mean of the members' values, in the targets' own units. Classification: logits of the mean of the
            members' probabilities.
        member_logits (`torch.FloatTensor` of shape `(num_members, batch_size, num_labels)`):
            What each member says.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States after the embeddings and after each layer, `(num_members, batch_size, num_atoms + 1, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention probabilities of each layer, `(num_members, batch_size, num_heads, num_atoms + 1, num_atoms + 1)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    member_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def mean_logits(member_logits: torch.Tensor, problem_type: ProblemType) -> torch.Tensor:
    """`(M, B, T)` to `(B, T)`: mean of values, or logits of the mean probability without leaving the logarithm."""
    if problem_type == "regression":
        return member_logits.mean(0)
    log_num_members = math.log(len(member_logits))
    if problem_type == "single_label_classification":
        return F.log_softmax(member_logits, dim=-1).logsumexp(0) - log_num_members
    return F.logsigmoid(member_logits).logsumexp(0) - F.logsigmoid(-member_logits).logsumexp(0)


@auto_docstring(
    custom_intro="""
    Several [`MoleBlendForSequenceClassification`] of one architecture and the same targets, whose mean is the prediction.
    """
)
class MoleBlendEnsembleForSequenceClassification(MoleBlendPreTrainedModel):
    config: MoleBlendEnsembleConfig

    def __init__(self, config: MoleBlendEnsembleConfig):
        super().__init__(config)
        if config.problem_type is None:
            raise ValueError(
                "`problem_type` is None, but an ensemble has to know whether to average values or probabilities; set it to "
                '"regression", "multi_label_classification" or "single_label_classification".'
            )
        self.members = nn.ModuleList(MoleBlendForSequenceClassification(config) for _ in range(config.num_members))
        self.post_init()

    @classmethod
    def from_members(cls, models: Sequence[MoleBlendForSequenceClassification]) -> Self:
        """An ensemble of copies of fine-tuned models, in their order, on the device of the first.

        Their configs must agree, means and scales of the targets included. Conformal calibrations of the members are left
        behind: they do not hold for the mean.
        """
        if not models:
            raise ValueError("There are no models to make an ensemble of; give one or more.")
        shared, *others = (
            {k: v for k, v in model.config.to_dict().items() if k not in NOT_SHARED} for model in models
        )
        for index, other in enumerate(others, start=1):
            if different := sorted(name for name in shared | other if shared.get(name) != other.get(name)):
                raise ValueError(
                    f"Model {index} differs from model 0 in {different}; the members of an ensemble share architecture and "
                    "targets. Fine-tune them with one configuration, targets standardised alike."
                )
        ensemble = cls(MoleBlendEnsembleConfig(**shared, num_members=len(models)))
        for member, model in zip(ensemble.members, models, strict=True):
            member.load_state_dict(model.state_dict())
        ensemble.to(models[0].device, models[0].dtype)  # type: ignore[arg-type]
        return ensemble.train(models[0].training)

    @can_return_tuple
    @auto_docstring(
        custom_args=MODEL_INPUTS_DOCSTRING
        + r"""
    labels (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
        Targets in their own units, or 0 / 1; for classes `(batch_size,)`. Missing ones are NaN, or -100 where labels are
        integers.
        `label_weights`, a tensor of the same shape, weighs each label in the loss.
"""
    )
    def forward(
        self,
        atom_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        degree: torch.Tensor | None = None,
        shortest_path_distance: torch.Tensor | None = None,
        path_bond_types: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        coordinates_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[PropertyKwargs],
    ) -> MoleBlendEnsembleOutput:
        r"""
        Example:

        ```python
        >>> from moleblend_hf import MoleBlendConfig, MoleBlendForSequenceClassification, MoleBlendProcessor
        >>> from moleblend_hf import MoleBlendEnsembleForSequenceClassification

        >>> config = MoleBlendConfig(num_labels=1, problem_type="regression")
        >>> models = [MoleBlendForSequenceClassification(config) for _ in range(3)]
        >>> ensemble = MoleBlendEnsembleForSequenceClassification.from_members(models)
        >>> outputs = ensemble(**MoleBlendProcessor()(["CCO", "c1ccccc1"], return_tensors="pt"))
        >>> spread = outputs.member_logits.std(0)
        ```
        """
        outputs = [
            member(
                atom_features,
                attention_mask=attention_mask,
                degree=degree,
                shortest_path_distance=shortest_path_distance,
                path_bond_types=path_bond_types,
                coordinates=coordinates,
                coordinates_mask=coordinates_mask,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
            for member in self.members
        ]

        def by_layer(name: str) -> tuple[torch.Tensor, ...] | None:
            members = [output[name] for output in outputs if output.get(name) is not None]
            return tuple(torch.stack(layer) for layer in zip(*members, strict=True)) or None

        member_logits = torch.stack([output.logits for output in outputs])
        return MoleBlendEnsembleOutput(
            loss=None if labels is None else torch.stack([output.loss for output in outputs]).mean(),
            logits=mean_logits(member_logits, problem_type_of(self.config)),
            member_logits=member_logits,
            hidden_states=by_layer("hidden_states"),
            attentions=by_layer("attentions"),
        )


__all__ = ["MoleBlendEnsembleForSequenceClassification", "MoleBlendEnsembleOutput"]
