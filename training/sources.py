"""Corpora as their users have them on disk -> a stream of raw `Record`s, in bounded memory, one reader a kind of source.

`open_source` checks at once what can be checked before the first record: the files, their formats, the columns. Reading
then hands on what is written: nothing is parsed by RDKit here, and nothing is skipped. A row that cannot be read is a record
too, with the stage and the reason. Whether a file is gzipped is decided by its content, not by its name.
"""

import csv
import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # nothing is unpickled: it is how `torch.load` refuses to
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from arrow_types import is_nested_list, is_text, is_value, is_values
from corpora import MOLECULENET, MOLECULENET_SETS, PCQM4MV2, PCQM4MV2_TARGETS, QM9, QM9_TARGETS, Target
from files import DAMAGE, check_file, check_folder, check_text, open_bytes, open_text, read_head
from moleblend_hf.molecule_files import DELIMITERS, WORKBOOKS, delimiter_of, plain_name, smiles_column_of
from moleblend_hf.molecules_moleblend import MoleculeError, first_line, sdf_records
from qm9_ids import qm9_number, read_qm9_ids
from target_values import MISSING_VALUES, TASKS, check_class_names

HEAD_CHARACTERS = 1 << 20  # of an SDF, in which the end of its first molecule has to be
HEAD_RECORDS = 1000  # of an SDF, of which one at least has to have the data fields that are asked for
BATCH_ROWS = 1000  # of Parquet and datasets, in memory at once
MAX_FIELD_CHARACTERS = 1 << 20  # of delimited text; the module's 131,072 is less than some fields of real tables
MAX_NAMES_IN_NOTE = 10

ID_NAMES = (  # without case and punctuation
    "id",
    "molid",
    "moleculeid",
    "compoundid",
    "cid",
    "chemblid",
    "zincid",
    "name",
    "moleculename",
    "compoundname",
)

csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source as it is written there; nothing is parsed by RDKit yet."""

    row: int  # position in the source, from 0
    id: str  # from the id column or the title, else the row; "row N" where a column of ids has none
    smiles: str | None = None  # without surrounding whitespace
    sdf: str | None = None  # text of an SDF record, without its "$$$$" line
    coordinates: list | None = None  # nested (C, n, 3) lists in angstrom, in the atom order of `smiles`
    # As written, one for each target of the source: None where missing; of a target of atoms a list or the text of one.
    targets: tuple[str | float | list | None, ...] = ()
    split: str | None = None  # as in the split column or split file
    missing_3d: str | None = None  # why there is no geometry although one was expected
    stage: str | None = None  # where it was rejected: "csv", "sdf", "parquet", "join" or "excluded"
    reason: str | None = None  # why, phrased to follow the name of the row: "has 5 fields, but the header has 4"


@dataclass(frozen=True)
class Source:
    """A corpus whose files and columns were found and checked."""

    name: str
    files: tuple[Path, ...]  # all that is read; none for a dataset on the Hub
    targets: tuple[Target, ...]
    notes: tuple[str, ...]  # what was guessed or decided, a sentence each
    title: str
    reader: Callable[[], Iterator[Record]] = field(repr=False, compare=False)
    id_column: str | None = None  # of the ids; None: they are titles, names of a SMILES file or row numbers
    id_guessed: bool = False  # from the name of the column, so nobody said that they are unique
    citation: str | None = None
    license: str | None = None
    homepage: str | None = None

    def records(self) -> Iterator[Record]:
        """All rows in the order of the files; each call starts anew and gives the same."""
        return self.reader()


@dataclass(frozen=True, slots=True)
class _Options:
    """What `open_source` was told beside the input; None where it was not."""

    smiles_column: str | None = None
    id_column: str | None = None
    targets: Sequence[str] | None = None
    atom_targets: Sequence[str] | None = None
    units: Mapping[str, str] | None = None
    tasks: Mapping[str, str] | None = None
    class_names: Sequence[str] | None = None
    split_column: str | None = None
    exclude: Path | None = None
    delimiter: str | None = None


def open_source(
    kind: str,
    input: str | Path,
    *,
    smiles_column: str | None = None,
    id_column: str | None = None,
    targets: Sequence[str] | None = None,
    atom_targets: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    tasks: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    split_column: str | None = None,
    exclude: str | Path | None = None,
    delimiter: str | None = None,
) -> Source:
    """A source that was checked as far as possible before its first record is read.

    Args:
        kind: one of `SOURCES`.
        input: pcqm4mv2, qm9: the folder of the files. parquet: a file or a folder of them. dataset: a folder saved by
            `datasets`, or "user/name" on the Hub, each with ":split" for one split alone. Else: a file.
        smiles_column: column of the SMILES; guessed from its name if it is not given.
        id_column: column (SDF: data field) of the ids; guessed if exactly one column is named like one.
        targets: columns (SDF: data fields) of the targets. Not given: those a known corpus has, none of a table.
        atom_targets: columns of lists, with a value for each atom in the order of the SMILES; in an SDF the NAME of an
            atom property list that RDKit reads, field atom.dprop.NAME or atom.iprop.NAME.
        units: unit of a target, by its name; goes before what is known.
        tasks: one of `TASKS`, by the name of the target; goes before what is known.
        class_names: what cells of all targets that are no regression may hold instead of the indices 0, 1, ...
        split_column: column (SDF: data field) that says which split a row belongs to.
        exclude: list of QM9 ids to reject, such as its uncharacterized.txt.
        delimiter: one character, of csv and tsv.
    """
    if kind not in _KINDS:
        raise ValueError(f"There is no source {kind!r}. Choose one of {_listed(SOURCES)}.")
    for name, given in (("targets", targets), ("atom_targets", atom_targets), ("class_names", class_names)):
        if isinstance(given, str):
            raise ValueError(f"{name} must be a list of names, got the text {given!r}. Put it into a list.")
    options = _Options(
        smiles_column=smiles_column,
        id_column=id_column,
        targets=targets,
        atom_targets=atom_targets or None,
        units=units or None,
        tasks=tasks or None,
        class_names=class_names or None,
        split_column=split_column,
        exclude=None if exclude is None else Path(exclude),
        delimiter=delimiter,
    )
    opener, used = _KINDS[kind]
    unused = [name for name in _Options.__slots__ if getattr(options, name) is not None and name not in used]
    if unused:
        raise ValueError(
            f"{unused[0]} has no meaning for source {kind!r}. It takes {_listed(used) if used else 'no options'}."
        )
    if wrong := sorted(set((tasks or {}).values()) - set(TASKS)):
        raise ValueError(f"A task must be one of {_listed(TASKS)}, got {wrong[0]!r}.")
    if delimiter is not None and len(delimiter) != 1:
        raise ValueError(f"The delimiter must be one character, got {delimiter!r}.")
    return opener(str(input), options)


def count_rows(source: Source) -> int | None:
    """About how many rows there are, for a progress bar: ends of records or lines; None where nobody knows."""
    if not source.files or not read_head(source.files[0]):
        return None
    if all(path.suffix == ".parquet" for path in source.files):
        return sum(pq.read_metadata(path).num_rows for path in source.files)
    path = next((path for path in source.files if ".csv" in path.suffixes), source.files[0])
    is_sdf = b"M  END" in read_head(path, HEAD_CHARACTERS)
    try:
        with open_bytes(path) as file:
            if is_sdf:
                return sum(chunk.count(b"$$$$") for chunk in iter(partial(file.read, HEAD_CHARACTERS), b""))
            lines = sum(not line.isspace() for line in file)
            return lines if source.name == "smi" else max(lines - 1, 0)  # without the header
    except DAMAGE:
        return None


# Targets and columns


@dataclass(frozen=True, slots=True)
class _Columns:
    """Names of the columns from which the parts of a record are taken."""

    smiles: str | None = None
    id: str | None = None
    targets: tuple[str, ...] = ()
    split: str | None = None
    coordinates: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        names = (self.smiles, self.id, *self.targets, self.split, self.coordinates)
        return list(dict.fromkeys(name for name in names if name is not None))


def _choose_targets(
    available: Iterable[str],
    where: object,
    options: _Options,
    known: Iterable[Target] = (),
    others: Iterable[Target] = (),
) -> tuple[Target, ...]:
    """The targets that are asked for, else all `known`, then those of atoms; `others` only lends its units and tasks."""
    known = tuple(known)
    by_name = {target.name: target for target in (*known, *others)}
    of_molecules = [target.name for target in known] if options.targets is None else options.targets
    of_atoms = options.atom_targets or ()
    if both := [name for name in of_atoms if name in of_molecules]:
        raise ValueError(f"{both[0]!r} is named as a target of molecules and of atoms. Name it once.")
    names = list(dict.fromkeys((*of_molecules, *of_atoms)))
    _check_columns(names, available, where)
    units, tasks = options.units or {}, options.tasks or {}
    if strangers := [name for name in (*units, *tasks) if name not in names]:
        chosen = f"The targets: {_listed(names)}" if names else "No target is named"
        raise ValueError(f"{strangers[0]!r} has a unit or a task, but is no target. {chosen}.")
    targets = []
    for name in names:
        target = by_name.get(name, Target(name))
        target = replace(target, task=tasks.get(name, target.task), of_atoms=name in of_atoms)
        if target.task == "regression":
            targets.append(replace(target, unit=units.get(name, target.unit)))
        elif name in units:
            raise ValueError(f"Target {name!r} has the task {target.task!r}, so it has no unit. Leave its unit out.")
        else:
            targets.append(replace(target, unit=None, class_names=tuple(options.class_names or ())))
    check_class_names(options.class_names or (), targets)
    return tuple(targets)


def _check_columns(names: Iterable[str | None], available: Iterable[str], where: object) -> None:
    available = list(available)
    for name in names:
        if name is not None and name not in available:
            raise ValueError(f"{where} has no column {name!r}. Its columns: {_listed(available, 100)}.")


def _choose_columns(
    available: Sequence[str], where: object, targets: Sequence[Target], options: _Options
) -> tuple[_Columns, list[str]]:
    """Columns as they are named or can be guessed, and what to tell about the choice."""
    _check_columns((options.smiles_column, options.id_column, options.split_column), available, where)
    notes: list[str] = []
    smiles, identifier = options.smiles_column, options.id_column
    if smiles is None:
        smiles = _guess_smiles(available, where)
        notes.append(f"SMILES column: {smiles!r} (guessed; --smiles_column names another).")
    if identifier is None:
        taken = {smiles, options.split_column, *(target.name for target in targets)}
        ids = [name for name in available if plain_name(name) in ID_NAMES and name not in taken]
        if len(ids) == 1:
            identifier = ids[0]
            notes.append(f"Id column: {identifier!r} (guessed; --id_column names another).")
        else:
            why = f"{_listed(ids)} could hold ids" if ids else "no column is named like an id"
            notes.append(f"Ids: row numbers, because {why} (--id_column names a column).")
    columns = _Columns(smiles, identifier, tuple(target.name for target in targets), options.split_column)
    return columns, notes


def _guess_smiles(available: Sequence[str], where: object) -> str:
    if (found := smiles_column_of(available)) is not None:
        return found
    raise ValueError(
        f"No column of {where} can be told to hold the SMILES. Name it with --smiles_column. "
        f"Its columns: {_listed(available, 100)}."
    )


def _note_not_taken(available: Iterable[str], taken: Iterable[str], what: str = "Columns") -> list[str]:
    taken = set(taken)
    rest = [name for name in available if name not in taken]
    return [f"{what} not taken: {_listed(rest)}."] if rest else []


def _listed(names: Iterable[str], limit: int = MAX_NAMES_IN_NOTE) -> str:
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _id_in(cell: str, row: int) -> str:
    """The id in a cell of a column of ids; where it is empty, one that is no number, which other cells may hold."""
    return cell.strip() or f"row {row}"


def _value(text: str) -> str | None:
    text = text.strip()
    return None if text.lower() in MISSING_VALUES else text


# Delimited text


@dataclass(frozen=True, slots=True)
class _Table:
    """A delimited text file whose header was read."""

    path: Path
    delimiter: str
    columns: tuple[str, ...]


def _open_table(path: Path, delimiter: str) -> _Table:
    check_text(path, "a text table")
    header = next(_read_rows(path, delimiter), None)
    if header is None or isinstance(header, str):
        raise ValueError(f"{path} has no header that can be read: the file {header or 'is empty'}. Fetch it again.")
    columns: dict[str, None] = {}
    for name in map(str.strip, header):
        # As pandas names them: the second column "x" is "x.1".
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
        columns[next(unused for unused in names if unused not in columns)] = None
    return _Table(path, delimiter, tuple(columns))


def _read_rows(path: Path, delimiter: str) -> Iterator[list[str] | str]:
    """Rows that are not blank, the header first; where one cannot be read, the reason."""
    with open_text(path, newline="") as file:
        # Strict, or else a quote that is never closed swallows the rows after it without a word.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines = f"line {line}" if reader.line_num <= line else f"lines {line} to {reader.line_num}"
                yield f"cannot be read from {lines}: {error}; is there a stray or unclosed quote?"
                continue
            except DAMAGE as error:
                yield f"lies where {path.name} is damaged, at line {line}: {error}"
                return
            # A blank line is no row; the empty cell of a table of one column is, and is quoted to be told from one.
            if len(row) > 1 or row == [""] or (row and row[0].strip()):
                yield row


def _read_table(table: _Table, columns: _Columns) -> Iterator[Record]:
    """Records of a table without coordinates."""
    at = {name: index for index, name in enumerate(table.columns)}
    smiles, identifier, split = (
        None if name is None else at[name] for name in (columns.smiles, columns.id, columns.split)
    )
    targets = [at[name] for name in columns.targets]
    width = len(table.columns)
    for row, fields in enumerate(itertools.islice(_read_rows(table.path, table.delimiter), 1, None)):
        if isinstance(fields, str):
            yield Record(row, str(row), stage="csv", reason=fields)
        elif len(fields) != width:
            plural = "" if len(fields) == 1 else "s"
            yield Record(
                row, str(row), stage="csv", reason=f"has {len(fields)} field{plural}, but the header has {width}"
            )
        else:
            yield Record(
                row,
                str(row) if identifier is None else _id_in(fields[identifier], row),
                None if smiles is None else fields[smiles].strip(),
                targets=tuple([_value(text) if (text := fields[index]) else None for index in targets]),
                split=None if split is None else _value(fields[split]),
            )


def _guess_delimiter(path: Path, usual: str) -> str:
    check_text(path, "a text table")
    with open_text(path) as file:
        try:
            return delimiter_of(file.readline(), usual)
        except DAMAGE:  # who reads the header says so
            return usual


def _open_csv(kind: str, input: str, options: _Options) -> Source:
    path = Path(input)
    notes: list[str] = []
    delimiter = options.delimiter or _guess_delimiter(path, DELIMITERS[kind])
    table = _open_table(path, delimiter)
    if delimiter not in (options.delimiter, DELIMITERS[kind]):
        notes.append(f"Delimiter: {delimiter!r} (guessed; --delimiter names another).")
    targets = _choose_targets(table.columns, path, options)
    columns, guesses = _choose_columns(table.columns, path, targets, options)
    notes += guesses + _note_not_taken(table.columns, columns.names)
    return Source(
        kind,
        (path,),
        targets,
        tuple(notes),
        path.name,
        partial(_read_table, table, columns),
        id_column=columns.id,
        id_guessed=columns.id != options.id_column,
    )


# SMILES files

# A CXSMILES extension belongs to the SMILES although there is a space before it.
_SMI_LINE = re.compile(r"[^\S\t]*(\S*(?:\s+\|[^|]*\|(?=\s|$))?)\s*([^\t]*)")


def _open_smi(input: str, options: _Options) -> Source:
    path = Path(input)
    check_text(path, "a file with a SMILES and a name a line")
    return Source("smi", (path,), (), (), path.name, partial(_read_smi, path))


def _read_smi(path: Path) -> Iterator[Record]:
    row = 0
    with open_text(path) as file:
        try:
            for line in map(str.rstrip, file):
                # What starts with a tab has no SMILES: the name must not be taken for one.
                match = cast(re.Match[str], _SMI_LINE.match(line))
                if not line or (row == 0 and match[1].lower() == "smiles"):
                    continue
                yield Record(row, match[2].strip() or str(row), match[1])
                row += 1
        except DAMAGE as error:
            yield Record(row, str(row), stage="csv", reason=f"lies where {path.name} is damaged: {error}")


# SDF

_FIELD_HEADER = re.compile(r">[^<]*<([^>]*)>")
_ATOM_LISTS = ("atom.dprop.", "atom.iprop.")  # what RDKit calls the fields that hold a value for each atom


def _read_sdf_texts(path: Path) -> Iterator[str | MoleculeError]:
    with open_text(path) as lines:
        try:
            yield from sdf_records(lines)
        except tarfile.TarError as error:
            yield MoleculeError(f"lies where the file is damaged: {first_line(error)}", "sdf", "Fetch the file again")


def _check_sdf(path: Path) -> None:
    """Raises unless a molecule ends near the start: what is no SDF has no end of record either, and fills the memory."""
    check_text(path, "an SDF or MOL file", tar=True)
    size = 0
    try:
        with open_text(path) as file:
            while size < HEAD_CHARACTERS and (line := file.readline(HEAD_CHARACTERS)):
                if line.startswith(("M  END", "$$$$")):
                    return
                size += len(line)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged before its first molecule ends: {error}. Fetch it again.") from error
    raise ValueError(
        f"{path} is no SDF or MOL file: no line of its first {size:,} characters starts with 'M  END' or '$$$$'. "
        "Give one, or another --source."
    )


def _sdf_fields(text: str) -> dict[str, str]:
    """Data fields of an SDF record. The value of one goes on until a blank line."""
    _, start, tail = text.partition("\n>")
    lines = iter((start[1:] + tail).split("\n"))
    fields: dict[str, str] = {}
    for line in lines:
        if header := _FIELD_HEADER.match(line):
            fields[header[1]] = "\n".join(itertools.takewhile(str.strip, lines)).strip()
    return fields


def _sdf_record(row: int, text: str | MoleculeError) -> Record:
    if isinstance(text, MoleculeError):
        return Record(row, str(row), stage="sdf", reason=text.reason)
    return Record(row, text.partition("\n")[0].strip() or str(row), sdf=text)


def _open_sdf(input: str, options: _Options) -> Source:
    path = Path(input)
    _check_sdf(path)
    available: dict[str, None] = {}
    for text in itertools.islice(_read_sdf_texts(path), HEAD_RECORDS):
        if isinstance(text, str):
            available |= dict.fromkeys(_sdf_fields(text))
    for name in (*(options.targets or ()), options.id_column, options.split_column):
        if name is not None and name not in available:
            raise ValueError(
                f"None of the first {HEAD_RECORDS:,} records of {path} has a data field {name!r}. "
                f"Their fields: {_listed(available, 100) or 'none'}."
            )
    field_of = {name: _atom_list_field(name, available, path) for name in options.atom_targets or ()}
    targets = _choose_targets((*available, *field_of), path, options)
    fields = tuple(field_of.get(target.name, target.name) for target in targets)
    columns = _Columns(None, options.id_column, fields, options.split_column)
    notes = _note_not_taken(available, columns.names, "Data fields")
    return Source(
        "sdf", (path,), targets, tuple(notes), path.name, partial(_read_sdf, path, columns), id_column=columns.id
    )


def _atom_list_field(name: str, available: Iterable[str], path: Path) -> str:
    """The data field that holds the values of atoms of this name."""
    found = [prefix + name for prefix in _ATOM_LISTS if prefix + name in available]
    if len(found) != 1:
        raise ValueError(
            f"The first {HEAD_RECORDS:,} records of {path} have {len(found) or 'no'} data fields for the target of atoms "
            f"{name!r}; one of {_listed(prefix + name for prefix in _ATOM_LISTS)} was expected. "
            f"Their fields: {_listed(available, 100) or 'none'}."
        )
    return found[0]


def _read_sdf(path: Path, columns: _Columns) -> Iterator[Record]:
    for row, text in enumerate(_read_sdf_texts(path)):
        record = _sdf_record(row, text)
        if columns.names and isinstance(text, str):
            fields = _sdf_fields(text)
            record = replace(
                record,
                id=record.id if columns.id is None else _id_in(fields.get(columns.id, ""), row),
                targets=tuple(_value(fields.get(name, "")) for name in columns.targets),
                split=None if columns.split is None else _value(fields.get(columns.split, "")),
            )
        yield record


def _join(table: Iterator[Record], texts: Iterator[str | MoleculeError]) -> Iterator[Record]:
    """Rows of a table with the SDF records of the same position; rows beyond the last record have none."""
    damage: str | None = None
    for row, (record, text) in enumerate(itertools.zip_longest(table, texts)):
        if isinstance(text, MoleculeError):  # the last that comes from the SDF
            damage, text = f"has an SDF record that {text.reason}", None
        if record is not None:
            yield replace(record, sdf=text, missing_3d=damage)
        elif text is not None:
            reason = "is a record of the SDF beyond the last row of the table"
            yield replace(_sdf_record(row, text), stage="join", reason=reason)
        else:
            yield Record(row, str(row), stage="sdf", reason=damage)


def _one_of(paths: Iterable[Path], what: str) -> Path | None:
    paths = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    if len(paths) > 1:
        raise ValueError(f"There are several {what}: {', '.join(map(str, paths))}. Leave the one to read.")
    return paths[0] if paths else None


# PCQM4Mv2


def _open_pcqm4mv2(input: str, options: _Options) -> Source:
    folder = Path(input)
    check_folder(folder, "the folder of PCQM4Mv2")
    places = (folder, folder / "raw")
    candidates = [place / name for place in places for name in ("data.csv.gz", "data.csv")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds neither data.csv.gz nor raw/data.csv.gz. Give the folder into which OGB unpacked PCQM4Mv2."
        )
    table = _open_table(path, ",")
    targets = _choose_targets(table.columns, path, options, PCQM4MV2_TARGETS)
    identifier = next((name for name in ("idx", "row") if name in table.columns), None)
    columns = _Columns("smiles", identifier, tuple(target.name for target in targets))
    _check_columns(columns.names, table.columns, path)

    files, notes = [path], []
    endings = ("*.sdf", "*.sdf.gz", "*.tar.gz")
    sdf = _one_of((path for place in places for ending in endings for path in place.glob(ending)), "SDF files")
    if sdf is None:
        notes.append(f"No SDF file in {folder}: all molecules are without geometry.")
    else:
        _check_sdf(sdf)
        files.append(sdf)
        notes.append(f"Geometries: {sdf.name}, of which record i belongs to row i of {path.name}.")
    split_path = next((p for p in (folder / "split_dict.pt", folder.parent / "split_dict.pt") if p.is_file()), None)
    if split_path is None:
        notes.append("No split_dict.pt: the rows belong to no split.")
    else:
        read_split_dict(split_path)
        files.append(split_path)
    return Source(
        "pcqm4mv2",
        tuple(files),
        targets,
        tuple(notes),
        reader=partial(_read_pcqm4mv2, table, columns, sdf, split_path),
        id_column=identifier,
        **asdict(PCQM4MV2),
    )


def _read_pcqm4mv2(table: _Table, columns: _Columns, sdf: Path | None, split_path: Path | None) -> Iterator[Record]:
    split_of, names = (np.zeros(0, np.uint8), ("",)) if split_path is None else read_split_dict(split_path)
    for record in _join(_read_table(table, columns), iter(()) if sdf is None else _read_sdf_texts(sdf)):
        # By the index that is written, not the position: a part of the corpus keeps the splits of the whole.
        index = int(record.id) if record.id.isdecimal() else -1
        split = names[split_of[index]] if 0 <= index < len(split_of) else ""
        yield replace(record, split=split) if split else record


def read_split_dict(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """OGB's split_dict.pt as a code for each index, and the name of each code; code 0 is no split.

    The file was pickled by `torch.save`; only what NumPy needs to rebuild an array is allowed in it.
    """
    reconstruct = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # NumPy 1 wrote it by this name, NumPy 2 by the next
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        bytes,  # of an empty array
        *{type(np.dtype(name)) for name in ("int32", "int64", "uint32", "uint64")},
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            splits = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        what = f"needs {needed[1]}, which is not allowed to run" if needed else f"is damaged: {first_line(error)}"
        raise ValueError(f"{path} {what}. Fetch OGB's split_dict.pt again, or remove the file.") from error
    if not isinstance(splits, dict) or not splits:
        raise ValueError(
            f"{path} holds a {type(splits).__name__}; a dict of index arrays was expected. Fetch it again."
        )
    indices = {str(name): np.asarray(values) for name, values in splits.items()}
    for name, values in indices.items():
        if values.ndim != 1 or values.dtype.kind not in "iu" or (values.size and values.min() < 0):
            raise ValueError(f"Split {name!r} in {path} is no list of indices. Fetch the file again.")
    split_of = np.zeros(max(int(values.max(initial=-1)) for values in indices.values()) + 1, np.uint8)
    for code, values in enumerate(indices.values(), start=1):
        split_of[values] = code
    return split_of, ("", *("validation" if name == "valid" else name for name in indices))


# QM9


def _open_qm9(input: str, options: _Options) -> Source:
    folder = Path(input)
    check_folder(folder, "the folder of QM9")
    sdf = _one_of((path for ending in ("*.sdf", "*.sdf.gz") for path in folder.glob(ending)), "SDF files")
    if sdf is None:
        raise FileNotFoundError(f"{folder} holds no *.sdf or *.sdf.gz. Give the folder of gdb9.sdf and gdb9.sdf.csv.")
    _check_sdf(sdf)
    files, notes = [sdf], []
    path = _one_of(
        (path for ending in ("*.sdf.csv", "*.sdf.csv.gz") for path in folder.glob(ending)), "tables of targets"
    )
    if path is None:
        if options.split_column is not None:
            raise ValueError(f"There is no table in {folder} that could hold the column {options.split_column!r}.")
        table = None
        notes.append(f"No {sdf.name.removesuffix('.gz')}.csv in {folder}: there are no targets.")
        targets = _choose_targets((), folder, options)
    else:
        files.append(path)
        table = _open_table(path, ",")
        known = tuple(target for target in QM9_TARGETS if target.name in table.columns)
        targets = _choose_targets(table.columns, path, options, known)
    columns = _Columns(None, "mol_id", tuple(target.name for target in targets), options.split_column)
    if table is not None:
        _check_columns(columns.names, table.columns, path)
        notes += _note_not_taken(table.columns, columns.names)

    excluded: frozenset[int] = frozenset()
    if options.exclude is not None:
        excluded = read_qm9_ids(options.exclude)
        files.append(options.exclude)
        notes.append(f"Excluded: {len(excluded):,} ids listed in {options.exclude.name}.")
    elif (folder / "uncharacterized.txt").is_file():
        notes.append("uncharacterized.txt is there, but nothing is excluded; --exclude names the file to do so.")
    return Source(
        "qm9",
        tuple(files),
        targets,
        tuple(notes),
        reader=partial(_read_qm9, table, columns, sdf, options.exclude, excluded),
        id_column="mol_id" if table else None,
        **asdict(QM9),
    )


def _read_qm9(
    table: _Table | None, columns: _Columns, sdf: Path, exclude: Path | None, excluded: frozenset[int]
) -> Iterator[Record]:
    texts = _read_sdf_texts(sdf)
    if table is None:
        records = (_sdf_record(row, text) for row, text in enumerate(texts))
    else:
        records = (_checked_join(record, sdf) for record in _join(_read_table(table, columns), texts))
    for record in records:
        if exclude is not None and not record.stage and qm9_number(record.id) in excluded:
            yield replace(record, stage="excluded", reason=f"is listed in {exclude.name}")
        else:
            yield record


def _checked_join(record: Record, sdf: Path) -> Record:
    """The record, rejected unless its id in the table is the title of its SDF record."""
    if record.stage:
        return record
    if record.sdf is None:
        return replace(record, stage="join", reason=record.missing_3d or f"has no record in {sdf.name}")
    title = record.sdf.partition("\n")[0].strip()
    if title != record.id:
        return replace(record, stage="join", reason=f"is {record.id!r} in the table, but {title!r} in {sdf.name}")
    return record


# MoleculeNet


def _open_moleculenet(input: str, options: _Options) -> Source:
    path = Path(input)
    check_file(path, "a CSV file of MoleculeNet")
    name = next((n for n, s in MOLECULENET_SETS.items() if path.name.lower().startswith(s.file_names)), None)
    if name is None:
        raise ValueError(
            f"{path.name!r} starts with the name of no MoleculeNet set. Rename it after one of "
            f"{_listed(MOLECULENET_SETS, 100)}, or read it as source 'csv'."
        )
    known = MOLECULENET_SETS[name]
    table = _open_table(path, ",")
    smiles = options.smiles_column or known.smiles
    identifier = options.id_column or (known.id if known.id in table.columns else None)
    targets = known.targets
    if not targets:
        prefix, unit = known.unit_of_prefix
        others = [column for column in table.columns if column not in (smiles, identifier, options.split_column)]
        targets = tuple(
            Target(column, unit if prefix and column.startswith(prefix) else None, known.task)
            for column in others
            if plain_name(column) not in ("", *ID_NAMES)
        )
    columns = _Columns(smiles, identifier, (), options.split_column)
    _check_columns(columns.names, table.columns, path)
    chosen = _choose_targets(table.columns, path, options, targets, (*targets, *known.others))
    columns = replace(columns, targets=tuple(target.name for target in chosen))
    return Source(
        f"moleculenet/{name}",
        (path,),
        chosen,
        (
            f"MoleculeNet set: {name} (from the name of the file).",
            *_note_not_taken(table.columns, columns.names),
        ),
        reader=partial(_read_table, table, columns),
        id_column=identifier,
        **{**asdict(MOLECULENET), "title": f"{known.title} (MoleculeNet)"},
    )


# Parquet and datasets


def _read_batches(
    batches: Iterable[Mapping[str, list]], columns: _Columns, first_row: int = 0, split: str | None = None
) -> Iterator[Record]:
    """Records of batches of columns."""
    row = first_row
    for batch in batches:
        nothing = [None] * len(batch[cast(str, columns.smiles)])
        smiles, ids, splits, coordinates = (
            nothing if name is None else batch[name]
            for name in (columns.smiles, columns.id, columns.split, columns.coordinates)
        )
        for index, text in enumerate(smiles):
            yield Record(
                row,
                str(row) if columns.id is None else _id_in("" if ids[index] is None else str(ids[index]), row),
                "" if text is None else str(text).strip(),
                coordinates=_conformers(coordinates[index]),
                targets=tuple([_cell(batch[name][index]) for name in columns.targets]),
                split=split if splits[index] is None else _value(str(splits[index])),
            )
            row += 1


def _conformers(coordinates: list | None) -> list | None:
    """Coordinates (n, 3) or (C, n, 3) as the latter."""
    if not coordinates:
        return None
    first = coordinates[0]
    return coordinates if isinstance(first, list) and first and isinstance(first[0], list) else [coordinates]


def _cell(value: Any) -> str | float | list | None:
    if value is None or isinstance(value, bool | list):
        return value
    if isinstance(value, str):
        return _value(value)
    number = float(value)
    return None if number != number else number


def _with_coordinates(columns: _Columns, notes: list[str], available: Sequence[str]) -> tuple[_Columns, list[str]]:
    """The columns, with `coordinates` if there is such a column and it is nothing else."""
    if "coordinates" in available and "coordinates" not in columns.names:
        columns = replace(columns, coordinates="coordinates")
        notes = [*notes, "Coordinates: column 'coordinates', in the atom order of the SMILES."]
    return columns, [*notes, *_note_not_taken(available, columns.names)]


def _open_parquet(input: str, options: _Options) -> Source:
    path = Path(input)
    paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(f"The folder {input!r} holds no *.parquet file. Give a file, or a folder of them.")
    schemas = [_parquet_schema(file) for file in paths]
    targets = _choose_targets(schemas[0].names, paths[0], options)
    columns, notes = _choose_columns(schemas[0].names, paths[0], targets, options)
    columns, notes = _with_coordinates(columns, notes, schemas[0].names)
    for file, schema in zip(paths, schemas, strict=True):
        _check_columns(columns.names, schema.names, file)
        _check_types(columns, targets, schema, file)
    return Source(
        "parquet",
        tuple(paths),
        targets,
        tuple(notes),
        path.name,
        partial(_read_parquet, tuple(paths), columns),
        id_column=columns.id,
        id_guessed=columns.id != options.id_column,
    )


def _parquet_schema(path: Path) -> pa.Schema:
    check_file(path, "a Parquet file")
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(-min(4, path.stat().st_size), io.SEEK_END)
        end = file.read(4)
    if start != b"PAR1":
        raise ValueError(f"{path} is no Parquet file: it does not start with 'PAR1'. Fetch it again.")
    if end != b"PAR1":
        raise ValueError(f"{path} is cut short: it does not end with 'PAR1'. Fetch it again.")
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The schema of {path} could not be read: {first_line(error)}. Fetch it again.") from error


def _check_types(columns: _Columns, targets: Iterable[Target], schema: pa.Schema, where: object) -> None:
    """Raises unless SMILES are text, targets text or numbers (of atoms: lists of them), and coordinates nested lists."""
    checks: list[tuple[str | None, Callable[[pa.DataType], bool], str]] = [
        (columns.smiles, is_text, "text was expected. Name another column"),
        (columns.coordinates, is_nested_list, "lists (atoms, 3) were expected. Convert or drop the column"),
        *(
            (target.name, is_values, "lists of numbers, or text, were expected. Name another column")
            if target.of_atoms
            else (target.name, is_value, "numbers or text were expected. Name another column")
            for target in targets
        ),
    ]
    for name, fits, expected in checks:
        if name is not None:
            found = schema.field(name).type
            found = found.storage_type if isinstance(found, pa.BaseExtensionType) else found
            found = found.value_type if pa.types.is_dictionary(found) else found
            if not fits(found):
                raise ValueError(f"Column {name!r} of {where} has the type {found}, but {expected}.")


def _read_parquet(paths: Sequence[Path], columns: _Columns) -> Iterator[Record]:
    row = 0
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                batches = (batch.to_pydict() for batch in file.iter_batches(BATCH_ROWS, columns=columns.names))
                for record in _read_batches(batches, columns, row):
                    yield record
                    row += 1
        except (OSError, pa.ArrowException) as error:
            yield Record(
                row, str(row), stage="parquet", reason=f"lies where {path.name} is damaged: {first_line(error)}"
            )
            row += 1


def _open_dataset(input: str, options: _Options) -> Source:
    # A folder may have a colon in its name.
    name, _, split = (input, "", "") if Path(input).exists() or ":" not in input else input.rpartition(":")
    files: tuple[Path, ...] = ()
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"{name!r} is no folder saved by `datasets`. Give one, or read Parquet files as source 'parquet'."
            )
        loaded = datasets.load_from_disk(name)
        files = tuple(sorted(file for file in Path(name).rglob("*") if file.is_file()))
        if split:
            splits = loaded if isinstance(loaded, dict) else {}
            if split not in splits:
                raise ValueError(f"{name!r} has no split {split!r}. Its splits: {_listed(splits) or 'none'}.")
            loaded = splits[split]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        loaded = datasets.load_dataset(name, split=split or None, streaming=True)
    else:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a dataset on the Hub such as 'user/name'.")

    parts = dict(loaded) if isinstance(loaded, dict) else {split: loaded}
    first = next(iter(parts.values()))
    # A stream from the Hub may not know its columns before its first row.
    available = first.column_names or list(next(iter(first), {}))
    targets = _choose_targets(available, name, options)
    columns, notes = _choose_columns(available, name, targets, options)
    columns, notes = _with_coordinates(columns, notes, available)
    for part_name, part in parts.items():
        where = f"{name} ({part_name})" if part_name else name
        if part.features is not None:
            _check_columns(columns.names, part.features, where)
            _check_types(columns, targets, part.features.arrow_schema, where)
    return Source(
        "dataset",
        files,
        targets,
        tuple(notes),
        name,
        partial(_read_dataset, parts, columns),
        id_column=columns.id,
        id_guessed=columns.id != options.id_column,
        citation=first.info.citation or None,
        license=first.info.license or None,
        homepage=first.info.homepage or None,
    )


def _read_dataset(parts: Mapping[str, Any], columns: _Columns) -> Iterator[Record]:
    row = 0
    for split, part in parts.items():
        batches = part.select_columns(columns.names).with_format(None).iter(BATCH_ROWS)
        for record in _read_batches(batches, columns, row, split or None):
            yield record
            row += 1


# Kinds of source: what opens one, and the options it takes.
_MOLECULENET_OPTIONS = ("smiles_column", "id_column", "targets", "units", "tasks", "class_names", "split_column")
_COLUMN_OPTIONS = (*_MOLECULENET_OPTIONS, "atom_targets")
_KINDS: dict[str, tuple[Callable[[str, _Options], Source], tuple[str, ...]]] = {
    "pcqm4mv2": (_open_pcqm4mv2, ("targets", "units")),
    "qm9": (_open_qm9, ("targets", "units", "exclude", "split_column")),
    "moleculenet": (_open_moleculenet, _MOLECULENET_OPTIONS),
    "csv": (partial(_open_csv, "csv"), (*_COLUMN_OPTIONS, "delimiter")),
    "tsv": (partial(_open_csv, "tsv"), (*_COLUMN_OPTIONS, "delimiter")),
    "smi": (_open_smi, ()),
    "sdf": (_open_sdf, tuple(name for name in _COLUMN_OPTIONS if name != "smiles_column")),
    "parquet": (_open_parquet, _COLUMN_OPTIONS),
    "dataset": (_open_dataset, _COLUMN_OPTIONS),
}
SOURCES = tuple(_KINDS)


# Kinds of files that any molecules come in, and the endings of their names.
_ENDINGS = {
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "smi": "smi",
    "smiles": "smi",
    "sdf": "sdf",
    "sd": "sdf",
    "mol": "sdf",
}
_ENDINGS |= {"parquet": "parquet"}
FILES = tuple(dict.fromkeys(_ENDINGS.values()))


def _ending(path: str | Path) -> str:
    return str(path).lower().removesuffix(".gz").rpartition(".")[2]


def has_known_ending(path: str | Path) -> bool:
    """Whether `source_of` tells what this is."""
    return _ending(path) in _ENDINGS


def source_of(path: str | Path) -> str:
    """The kind of source that the ending of a file's name tells, of `FILES`; the file may be gzipped."""
    if not has_known_ending(path):
        remedy = "Save the workbook as CSV" if f".{_ending(path)}" in WORKBOOKS else "Say what it is with --source"
        raise ValueError(f"{str(path)!r} does not end in {', '.join(f'.{name}' for name in _ENDINGS)}. {remedy}.")
    return _ENDINGS[_ending(path)]
