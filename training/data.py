"""A preprocessed dataset -> padded batches."""

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch.utils.data import Dataset

from moleblend_hf import FlatGraphs, MoleBlendProcessor
from parts import makes_conformers
from rows import FORMAT_VERSION, GRAPH_COLUMNS, GraphTable
from sources import has_known_ending

ABOUT = "preprocessing.json"

ROWS_A_BATCH = 100_000  # of the memory map, each of which costs an indexing a step

_MOLECULE = ("inchikey", "smiles")  # what tells molecules apart: of one without InChIKey, its SMILES

ROW_SETTINGS = ("hydrogens", "canonical_atom_order")  # of the processor: what the stored graphs depend on


@dataclass(frozen=True)
class PreprocessedDataset:
    """A dataset that `preprocess.py` wrote: its splits, memory-mapped, and what it says about itself."""

    name: str
    splits: datasets.DatasetDict
    about: dict[str, Any]  # preprocessing.json

    def processor(self, **settings: Any) -> MoleBlendProcessor:
        """A processor with the settings of this dataset, but for those given."""
        return MoleBlendProcessor(**self.about["processor"] | settings)

    def part(self, name: str) -> datasets.Dataset:
        """Rows of a part."""
        if name not in self.splits:
            raise ValueError(
                f"The dataset {self.name!r} has no part {name!r}; it has {', '.join(self.splits)}. Preprocess it with --split."
            )
        return self.splits[name]

    def has_inchikeys(self) -> bool:
        """Whether each molecule of its parts has an InChIKey; by SMILES alone, one molecule in two spellings is two."""
        return all(
            "inchikey" in part.column_names and not column(part, "inchikey").null_count
            for part in self.splits.values()
        )

    def class_names(self, target: str) -> list[str]:
        """What the classes of a target are called, in the order of their indices; empty where nobody said."""
        named = {each["name"]: each.get("class_names") for each in self.about["targets"]}
        return list(named.get(target) or ())

    def binary_class_names(self, targets: Sequence[str]) -> dict[str, list[str]]:
        """The names of 0 and 1, of those targets that have them."""
        return {target: names for target in targets if len(names := self.class_names(target)) == 2}

    def check_geometries(self, modality: str, rows: datasets.Dataset | None = None) -> None:
        """Raise unless all rows, or these, have the geometries that a processor of this modality shows, or could not be given any."""
        made, num_rows, num_bent = (
            self.about["processor"]["modality"], self.about["num_kept"], self.about["num_with_coordinates"]
        )  # fmt: skip
        if rows is not None:
            num_rows = len(rows)
            num_bent = GraphRows(rows, np.arange(num_rows)).num_with_coordinates()
        if num_bent < num_rows and (modality == "3d" or (modality == "2d+3d" and not makes_conformers(made))):
            raise ValueError(
                f"The dataset {self.name!r} was made with modality={made!r} and has no geometries of {num_rows - num_bent:,} of "
                f"{num_rows:,} molecules, which modality={modality!r} needs. Preprocess it with --modality {modality}."
            )

    def check(self, processor: MoleBlendProcessor) -> None:
        """Raise unless the graphs are those that this processor would make."""
        check_same_graphs(self.name, self.about["processor"], processor)


def check_same_graphs(dataset: str, made: Mapping[str, Any], processor: MoleBlendProcessor) -> None:
    """Raise unless a dataset that is made with these settings has the graphs that the processor would make."""
    if differing := [name for name in ROW_SETTINGS if getattr(processor, name) != made[name]]:
        name = differing[0]
        raise ValueError(
            f"The dataset {dataset!r} was made with {name}={made[name]!r}, but the model's processor has "
            f"{getattr(processor, name)!r}: it would be trained on other graphs than it is used with. Preprocess with "
            f"--{name} {getattr(processor, name)}."
        )


def open_dataset(name: str | Path) -> PreprocessedDataset:
    """The dataset in a folder, or of a name on the Hub, that `preprocess.py` wrote."""
    folder = Path(name)
    if not folder.is_dir():
        if str(name).count("/") != 1 or str(name).startswith((".", "/")):
            raise FileNotFoundError(f"There is no dataset folder {str(name)!r}. {_REMEDY}")
        try:
            folder = Path(snapshot_download(str(name), repo_type="dataset", allow_patterns=["data/*", ABOUT]))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"There is no folder {str(name)!r}, and a dataset of that name could not be had from the Hub "
                f"({type(error).__name__}). {_REMEDY}"
            ) from error
    files = sorted((folder / "data").glob("*.parquet"))
    if not files or not (folder / ABOUT).is_file():
        missing = ABOUT if files else "data/*.parquet"
        raise FileNotFoundError(
            f"The folder {str(name)!r} holds no {missing}, so it is no preprocessed dataset. {_REMEDY}"
        )
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"The dataset {str(name)!r} has format {about['format_version']}, but this version reads {FORMAT_VERSION}. "
            "Preprocess it again."
        )
    if about.get("num_kept") == 0:
        raise ValueError(
            f"The dataset {str(name)!r} is empty: {about['num_read']:,} rows were read, and none was kept. Its rejected.parquet "
            "says why."
        )
    files_of: dict[str, list[str]] = {}
    for file in files:
        files_of.setdefault(file.name.rsplit("-", 3)[0], []).append(glob.escape(str(file)))
    splits = datasets.load_dataset("parquet", data_files=files_of, writer_batch_size=ROWS_A_BATCH)
    if missing_columns := sorted(set(GRAPH_COLUMNS) - set(next(iter(splits.values())).column_names)):
        raise ValueError(f"The dataset {str(name)!r} has no column {missing_columns[0]!r}. {_REMEDY}")
    return PreprocessedDataset(str(name), splits, about)


def open_together(names: Sequence[str]) -> PreprocessedDataset:
    """Several datasets as one: the rows of a split one dataset after the other, without targets.

    `about` has all `corpora`, each with whether it is among those that `training_and_held_out` holds molecules out of.
    """
    first, *others = opened = [open_dataset(name) for name in names]
    for other in others:
        other.check(first.processor())
    hashes = [dataset.about["content_sha256"] for dataset in opened]
    validated = ["validation" in dataset.splits for dataset in opened]
    corpora = [
        dataset.about["corpus"] | {"held_out": here or not any(validated)}
        for dataset, here in zip(opened, validated, strict=True)
    ]
    about = first.about | {"corpora": corpora, "content_sha256": hashes}
    if not others:
        return replace(first, about=about)
    splits = datasets.DatasetDict()
    # The same in all splits: molecules of one are looked for in another.
    everything = [part for dataset in opened for part in dataset.splits.values()]
    columns = [name for name in _MOLECULE if all(name in part.column_names for part in everything)]
    for split in dict.fromkeys(split for dataset in opened for split in dataset.splits):
        parts = [dataset.splits[split] for dataset in opened if split in dataset.splits]
        splits[split] = datasets.concatenate_datasets(
            [part.select_columns([*columns, *GRAPH_COLUMNS]) for part in parts]
        )
    return PreprocessedDataset(", ".join(names), splits, about)


def is_preprocessed(name: str) -> bool:
    """Whether this is a dataset that preprocess.py wrote, or a name on the Hub, and no file of molecules."""
    is_hub_name = name.count("/") == 1 and not has_known_ending(name)
    return (Path(name) / ABOUT).is_file() or (not Path(name).exists() and is_hub_name)


_REMEDY = "Make one with training/preprocess.py; training/sample is an example."


class GraphRows(Dataset[list[tuple[FlatGraphs, np.ndarray]]]):
    """Some rows of a split as a map-style dataset, whose item is a step: a list of parts."""

    def __init__(self, rows: datasets.Dataset, indices: np.ndarray) -> None:
        """`indices` are those of the rows, in the order in which they are numbered here."""
        self.rows, self.indices = rows.select_columns(list(GRAPH_COLUMNS)).with_format("arrow"), indices

    def __len__(self) -> int:
        return len(self.indices)

    def sizes(self) -> np.ndarray:
        """Atoms of each molecule, (n,) int32; the molecules themselves are not read."""
        return self._table.sizes()[self.indices]

    def num_with_coordinates(self) -> int:
        """How many of the molecules have a geometry."""
        return int((self._table.num_conformers()[self.indices] > 0).sum())

    def __getitems__(self, parts: list[list[int]]) -> list[tuple[FlatGraphs, np.ndarray]]:
        """The graphs at the positions of each part, and their numbers in the split."""
        return [(self._table.take(self.indices[part]), self.indices[part]) for part in parts]

    @cached_property
    def _table(self) -> GraphTable:
        return GraphTable(self.rows[:])

    def __getstate__(self) -> dict[str, Any]:
        # A process that reads batches maps the files for itself.
        return {name: value for name, value in vars(self).items() if name != "_table"}


def column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column in the order of the rows, which is not that of `rows.data` once they are selected or shuffled."""
    return rows.select_columns([name]).with_format("arrow")[:][name]


def _molecules(rows: datasets.Dataset) -> pa.ChunkedArray:
    """What tells the molecules of the rows apart."""
    return pc.coalesce(*(column(rows, name) for name in _MOLECULE if name in rows.column_names))


def collate(
    parts: list[tuple[FlatGraphs, np.ndarray]], processor: MoleBlendProcessor
) -> list[dict[str, torch.Tensor]]:
    """The parts of a step as padded batches, each with the `rows` of the split that it holds.

    A part without any geometry has coordinates all the same, which nothing reads: processes that average gradients need every
    parameter to have one.
    """
    padded = []
    for graphs, rows in parts:
        batch = dict(processor.pad(graphs))
        if "coordinates" not in batch:
            batch["coordinates"] = torch.zeros(*batch["attention_mask"].shape, 3)
            batch["coordinates_mask"] = torch.zeros(len(rows), dtype=torch.bool)
        padded.append(batch | {"rows": torch.from_numpy(rows)})
    return padded


def split_held_out(keys: pa.ChunkedArray, num_held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (training, held out), about `num_held_out` held out; rows of one key fall on one side."""
    molecule_of_row = pc.rank(keys, tiebreaker="dense").to_numpy(zero_copy_only=False).astype(np.int64) - 1
    order = np.random.default_rng(seed).permutation(int(molecule_of_row.max(initial=-1)) + 1)
    if not 0 < num_held_out < len(order):
        raise ValueError(
            f"held_out_molecules must lie between 1 and the number of different molecules less one ({len(order) - 1}), "
            f"got {num_held_out}."
        )
    is_held_out = np.zeros(len(order), dtype=bool)
    is_held_out[order[:num_held_out]] = True
    held_out = is_held_out[molecule_of_row]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def training_and_held_out(dataset: PreprocessedDataset, num_held_out: int, seed: int) -> tuple[GraphRows, GraphRows]:
    """The rows to train on and those to evaluate on: drawn from a validation split, or else from "train".

    No molecule of the validation split is trained on, whichever dataset it stands in.
    """
    train = dataset.part("train")
    if "validation" in dataset.splits:
        validation = dataset.splits["validation"]
        held_out = np.random.default_rng(seed).permutation(len(validation))[:num_held_out]
        is_validated = pc.is_in(_molecules(train), value_set=_molecules(validation).combine_chunks())
        rows = np.flatnonzero(~is_validated.to_numpy(zero_copy_only=False).astype(bool))
        return GraphRows(train, rows), GraphRows(validation, np.sort(held_out))
    rows, held_out = split_held_out(_molecules(train), num_held_out, seed)
    return GraphRows(train, rows), GraphRows(train, held_out)
