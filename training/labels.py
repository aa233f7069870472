"""The labels of a preprocessed dataset as arrays, and whether a model can be trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moleblend_hf import MolecularGraph
from rows import GRAPH_COLUMNS, graphs


@dataclass(frozen=True, eq=False)
class Labelled:
    """What is known about the molecules of a split besides their graphs; labels never leave their molecule.

    Attributes:
        names: of the T targets.
        ids, smiles: (n,) of the molecules.
        inchikeys: (n,), None where there is none or nobody asked for them.
        labels: (n, T) float64, NaN where missing; of atom targets (A, T), the atoms of one molecule after those of the
            other.
        num_atoms: (n,) if the targets are of atoms, else None.
    """

    names: tuple[str, ...]
    ids: list[str]
    smiles: list[str]
    inchikeys: list[str | None]
    labels: np.ndarray
    num_atoms: np.ndarray | None = None

    def known(self) -> np.ndarray:
        """(n,) whether a molecule has any label."""
        if self.num_atoms is None:
            return ~np.isnan(self.labels).all(1)
        return np.array([not np.isnan(labels).all() for labels in self.of_atoms()], dtype=bool)

    def of_atoms(self) -> list[np.ndarray]:
        """The labels of each molecule's atoms, (num_atoms, T), in the order of its graph."""
        if self.num_atoms is None:
            raise ValueError(f"{', '.join(self.names)} are targets of molecules, not of atoms. Read `labels`.")
        return np.split(self.labels, np.cumsum(self.num_atoms)[:-1])


def labelled(rows: datasets.Dataset, names: Sequence[str]) -> Labelled:
    """The labels of all rows of a split; `names` are targets of molecules or targets of atoms, not both."""
    if not names:
        raise ValueError("No target is named. Name one at least.")
    if unknown := [name for name in names if name not in rows.column_names]:
        raise ValueError(f"The dataset has no target {unknown[0]!r}. Its columns: {', '.join(rows.column_names)}.")
    text = ["id", "smiles", *(["inchikey"] if "inchikey" in rows.column_names else [])]
    table = rows.select_columns(list(dict.fromkeys([*text, *names]))).with_format("arrow")[:]
    kinds = [table.schema.field(name).type for name in names]
    of_atoms = [pa.types.is_list(kind) and pa.types.is_floating(kind.value_type) for kind in kinds]
    for name, kind, is_list in zip(names, kinds, of_atoms, strict=True):
        if not (is_list or pa.types.is_floating(kind)):
            raise ValueError(f"Column {name!r} of the dataset has the type {kind}, so it is no target.")
    if any(of_atoms) and not all(of_atoms):
        of_molecule = names[of_atoms.index(False)]
        raise ValueError(
            f"{names[of_atoms.index(True)]!r} is a target of atoms and {of_molecule!r} one of molecules. Train a model "
            "for each kind."
        )
    num_atoms = None
    if all(of_atoms):
        sizes = rows.select_columns(["atom_features"]).with_format("arrow")[:]["atom_features"]
        num_atoms = pc.list_value_length(sizes).to_numpy()
    columns = [
        table[name].to_numpy() if num_atoms is None else _values_of_atoms(table[name], num_atoms) for name in names
    ]
    inchikeys = table["inchikey"].to_pylist() if "inchikey" in table.column_names else [None] * len(table)
    return Labelled(
        names=tuple(names),
        ids=table["id"].to_pylist(),
        smiles=table["smiles"].to_pylist(),
        inchikeys=inchikeys,
        labels=np.stack(columns, axis=1).astype(np.float64),
        num_atoms=num_atoms,
    )


def atom_names(ids: Sequence[str], smiles: Sequence[str], num_atoms: np.ndarray) -> tuple[list[str], list[str]]:
    """What atoms of molecules are called in a report, in their order: id and index, and the SMILES of the molecule."""
    names = [f"{name}:{atom}" for name, size in zip(ids, num_atoms, strict=True) for atom in range(size)]
    return names, [text for text, size in zip(smiles, num_atoms, strict=True) for _ in range(size)]


def _values_of_atoms(column: pa.ChunkedArray, num_atoms: np.ndarray) -> np.ndarray:
    """The values of all atoms, (A,), NaN for those of a molecule without a list."""
    given = column.is_valid().to_numpy()
    values = np.full(int(num_atoms.sum()), np.nan)
    values[np.repeat(given, num_atoms)] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


def graphs_of(rows: datasets.Dataset, indices: Sequence[int] | np.ndarray | None = None) -> list[MolecularGraph]:
    """The graphs of some rows of a split, or of all, in that order."""
    selected = rows.select_columns(list(GRAPH_COLUMNS)).with_format("arrow")
    return graphs(selected[:] if indices is None else selected[indices])


def check_labels(task: str, training: Labelled) -> list[str]:
    """Raise unless a model can be trained on these labels; return what is odd about them, a sentence each.

    Args:
        task: "regression", "classification" (each target is 0 or 1) or "classes" (one target of indices 0 to C - 1).
        training: the rows to train on.
    """
    if task not in ("regression", "classification", "classes"):
        raise ValueError(f"There is no task {task!r}. Choose one of regression, classification, classes.")
    if task == "classes" and len(training.names) != 1:
        raise ValueError(
            f"The task 'classes' takes one target, got {len(training.names)}: {', '.join(training.names)}. Train a model "
            "for each, or take task 'classification' if all are 0 or 1."
        )
    check_classes(task, training)
    warnings = []
    for name, values in zip(training.names, training.labels.T, strict=True):
        found = np.unique(values[~np.isnan(values)])
        if not len(found):
            raise ValueError(
                f"Target {name!r} has no label in the {len(training.ids)} molecules to train on. Leave it out of the "
                "targets, or split the data another way."
            )
        if len(found) == 1:
            what = "value" if task == "regression" else "class"
            warnings.append(f"Target {name!r} has the same {what} in all of the training set ({found[0]:g}).")
        elif task == "regression" and set(found) == {0, 1}:
            warnings.append(
                f"Target {name!r} is 0 or 1 everywhere, but is learned as a number, not with --task classification."
            )
    return warnings


def check_classes(task: str, labelled: Labelled) -> None:
    """Raise for labels, of whatever part, that are no classes though the task has classes."""
    for name, values in zip(labelled.names, labelled.labels.T, strict=True):
        found = np.unique(values[~np.isnan(values)])
        if task != "regression" and len(wrong := found[~_is_class(task, found)]):
            raise ValueError(
                f"{labelled.ids[_molecule_of(labelled, values == wrong[0])]!r} has {wrong[0]:g} for target {name!r}, but "
                f"task {task!r} takes {'0 and 1' if task == 'classification' else 'the indices 0, 1, 2, ...'}. Train "
                "with task 'regression', or preprocess the labels as classes."
            )


def _is_class(task: str, values: np.ndarray) -> np.ndarray:
    return np.isin(values, (0, 1)) if task == "classification" else (values >= 0) & (values == np.floor(values))


def _molecule_of(labelled: Labelled, labels: np.ndarray) -> int:
    """The first molecule that has one of the labels which are true."""
    first = int(labels.argmax())
    if labelled.num_atoms is None:
        return first
    return int(np.searchsorted(np.cumsum(labelled.num_atoms), first, side="right"))
