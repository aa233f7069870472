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
"""Command line: what a checkpoint is, whether it is what it was, and what it says about molecules."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError  # nothing is unpickled: it is how `torch.load` refuses to
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils import logging

from .cards import card_problems
from .checkpoints import check_is_there, class_of, keep_lowest_layers, open_checkpoint
from .convert_original_checkpoint import convert as convert_original
from .molecule_files import STANDARD_STREAM, MoleculeRow, read_molecules, row_writer
from .pipeline_moleblend import MoleBlendPipeline
from .prediction_moleblend import prediction_type, target_names
from .verification import verify as verify_checkpoint

MOLECULES_A_BATCH = 512  # featurized together; memory is bounded by `predict_graphs`
EMPTY_SET = "(none)"
# What is wrong with the input, not with this program. UnpicklingError: a checkpoint with more than tensors in it.
EXPECTED_ERRORS = (
    *(ValueError, TypeError, OSError, ImportError, StrictDataclassError, SafetensorError, UnpicklingError),
    yaml.YAMLError,
)


class OneLineErrors(typer.core.TyperGroup):
    """Commands whose expected errors end in a line on standard error and exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head`: typer knows what to do
            raise
        except EXPECTED_ERRORS as error:
            typer.echo(f"Error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    help="MoleBLEND checkpoints on the command line.\n\nMODEL is a folder, or the name of a repository on the Hub. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, also where it is piped
    pretty_exceptions_enable=False,
    # --smiles_column, as the scripts in training/ have it, is --smiles-column.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or its name on the Hub.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
Input = Annotated[str, typer.Argument(help="SMILES, CSV, TSV, SDF or Parquet file; - reads standard input.")]
Format = Annotated[
    Literal["smi", "csv", "tsv", "sdf", "parquet"] | None,
    typer.Option(help="Left out: by the ending of the name, smi on standard input.", show_default=False),
]
SmilesColumn = Annotated[
    str | None, typer.Option(help="Of a table; left out: the one named like it.", show_default=False)
]
IdColumn = Annotated[
    str | None,
    typer.Option(help="Or data field of an SDF; left out: titles, or row numbers.", show_default=False),
]
Modality = Annotated[
    Literal["auto", "2d", "3d", "2d+3d"] | None,
    typer.Option(help="What the model is shown; left out: as the checkpoint.", show_default=False),
]
NumConformers = Annotated[
    int | None, typer.Option(help="To make and average over; left out: as the checkpoint.", show_default=False)
]
Output = Annotated[str, typer.Option("--output", "-o", help=".csv or .parquet file; - writes CSV to standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")]
Device = Annotated[str | None, typer.Option(help="Left out: cuda if there is one, else cpu.", show_default=False)]


@app.callback()
def _quiet() -> None:
    # Standard error is for progress and for what is wrong.
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def predict(
    model: Model,
    input: Input = STANDARD_STREAM,
    output: Output = STANDARD_STREAM,
    format: Format = None,
    smiles_column: SmilesColumn = None,
    id_column: IdColumn = None,
    modality: Modality = None,
    num_conformers: NumConformers = None,
    device: Device = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Predict properties of molecules.

    A row for each molecule, in order, and a column for each target, in its own unit or as a probability; its spread, interval or set where the checkpoint has them;
    what the model was shown; and the error of a molecule that cannot be predicted. Of a model of atoms, columns hold lists.
    training/predict.py does the same for large files, with several processes and after interrupts.

    \b
    Examples:
      moleblend predict outputs/finetune molecules.csv --output predictions.csv
      moleblend predict outputs/finetune molecules.sdf.gz -o predictions.parquet
      echo "CCO" | moleblend predict outputs/finetune
    """
    predictor = open_checkpoint(model, revision, device, modality=modality, num_conformers=num_conformers)
    name = type(predictor.model).__name__
    if not name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        raise ValueError(
            f"{model} holds a {name}, which predicts no properties. Fine-tune it with training/finetune.py, or use "
            "`moleblend embed`."
        )
    rows = read_molecules(input, format, smiles_column, id_column)
    _check_is_not_read(input, output)
    _answer(predictor, rows, "prediction", _prediction_columns(predictor), output, overwrite)


@app.command()
def embed(
    model: Model,
    input: Input = STANDARD_STREAM,
    output: Output = STANDARD_STREAM,
    atoms: Annotated[bool, typer.Option("--atoms", help="Embed each atom; --output is a .parquet file.")] = False,
    layers: Annotated[
        int | None, typer.Option(help="Embed after so many of the lowest layers; left out: all.", show_default=False)
    ] = None,
    format: Format = None,
    smiles_column: SmilesColumn = None,
    id_column: IdColumn = None,
    modality: Modality = None,
    num_conformers: NumConformers = None,
    device: Device = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Embed molecules, or their atoms.

    A row for each molecule, in order, from any checkpoint but an ensemble. The column `embedding` is a list; in CSV its values are joined by ; . With --atoms, `atom_embeddings` has one for each atom.

    \b
    Examples:
      moleblend embed outputs/pretrain molecules.csv --output embeddings.parquet
      moleblend embed outputs/pretrain molecules.csv --atoms -o atoms.parquet
      moleblend embed outputs/pretrain molecules.csv --layers 2 -o lower.parquet
      cat molecules.smi | moleblend embed outputs/pretrain > embeddings.csv
    """
    embedder = open_checkpoint(model, revision, device, modality=modality, num_conformers=num_conformers)
    if embedder.model.config.model_type == "moleblend_ensemble":
        raise ValueError(
            f"{model} is an ensemble, whose members have no common embedding. Give the checkpoint of one."
        )
    if layers is not None:
        keep_lowest_layers(embedder.model, layers)
    rows = read_molecules(input, format, smiles_column, id_column)
    what, column = ("atom_embeddings", "[vector]") if atoms else ("molecule_embedding", "vector")
    columns = [("atom_embeddings" if atoms else "embedding", column)]
    _check_is_not_read(input, output)
    _answer(embedder, rows, what, columns, output, overwrite)


@app.command()
def verify(model: Model, revision: Revision = None) -> None:
    """Say whether a checkpoint loads as the model that was saved.

    Else at which depth it departs, and which weights and settings differ.

    \b
    Examples:
      moleblend verify outputs/finetune
      moleblend verify user/name --revision main
    """
    report = verify_checkpoint(model, revision)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint of the original, .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert a checkpoint of the original.

    Of MoleBLEND or Transformer-M, to a folder for this package. Prints the folder; what was dropped goes to standard error.

    \b
    Example:
      moleblend convert checkpoint_best.pt moleblend-base
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty. Name another folder.")
    for name, reason in convert_original(source, target).items():
        typer.echo(f"dropped {name}: {reason}", err=True)
    typer.echo(target)


@app.command()
def card(
    model: Model,
    check: Annotated[
        bool, typer.Option("--check", help="List what is wrong with it instead; 1 if anything is.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Print the card of a checkpoint, or check it.

    \b
    Examples:
      moleblend card outputs/finetune
      moleblend card outputs/finetune --check
    """
    if not check:
        is_folder = Path(model).is_dir()
        path = Path(model) / "README.md" if is_folder else hf_hub_download(model, "README.md", revision=revision)
        typer.echo(Path(path).read_text(encoding="utf-8"))
    elif not Path(model).is_dir():
        raise ValueError(f"{model} is no folder. Only the card of a folder can be checked.")
    elif problems := card_problems(model):
        typer.echo("\n".join(problems))
        raise typer.Exit(1)
    else:
        typer.echo(f"Nothing is wrong with the card of {model}.")


@app.command()
def info(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    revision: Revision = None,
) -> None:
    """Say what a checkpoint is.

    Sizes, targets with units and calibration, settings of its processor. Reads no weights.

    \b
    Examples:
      moleblend info outputs/finetune
      moleblend info outputs/finetune --json
    """
    facts = _facts(model, revision)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for title, found in facts.items():
        if isinstance(found, dict):
            typer.echo(f"{title}:")
            width = max(map(len, found))
            for name, value in found.items():
                if isinstance(value, dict):
                    parts = (
                        f"{key} {part:.4g}" if isinstance(part, float) else f"{key} {part}"
                        for key, part in value.items()
                    )
                    value = ", ".join(parts) or "no unit, not calibrated"
                typer.echo(f"  {name:{width}}  {value}")
        else:
            typer.echo(f"{title}: {f'{found:,}' if isinstance(found, int) else found}")


@app.command()
def demo(
    model: Model,
    neighbours: Annotated[
        str | None,
        typer.Option(help="SMILES, CSV, TSV, SDF or Parquet file; the molecules to compare with.", show_default=False),
    ] = None,
    smiles_column: SmilesColumn = None,
    id_column: IdColumn = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Left out: the first from 7860 on that is free.", show_default=False)
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Through a public address of gradio's.")] = False,
    modality: Modality = None,
    num_conformers: NumConformers = None,
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Show a checkpoint in the browser.

    A molecule is drawn, pasted or read from an SDF file; the page has its prediction with uncertainty, what each atom contributes, its geometry, and the molecules of a file that are nearest by embedding (of an ensemble: that of its first model). It needs no connection.

    \b
    Examples:
      moleblend demo outputs/finetune
      moleblend demo outputs/finetune --neighbours molecules.csv
      moleblend demo outputs/pretrain --neighbours molecules.sdf --port 8000
    """
    from .demo import build_demo, launch_demo, require_gradio  # gradio takes seconds to import
    from .molecule_page import MoleculePage

    require_gradio()
    predictor = open_checkpoint(model, revision, device, modality=modality, num_conformers=num_conformers)
    rows = None if neighbours is None else read_molecules(neighbours, None, smiles_column, id_column)
    page = MoleculePage(predictor, Path(model).resolve().name if Path(model).is_dir() else model, rows)
    if page.neighbours:
        typer.echo(f"{neighbours}: {page.neighbours.report}.", err=True)
    launch_demo(build_demo(page), server_name=host, server_port=port, share=share)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="moleblend")


# What a checkpoint is


def _facts(model: str, revision: str | None) -> dict[str, Any]:
    check_is_there(model)
    config = AutoConfig.from_pretrained(model, revision=revision)
    model_class = class_of(config, model)
    processor = AutoFeatureExtractor.from_pretrained(model, revision=revision).to_dict()
    with torch.device("meta"):  # shapes without memory
        num_parameters = model_class(config).num_parameters()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_path_bonds")
    facts: dict[str, Any] = {
        "checkpoint": model,
        "class": model_class.__name__,
        "parameters": num_parameters,
        "sizes": {name: getattr(config, name) for name in sizes},
    }
    if config.model_type == "moleblend_ensemble":
        facts["members"] = config.num_members
    if "Classification" in model_class.__name__:
        facts["predicts for"] = "atoms" if "Token" in model_class.__name__ else "molecules"
        try:
            facts |= {"problem": prediction_type(config)} | _targets(config)
        except ValueError:  # several outputs, of which only labels tell what they are
            facts |= {"problem": "not in the config", "outputs": ", ".join(target_names(config))}
    hidden = ("auto_map", "feature_extractor_type", "processor_class")
    return facts | {"processor": {name: value for name, value in processor.items() if name not in hidden}}


def _targets(config: Any) -> dict[str, Any]:
    names = target_names(config)
    quantiles = config.conformal_quantiles or [None] * len(names)
    calibrated = (
        {} if config.conformal_coverage is None else {"conformal coverage": f"{config.conformal_coverage:.0%}"}
    )
    if prediction_type(config) == "single_label_classification":
        return {"classes": ", ".join(names)} | ({} if quantiles[0] is None else calibrated)
    targets: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        told = {
            "unit": config.target_units[index] if config.target_units else None,
            "transform": config.target_transforms[index] if config.target_transforms else None,
            # Regression: half the width of the interval, of the transformed values. Else: the largest 1 - p in the set.
            "conformal quantile": quantiles[index],
        }
        targets[name] = {key: value for key, value in told.items() if value not in (None, "none")}
    return {"targets": targets} | (calibrated if any(quantile is not None for quantile in quantiles) else {})


# What it says about molecules


def _prediction_columns(predictor: MoleBlendPipeline) -> list[tuple[str, str]]:
    """Names and kinds of what is predicted: known before the first molecule is read."""
    config, processor = predictor.model.config, predictor.feature_extractor
    problem_type, names = prediction_type(config), target_names(config)
    is_classes = problem_type == "single_label_classification"
    quantiles = [None] * len(names) if is_classes else (config.conformal_quantiles or [None] * len(names))
    columns: list[tuple[str, str]] = []
    for name, quantile in zip(names, quantiles, strict=True):
        columns.append((name, "number"))
        if getattr(config, "num_members", 1) > 1:
            columns.append((f"{name}_ensemble_spread", "number"))
        if processor.num_conformers > 1 and processor.modality in ("3d", "2d+3d"):
            columns.append((f"{name}_conformer_spread", "number"))
        if quantile is not None and problem_type == "regression":
            columns += [(f"{name}_lower", "number"), (f"{name}_upper", "number")]
        elif quantile is not None:
            columns.append((f"{name}_set", "text"))
    if is_classes:
        columns.append(("prediction", "text"))
        if config.conformal_quantiles and config.conformal_quantiles[0] is not None:
            columns.append(("prediction_set", "text"))
    of_atoms = type(predictor.model).__name__.endswith("ForTokenClassification")
    return [(name, f"[{kind}]") for name, kind in columns] if of_atoms else columns


def _check_is_not_read(input: str, output: str) -> None:
    if STANDARD_STREAM not in (input, output) and Path(output).resolve() == Path(input).resolve():
        raise ValueError(f"The output, {output}, is the input. Name another file.")


def _answer(
    predictor: MoleBlendPipeline,
    rows: Iterator[MoleculeRow],
    what: str,
    predicted: list[tuple[str, str]],
    output: str,
    overwrite: bool,
) -> None:
    """Writes a row for each molecule, and says on standard error how many there were."""
    all_columns = [("id", "text"), ("smiles", "text"), *predicted, ("modality", "text"), ("error", "text")]
    columns = dict(all_columns)
    if both := [name for name, times in Counter(name for name, _ in all_columns).items() if times > 1]:
        raise ValueError(
            f"The output would have two columns {both[0]!r}. Rename the target in `id2label` of config.json."
        )
    counts = {"rows": 0, "errors": 0}
    with row_writer(output, columns, overwrite) as write, tqdm(unit=" molecules", disable=None) as progress:
        while batch := list(islice(rows, MOLECULES_A_BATCH)):
            for row, answer in zip(batch, _answers(predictor, batch, what), strict=True):
                cells = _cells(answer, what)
                write({**cells, "id": row.id, "smiles": row.smiles})
                counts["rows"] += 1
                counts["errors"] += cells["error"] is not None
            progress.update(len(batch))
        if not counts["rows"]:
            raise ValueError("There are no molecules in the input.")
    typer.echo(f"{counts['rows']:,} molecules, {counts['errors']:,} of them with an error.", err=True)
    if counts["rows"] == counts["errors"]:
        raise typer.Exit(1)


def _answers(predictor: MoleBlendPipeline, rows: list[MoleculeRow], what: str) -> list[dict[str, Any]]:
    """What the pipeline answers for each molecule; they are featurized together, which is twice as fast."""
    processor = predictor.feature_extractor
    graphs = iter(processor.featurize_many([row.molecule for row in rows], on_error="skip"))
    reasons = {rejected.index: rejected.reason for rejected in processor.rejected}
    errors = [reasons.get(index) for index in range(len(rows))]
    inputs = {"graph": [next(graphs) if error is None else None for error in errors], "error": errors}
    return predictor.forward(inputs, output=what)["answer"]


def _cells(answer: dict[str, Any], what: str) -> dict[str, Any]:
    """An answer of the pipeline by the names of the columns."""
    cells = {"modality": answer["modality"], "error": answer["error"]}
    if what != "prediction":
        return cells | {
            "embedding": answer.get("molecule_embedding"),
            "atom_embeddings": answer.get("atom_embeddings"),
        }
    predictions = answer["predictions"] or {}
    for name, told in predictions.items():
        cells |= {name if key == "value" else f"{name}_{key}": value for key, value in told.items()}
        if "prediction_set" in told:
            cells[f"{name}_set"] = _joined(told["prediction_set"])
    if "prediction" in answer:
        cells["prediction"] = answer["prediction"]
    if "prediction_set" in answer:
        cells["prediction_set"] = _joined(answer["prediction_set"])
    if not all(np.isfinite(np.array(told["value"], dtype=float)).all() for told in predictions.values()):
        cells["error"] = "got a prediction that is not finite"
    return cells


def _joined(members: list) -> str | list[str]:
    """A prediction set as text; of atoms a list of them."""
    if members and isinstance(members[0], list):
        return [str(_joined(each)) for each in members]
    return "|".join(map(str, members)) or EMPTY_SET


if __name__ == "__main__":
    main()
