"""One part of a source -> a file of rows and a file of rejections, in a process that RDKit may take down.

`featurize_part` is what every engine runs, on one machine or on many: the content of a part depends on nothing but its
records and the settings. RDKit may crash, or never return; then a timer in C ends the process, even while RDKit holds the
interpreter. A marker file tells the supervisor at which row that was. It runs the part again, row by row
(`after_failure`), and at last without the row that ended its process twice.
"""

import faulthandler
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rdkit import Chem, rdBase

from conformers import ConformerCache
from corpora import Target
from moleblend_hf import MolecularGraph
from moleblend_hf.featurization_moleblend import featurize_parsed
from moleblend_hf.molecules_moleblend import (
    RDKIT_ERRORS,
    FeaturizationSettings,
    MoleculeError,
    ParsedMolecule,
    apply_modality,
    first_line,
    parse_molecule,
    parse_sdf_record,
)
from rows import GRAPH_COLUMNS, graph_columns, schema
from sources import Record
from splits import scaffold_of
from target_values import AtomOrder, stored_number, stored_numbers

RECORDS_A_BATCH = 64  # featurized together, within the time limit of one molecule
CONFORMERS_A_BATCH = 6  # the same where conformers are made, which takes a hundred times longer
ROW_DIGITS = 20  # of a marker
MAX_FAILURES = 2  # processes that a row may end: once it is blamed on its conformer
REJECTED = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("input", pa.string()), ("stage", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True, slots=True)
class PartSettings:
    """All that the content of a row depends on."""

    featurization: FeaturizationSettings
    targets: tuple[Target, ...] = ()
    target_factors: tuple[float, ...] = ()  # to the unit that is stored
    with_inchikey: bool = False
    scaffold: str | None = None  # definition of the split that needs it
    molecule_time_limit: float = 60.0  # seconds
    conformer_cache: str | None = None
    with_atom_order: bool = False  # for each atom of the graph its place among them in the order of the input

    def __post_init__(self) -> None:
        """Refuse targets that would share a column with something else."""
        own = [] if not self.targets else part_schema(replace(self, targets=(), with_inchikey=True)).names
        if taken := [target.name for target in self.targets if target.name in own]:
            raise ValueError(
                f"A target cannot be called {taken[0]!r}, which is a column of every dataset. Rename its column in the input."
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive records of a source, and what earlier attempts at them taught."""

    index: int
    records: Sequence[Record]
    folder: str  # where its files go
    failures: Mapping[int | None, tuple[str, ...]] = field(
        default_factory=dict
    )  # what ended processes, by row if known

    def path(self, kind: str) -> Path:
        """Where the rows, the rejections or the marker of this part are."""
        return Path(self.folder) / f"{kind}-{self.index:07d}{'' if kind == 'marker' else '.parquet'}"


def makes_conformers(modality: str) -> bool:
    """Whether molecules without a geometry get one."""
    return modality in ("2d+3d", "3d")


def target_schema(targets: Iterable[Target], with_inchikey: bool) -> pa.Schema:
    """Columns of a dataset with these targets."""
    targets = list(targets)
    return schema(
        [target.name for target in targets if not target.of_atoms],
        ("inchikey",) if with_inchikey else (),
        [target.name for target in targets if target.of_atoms],
    )


def part_schema(settings: PartSettings) -> pa.Schema:
    """Columns of the rows of a part: those of the dataset, and what is needed to put it together."""
    columns = target_schema(settings.targets, settings.with_inchikey)
    extra = [
        pa.field(name, pa.string()) for name in ("split", "scaffold", "missing_coordinates_reason", "unknown_values")
    ]
    order = [pa.field("atom_order", pa.list_(pa.int32()))] if settings.with_atom_order else []
    return pa.schema([pa.field("row", pa.int64()), *columns, *extra, *order])


def featurize_part(part: Part, settings: PartSettings) -> tuple[int, int]:
    """Write the rows and the rejections of a part, and return how many there are of each.

    The file of rows gets its name last: where it is, the part is done.
    """
    size = CONFORMERS_A_BATCH if makes_conformers(settings.featurization.modality) else RECORDS_A_BATCH
    size = 1 if part.failures else size
    rows: list[dict[str, Any]] = []
    graphs: list[MolecularGraph] = []
    rejected: list[dict[str, Any]] = []
    with _marked(part) as mark, rdBase.BlockLogs():
        for start in range(0, len(part.records), size):
            records = part.records[start : start + size]
            mark(records[0].row, settings.molecule_time_limit)
            for record, result in zip(records, _featurize(records, part.failures, settings), strict=True):
                if isinstance(result, MoleculeError):
                    text = record.smiles if record.sdf is None else record.sdf
                    values = (record.row, record.id, text, result.stage, result.reason)
                    rejected.append(dict(zip(REJECTED.names, values, strict=True)))
                else:
                    rows.append(result[0])
                    graphs.append(result[1])
    columns = part_schema(settings)
    arrays = graph_columns(graphs) | {
        name: pa.array([row.get(name) for row in rows], columns.field(name).type)
        for name in columns.names
        if name not in GRAPH_COLUMNS
    }
    table = pa.table({name: arrays[name] for name in columns.names}, schema=columns)
    write_whole(pa.Table.from_pylist(rejected, REJECTED), part.path("rejected"))
    write_whole(table, part.path("rows"))
    return len(rows), len(rejected)


def after_failure(part: Part, settings: PartSettings, how: str) -> Part:
    """The part as it is to be tried again after its process ended.

    Args:
        part: as it was tried.
        settings: of the part.
        how: the process ended, if it was not the timer; phrased to follow the name of a row.
    """
    marker = part.path("marker")
    text = marker.read_bytes() if marker.exists() else b""
    marker.unlink(missing_ok=True)  # or it would speak for the next attempt, if that ended before its first row
    timer_ended_it = b"Timeout" in text
    reason = f"took RDKit more than {settings.molecule_time_limit:g} s" if timer_ended_it else how
    row = int(text[:ROW_DIGITS]) if text and part.failures else None  # which row of a batch it was, nobody knows
    failures = (*part.failures.get(row, ()), reason)
    if len(failures) > MAX_FAILURES:
        where = "outside of any row" if row is None else f"at row {row}, which was not even read any more"
        raise RuntimeError(
            f"{len(failures)} processes ended at part {part.index}, the last one {where}: it {reason}. If memory is "
            "short, take fewer processes (--num_proc). Parts that are done are kept."
        )
    return replace(part, failures={**part.failures, row: failures})


def _featurize(
    records: Sequence[Record], failures: Mapping[int | None, tuple[str, ...]], settings: PartSettings
) -> list[tuple[dict[str, Any], MolecularGraph] | MoleculeError]:
    """A row without its graph columns, and its graph, or the error, for each record."""
    results: list[Any] = []
    for record in records:
        try:
            results.append(_parse(record, failures.get(record.row, ()), settings))
        except MoleculeError as error:
            results.append(error)
    parsed = [index for index, result in enumerate(results) if not isinstance(result, MoleculeError)]
    graphs = featurize_parsed([results[index][0] for index in parsed], settings.featurization)
    for index, graph in zip(parsed, graphs, strict=True):
        if isinstance(graph, MoleculeError):
            results[index] = graph
            continue
        row = results[index][1]
        if graph.unknown_values:
            row["unknown_values"] = json.dumps(graph.unknown_values)
        results[index] = (row, graph)
    return results


def _parse(record: Record, failures: tuple[str, ...], settings: PartSettings) -> tuple[ParsedMolecule, dict[str, Any]]:
    """The molecule, with atoms in the order of the row's SMILES, and the row without its graph."""
    if record.stage is not None:
        raise MoleculeError(record.reason or "", record.stage, "Fix it")
    if len(failures) >= MAX_FAILURES:
        raise MoleculeError(failures[-1], "process", "Leave it out")
    targets = _targets(record, settings)
    parsed, smiles, order, missing_reason = _molecule(record, settings.featurization)
    if any(isinstance(values, list) for values in targets.values()):
        molecule = record.smiles if record.sdf is None else parse_sdf_record(record.sdf)
        atoms = AtomOrder(molecule, settings.featurization, parsed.mol.GetNumAtoms(), order)
        for name, values in targets.items():
            targets[name] = atoms.arranged(values, name) if isinstance(values, list) else values
    if failures and makes_conformers(settings.featurization.modality) and parsed.coordinates is None:
        missing_reason = f"has no conformer: {failures[-1]}"  # perhaps; the next attempt shows
        if settings.featurization.modality == "3d":
            raise MoleculeError(missing_reason, "conformer", "Leave it out")
    else:
        embed = None if settings.conformer_cache is None else _cache(settings.conformer_cache).embed
        parsed = apply_modality(parsed, settings.featurization, embed)
        if missing_reason and parsed.coordinates is not None:
            missing_reason += ", so a conformer was made"
    row = {
        "row": record.row,
        "id": record.id,
        "smiles": smiles,
        "split": record.split,
        "missing_coordinates_reason": missing_reason or parsed.missing_coordinates_reason,
        **targets,
    }
    if settings.with_atom_order:
        row["atom_order"] = range(parsed.mol.GetNumAtoms()) if order is None else order
    if settings.with_inchikey:
        row["inchikey"] = Chem.MolToInchiKey(parsed.mol) or None
    if settings.scaffold is not None:
        try:
            row["scaffold"] = scaffold_of(parsed.mol, settings.scaffold)
        except ValueError as error:
            raise MoleculeError(f"has no scaffold: {error}", "split", "Choose another split") from error
    return parsed, row


def _molecule(
    record: Record, settings: FeaturizationSettings
) -> tuple[ParsedMolecule, str, list[int] | None, str | None]:
    """The molecule as its SMILES says, with the coordinates it has; the SMILES; and why expected coordinates are not there.

    Before the last comes where its atoms are in the order of the input, if that is another one.
    """
    given = replace(settings, modality="2d" if settings.modality == "2d" else "auto")
    if record.sdf is None or (record.smiles is not None and given.modality == "2d"):
        written = parse_molecule(record.smiles, record.coordinates, given)
        # Added hydrogens are atoms of the row, so its SMILES has them too.
        if settings.hydrogens == "add":
            return *_as_smiles(written, given), record.missing_3d
        return written, str(record.smiles), None, record.missing_3d
    mol = parse_sdf_record(record.sdf)
    if record.smiles is None:
        drawn = parse_molecule(mol, None, given)
        return *_as_smiles(drawn, given), _why_flat(record.sdf, drawn, given)
    # The SMILES says which molecule the row is about: if the geometry is of another one, the files are out of step.
    written = parse_molecule(record.smiles, None, given)
    try:
        drawn = parse_molecule(mol, None, given)
        if _constitution(drawn.mol) == _constitution(written.mol):
            return *_as_smiles(drawn, given), _why_flat(record.sdf, drawn, given)
        reason = "has an SDF record of another molecule than its SMILES"
    except MoleculeError as error:
        reason = f"has an SDF record that {error.reason}"
    return _molecule(replace(record, sdf=None, missing_3d=reason), settings)


def _why_flat(sdf: str, drawn: ParsedMolecule, settings: FeaturizationSettings) -> str | None:
    """Why the molecule of an SDF record that is flagged 3D has no coordinates, if so."""
    flag = "".join(sdf.split("\n", 2)[1:2])[20:22]
    if flag != "3D" or settings.modality == "2d" or drawn.coordinates is not None:
        return None
    return "has an SDF record that is flagged 3D, but flat and with marks of a drawing, for which RDKit takes it"


def _as_smiles(parsed: ParsedMolecule, settings: FeaturizationSettings) -> tuple[ParsedMolecule, str, list[int]]:
    """The molecule as it is read from its SMILES, that, and where its atoms were before.

    So whoever reads the row's SMILES has the row's graph.
    """
    try:
        smiles = Chem.MolToSmiles(parsed.mol)
    except RDKIT_ERRORS as error:
        raise MoleculeError(f"could not be written as SMILES: {first_line(error)}", "parse", "Fix it") from error
    order = list(parsed.mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])
    coordinates = None if parsed.coordinates is None else parsed.coordinates[:, order]
    return parse_molecule(smiles, coordinates, settings), smiles, order


def _constitution(mol: Chem.Mol) -> str:
    """Canonical SMILES without stereo: a geometry has stereo of which a SMILES may say nothing."""
    return Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False)


def _targets(record: Record, settings: PartSettings) -> dict[str, Any]:
    """Numbers, and lists of them in the order of the input."""
    found: dict[str, Any] = {}
    cells: tuple[Any, ...] = record.targets
    for target, value, factor in zip(settings.targets, cells, settings.target_factors, strict=True):
        if value is None:
            found[target.name] = None
        elif target.of_atoms:
            found[target.name] = stored_numbers(value, target, factor)
        else:
            found[target.name] = stored_number(value, target, factor)
    return found


@cache
def _cache(path: str) -> ConformerCache:
    """One connection a process."""
    return ConformerCache(path)


@contextmanager
def _marked(part: Part) -> Iterator[Any]:
    """A function that notes the row which is next and winds up the timer; both are gone in the end.

    The timer adds a traceback to the marker before it ends the process.
    """
    path = part.path("marker")
    with path.open("wb", buffering=0) as marker:

        def mark(row: int, limit: float) -> None:
            marker.seek(0)
            marker.write(b"%0*d" % (ROW_DIGITS, row))
            faulthandler.dump_traceback_later(limit, exit=True, file=marker)

        try:
            yield mark
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink(missing_ok=True)


def write_whole(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
