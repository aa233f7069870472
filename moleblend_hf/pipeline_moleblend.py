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
"""`pipeline("molecular-property-prediction")`: molecules to what a fine-tuned model predicts for them, or to embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .molecules_moleblend import without_column
from .prediction_moleblend import (
    GraphMemoryError,
    Predictions,
    embed_graphs,
    predict_graphs,
    prediction_type,
    predicts_atoms,
    shown_modality,
    target_names,
)

TASK = "molecular-property-prediction"
OUTPUTS = ("prediction", "molecule_embedding", "atom_embeddings")


class MoleBlendPipeline(Pipeline):
    r"""
    Predicts properties of molecules, or embeds them: one dict a molecule, in order. A molecule that cannot be read has an
    `error` in its place and stops nothing.

    `save_pretrained` saves the model, the processor and this code, so that the folder loads by
    `pipeline(model=folder, trust_remote_code=True)` where this package is not installed.

    Args:
        model (`MoleBlendForSequenceClassification`, `MoleBlendForTokenClassification` or
            `MoleBlendEnsembleForSequenceClassification`): a fine-tuned model.
        feature_extractor (`MoleBlendProcessor`): the processor of its checkpoint.
        batch_size (`int`, *optional*, defaults to 64): molecules in a batch, at most.

    Called with a molecule (SMILES, RDKit molecule or `(symbols, coordinates)`) or a list of them, and
        output (`str`, *optional*, defaults to `"prediction"`): or `"molecule_embedding"` or `"atom_embeddings"`.

    Returns a dict a molecule with
        - **predictions** -- for each target, or each class, by its name: `value` in the target's own unit, or a probability;
          `unit`, where there is one; `ensemble_spread` and `conformer_spread`, sample standard deviations, where there are
          several; `lower` and `upper` ends of the conformal interval, or for a binary target the `prediction_set` of its
          values, where the checkpoint is calibrated.
        - **prediction**, **prediction_set** -- the likeliest class, and those of the conformal prediction set, with classes.
          Of a model of atoms, each of these but `unit` is a list: one for each atom in the order of the input, hydrogens
          that are dropped left out, those that are added at its end.
        - **molecule_embedding** -- `(hidden_size,)`, in place of all this.
        - **atom_embeddings** -- `(num_atoms, hidden_size)` in the atom order of the input, in place of all this.
        - **modality** -- what the model was shown of the molecule: `"2d"`, `"3d"` or `"2d+3d"`.
        - **error** -- why there is nothing for this molecule, else `None`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> predict = pipeline(model="checkpoints/esol", trust_remote_code=True)
    >>> predict(["CCO", "c1ccccc1"])[0]["predictions"]["solubility"]["value"]
    ```
    """

    feature_extractor: Any

    _load_feature_extractor: Any = True
    _load_image_processor: Any = False
    _load_processor: Any = False
    _load_tokenizer: Any = False
    _load_video_processor: Any = False

    def __init__(self, model: Any, *args: Any, batch_size: int = 64, **kwargs: Any):
        super().__init__(model, *args, batch_size=batch_size, **kwargs)
        # By its name: from a saved folder it is another class than in this package.
        if type(model).__name__ == "MoleBlendForTokenClassification":
            self._registered_impl = {TASK: {"impl": type(self), "pt": (AutoModelForTokenClassification,)}}
        elif predicts_atoms(model.config):
            raise ValueError(
                "The checkpoint predicts for atoms, but was loaded as a model of molecules. Load it with "
                "AutoModelForTokenClassification and pass it as `model`. If it has been trained for molecules since, set "
                "`model.config.architectures` to None."
            )
        # `pipeline()` leaves classes in the config that it loaded, which could then not be saved.
        for info in getattr(model.config, "custom_pipelines", {}).values():
            info["pt"] = [getattr(auto_class, "__name__", auto_class) for auto_class in info["pt"]]

    def _sanitize_parameters(self, output: str | None = None, **unknown: Any) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(f"{type(self).__name__} has no parameter {sorted(unknown)[0]!r}. It takes `output`.")
        if output not in (None, *OUTPUTS):
            raise ValueError(f"`output` is {output!r}, but has to be one of {', '.join(map(repr, OUTPUTS))}.")
        return {}, {} if output is None else {"output": output}, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers a molecule, or many: a list, a generator, a dataset of them, or a column of NumPy, pandas or datasets."""
        inputs = without_column(inputs)  # which transformers would take for one molecule
        if isinstance(inputs, list) and not inputs:  # transformers would look at its first
            return []
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the graph of a molecule, or why there is none; graphs are padded when their batch is known."""
        try:
            return {"graph": self.feature_extractor.featurize(input_), "error": None}
        except ValueError as error:
            # A MoleculeError, of the processor's own module: that may be another copy than the one beside this file.
            if not (hasattr(error, "reason") and hasattr(error, "remedy")):
                raise
            return {"graph": None, "error": error.reason}

    def _forward(self, input_tensors: dict[str, Any], output: str = "prediction") -> Any:  # type: ignore[override]
        graphs, errors = input_tensors["graph"], input_tensors["error"]
        if isinstance(graphs, list):
            return {"answer": self._answers(graphs, errors, output)}
        return {"answer": self._answers([graphs], [errors], output)[0]}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: dict) -> dict[str, Any]:
        return model_outputs["answer"]

    def _answers(self, graphs: list, errors: list[str | None], output: str) -> list[dict[str, Any]]:
        """Returns the dict of each molecule."""
        kept = [index for index, graph in enumerate(graphs) if graph is not None]
        errors = list(errors)
        found: list[dict[str, Any]] = []
        while kept and not found:
            batch = [graphs[index] for index in kept]
            try:
                if output == "prediction":
                    found = named_predictions(
                        predict_graphs(self.model, self.feature_extractor, batch), self.model.config
                    )
                else:
                    atoms = output == "atom_embeddings"
                    embeddings = embed_graphs(self.model, self.feature_extractor, batch, atoms=atoms)
                    found = [{output: embedding} for embedding in embeddings]
            except GraphMemoryError as error:
                errors[kept.pop(error.index)] = error.reason
        nothing = {"predictions" if output == "prediction" else output: None}
        answers = [{**nothing, "modality": None, "error": error} for error in errors]
        for index, answer in zip(kept, found, strict=True):
            modality = shown_modality(graphs[index], self.feature_extractor.modality)
            answers[index] = {**answer, "modality": modality, "error": None}
        return answers


def named_predictions(predictions: Predictions, config: Any) -> list[dict[str, Any]]:
    """Returns for each molecule its predictions by the names of the targets; of a model of atoms, lists of them."""
    names, problem_type = target_names(config), prediction_type(config)
    columns = {
        name: getattr(predictions, attribute)
        for name, attribute in (
            ("value", "values"),
            ("ensemble_spread", "ensemble_spread"),
            ("conformer_spread", "conformer_spread"),
            ("lower", "lower"),
            ("upper", "upper"),
        )
    }
    rows: Any = range(len(predictions.values))
    if predictions.num_atoms is not None:
        rows = np.split(np.arange(len(predictions.values)), np.cumsum(predictions.num_atoms)[:-1])
    found = []
    for row in rows:
        by_name: dict[str, Any] = {}
        for index, name in enumerate(names):
            by_name[name] = {key: _plain(column[row, index]) for key, column in columns.items() if column is not None}
            if config.target_units is not None:
                by_name[name]["unit"] = config.target_units[index]
        answer: dict[str, Any] = {"predictions": by_name}
        sets = predictions.prediction_sets
        if problem_type == "single_label_classification":
            answer["prediction"] = np.array(names)[predictions.values[row].argmax(-1)].tolist()
            if sets is not None:
                answer["prediction_set"] = _members(sets[row], names)
        elif sets is not None:
            for index, name in enumerate(names):
                if config.conformal_quantiles[index] is not None:  # or else it holds both, and tells nothing
                    by_name[name]["prediction_set"] = _members(sets[row, index], range(2))
        found.append(answer)
    return found


def _plain(values: Any) -> Any:
    """Returns a number, or a list of those of atoms; None where there is none."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return None if np.isnan(values) else float(values)


def _members(is_in: np.ndarray, classes: Sequence) -> list:
    """Returns the classes in a prediction set, or a list of those of atoms."""
    if is_in.ndim > 1:
        return [_members(row, classes) for row in is_in]
    return [one for one, inside in zip(classes, is_in, strict=True) if inside]


# Also where this file was loaded from a saved folder, so that a pipeline from there can be saved again. The class that was
# loaded last is the registered one.
PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MoleBlendPipeline, pt_model=AutoModelForSequenceClassification, type="multimodal"
)

__all__ = ["MoleBlendPipeline"]
