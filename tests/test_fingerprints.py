"""The fingerprint baseline: known bits, gaps in the labels, what cannot be learned, and the same forest for a seed."""

import numpy as np
import pytest

import fingerprints as module
from fingerprints import fingerprint_baseline, fingerprints

NAN = np.nan
ALCOHOLS = [f"{'C' * length}O" for length in range(1, 9)]
AMINES = [f"{'C' * length}N" for length in range(1, 9)]
SMILES = ALCOHOLS + AMINES
IS_AMINE = np.repeat([0.0, 1.0], 8)[:, None]


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    monkeypatch.setattr(module, "NUM_TREES", 20)


def test_fingerprints_are_ecfp4_bits():
    found = fingerprints(["C", "CC", "CCO", "OCC"])
    assert (found.shape, set(np.unique(found))) == ((4, 2048), {0, 1})
    # Methane has one environment, ethane its atom and its atom with a bond, ethanol three atoms with radius 0 and 1.
    assert found.sum(1).tolist() == [1, 2, 6, 6]
    assert np.array_equal(found[2], found[3])


def test_a_molecule_that_rdkit_does_not_sanitize_has_a_fingerprint_and_one_it_cannot_parse_is_named():
    assert fingerprints(["CN1(=O)(=O)CC1"]).any()
    with pytest.raises(ValueError, match=r"Molecule 1 \('C1CC'\) has no fingerprint.*Leave it out"):
        fingerprints(["C", "C1CC"])


def test_it_learns_what_fingerprints_tell():
    found = fingerprint_baseline(SMILES, IS_AMINE, ["CCCCCCCCCCN", "CCCCCCCCCCO"], "multi_label_classification", 0)
    assert found.shape == (2, 1)
    assert found[0, 0] > 0.8 > 0.2 > found[1, 0]
    found = fingerprint_baseline(SMILES, 10 * IS_AMINE, ["CCCCCCCCCCN", "CCCCCCCCCCO"], "regression", 0)
    assert found[0, 0] > 8 > 2 > found[1, 0]


def test_rows_without_a_label_are_as_if_they_were_not_there():
    labels = IS_AMINE.copy()
    labels[::3] = NAN
    kept = ~np.isnan(labels[:, 0])
    with_gaps = fingerprint_baseline(SMILES, labels, SMILES, "regression", 0)
    without = fingerprint_baseline(
        [SMILES[row] for row in np.flatnonzero(kept)], labels[kept], SMILES, "regression", 0
    )
    assert np.array_equal(with_gaps, without)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_constant_labels_are_predicted_and_missing_ones_are_not(problem_type):
    labels = np.hstack([np.ones((16, 1)), np.full((16, 1), NAN), IS_AMINE])
    found = fingerprint_baseline(SMILES, labels, ["CCS", "CCP"], problem_type, 0)
    assert found[:, 0].tolist() == [1.0, 1.0]
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, 2]).all()


def test_classes_that_were_not_trained_on_have_the_probability_0():
    found = fingerprint_baseline(SMILES, 2 * IS_AMINE, SMILES, "single_label_classification", 0, num_classes=4)
    assert found.shape == (16, 4)
    assert found.sum(1) == pytest.approx(1)
    assert not found[:, [1, 3]].any()


def test_the_seed_decides():
    first, again, other = (
        fingerprint_baseline(SMILES, IS_AMINE, ["CCCCO", "CNO"], "regression", seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
