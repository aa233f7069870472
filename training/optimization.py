"""Which parameters are trained in fine-tuning, and how fast; and a moving average of those of a pretraining."""

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedConfig, PreTrainedModel


def depth(name: str, config: PreTrainedConfig) -> int:
    """0 for embeddings and attention biases, 1 ... for the encoder's layers, one more for the head."""
    if not name.startswith("moleblend."):
        return config.num_hidden_layers + 1
    _, part, *rest = name.split(".")
    return int(rest[0]) + 1 if part == "layers" else 0


def freeze(model: PreTrainedModel, num_layers: int) -> None:
    """Leave the embeddings and the lowest `num_layers` layers as they are; 0 trains everything."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = num_layers == 0 or depth(name, model.config) > num_layers


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: each layer learns `layer_decay` times as fast as the one above it.

    As in BEiT's and ELECTRA's fine-tuning. Biases and norms, which are vectors, have no weight decay.
    """
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depth(name, model.config), parameter.dim() > 1), []).append(parameter)
    top = model.config.num_hidden_layers + 1
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (top - level),
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (level, is_matrix), parameters in groups.items()
    ]


@torch.no_grad()
def move_average(average: AveragedModel, model: torch.nn.Module, decay: float) -> None:
    """Take weights into their exponential moving average, as `AveragedModel.update_parameters` does.

    That copies its count of updates to the device each time, for which the CPU waits; `average.n_averaged` lies on the CPU.
    """
    averages: list[torch.Tensor] = list(average.module.parameters())
    weights: list[torch.Tensor] = list(model.parameters())
    if average.n_averaged == 0:
        torch._foreach_copy_(averages, weights)
    else:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    average.n_averaged += 1
