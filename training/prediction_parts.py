"""One part of a source -> a file of predictions, a row for each record, in a process that RDKit may take down.

The process that featurizes predicts as well: graphs stay where they are, and all cores work on both.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils import logging

from moleblend_hf import MoleBlendProcessor, MolecularGraph, Predictions, embed_graphs, predict_graphs
from moleblend_hf.checkpoints import keep_lowest_layers, load_whole
from moleblend_hf.graphs_moleblend import Budget
from moleblend_hf.prediction_moleblend import (
    GraphMemoryError,
    prediction_type,
    predicts_atoms,
    shown_modality,
    target_names,
)
from parts import Part, PartSettings, featurize_part, write_whole
from rows import GRAPH_COLUMNS, graphs

EMPTY_SET = "(none)"


@dataclass(frozen=True, slots=True)
class PredictionPartSettings(PartSettings):
    """All that a row of the output depends on."""

    model: str = ""  # folder, or name on the Hub
    revision: str | None = None  # on the Hub
    device: str = "cpu"
    embeddings: bool = False  # of molecules, in place of predictions
    layers: int | None = None  # that embeddings are taken after; left out: all
    several_conformers: bool = False  # whether a molecule may have them
    budget: Budget | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the output, and how it is read from what the model returned for molecules, or for all of their atoms."""

    name: str
    type: pa.DataType  # of a model of atoms, a list
    read: Callable[[Any], Any]


def predict_part(part: Part, settings: PredictionPartSettings) -> tuple[int, int]:
    """Write the predictions of a part, and return for how many records there is one and for how many an error.

    The file gets its name last: where it is, the part is done.
    """
    featurize_part(part, settings)
    config, processor, model = loaded_model(settings)
    position = {record.row: index for index, record in enumerate(part.records)}
    errors: list[str | None] = [None] * len(position)
    modalities: list[str | None] = [None] * len(position)
    smiles = [record.smiles for record in part.records]
    for rejected in pq.read_table(part.path("rejected"), columns=["row", "reason"]).to_pylist():
        errors[position[rejected["row"]]] = rejected["reason"]
    atom_order = ["atom_order"] if settings.with_atom_order else []
    rows = pq.read_table(part.path("rows"), columns=["row", "smiles", *GRAPH_COLUMNS, *atom_order])
    kept: dict[int, MolecularGraph] = {}
    found_graphs = graphs(rows) if len(rows) else []
    for row, text, graph in zip(rows["row"].to_pylist(), rows["smiles"].to_pylist(), found_graphs, strict=True):
        kept[position[row]] = graph
        smiles[position[row]] = smiles[position[row]] or text  # an SDF record has none of its own

    predict = partial(embed_graphs if settings.embeddings else predict_graphs, model, processor)
    found: Any = None
    while kept and found is None:
        try:
            found = predict(list(kept.values()), budget=settings.budget)
        except GraphMemoryError as error:
            index = list(kept)[error.index]
            errors[index] = error.reason
            del kept[index]
    if isinstance(found, Predictions):
        owners = np.array(list(kept)).repeat(1 if found.num_atoms is None else found.num_atoms)
        for index in owners[~np.isfinite(found.values).all(1)]:
            errors[index] = "got a prediction that is not finite"
    for index, graph in kept.items():
        modalities[index] = shown_modality(graph, processor.modality)
    columns = model_columns(config, settings)
    if kept and settings.with_atom_order:
        orders = dict(zip(map(position.get, rows["row"].to_pylist()), rows["atom_order"].to_pylist(), strict=True))
        arrays = atom_lists(found, columns, [np.array(orders[index]) for index in kept])
    else:
        arrays = [pa.array(column.read(found) if kept else [], column.type, from_pandas=True) for column in columns]
    # Rows without a prediction are null.
    order: list[int | None] = [None] * len(position)
    for place, index in enumerate(kept):
        order[index] = place
    placed = pa.table(arrays, [column.name for column in columns]).take(pa.array(order, pa.int64()))
    ids = [record.id for record in part.records]
    first, last = ([pa.array(texts, pa.string()) for texts in pair] for pair in ((ids, smiles), (modalities, errors)))
    table = pa.table([*first, *placed.columns, *last], schema=output_schema(columns))
    write_whole(table, part.path("predictions"))
    for kind in ("rows", "rejected"):
        part.path(kind).unlink(missing_ok=True)  # unless a process of a killed run was still at it
    return len(kept), len(position) - len(kept)


def atom_lists(found: Predictions, columns: list[Column], orders: list[np.ndarray]) -> list[pa.Array]:
    """A list for each molecule, in the order of the input: `orders` tell each atom's place there."""
    offsets = np.cumsum([0, *map(len, orders)])
    # argsort inverts a permutation.
    places = np.concatenate([start + order.argsort() for start, order in zip(offsets[:-1], orders, strict=True)])
    return [
        pa.ListArray.from_arrays(
            offsets.astype(np.int32),
            pa.array(column.read(found), column.type.value_type, from_pandas=True).take(pa.array(places)),
        )
        for column in columns
    ]


def output_schema(columns: list[Column]) -> pa.Schema:
    """Names and types of all columns of the output."""
    first, last = (
        pa.schema([(name, pa.string()) for name in names]) for names in (("id", "smiles"), ("modality", "error"))
    )
    return pa.schema([*first, *((column.name, column.type) for column in columns), *last])


def model_columns(config: Any, settings: PredictionPartSettings) -> list[Column]:
    """The columns that the model fills."""
    if settings.embeddings:
        return [Column("embedding", pa.list_(pa.float32(), config.hidden_size), list)]
    problem_type, names = prediction_type(config), target_names(config)
    is_regression, is_classes = problem_type == "regression", problem_type == "single_label_classification"
    quantiles = config.conformal_quantiles or [None] * len(names)
    number, text = pa.float64(), pa.string()
    if settings.with_atom_order:
        number, text = pa.list_(number), pa.list_(text)
    found = []
    for index, name in enumerate(names):
        attributes = ["values"]
        attributes += ["ensemble_spread"] if getattr(config, "num_members", 1) > 1 else []
        attributes += ["conformer_spread"] if settings.several_conformers else []
        attributes += ["lower", "upper"] if is_regression and quantiles[index] is not None else []
        for attribute in attributes:
            column = name if attribute == "values" else f"{name}_{attribute}"
            found.append(Column(column, number, partial(_numbers, attribute, index)))
        if problem_type == "multi_label_classification" and quantiles[index] is not None:
            found.append(Column(f"{name}_set", text, partial(_binary_sets, index)))
    if is_classes:
        found.append(Column("prediction", text, partial(_likeliest, names)))
        if quantiles[0] is not None:
            found.append(Column("prediction_set", text, partial(_class_sets, names)))
    return found


def _numbers(attribute: str, index: int, predictions: Predictions) -> np.ndarray:
    values = getattr(predictions, attribute)
    return np.full(len(predictions.values), np.nan) if values is None else values[:, index]


def _likeliest(names: list[str], predictions: Predictions) -> list[str]:
    return [names[index] for index in predictions.values.argmax(1)]


def _binary_sets(index: int, predictions: Predictions) -> list[str]:
    sets: Any = predictions.prediction_sets  # the checkpoint is calibrated, or there would be no such column
    return [_joined(["0", "1"], row) for row in sets[:, index]]


def _class_sets(names: list[str], predictions: Predictions) -> list[str]:
    sets: Any = predictions.prediction_sets
    return [_joined(names, row) for row in sets]


def _joined(names: list[str], is_in: np.ndarray) -> str:
    return "|".join(name for name, inside in zip(names, is_in, strict=True) if inside) or EMPTY_SET


def model_class(config: Any, embeddings: bool) -> Any:
    """The auto class of what is asked of a checkpoint."""
    if embeddings:
        return AutoModel
    return AutoModelForTokenClassification if predicts_atoms(config) else AutoModelForSequenceClassification


@cache
def loaded_model(settings: PredictionPartSettings) -> tuple[Any, MoleBlendProcessor, Any]:
    """Config, processor and model of the settings: once a process."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the processes are the parallelism, so that their number changes no digit
    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    processor = AutoFeatureExtractor.from_pretrained(
        settings.model, revision=settings.revision, **asdict(settings.featurization)
    )
    model: Any = load_whole(model_class(config, settings.embeddings), settings.model, settings.revision)
    if settings.layers is not None:
        keep_lowest_layers(model, settings.layers)
    return config, processor, model.to(settings.device).eval()
