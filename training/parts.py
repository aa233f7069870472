"""One part of a source -> a file of rows and a file of rejections, in a process that RDKit may take down.

`featurize_part` is what every engine runs, on one machine or on many: the content of a part depends on nothing but its
records and the settings. RDKit may crash or never return. A timer in C ends the process then, even while RDKit holds the
interpreter, and a marker file tells the supervisor at which row: it runs the part again, row by row, and at last without
the row that is to blame.
"""

import faulthandler
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rdkit import Chem, rdBase

from conformers import ConformerCache
from moleblend_hf import MolecularGraph
from moleblend_hf.featurization_moleblend import featurize_parsed
from moleblend_hf.molecules_moleblend import (
    FeaturizationSettings,
    MoleculeError,
    ParsedMolecule,
    apply_modality,
    parse_molecule,
    parse_sdf_record,
)
from rows import GRAPH_COLUMNS, graph_columns, schema
from sources import Record
from splits import scaffold_of

RECORDS_A_BATCH = (
    64  # featurized together; a tenth of that where conformers are made, so that less is lost to the timer
)
REJECTED = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("input", pa.string()), ("stage", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True, slots=True)
class PartSettings:
    """All that the content of a row depends on."""

    featurization: FeaturizationSettings
    target_names: tuple[str, ...] = ()
    target_factors: tuple[float, ...] = ()  # to the unit that is stored
    binary_targets: frozenset[str] = frozenset()
    with_inchikey: bool = False
    scaffold: str | None = None  # definition of the split that needs it
    molecule_time_limit: float = 60.0  # seconds
    conformer_cache: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive records of a source, and what earlier attempts at them taught."""

    index: int
    records: Sequence[Record]
    folder: str  # where its files go
    one_by_one: bool = False
    failures: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by row: what ended the process

    def path(self, kind: str) -> Path:
        """Where the rows, the rejections or the marker of this part are."""
        return Path(self.folder) / f"{kind}-{self.index:07d}{'' if kind == 'marker' else '.parquet'}"


def part_schema(settings: PartSettings) -> pa.Schema:
    """Columns of the rows of a part: those of the dataset, and what is needed to put it together."""
    columns = schema(settings.target_names, ("inchikey",) if settings.with_inchikey else ())
    extra = [
        pa.field(name, pa.string()) for name in ("split", "scaffold", "missing_coordinates_reason", "unknown_values")
    ]
    return pa.schema([pa.field("row", pa.int64()), *columns, *extra])


def featurize_part(part: Part, settings: PartSettings) -> tuple[int, int]:
    """Write the rows and the rejections of a part, and return how many there are of each.

    The file of rows gets its name last: where it is, the part is done.
    """
    made = settings.featurization.modality in ("2d+3d", "3d")
    size = 1 if part.one_by_one else RECORDS_A_BATCH // (10 if made else 1)
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
                    rejected.append(
                        {
                            "row": record.row,
                            "id": record.id,
                            "input": text,
                            "stage": result.stage,
                            "reason": result.reason,
                        }
                    )
                else:
                    rows.append(result[0])
                    graphs.append(result[1])
    target_schema = part_schema(settings)
    arrays = graph_columns(graphs) | {
        name: pa.array([row.get(name) for row in rows], target_schema.field(name).type)
        for name in target_schema.names
        if name not in GRAPH_COLUMNS
    }
    table = pa.table({name: arrays[name] for name in target_schema.names}, schema=target_schema)
    _write(pa.Table.from_pylist(rejected, REJECTED), part.path("rejected"))
    _write(table, part.path("rows"))
    return len(rows), len(rejected)


def _featurize(
    records: Sequence[Record], failures: Mapping[int, tuple[str, ...]], settings: PartSettings
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
        _, row, order = results[index]
        if graph.unknown_values:
            row["unknown_values"] = json.dumps(graph.unknown_values)
        results[index] = (row, graph if order is None else _reordered(graph, order))
    return results


def _parse(
    record: Record, failures: tuple[str, ...], settings: PartSettings
) -> tuple[ParsedMolecule, dict[str, Any], list[int] | None]:
    """The molecule, the row without its graph, and the order in which the row's SMILES has the atoms, if not the same."""
    if record.stage is not None:
        raise MoleculeError(record.reason or "", record.stage, "Fix it")
    made = settings.featurization.modality in ("2d+3d", "3d")
    if len(failures) > (1 if made else 0):
        raise MoleculeError(failures[-1], "process", "Leave it out")
    targets = _targets(record, settings)
    parsed, missing_reason, from_sdf = _molecule(record, settings.featurization)
    if failures:  # once is blamed on the conformer, without which it is tried again
        if settings.featurization.modality == "3d" and parsed.coordinates is None:
            raise MoleculeError(f"has no conformer: {failures[-1]}", "conformer", "Leave it out")
        missing_reason = missing_reason or (
            f"has no conformer: {failures[-1]}" if parsed.coordinates is None else None
        )
    else:
        embed = None if settings.conformer_cache is None else _cache(settings.conformer_cache).embed
        parsed = apply_modality(parsed, settings.featurization, embed)
    smiles, order = record.smiles, None
    if from_sdf:
        smiles = Chem.MolToSmiles(parsed.mol)
        order = list(parsed.mol.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])
    row = {
        "row": record.row,
        "id": record.id,
        "smiles": smiles,
        "split": record.split,
        "missing_coordinates_reason": missing_reason or parsed.missing_coordinates_reason,
        **targets,
    }
    if settings.with_inchikey:
        row["inchikey"] = Chem.MolToInchiKey(parsed.mol) or None
    if settings.scaffold is not None:
        try:
            row["scaffold"] = scaffold_of(parsed.mol, settings.scaffold)
        except ValueError as error:
            raise MoleculeError(f"has no scaffold: {error}", "split", "Choose another split") from error
    return parsed, row, order


def _molecule(record: Record, settings: FeaturizationSettings) -> tuple[ParsedMolecule, str | None, bool]:
    """The molecule with coordinates if it has some, why not although there is an SDF record, and if it is of that."""
    given = replace(settings, modality="2d" if settings.modality == "2d" else "auto")
    if record.sdf is None:
        return parse_molecule(record.smiles, record.coordinates, given), None, False
    mol = parse_sdf_record(record.sdf)
    if record.smiles is None:
        return parse_molecule(mol, None, given), None, True
    # The SMILES says which molecule the row is about: if the geometry is of another one, the files are out of step.
    written = parse_molecule(record.smiles, None, given)
    try:
        drawn = parse_molecule(mol, None, given)
    except MoleculeError as error:
        return written, f"has an SDF record that {error.reason}", False
    if _constitution(drawn.mol) != _constitution(written.mol):
        return written, "has an SDF record of another molecule than its SMILES", False
    return drawn, None, True


def _constitution(mol: Chem.Mol) -> str:
    """Canonical SMILES without stereo: a geometry has stereo of which a SMILES may say nothing."""
    return Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False)


def _targets(record: Record, settings: PartSettings) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value, factor in zip(settings.target_names, record.targets, settings.target_factors, strict=True):
        if value is None:
            found[name] = None
            continue
        try:
            number = float(value) * factor
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise MoleculeError(f"has {value!r} for target {name!r}, which is no number", "target", "Fix it")
        if name in settings.binary_targets and number not in (0, 1):
            raise MoleculeError(f"has {value!r} for target {name!r}, which is neither 0 nor 1", "target", "Fix it")
        found[name] = number
    return found


def _reordered(graph: MolecularGraph, order: list[int]) -> MolecularGraph:
    """The graph with atom `order[i]` as atom i."""
    place = np.empty(len(order), dtype=graph.bonds.dtype)
    place[order] = np.arange(len(order))
    return replace(
        graph,
        atom_features=graph.atom_features[order],
        bonds=place[graph.bonds],
        coordinates=graph.coordinates[:, order],
    )


@cache
def _cache(path: str) -> ConformerCache:
    """One connection a process."""
    return ConformerCache(path)


@contextmanager
def _marked(part: Part) -> Iterator[Any]:
    """A function that notes the row which is next and winds up the timer; both are gone in the end."""
    path = part.path("marker")
    with path.open("wb", buffering=0) as marker, open(os.devnull, "w") as nowhere:

        def mark(row: int, limit: float) -> None:
            marker.seek(0)
            marker.write(b"%020d" % row)
            faulthandler.dump_traceback_later(limit, exit=True, file=nowhere)

        try:
            yield mark
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink()


def _write(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
