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
"""Between the outputs of a property head and labels in the targets' own units: transforms, standardisation, the loss."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.utils import TransformersKwargs

from .blending_moleblend import IGNORED_LABEL
from .configuration_moleblend import MoleBlendConfig

ProblemType = Literal["regression", "multi_label_classification", "single_label_classification"]
Transform = Callable[[torch.Tensor], torch.Tensor]


class PropertyKwargs(TransformersKwargs, total=False):
    """Keyword arguments of the models with a property head.

    The weights are no named argument of `forward`: the Trainer takes each one called "label" for labels that must be there.

    Attributes:
        label_weights (`torch.FloatTensor` shaped as `labels`, *optional*):
            Weight of each label in the loss, `sum(weight * loss) / sum(weight)`. Left out, all weigh the same.
    """

    label_weights: torch.Tensor | None


# Each transform of `config.target_transforms` and its inverse.
TRANSFORMS: dict[str, tuple[Transform, Transform]] = {
    "none": (lambda values: values, lambda values: values),
    "log10": (torch.log10, lambda values: torch.pow(10, values)),
    "signed_log10": (
        lambda values: torch.log1p(values.abs()) / math.log(10) * values.sign(),
        lambda values: torch.expm1(values.abs() * math.log(10)) * values.sign(),
    ),
}


def problem_type_of(config: MoleBlendConfig, labels: torch.Tensor | None = None) -> ProblemType:
    """`config.problem_type`, or what the rest of the config and the kind of the labels say where it is `None`."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1 or config.target_scales is not None or config.target_transforms is not None:
        return "regression"
    is_class_index = labels is not None and not labels.is_floating_point()
    return "single_label_classification" if is_class_index else "multi_label_classification"


def transformed(values: torch.Tensor, config: MoleBlendConfig) -> torch.Tensor:
    """`values (..., T)` in the targets' own units after `config.target_transforms`; NaN stays NaN."""
    if config.target_transforms is None:
        return values
    columns = zip(config.target_transforms, values.unbind(-1), strict=True)
    return torch.stack([TRANSFORMS[name][0](column) for name, column in columns], dim=-1)


def untransformed(values: torch.Tensor, config: MoleBlendConfig) -> torch.Tensor:
    """The inverse of `transformed`."""
    if config.target_transforms is None:
        return values
    columns = zip(config.target_transforms, values.unbind(-1), strict=True)
    return torch.stack([TRANSFORMS[name][1](column) for name, column in columns], dim=-1)


def units_dtype(device: torch.device) -> torch.dtype:
    """Dtype of values in the targets' own units: fp64, or fp32 on devices that may not have it.

    A mean may be a million times the spread, as of total energies: in fp32 all molecules would have the same value.
    """
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def in_target_units(outputs: torch.Tensor, config: MoleBlendConfig) -> torch.Tensor:
    """Outputs of the head `(..., T)` in the targets' own units, in `units_dtype` if that is any change."""
    # CODEPATH: regression checkpoints fine-tuned with scaled targets; converted ones and classifiers have none.
    if config.target_scales is None and config.target_transforms is None:
        return outputs
    outputs = outputs.to(units_dtype(outputs.device))
    if config.target_scales is not None:
        outputs = outputs * outputs.new_tensor(config.target_scales) + outputs.new_tensor(config.target_means)
    return untransformed(outputs, config)


def property_loss(
    outputs: torch.Tensor, labels: torch.Tensor, config: MoleBlendConfig, label_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean loss over the labels that are there, in fp32; 0 with zero gradient where none is.

    Args:
        outputs (`torch.FloatTensor` of shape `(..., T)`): outputs of the head; regression in standard deviations.
        labels (`torch.Tensor` of shape `(..., T)`):
            In the targets' own units, or 0 / 1; for classes `(...)`. Missing ones are NaN, or -100 where labels are integers.
        config (`MoleBlendConfig`): kind of the problem, and the scales and transforms of its targets.
        label_weights (`torch.FloatTensor` shaped as `labels`, *optional*): the loss is `sum(weight * loss) / sum(weight)`.
    """
    problem_type = problem_type_of(config, labels)
    is_class_index = problem_type == "single_label_classification"
    shape = outputs.shape[:-1] if is_class_index else outputs.shape
    for name, tensor in (("labels", labels), ("label_weights", label_weights)):
        if tensor is not None and tensor.numel() != shape.numel():
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}; expected {tuple(shape)} for {config.num_labels} labels and "
                f'`problem_type="{problem_type}"`. Fill gaps with NaN, or with {IGNORED_LABEL} where labels are integers.'
            )
    labels, outputs = labels.reshape(shape), outputs.float()
    if not labels.is_floating_point():
        labels = labels.long()
    elif is_class_index:  # NaN, where a class is missing, made them so
        labels = labels.nan_to_num(IGNORED_LABEL).long()
    present = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED_LABEL
    if is_class_index:
        losses = F.cross_entropy(
            outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        losses = losses.view(shape)
    else:
        if problem_type == "multi_label_classification":
            labels = labels.masked_fill(~present, 0).to(outputs.dtype)
            losses = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        else:
            labels = transformed(labels.to(torch.promote_types(labels.dtype, outputs.dtype)), config)
            # CODEPATH: as in `in_target_units`.
            if config.target_scales is not None:
                labels = (labels - labels.new_tensor(config.target_means)) / labels.new_tensor(config.target_scales)
            losses = F.mse_loss(outputs, labels.masked_fill(~present, 0).to(outputs.dtype), reduction="none")
    weights = torch.ones_like(losses) if label_weights is None else label_weights.reshape(shape).to(losses.dtype)
    weights = weights.masked_fill(~present, 0)
    total = weights.sum()
    return (weights * losses).sum() / total.masked_fill(total == 0, 1)
