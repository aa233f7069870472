"""The baseline of every report: ECFP4 fingerprints and a random forest for each target, trained on the same rows.

ECFP4 (Rogers and Hahn 2010, doi:10.1021/ci100050t): the environments of up to two bonds around each atom, hashed to 2,048
bits. It knows neither coordinates nor pretraining, and many a pretrained model does not beat it.
"""

from collections.abc import Sequence

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from metrics import BINARY, REGRESSION

RADIUS = 2  # bonds
NUM_BITS = 2048
NUM_TREES = 200


def fingerprints(smiles: Sequence[str]) -> np.ndarray:
    """ECFP4 of each molecule, (n, 2048) of 0 and 1; stereochemistry is not in it."""
    generator = GetMorganGenerator(radius=RADIUS, fpSize=NUM_BITS)
    found = np.empty((len(smiles), NUM_BITS), np.uint8)
    for row, text in enumerate(smiles):
        found[row] = generator.GetFingerprintAsNumPy(_molecule(text, row))
    return found


def _molecule(smiles: str, row: int) -> Chem.Mol:
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        if mol is None:  # of a geometry, say, whose bonds RDKit does not accept: the environments are there
            mol = Chem.MolFromSmiles(smiles, sanitize=False)
            if mol is None:
                raise ValueError(
                    f"Molecule {row} ({smiles!r}) has no fingerprint: RDKit cannot parse it. Leave it out, or train "
                    "without the baseline."
                )
            mol.UpdatePropertyCache(strict=False)
            Chem.FastFindRings(mol)
    return mol


def fingerprint_baseline(
    train_smiles: Sequence[str],
    train_labels: np.ndarray,
    smiles: Sequence[str],
    problem_type: str,
    seed: int,
    num_classes: int | None = None,
) -> np.ndarray:
    """Predictions for `smiles` as a model's would be: (m, T) values or probabilities of class 1, or (m, C) of classes.

    A target whose training labels are all equal is predicted to be so; one without any is NaN.

    Args:
        train_smiles: molecules to train on.
        train_labels: (n, T), NaN where missing; for single_label_classification one target of 0 to C - 1.
        smiles: m molecules to predict.
        problem_type: regression, multi_label_classification or single_label_classification.
        seed: of the forests.
        num_classes: C, of single_label_classification.
    """
    train_features, features = fingerprints(train_smiles), fingerprints(smiles)
    columns = []
    for label in train_labels.T:
        known = ~np.isnan(label)
        if not known.any():
            columns.append(np.full((len(smiles), num_classes or 1), np.nan))
            continue
        if problem_type == REGRESSION:
            # A third of the bits at a split: no worse than all of them, and three times as fast.
            regressor = RandomForestRegressor(NUM_TREES, max_features=1 / 3, random_state=seed)
            columns.append(regressor.fit(train_features[known], label[known]).predict(features)[:, None])
        else:
            classifier = RandomForestClassifier(NUM_TREES, random_state=seed)
            classifier.fit(train_features[known], label[known].astype(int))
            probabilities = np.zeros((len(smiles), num_classes or 2))
            probabilities[:, classifier.classes_] = classifier.predict_proba(features)
            columns.append(probabilities[:, 1:] if problem_type == BINARY else probabilities)
    return np.hstack(columns)
