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

"""Graphs to predictions in the targets' own units, with what is known about how far to trust them; and to embeddings.

Molecules of like size share a batch under a budget of padded tokens and pairs, and results come in the order of the input. A
molecule with several conformers is predicted on each of them; what is returned is the mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .eval_mode_moleblend import eval_mode
from .graphs_moleblend import Budget, MolecularGraph, ragged
from .targets_moleblend import problem_type_of, transformed, untransformed


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions for n molecules, in their order. T targets; with classes, T is 1 and there are C probabilities.

    A model of atoms predicts for n atoms: those of a molecule in the order of its graph, one molecule after the other.

    Attributes:
        values: (n, T) float64 in the targets' own units for regression, probability of class 1 for binary tasks; (n, C)
            probabilities for classes. Mean over conformers and members of an ensemble.
        ensemble_spread: shaped as `values`, sample standard deviation over the members; None without an ensemble.
        conformer_spread: shaped as `values`, sample standard deviation over the conformers, mean over the members; NaN for a
            molecule with fewer than two conformers; None if all are.
        lower: (n, T) lower end of the conformal interval, NaN for a target that is not calibrated; None if none is.
        upper: (n, T) its upper end.
        prediction_sets: (n, T, 2) for binary tasks, (n, C) for classes: whether the class is in the conformal prediction set;
            all are for a target that is not calibrated; None if none is.
        modalities: of molecules, what the model was shown of each: "2d", "3d" or "2d+3d".
        num_atoms: of molecules, how many of the n are atoms of each; None for a model of molecules.
    """

    values: np.ndarray
    ensemble_spread: np.ndarray | None
    conformer_spread: np.ndarray | None
    lower: np.ndarray | None
    upper: np.ndarray | None
    prediction_sets: np.ndarray | None
    modalities: list[str]
    num_atoms: np.ndarray | None = None


class GraphMemoryError(MemoryError):
    """A graph that does not fit into memory even alone: which one, and why, phrased to follow its name."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"Graph {index} {reason}. Leave it out, or use a device with more memory.")
        self.index = index
        self.reason = reason


def predict_graphs(
    model: PreTrainedModel,
    processor: Any,
    graphs: Sequence[MolecularGraph],
    budget: Budget | None = None,
) -> Predictions:
    """
    Returns what a fine-tuned model, or an ensemble, predicts for graphs. See `Predictions`.

    If memory runs out, the batch is halved; a graph that does not fit alone raises `GraphMemoryError`.

    Args:
        model (`MoleBlendForSequenceClassification`, `MoleBlendForTokenClassification` or an ensemble): on any device.
        processor (`MoleBlendProcessor`): that of the checkpoint; its `modality` says what the model is shown.
        graphs (`list[MolecularGraph]`): from `processor.featurize_many`.
        budget (`Budget`, *optional*): padded tokens and pairs of one forward, which one molecule may exceed; left out, what
            suits the model's device.
    """
    config = model.config
    problem_type = prediction_type(config)

    def read(outputs: Any, batch: Sequence[MolecularGraph]) -> list[np.ndarray]:
        logits = outputs.get("member_logits")
        # On the CPU, since Apple's GPUs have no float64.
        logits = (outputs.logits.unsqueeze(0) if logits is None else logits).cpu().double()
        if problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif problem_type == "single_label_classification":
            logits = logits.softmax(-1)
        logits = logits.numpy()  # (M, B, T), of atoms (M, B, N, T)
        of_atoms = logits.ndim == 4
        return [logits[:, row, : graph.num_atoms] if of_atoms else logits[:, row] for row, graph in enumerate(batch)]

    found = _over_conformers(model, processor, graphs, read, budget)
    of_atoms = found[0].ndim == 4  # (conformers, M, atoms, T), of molecules (conformers, M, T)
    joined = np.concatenate if of_atoms else np.stack
    means = joined([each.mean(0) for each in found], axis=1)  # (M, n, T)
    values = means.mean(0)
    conformer_spread = None
    if any(len(each) > 1 for each in found):
        deviations = [
            each.std(0, ddof=1).mean(0) if len(each) > 1 else np.full(each.shape[2:], np.nan) for each in found
        ]
        conformer_spread = joined(deviations)
    lower = upper = prediction_sets = None
    if any(quantile is not None for quantile in config.conformal_quantiles or ()):
        quantiles = np.array([np.nan if q is None else q for q in config.conformal_quantiles])
        if problem_type == "regression":
            lower, upper = _interval(values, quantiles, config)
        else:
            is_binary = problem_type == "multi_label_classification"
            probabilities = np.stack([1 - values, values], axis=-1) if is_binary else values
            threshold = quantiles[:, None] if is_binary else quantiles
            prediction_sets = ~(1 - probabilities > threshold)
    return Predictions(
        values=values,
        ensemble_spread=means.std(0, ddof=1) if len(means) > 1 else None,
        conformer_spread=conformer_spread,
        lower=lower,
        upper=upper,
        prediction_sets=prediction_sets,
        modalities=[shown_modality(graph, processor.modality) for graph in graphs],
        num_atoms=np.array([graph.num_atoms for graph in graphs]) if of_atoms else None,
    )


def embed_graphs(
    model: PreTrainedModel,
    processor: Any,
    graphs: Sequence[MolecularGraph],
    atoms: bool = False,
    budget: Budget | None = None,
) -> list[np.ndarray]:
    """
    Returns an embedding for each graph: `(hidden_size,)`, the state of the graph token, or with `atoms=True` the states of its
    atoms, `(num_atoms, hidden_size)`; float32, mean over conformers.

    Args:
        model (`MoleBlendModel` or a model with a head): no ensemble, whose members have nothing in common but their targets.
        processor (`MoleBlendProcessor`): as in `predict_graphs`.
        graphs (`list[MolecularGraph]`): as in `predict_graphs`.
        atoms (`bool`, *optional*, defaults to `False`): whether to return the embeddings of atoms.
        budget (`Budget`, *optional*): as in `predict_graphs`.
    """
    if hasattr(model, "members"):  # its config would not tell: the members share it
        raise ValueError(
            f"An ensemble of {model.config.num_members} models has no embedding: those of its members are not comparable. Embed with "
            "one of `model.members`, or with the checkpoint of a single model."
        )

    def read(outputs: Any, batch: Sequence[MolecularGraph]) -> list[np.ndarray]:
        states = outputs.last_hidden_state.float().cpu().numpy()
        # Copies: a view would keep the states of the whole batch, all atoms and padding, until the last batch is done.
        return [
            (state[1 : graph.num_atoms + 1] if atoms else state[0]).copy()
            for state, graph in zip(states, batch, strict=True)
        ]

    found = _over_conformers(model.base_model, processor, graphs, read, budget)
    return [states.mean(0) for states in found]


def prediction_type(config: Any) -> str:
    """Returns the kind of problem that a config's outputs solve; raises where only labels would tell."""
    if (
        config.problem_type is None
        and config.num_labels > 1
        and not (config.target_scales or config.target_transforms)
    ):
        raise ValueError(
            f"`problem_type` of the config is None with {config.num_labels} labels, so that it is not known what the outputs "
            'mean. Set it to "regression", "multi_label_classification" or "single_label_classification".'
        )
    return problem_type_of(config)


def predicts_atoms(config: Any) -> bool:
    """Returns whether a saved config is that of a model of atoms; the auto classes of both kinds would load its weights."""
    return "MoleBlendForTokenClassification" in (config.architectures or ())


def target_names(config: Any) -> list[str]:
    """Returns the names of a config's targets, or of its classes."""
    return [config.id2label[index] for index in range(config.num_labels)]


def shown_modality(graph: MolecularGraph, modality: str) -> str:
    """Returns what a model of that modality is shown of a graph."""
    if modality == "2d" or len(graph.coordinates) == 0:
        return "2d"
    return "3d" if modality == "3d" else "2d+3d"


# Batches


def _over_conformers(
    model: Any,
    processor: Any,
    graphs: Sequence[MolecularGraph],
    read: Callable[[Any, Sequence[MolecularGraph]], Any],
    budget: Budget | None,
) -> list[np.ndarray]:
    """Returns for each graph what `read` takes from the outputs for each of its conformers, (conformers, ...)."""
    if len(graphs) == 0:
        raise ValueError("There are no graphs to predict for. Pass at least one.")
    if processor.modality == "3d" and (flat := [i for i, graph in enumerate(graphs) if len(graph.coordinates) == 0]):
        raise ValueError(
            f"Graph {flat[0]} has no coordinates, which modality='3d' needs. Featurize it with modality='3d' or give it "
            "coordinates."
        )
    # CODEPATH: a 2D model is shown no conformer, however many a graph has.
    counts = [1 if processor.modality == "2d" else max(1, len(graph.coordinates)) for graph in graphs]
    owners, conformers = ragged(np.array(counts))
    sizes = np.array([graph.num_atoms for graph in graphs])[owners]
    found: list[Any] = [None] * len(owners)
    batches = list((budget or Budget.on(model.device.type)).cut(sizes))[::-1]
    with eval_mode(model):
        while batches:
            positions = batches.pop()
            batch = [graphs[owner] for owner in owners[positions]]
            results = None
            try:
                with torch.inference_mode():
                    inputs = processor.pad(batch, conformer_index=conformers[positions])
                    results = read(model(**inputs.to(model.device)), batch)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(positions) == 1:
                    owner = int(owners[positions[0]])
                    reason = f"has {graphs[owner].num_atoms} atoms, which do not fit into the memory of {model.device} alone"
                    raise GraphMemoryError(owner, reason) from error
            if results is None:  # here, where the exception no longer keeps the tensors of the batch alive
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
                half = len(positions) // 2
                batches += [positions[half:], positions[:half]]
                continue
            for position, result in zip(positions, results, strict=True):
                found[position] = result
    stops = np.cumsum(counts)
    return [np.stack(found[stop - count : stop]) for count, stop in zip(counts, stops, strict=True)]


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: PyTorch's allocator on the CPU has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


# What is made of the values


def _interval(values: np.ndarray, quantiles: np.ndarray, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of intervals whose half widths are `quantiles` where the targets are transformed."""
    centre, half = transformed(torch.from_numpy(values), config), torch.from_numpy(quantiles)
    return untransformed(centre - half, config).numpy(), untransformed(centre + half, config).numpy()


__all__ = ["GraphMemoryError", "Predictions", "embed_graphs", "predict_graphs"]
