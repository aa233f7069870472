"""Finished parts -> the dataset: doubles found, splits assigned, Parquet files written, every row accounted for.

Nothing here looks at a molecule. The parts are read twice, once for the few columns that concern all rows together and
once to be written, so that only those columns are ever in memory as a whole.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from content_hash import ContentHash
from data import open_dataset
from parts import REJECTED, Part, target_schema
from reporting import versions, without_places
from rows import FORMAT_VERSION
from sources import Source
from splits import SCAFFOLD_SPLITS, assign_splits, split_hash

if TYPE_CHECKING:
    from preprocess import PreprocessingSettings

ABOUT = "preprocessing.json"
MAX_SPLITS = 20  # given by a source; more are no splits, but another column
ROWS_A_GROUP = (
    100_000  # of a Parquet row group, about 8 MB: what is read at once, and lies in one piece when it is mapped
)
SPLIT_NAMES = ("train", "validation", "test")
SPLIT_SYNONYMS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
MAX_REASONS = 3  # of rejections, that are told
MISSING_3D = pa.schema([("row", pa.int64()), ("id", pa.string()), ("smiles", pa.string()), ("reason", pa.string())])


@dataclass
class Assembly:
    """What became of the rows of a source."""

    num_read: int = 0
    num_kept: int = 0
    rejected_by_stage: Counter[str] = field(default_factory=Counter)
    rejected_by_reason: Counter[str] = field(default_factory=Counter)
    first_of_reason: dict[str, str] = field(default_factory=dict)  # as it was said of the first row
    num_with_coordinates: int = 0
    num_conformers: int = 0
    missing_3d_by_reason: Counter[str] = field(default_factory=Counter)
    unknown_values: Counter[str] = field(default_factory=Counter)
    num_repeated_inchikeys: int | None = None  # None: nobody looked
    num_repeated_ids: int = 0
    num_in_several_splits: int = 0  # molecules, by InChIKey
    sizes: Counter[int] = field(default_factory=Counter)  # molecules by number of atoms
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    content_sha256: str = ""

    @property
    def num_rejected(self) -> int:
        """Rows that did not make it into the dataset."""
        return self.rejected_by_stage.total()

    def commonest_reasons(self) -> list[str]:
        """Why rows were rejected, each reason as it was said of the first such row."""
        common = self.rejected_by_reason.most_common(MAX_REASONS)
        return [
            f"{count:,} {self.first_of_reason[kind]}{' (and alike)' if count > 1 else ''}" for kind, count in common
        ]

    def summary(self) -> str:
        """The account, in a few lines."""
        stages = ", ".join(f"{count:,} {stage}" for stage, count in self.rejected_by_stage.most_common())
        lines = [
            f"{self.num_read:,} rows read = {self.num_kept:,} in the dataset + {self.num_rejected:,} rejected"
            + (f" ({stages}; see rejected.parquet)" if stages else ""),
            *(f"  {text}" for text in self.commonest_reasons()),
            f"{self.num_with_coordinates:,} with a geometry, {self.num_conformers:,} conformers in all",
        ]
        if self.missing_3d_by_reason:
            lines.append(
                f"{self.missing_3d_by_reason.total():,} without the geometry that was expected; see missing_3d.parquet"
            )
        if self.num_repeated_inchikeys:
            lines.append(f"{self.num_repeated_inchikeys:,} rows repeat the InChIKey of an earlier one and were kept")
        if self.num_repeated_ids:
            lines.append(f"{self.num_repeated_ids:,} rows repeat the id of an earlier one and were kept")
        if self.num_in_several_splits:
            lines.append(f"{self.num_in_several_splits:,} molecules are in more than one split (by InChIKey)")
        sizes = ", ".join(f"{name} {part['rows']:,}" for name, part in self.splits.items())
        return "\n".join([*lines, f"splits: {sizes}"])


def assemble(
    settings: "PreprocessingSettings",
    source: Source,
    work: Path,
    folder: Path,
    num_parts: int,
    num_read: int,
    units: dict[str, str | None],
) -> Assembly:
    """Write data/, rejected.parquet, missing_3d.parquet and preprocessing.json into a folder, and return the account."""
    parts = [Part(index, (), str(work)) for index in range(num_parts)]
    assembly = Assembly(num_read=num_read)
    columns = _Columns([part.path("rows") for part in parts])
    keep, reasons = _without_doubles(settings, source, columns, assembly)
    names, split_of = _splits(settings, columns, keep)
    assembly.splits = {name: {"rows": int(((split_of == code) & keep).sum())} for code, name in enumerate(names)}
    assembly.splits = {name: part for name, part in assembly.splits.items() if part["rows"]}
    if not assembly.splits:
        assembly.splits = {names[0]: {"rows": 0}}
    if settings.duplicates != "keep" and len(assembly.splits) > 1:
        assembly.num_in_several_splits = _in_several_splits(columns.codes("inchikey")[keep], split_of[keep])

    target = target_schema(source.targets, settings.duplicates != "keep")
    shutil.rmtree(folder, ignore_errors=True)
    content = ContentHash()
    with _Files(folder, settings.rows_per_file, target, assembly.splits) as files:
        start = 0
        for part in parts:
            rows = pq.read_table(part.path("rows"))
            here = slice(start, start := start + len(rows))
            kept = rows.filter(pa.array(keep[here]))
            files.reject(_rejections(part, rows, keep[here], reasons, here.start), assembly)
            _account(kept, assembly)
            files.miss(kept)
            table = kept.select(target.names)
            codes = split_of[here][keep[here]]
            content.add(table.append_column("split", pa.array(names).take(pa.array(codes))))
            for code in np.unique(codes):
                files.write(names[code], table.filter(pa.array(codes == code)))
    assembly.content_sha256 = content.hexdigest()
    if assembly.num_read != assembly.num_kept + assembly.num_rejected:
        raise RuntimeError(
            f"{assembly.num_read} rows were read, but {assembly.num_kept} are in the dataset and {assembly.num_rejected} "
            "rejected. This is a fault of the script: please report it."
        )
    if len(assembly.splits) > 1:
        for name, part_of in assembly.splits.items():
            part_of["sha256"] = split_hash(_ids_of(folder, name))
    assembly.targets = [
        {**asdict(target), "unit": units[target.name], "unit_of_source": target.unit} for target in source.targets
    ]
    record = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "processor": asdict(settings.featurization()),
        "corpus": {name: getattr(source, name) for name in ("title", "citation", "license", "homepage")},
        "settings": without_places(settings.that_shape_the_content()),
        **vars(assembly),
        "num_rejected": assembly.num_rejected,
        "versions": versions("moleblend_hf", "rdkit", "datasets", "pyarrow", "numpy"),
    }
    (folder / ABOUT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return assembly


def publish(folder: Path, output: Path) -> None:
    """Move all of a folder into OUTPUT; preprocessing.json last, as the sign that the rest is there."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == ABOUT):
        shutil.rmtree(output / path.name, ignore_errors=True)
        path.replace(output / path.name)


class _Columns:
    """Columns of all parts together, one at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._dataset = pads.dataset([str(path) for path in paths], format="parquet") if paths else None

    def values(self, name: str) -> pa.ChunkedArray:
        if self._dataset is None:
            return pa.chunked_array([], pa.string())
        return self._dataset.to_table(columns=[name])[name]

    def coded(self, name: str) -> tuple[np.ndarray, list[str]]:
        """For each row the number of its value, by first appearance, -1 for null; and the values."""
        encoded = pc.dictionary_encode(self.values(name)).combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
        return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()

    def codes(self, name: str) -> np.ndarray:
        """The numbers of `coded`."""
        return self.coded(name)[0]

    def __len__(self) -> int:
        return 0 if self._dataset is None else int(self._dataset.count_rows())


def _first_with_code(codes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each row the first of `among` that has its code; the row itself if it has none."""
    own = np.arange(len(codes))
    first = np.full(int(codes.max(initial=-1)) + 1, len(codes))
    rows = own[among & (codes >= 0)]
    np.minimum.at(first, codes[rows], rows)
    return np.where((codes >= 0) & among, first[codes] if len(first) else own, own)


def _without_doubles(
    settings: "PreprocessingSettings", source: Source, columns: _Columns, assembly: Assembly
) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Which rows stay, and for the others stage and reason."""
    num = len(columns)
    own, keep = np.arange(num), np.ones(num, dtype=bool)
    reasons: dict[int, tuple[str, str]] = {}
    number = columns.values("row").to_numpy() if num else own

    def drop(doubles: np.ndarray, first: np.ndarray, stage: str, what: str) -> None:
        keep[doubles] = False
        reasons.update(
            (int(row), (stage, f"has the {what} of row {number[first[row]]}")) for row in np.flatnonzero(doubles)
        )

    codes, inchikeys = columns.coded("inchikey") if settings.without else (own, [])
    for folder in settings.without or ():
        excluded = _inchikeys_of(folder)
        found = keep & np.isin(codes, [code for code, inchikey in enumerate(inchikeys) if inchikey in excluded])
        keep[found] = False
        reasons.update(
            (int(row), ("excluded", f"is in {Path(folder).name} (InChIKey)")) for row in np.flatnonzero(found)
        )
    first = _first_with_code(columns.codes("id"), keep)
    if source.id_column is not None and not source.id_guessed:
        drop(first != own, first, "id", "id")
    else:
        assembly.num_repeated_ids = int((first != own).sum())
    if settings.duplicates != "keep":
        first = _first_with_code(columns.codes("inchikey"), keep)
        if settings.duplicates == "drop":
            drop(first != own, first, "duplicate", "InChIKey")
        assembly.num_repeated_inchikeys = int(((first != own) & keep).sum())
    return keep, reasons


def check_without(folders: Iterable[str]) -> None:
    """Raise unless these are preprocessed datasets with InChIKeys."""
    for folder in folders:
        if any("inchikey" not in rows.column_names for rows in open_dataset(folder).splits.values()):
            raise ValueError(
                f"The dataset {folder!r} has no InChIKeys. Preprocess it with --duplicates report or drop."
            )


def _inchikeys_of(folder: str) -> set[str]:
    """Of all molecules of a preprocessed dataset."""
    splits = open_dataset(folder).splits.values()
    return {inchikey for rows in splits for inchikey in rows["inchikey"] if inchikey is not None}


def _splits(settings: "PreprocessingSettings", columns: _Columns, keep: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the splits, and the index of each row's among them."""
    num = len(columns)
    split_of = np.zeros(num, dtype=np.int64)
    if settings.split in (None, "given"):
        codes, given = columns.coded("split")
        if settings.split == "given" and not given:
            raise ValueError(
                "split is 'given', but the source names no splits. Name their column with --split_column, or choose "
                "another --split."
            )
        if len(given) > MAX_SPLITS:
            raise ValueError(
                f"The rows name {len(given):,} splits, such as {given[0]!r} and {given[1]!r}; at most {MAX_SPLITS} were "
                "expected. Name another --split_column."
            )
        if not given:
            return ["train"], split_of
        found = [_split_name(name) for name in given]
        names = sorted({*found, "unassigned"}, key=lambda name: (name not in SPLIT_NAMES, *_place(name)))
        place = np.array([*(names.index(name) for name in found), names.index("unassigned")])
        return names, place[codes]
    rows: Any = int(keep.sum())
    if settings.split in SCAFFOLD_SPLITS:
        rows = columns.codes("scaffold")[keep]
    fractions = tuple(settings.split_fractions)
    split_of[keep] = assign_splits(str(settings.split), rows, fractions, settings.split_seed)  # type: ignore[arg-type]
    return list(SPLIT_NAMES), split_of


def _place(name: str) -> tuple[int, str]:
    return (SPLIT_NAMES.index(name) if name in SPLIT_NAMES else 0, name)


def _split_name(given: str) -> str:
    """As `datasets` allows and calls it."""
    name = re.sub(r"\W+", "_", given.strip().lower()).strip("_") or "unassigned"
    return SPLIT_SYNONYMS.get(name, name)


def _in_several_splits(inchikeys: np.ndarray, split_of: np.ndarray) -> int:
    known = inchikeys >= 0
    pairs = np.unique(np.stack([inchikeys[known], split_of[known]]), axis=1)
    return int((np.bincount(pairs[0]) > 1).sum()) if pairs.size else 0


def _rejections(
    part: Part, rows: pa.Table, keep: np.ndarray, reasons: dict[int, tuple[str, str]], start: int
) -> pa.Table:
    """What the part rejected, and its rows that are doubles or excluded, by row."""
    rejected = pq.read_table(part.path("rejected"))
    dropped = np.flatnonzero(~keep)
    if len(dropped):
        left_out = rows.take(pa.array(dropped))
        stages = [reasons[start + int(row)] for row in dropped]
        columns = [left_out["row"], left_out["id"], left_out["smiles"], *map(pa.array, zip(*stages, strict=True))]
        rejected = pa.concat_tables([rejected, pa.table(columns, schema=REJECTED)]).sort_by("row")
    return rejected


def _account(kept: pa.Table, assembly: Assembly) -> None:
    sizes, counts = np.unique(pc.list_value_length(kept["atom_features"]).to_numpy(), return_counts=True)
    conformers = pc.list_value_length(kept["coordinates"]).to_numpy()
    assembly.num_kept += len(kept)
    assembly.sizes.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
    assembly.num_conformers += int(conformers.sum())
    assembly.num_with_coordinates += int((conformers > 0).sum())
    for text in kept["unknown_values"].drop_null().to_pylist():
        assembly.unknown_values.update(json.loads(text))
    assembly.missing_3d_by_reason.update(map(_kind, kept["missing_coordinates_reason"].drop_null().to_pylist()))


def _kind(reason: str) -> str:
    """A reason without what is particular to the molecule, so that like ones are counted together."""
    return re.sub(r"'[^']*'|\b\d[\d,.]*\b", "...", reason)


class _Files:
    """The Parquet files of the dataset, each split cut after so many rows."""

    def __init__(self, folder: Path, rows_per_file: int, target: pa.Schema, splits: dict[str, dict[str, Any]]) -> None:
        self._folder, self._rows_per_file, self._schema = folder, rows_per_file, target
        self._num_files = {name: max(1, -(-part["rows"] // rows_per_file)) for name, part in splits.items()}
        self._written: Counter[str] = Counter()
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in splits}
        self._writers: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> "_Files":
        (self._folder / "data").mkdir(parents=True)
        self._rejected = self._open("rejected.parquet", REJECTED)
        self._missing = self._open("missing_3d.parquet", MISSING_3D)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            for name in self._waiting:
                self._flush(name)
                if not self._written[name]:  # an empty dataset has its columns all the same
                    self._writer(name)
        for writer in (*self._writers.values(), self._rejected, self._missing):
            writer.close()

    def write(self, split: str, rows: pa.Table) -> None:
        """Add rows to a split."""
        self._waiting[split].append(rows)
        if sum(map(len, self._waiting[split])) >= ROWS_A_GROUP:
            self._flush(split)

    def reject(self, rows: pa.Table, assembly: Assembly) -> None:
        """Add rejections, and count them."""
        self._rejected.write_table(rows)
        stages, found = rows["stage"].to_pylist(), rows["reason"].to_pylist()
        assembly.rejected_by_stage.update(stages)
        for stage, reason in zip(stages, found, strict=True):
            kind = f"{stage}: {_kind(reason)}"
            assembly.rejected_by_reason[kind] += 1
            assembly.first_of_reason.setdefault(kind, f"{stage}: {reason}")

    def miss(self, rows: pa.Table) -> None:
        """Note the rows that have no geometry although one was expected."""
        rows = rows.filter(pc.is_valid(rows["missing_coordinates_reason"]))
        names = ("row", "id", "smiles", "missing_coordinates_reason")
        self._missing.write_table(rows.select(names).rename_columns(MISSING_3D.names))

    def _flush(self, split: str) -> None:
        rows = pa.concat_tables(self._waiting[split]) if self._waiting[split] else self._schema.empty_table()
        self._waiting[split] = []
        while len(rows):
            room = self._rows_per_file - self._written[split] % self._rows_per_file
            head, rows = rows.slice(0, room), rows.slice(room)
            self._writer(split).write_table(head.combine_chunks(), row_group_size=ROWS_A_GROUP)
            self._written[split] += len(head)
            if self._written[split] % self._rows_per_file == 0:
                self._writers.pop(split).close()

    def _writer(self, split: str) -> pq.ParquetWriter:
        if split not in self._writers:
            index, count = self._written[split] // self._rows_per_file, self._num_files[split]
            name = f"data/{split}-{index:05d}-of-{count:05d}.parquet"
            self._writers[split] = self._open(name, self._schema)
        return self._writers[split]

    def _open(self, name: str, kind: pa.Schema) -> pq.ParquetWriter:
        return pq.ParquetWriter(self._folder / name, kind, compression="zstd")


def _ids_of(folder: Path, split: str) -> Iterator[str]:
    for path in sorted((folder / "data").glob(f"{split}-*.parquet")):
        yield from pq.read_table(path, columns=["id"])["id"].to_pylist()
