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
"""Files of molecules, read and written a row at a time: SMILES, CSV, TSV, SDF and Parquet in; CSV and Parquet out."""

import codecs
import csv
import gzip
import io
import itertools
import re
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from rdkit import Chem, rdBase

from .molecules_moleblend import RDKIT_ERRORS, MoleculeError, parse_sdf_record, sdf_records

STANDARD_STREAM = "-"
DELIMITERS = {"csv": ",", "tsv": "\t"}
FORMATS = ("smi", *DELIMITERS, "sdf", "parquet")
ENDINGS = {
    **{".smi": "smi", ".smiles": "smi", ".txt": "smi", ".csv": "csv", ".tsv": "tsv"},
    **{".sdf": "sdf", ".mol": "sdf", ".parquet": "parquet"},
}
WORKBOOKS = (".xlsx", ".xls", ".ods")
# Without case and punctuation, the likeliest first. Isomeric before canonical: only one of them may have the stereo.
SMILES_NAMES = ("smiles", "isomericsmiles", "canonicalsmiles", "cxsmiles", "smi", "mol", "structure")
WINDOWS = "windows-1252"  # for what is no UTF-8: how Excel on Windows saves CSV
ROWS_A_WRITE = 10_000  # of Parquet, in memory at once

csv.field_size_limit(max(csv.field_size_limit(), 1 << 20))


class MoleculeRow(NamedTuple):
    """A molecule of a file.

    Its id or row number, its SMILES (of an SDF record: RDKit's), what the processor takes, and the cells of its row by their
    columns, or the data fields of its record.
    """

    id: str
    smiles: str | None
    molecule: Any
    values: Mapping[str, Any] = MappingProxyType({})


class RowWriter(Protocol):
    """Takes rows by the names of their columns."""

    def __call__(self, row: Mapping[str, Any]) -> None: ...


# Reading


def plain_name(name: str) -> str:
    """Returns the name of a column without case and punctuation."""
    return re.sub("[^a-z0-9]", "", name.lower())


def smiles_column_of(columns: Sequence[str]) -> str | None:
    """Returns the column whose name says that it holds the SMILES, None if none or several do."""
    plain = {plain_name(name): name for name in reversed(columns)}
    for name in SMILES_NAMES:
        if name in plain:
            return plain[name]
    like = [name for name in columns if "smiles" in name.lower()]
    return like[0] if len(like) == 1 else None


def delimiter_of(header: str, usual: str) -> str:
    """Returns what stands between the names of columns in a first line: the only mark outside of quotes, else the usual one."""
    unquoted = re.sub('"[^"]*"', "", header)
    found = [mark for mark in ",;\t" if mark in unquoted]
    return found[0] if len(found) == 1 else usual


def read_molecules(
    path: str, format: str | None = None, smiles_column: str | None = None, id_column: str | None = None
) -> Iterator[MoleculeRow]:
    """Yields the molecules of a file in its order, also those that cannot be read: as a `MoleculeError`.

    Args:
        path: of a file, plain or gzipped, or "-" for standard input.
        format: one of `FORMATS`; left out: by the ending of the name, SMILES on standard input.
        smiles_column: of csv, tsv and parquet; left out: the one whose name says so.
        id_column: of csv, tsv and parquet, or a data field of an SDF; left out: titles, or row numbers from 0.
    """
    format = format or _format_of(path)
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(FORMATS)}.")
    if format == "parquet":
        yield from _read_parquet(path, smiles_column, id_column)
        return
    if format not in DELIMITERS and smiles_column is not None:
        raise ValueError(f"A file of the format {format!r} has no column {smiles_column!r}. Leave its name out.")
    if format == "smi" and id_column is not None:
        raise ValueError(f"A file of the format 'smi' has no column {id_column!r}: names stand behind the SMILES.")
    num_rows = 0
    with _opened(path) as lines:
        if format == "smi":
            rows = _read_smiles(lines)
        elif format == "sdf":
            rows = _read_sdf(lines, id_column)
        else:
            rows = _read_table(lines, DELIMITERS[format], smiles_column, id_column)
        try:
            for molecule in rows:
                yield molecule
                num_rows += 1
        except (EOFError, OSError, zlib.error) as error:
            damage = MoleculeError(f"lies where the file is damaged: {error}", format, "Fetch the file again")
            yield MoleculeRow(str(num_rows), None, damage)


def _format_of(path: str) -> str:
    if path == STANDARD_STREAM:
        return "smi"
    ending = Path(path.removesuffix(".gz")).suffix.lower()
    if ending not in ENDINGS:
        remedy = "Save the workbook as CSV" if ending in WORKBOOKS else "Say what it is with --format"
        raise ValueError(f"{path!r} does not end in {', '.join(ENDINGS)} or one of these and .gz. {remedy}.")
    return ENDINGS[ending]


def _decoded_as_windows(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no UTF-8 as characters that tell them apart; the five that Windows-1252 leaves free are controls."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    warnings.warn(
        "There is text that is not UTF-8; it is read as Windows-1252, as Excel saves it. If its letters are wrong, save the "
        "file as UTF-8.",
        stacklevel=2,
    )
    wrong = error.object[error.start : error.end]
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in wrong), error.end


codecs.register_error(WINDOWS, _decoded_as_windows)


def text_encoding(head: bytes) -> tuple[str, str]:
    """Returns the encoding of a text that starts so, and what is to be done about bytes that are none of it."""
    is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return ("utf-16", "replace") if is_utf16 else ("utf-8-sig", WINDOWS)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    if path == STANDARD_STREAM:
        if sys.stdin.isatty():
            print("Reading molecules from the terminal; Ctrl-D ends them.", file=sys.stderr)
        if isinstance(sys.stdin, io.TextIOWrapper):  # as a file, below
            head = sys.stdin.buffer.peek(2)[:2] if isinstance(sys.stdin.buffer, io.BufferedReader) else b""
            encoding, errors = text_encoding(head)
            sys.stdin.reconfigure(encoding=encoding, errors=errors, newline="")
        yield sys.stdin
        return
    with ExitStack() as stack:
        raw = stack.enter_context(Path(path).open("rb"))
        is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
        file: Any = stack.enter_context(gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        try:
            head = file.peek(2)[:2]
        except (EOFError, OSError, zlib.error):  # who reads it from its start finds the damage again, and names it
            raw.seek(0)
            file, head = stack.enter_context(gzip.GzipFile(fileobj=raw)), b""
        # What is not text cannot be parsed either, and is an error of its row.
        encoding, errors = text_encoding(head)
        yield stack.enter_context(io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=""))


def _read_smiles(lines: Iterable[str]) -> Iterator[MoleculeRow]:
    row = 0
    for line in lines:
        text = line.rstrip()  # what stands before a first tab may be nothing, and is the SMILES all the same
        smiles, _, name = text.partition("\t") if "\t" in text else text.lstrip().partition(" ")
        smiles, name = smiles.strip(), name.lstrip()
        if not text or (row == 0 and smiles.lower() == "smiles"):
            continue
        if name.startswith("|"):  # a CXSMILES extension belongs to the SMILES although there is a space before it
            extension, bar, name = name[1:].partition("|")
            smiles = f"{smiles} |{extension}{bar}"
        yield MoleculeRow(name.strip() or str(row), smiles, smiles)
        row += 1


def _read_table(
    lines: Iterable[str], delimiter: str, smiles_column: str | None, id_column: str | None
) -> Iterator[MoleculeRow]:
    lines = iter(lines)
    first = next(lines, "")
    if (found := delimiter_of(first, delimiter)) != delimiter:
        delimiter = found
        print(f"Delimiter: {delimiter!r}, for the first line has no other.", file=sys.stderr)
    # Strict, or else a quote that is never closed swallows the rows after it without a word.
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(
            f"The first row, of the names of columns, cannot be read: {error}. Fix its quotes."
        ) from error
    smiles_at = _position(smiles_column or _guess_smiles(header), header)
    id_at = None if id_column is None else _position(id_column, header)
    row = 0
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield MoleculeRow(str(row), None, MoleculeError(f"cannot be read: {error}", "csv", "Fix its quotes"))
            row += 1
            continue
        # A blank line; of one column, an empty cell is written as "" to be none.
        if not cells or (len(cells) == 1 and cells != [""] and not cells[0].strip()):
            continue
        if len(cells) != len(header):
            reason = f"is in a row with {len(cells)} cells under {len(header)} columns"
            yield MoleculeRow(str(row), None, MoleculeError(reason, "csv", "Fix the row"))
        else:
            smiles = cells[smiles_at].strip()
            values = dict(zip(header, cells, strict=True))
            yield MoleculeRow(str(row) if id_at is None else _id_in(cells[id_at], row), smiles, smiles, values)
        row += 1


def _read_parquet(path: str, smiles_column: str | None, id_column: str | None) -> Iterator[MoleculeRow]:
    if path == STANDARD_STREAM:
        raise ValueError("Parquet cannot be read from standard input. Name a file.")
    pa, pq = _pyarrow()
    with pq.ParquetFile(path) as file:
        header = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        if "coordinates" in file.schema_arrow.names:
            print("The column 'coordinates' is not read; training/predict.py reads it.", file=sys.stderr)
        smiles_name = header[_position(smiles_column or _guess_smiles(header), header)]
        id_name = None if id_column is None else header[_position(id_column, header)]
        rows = (cells for batch in file.iter_batches(columns=header) for cells in batch.to_pylist())
        for row, cells in enumerate(rows):
            smiles = str(cells[smiles_name] or "").strip()
            identifier = str(row) if id_name is None else _id_in(cells[id_name], row)
            yield MoleculeRow(identifier, smiles, smiles, cells)


def _id_in(cell: Any, row: int) -> str:
    """The id in a cell; where it is empty, one that is no number, which other cells may hold."""
    return ("" if cell is None else str(cell).strip()) or f"row {row}"


def _position(name: str, header: list[str]) -> int:
    if name not in header:
        raise ValueError(f"There is no column {name!r}. The columns: {', '.join(map(repr, header)) or 'none'}.")
    return header.index(name)


def _guess_smiles(header: list[str]) -> str:
    if (found := smiles_column_of(header)) is not None:
        return found
    raise ValueError(
        f"No column can be told to hold the SMILES. Name it with --smiles-column. The columns: "
        f"{', '.join(map(repr, header)) or 'none'}."
    )


def _read_sdf(lines: Iterable[str], id_column: str | None) -> Iterator[MoleculeRow]:
    for row, record in enumerate(sdf_records(re.sub("\r\n?", "\n", line) for line in lines)):
        if isinstance(record, MoleculeError):
            yield MoleculeRow(str(row), None, record)
            continue
        title = record.partition("\n")[0].strip()
        with rdBase.BlockLogs():
            molecule = parse_sdf_record(record)
        if isinstance(molecule, MoleculeError):
            yield MoleculeRow(title or str(row), None, molecule)
            continue
        identifier = title
        if id_column is not None:
            identifier = molecule.GetProp(id_column) if molecule.HasProp(id_column) else ""
        values = {name: molecule.GetProp(name) for name in molecule.GetPropNames()}
        try:
            with rdBase.BlockLogs():
                smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule))
        except RDKIT_ERRORS:  # the processor rejects it, with the reason
            smiles = None
        yield MoleculeRow(identifier or str(row), smiles, molecule, values)


# Writing


@contextmanager
def row_writer(path: str, columns: Mapping[str, str], overwrite: bool = False) -> Iterator[RowWriter]:
    """Gives a function that writes a row. The file gets its name when all of them are written, or never.

    Args:
        path: ends in .csv or .parquet, or is "-": CSV on standard output.
        columns: the kind of each column: "text", "number" or "vector" (of float32), or "[...]" for a list of such. In CSV a
            list is written with ; between its values, and a list of vectors is refused.
        overwrite: whether to replace a file that is there.
    """
    if path == STANDARD_STREAM:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="")  # as a file, whatever the code page of the terminal
        with _csv_writer(sys.stdout, columns) as write:
            yield write
        return
    target = Path(path)
    if target.suffix not in (".csv", ".parquet"):
        raise ValueError(f"The output {path!r} does not end in .csv or .parquet. Name such a file, or - for CSV.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another --output, or replace it with --overwrite.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} for the output. Make it, or name another.")
    partial = target.with_name(f"{target.name}.partial")
    try:
        if target.suffix == ".csv":
            with partial.open("w", encoding="utf-8", newline="") as file, _csv_writer(file, columns) as write:
                yield write
        else:
            with _parquet_writer(partial, columns) as write:
                yield write
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _csv_writer(file: TextIO, columns: Mapping[str, str]) -> Iterator[RowWriter]:
    if "[vector]" in columns.values():
        raise ValueError("A list of vectors does not fit into CSV. Name an --output that ends in .parquet.")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)

    def write(row: Mapping[str, Any]) -> None:
        writer.writerow([_cell(row.get(name)) for name in columns])

    yield write


def _cell(value: Any) -> Any:
    if isinstance(value, list | np.ndarray):
        return ";".join("" if part is None else str(part) for part in value)
    return value


@contextmanager
def _parquet_writer(path: Path, columns: Mapping[str, str]) -> Iterator[RowWriter]:
    pa, pq = _pyarrow()
    types: dict[str, Any] = {"text": pa.string(), "number": pa.float64(), "vector": pa.list_(pa.float32())}
    types |= {f"[{kind}]": pa.list_(type) for kind, type in types.items()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    rows: list[dict[str, Any]] = []

    def write(row: Mapping[str, Any]) -> None:
        cells: dict[str, Any] = {name: row.get(name) for name in columns}
        # Arrow takes vectors of NumPy, but no matrices.
        rows.append({name: list(cell) if np.ndim(cell) > 1 else cell for name, cell in cells.items()})
        if len(rows) == ROWS_A_WRITE:
            flush()

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    with pq.ParquetWriter(path, schema) as writer:
        yield write
        flush()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow, which is not installed. Run `pip install pyarrow`.") from error
    return pa, pq


__all__ = ["FORMATS", "MoleculeRow", "read_molecules", "row_writer"]
