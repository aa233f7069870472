"""training/labels.py: labels are read as arrays in the order of the rows, and unusable ones are named."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from labels import Labelled, check_labels, graphs_of, labelled
from moleblend_hf import MoleBlendProcessor
from rows import graph_columns, schema

SMILES = ["CCO", "C", "CC"]
NAN = float("nan")


def dataset(inchikeys: bool = True) -> datasets.Dataset:
    """Three molecules with a target of the molecule, one of classes and two of its atoms."""
    columns = schema(["y", "kind"], ["inchikey"] if inchikeys else [])
    arrays = {
        "id": pa.array(["a", "b", "c"]),
        "smiles": pa.array(SMILES),
        "inchikey": pa.array(["K1", None, "K2"]),
        "y": pa.array([0.5, None, 2.0]),
        "kind": pa.array([0.0, 2.0, None]),
        **graph_columns(MoleBlendProcessor().featurize_many(SMILES)),
    }
    table = pa.table({name: arrays[name] for name in columns.names})
    shifts = pa.array([[1.0, 2.0, None], None, [3.0, 4.0]], pa.list_(pa.float32()))
    charges = pa.array([[0.0] * 3, [5.0], [0.0] * 2], pa.list_(pa.float32()))
    return datasets.Dataset(table.append_column("shift", shifts).append_column("charge", charges))


def test_labels_of_molecules_are_in_the_order_of_the_rows():
    rows = dataset()
    found = labelled(rows, ["kind", "y"])
    assert (found.names, found.ids, found.smiles) == (("kind", "y"), ["a", "b", "c"], SMILES)
    assert found.inchikeys == ["K1", None, "K2"]
    assert found.labels.dtype == np.float64
    np.testing.assert_array_equal(found.labels, [[0, 0.5], [2, NAN], [NAN, 2]])
    chosen = labelled(rows.select([2, 0]), ["y"])
    assert (chosen.ids, chosen.labels.tolist()) == (["c", "a"], [[2.0], [0.5]])
    assert labelled(dataset(inchikeys=False), ["y"]).inchikeys == [None] * 3


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1]])
def test_labels_of_atoms_stay_with_their_molecule(order):
    found = labelled(dataset().select(order), ["shift", "charge"])
    expected = [[[1, 0], [2, 0], [NAN, 0]], [[NAN, 5]], [[3, 0], [4, 0]]]
    for labels, row in zip(found.of_atoms(), order, strict=True):
        np.testing.assert_array_equal(labels, expected[row])
    assert found.labels.shape == (found.num_atoms.sum(), 2)


def test_graphs_are_those_of_the_rows():
    rows = dataset()
    assert [graph.num_atoms for graph in graphs_of(rows)] == [3, 1, 2]
    assert [graph.num_atoms for graph in graphs_of(rows.select([2, 0]), [1, 0])] == [3, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "No target is named"),
        (["y", "z"], "has no target 'z'. Its columns: id, smiles, inchikey, .*, shift"),
        (["smiles"], "Column 'smiles' of the dataset has the type string, so it is no target"),
        (["coordinates"], "Column 'coordinates' of the dataset has the type list<.*, so it is no target"),
        (["y", "shift"], "'shift' is a target of atoms and 'y' one of molecules. Train a model for each kind"),
    ],
)
def test_columns_that_are_no_targets_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        labelled(dataset(), names)


def test_molecule_labels_are_not_taken_for_those_of_atoms():
    with pytest.raises(ValueError, match="y are targets of molecules, not of atoms"):
        labelled(dataset(), ["y"]).of_atoms()


def training(*columns: list[float], num_atoms: list[int] | None = None) -> Labelled:
    values = np.array(columns, dtype=np.float64).T
    num = len(values if num_atoms is None else num_atoms)
    names = tuple("xyz"[: len(columns)])
    ids = [f"m{row}" for row in range(num)]
    return Labelled(names, ids, ids, [None] * num, values, None if num_atoms is None else np.array(num_atoms))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("ranking", training([0, 1]), "There is no task 'ranking'. Choose one of regression, classification, classes"),
        ("classes", training([0, 1], [1, 0]), "'classes' takes one target, got 2: x, y. Train a model for each"),
        ("regression", training([0, 1], [NAN, NAN]), "'y' has no label in the 2 molecules to train on. Leave it out"),
        (
            "classification",
            training([0, 1], [1, 0.3]),
            "'m1' has 0.3 for target 'y', but .* takes 0 and 1. Train with",
        ),
        ("classification", training([0, 1, 2]), "'m2' has 2 for target 'x'.*preprocess the labels as classes"),
        ("classes", training([0, NAN, 1.5]), r"'m2' has 1.5 for target 'x', but .* takes the indices 0, 1, 2, \.\.\."),
        ("classes", training([-1, 0]), "'m0' has -1 for target 'x'"),
        ("classification", training([0, 1, 7, 0], num_atoms=[2, 2]), "'m1' has 7 for target 'x'"),
    ],
)
def test_labels_that_cannot_be_trained_on_are_named(task, labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(task, labels)


def test_constant_labels_are_told():
    assert check_labels("regression", training([1, 2, NAN], [3.5, NAN, 3.5])) == [
        "Target 'y' has the same value in all of the training set (3.5)."
    ]
    assert check_labels("classification", training([1, 1])) == [
        "Target 'x' has the same class in all of the training set (1)."
    ]
    assert check_labels("classes", training([0, 2, NAN])) == []
