r"""Predict with a fine-tuned checkpoint, or an ensemble, for a file of molecules of any size.

A table              python training/predict.py --model checkpoints/esol --input molecules.csv --output predictions.csv
An SDF, geometries   python training/predict.py --model checkpoints/gap --input molecules.sdf.gz --output predictions.parquet
On a GPU             the same; --num_proc processes share it
Embeddings           ... --output embeddings.parquet --embeddings
After an interrupt   the same command: parts that are done are kept, and the output is the same

The output has a row for each row of the input, in its order:

id, smiles           as given; id: the row number, or "row N" where a column of ids has none; smiles of an SDF: RDKit's
TARGET               prediction in the target's own unit, or the probability that a binary target is 1, or of a class
TARGET_ensemble_spread    sample standard deviation over the members, of an ensemble
TARGET_conformer_spread   the same over the conformers of the molecule, where the model sees several
TARGET_lower, TARGET_upper   ends of the conformal interval, of a calibrated regression target
TARGET_set           of a calibrated binary target: the values in the conformal prediction set, 0, 1, 0|1 or (none)
prediction, prediction_set   of classes: the likeliest, and the conformal prediction set, joined by |
embedding            of the molecule, in place of all these, with --embeddings
modality             what the model was shown: 2d, 3d or 2d+3d
error                why there is no prediction; else empty

Of a model of atoms, every column of the model is a list: a value for each atom in the order of the input, hydrogens that are
dropped left out, those that are added at its end. In CSV the values are joined by semicolons, as preprocess.py reads them.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from joblib import cpu_count  # that this process may use, also in a container
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoFeatureExtractor

from engines import run_locally
from moleblend_hf.checkpoints import check_conformers, check_is_there, check_layers, load_whole
from moleblend_hf.graphs_moleblend import Budget
from moleblend_hf.molecules_moleblend import MODALITIES, FeaturizationSettings
from moleblend_hf.prediction_moleblend import predicts_atoms
from parts import Part, makes_conformers
from prediction_parts import PredictionPartSettings, model_class, model_columns, output_schema, predict_part
from reporting import versions
from settings import load_settings, setting
from sources import FILES, Record, Source, count_rows, open_source, source_of

# What is done again after an interrupt. A conformer takes 100 times longer than all the rest.
RECORDS_A_PART = 1000
CONFORMERS_A_PART = 100
ROWS_A_WRITE = 50_000  # of the output, in memory at once
WRITERS = {".csv": pyarrow.csv.CSVWriter, ".parquet": pq.ParquetWriter}


@dataclasses.dataclass(kw_only=True)
class PredictionSettings:
    """What to predict with, for what, and where to write."""

    model: str = setting("model", "folder of a fine-tuned checkpoint, or its name on the Hub")
    revision: str | None = setting("model", "branch, tag or commit on the Hub", None)
    embeddings: bool = setting("model", "write embeddings of molecules instead; any checkpoint but an ensemble", False)
    layers: int | None = setting("model", "embed after so many of the lowest layers; left out: all", None)

    input: str = setting("input", "CSV, TSV, SMILES, SDF or Parquet file, plain or gzipped")
    source: str | None = setting("input", "its layout; left out: by the ending of its name", None, choices=FILES)
    smiles_column: str | None = setting("input", "column of the SMILES; guessed from its name if left out", None)
    id_column: str | None = setting("input", "column or SDF field of the ids; else guessed, else row numbers", None)
    delimiter: str | None = setting("input", "of csv and tsv", None)

    modality: str | None = setting("molecules", "left out: that of the checkpoint", None, choices=MODALITIES)
    num_conformers: int | None = setting("molecules", "to make and average over; left out: as the checkpoint", None)
    molecule_time_limit: float = setting("molecules", "seconds after which RDKit is given up on a molecule", 60.0)

    output: str = setting("output", "file to write, .csv or .parquet")
    overwrite: bool = setting("output", "replace it", False)
    num_proc: int | None = setting("output", "processes that featurize and predict; left out: one a core", None)
    device: str | None = setting("output", "left out: cuda if there is one, else cpu", None)
    max_tokens: int | None = setting(
        "output",
        "padded tokens (atoms + 1) of the molecules in one forward; left out: what suits the device",
        None,
    )
    max_pairs: int | None = setting("output", "padded pairs of tokens in one forward, likewise", None)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        for name in ("num_proc", "max_tokens", "max_pairs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.molecule_time_limit <= 0:
            raise ValueError(f"molecule_time_limit must be more than 0 seconds, got {self.molecule_time_limit}.")
        if self.layers is not None and not self.embeddings:
            raise ValueError(
                f"layers is {self.layers}, but a prediction takes all layers. Leave it out, or give --embeddings."
            )
        endings = (".parquet",) if self.embeddings else tuple(WRITERS)
        if Path(self.output).suffix not in endings:
            what = "embeddings" if self.embeddings else "predictions"
            raise ValueError(f"output is {self.output!r}, but {what} are written to {' or '.join(endings)}. Name one.")

    def that_shape_the_content(self) -> dict[str, Any]:
        """All settings but those that say where and how fast."""
        free = ("output", "overwrite", "num_proc", "device")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def parse_args(argv: list[str] | None = None) -> PredictionSettings:
    """Settings from the flags, and from a YAML file if one is named."""
    return load_settings(PredictionSettings, __doc__, None, argv)


def opened_source(settings: PredictionSettings) -> Source:
    """The source that the settings name."""
    return open_source(
        settings.source or source_of(settings.input),
        settings.input,
        smiles_column=settings.smiles_column,
        id_column=settings.id_column,
        delimiter=settings.delimiter,
    )


def opened_model(settings: PredictionSettings, source: Source) -> tuple[Any, PredictionPartSettings]:
    """The config of the checkpoint, checked, and what the processes need to know."""
    check_is_there(settings.model)
    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    given = {name: getattr(settings, name) for name in ("modality", "num_conformers")}
    given = {name: value for name, value in given.items() if value is not None}
    processor = AutoFeatureExtractor.from_pretrained(settings.model, revision=settings.revision, **given)
    check_conformers(settings.num_conformers, processor.modality)
    heads = config.architectures or []
    if settings.embeddings and config.model_type == "moleblend_ensemble":
        raise ValueError(
            f"{settings.model} is an ensemble, whose members have no common embedding. Give the checkpoint of one of them."
        )
    if settings.layers is not None:
        check_layers(settings.layers, config)
    of_property = ("ForSequenceClassification", "ForTokenClassification")
    if not settings.embeddings and not any(name.endswith(of_property) for name in heads):
        raise ValueError(
            f"{settings.model} holds {' and '.join(heads) or 'a model'}, which predicts no properties of molecules. Fine-tune "
            "it with training/finetune.py, or give --embeddings."
        )
    if processor.max_path_bonds != config.max_path_bonds:
        raise ValueError(
            f"The processor of {settings.model} tells {processor.max_path_bonds} bonds of a path apart, but its model "
            f"{config.max_path_bonds}. Save the processor that the model was trained with."
        )
    # Here, so that what is missing is said once, not by each process.
    load_whole(model_class(config, settings.embeddings), settings.model, settings.revision)
    names = (field.name for field in dataclasses.fields(FeaturizationSettings))
    featurization = FeaturizationSettings(**{name: getattr(processor, name) for name in names})
    makes_several = makes_conformers(featurization.modality) and featurization.num_conformers > 1
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return config, PredictionPartSettings(
        featurization=featurization,
        molecule_time_limit=settings.molecule_time_limit,
        with_atom_order=predicts_atoms(config) and not settings.embeddings,
        model=settings.model,
        revision=getattr(config, "_commit_hash", None) or settings.revision,
        device=device,
        embeddings=settings.embeddings,
        layers=settings.layers,
        several_conformers=makes_several or (source.name == "parquet" and featurization.modality != "2d"),
        budget=Budget.on(device, settings.max_tokens, settings.max_pairs),
    )


def opened_folder(settings: PredictionSettings, source: Source, part_settings: PredictionPartSettings) -> Path:
    """The folder of the parts, new or as an interrupted run of the same settings on the same files left it."""
    output = Path(settings.output)
    work = output.with_name(f"{output.name}.parts")
    model = Path(settings.model)
    files = [*source.files, *(sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else ())]
    identity = {
        "settings": settings.that_shape_the_content(),
        "revision": part_settings.revision,
        "versions": versions("moleblend_hf", "rdkit", "torch"),
        "part_size": part_size(part_settings),
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    identity = json.loads(json.dumps(identity))
    path = work / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if before == identity:
        for leftover in (*work.glob("*.partial"), *work.glob("marker-*")):
            leftover.unlink(missing_ok=True)
        return work
    if before is not None and not settings.overwrite:
        changed = [name for name in identity["settings"] if before["settings"].get(name) != identity["settings"][name]]
        what = f"settings ({', '.join(changed)})" if changed else "input files, model or versions"
        raise ValueError(
            f"{work} holds an unfinished run with other {what}. Repeat that command, choose another --output, or start anew "
            "with --overwrite."
        )
    if output.resolve() in [path.resolve() for path in files]:
        raise ValueError(f"The output, {output}, is the input. Name another file.")
    if output.exists() and not settings.overwrite:
        raise FileExistsError(f"{output} exists. Choose another --output, or replace it with --overwrite.")
    remove(work)
    work.mkdir(parents=True)
    partial = path.with_suffix(".partial")  # so that an interrupt leaves all of it or nothing
    partial.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return work


def remove(work: Path) -> None:
    """Delete the folder of the parts, what says whose they are at last."""
    for path in sorted(work.glob("*"), key=lambda path: path.name == "run.json"):
        path.unlink()
    if work.exists():
        work.rmdir()


def part_size(settings: PredictionPartSettings) -> int:
    """How many records are worked on together."""
    return CONFORMERS_A_PART if makes_conformers(settings.featurization.modality) else RECORDS_A_PART


def parts_to_do(
    records: Iterable[Record], size: int, work: Path, counts: Counter[str], progress: tqdm
) -> Iterator[Part]:
    """The source in parts, without those that are done; `counts` counts what was read."""
    records = iter(records)
    while chunk := list(islice(records, size)):
        part = Part(counts["parts"], chunk, str(work))
        counts["parts"] += 1
        if part.path("predictions").exists():
            progress.initial += len(chunk)  # they do not count for the rate
            progress.update(len(chunk))
        else:
            yield part


def predict_all(
    settings: PredictionSettings, part_settings: PredictionPartSettings, source: Source, work: Path
) -> int:
    """Make all parts that are not there yet, and return how many there are."""
    counts: Counter[str] = Counter()
    num_proc = settings.num_proc or cpu_count()
    with tqdm(total=count_rows(source), unit=" molecules", unit_scale=True, mininterval=0.5) as progress:
        parts = parts_to_do(source.records(), part_size(part_settings), work, counts, progress)
        for num_predicted, num_failed in run_locally(parts, part_settings, num_proc, predict_part):
            counts["failed"] += num_failed
            progress.update(num_predicted + num_failed)
            progress.set_postfix_str(f"{counts['failed']:,} errors")
    return counts["parts"]


def write_output(work: Path, num_parts: int, schema: pa.Schema, output: Path) -> Counter[str]:
    """Put the parts together, in order, whole or not at all; return how many rows there are and how many have an error."""
    counts: Counter[str] = Counter()
    partial = work / "output.partial"
    as_written = without_lists if output.suffix == ".csv" else pa.Table.combine_chunks
    writer: Any = WRITERS[output.suffix](partial, as_written(schema.empty_table()).schema)
    tables: list[pa.Table] = []
    with writer:
        for index in range(num_parts):
            table = pq.read_table(Part(index, (), str(work)).path("predictions"))
            counts["rows"] += len(table)
            counts["errors"] += len(table) - table["error"].null_count
            tables.append(table)
            if sum(map(len, tables)) >= ROWS_A_WRITE or index == num_parts - 1:
                writer.write_table(as_written(pa.concat_tables(tables).combine_chunks()))
                tables = []
    partial.replace(output)
    return counts


def without_lists(table: pa.Table) -> pa.Table:
    """Lists as text, which CSV takes."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            lists = table.column(index).combine_chunks()
            items = pc.fill_null(lists.values.cast(pa.string()), "nan")
            texts = pc.binary_join(pa.ListArray.from_arrays(lists.offsets, items, mask=lists.is_null()), ";")
            table = table.set_column(index, field.name, texts)
    return table


def main(argv: list[str] | None = None) -> Counter[str]:
    """Predict as the arguments say, and return how many rows there are and how many have an error."""
    settings = parse_args(argv)
    source = opened_source(settings)
    for note in source.notes:
        print(note)
    config, part_settings = opened_model(settings, source)
    schema = output_schema(model_columns(config, part_settings))
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise ValueError(
            f"The output would have two columns {twice[0]!r}. Rename the target in `id2label` of {settings.model}/config.json."
        )
    work = opened_folder(settings, source, part_settings)
    num_parts = predict_all(settings, part_settings, source, work)
    counts = write_output(work, num_parts, schema, Path(settings.output))
    remove(work)
    print(f"{counts['rows']:,} rows written to {settings.output}, {counts['errors']:,} of them with an error.")
    return counts


if __name__ == "__main__":
    found = main()
    sys.exit(1 if found["errors"] == found["rows"] > 0 else 0)
