"""What a linear model reads from the embeddings of pretrained checkpoints: how good they are before anything is fine-tuned.

    python benchmarks/linear_probe.py --models outputs/small,outputs/other --data data/qm9 --targets gap,homo,lumo,mu,alpha
    python benchmarks/linear_probe.py --models outputs/small --data data/qm9 --layers 4          # of the lower layers alone
    python benchmarks/linear_probe.py --models outputs/small --data data/bbbp --part test        # once, at the end

Embeddings are the state of the graph token, the mean over the atoms, and both side by side, standardised; on them ridge regression,
or logistic regression of binary targets, is fitted to molecules of the training part, its penalty chosen by cross-validation among
them. A row is a checkpoint, an embedding and a target. Yardsticks are the first checkpoint's architecture with random weights (one
draw), and ECFP4 fingerprints.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data import PreprocessedDataset, open_dataset
from fingerprints import fingerprints
from labels import graphs_of, labelled
from moleblend_hf import MoleBlendModel, MoleBlendProcessor, MolecularGraph, embed_graphs

PENALTIES = np.logspace(-2, 6, 17)
RANDOM, ECFP4 = "random weights", "ECFP4"
BOTH = "both"


def embeddings(
    name: str, like: str, graphs: list[MolecularGraph], modality: str, layers: int | None = None
) -> dict[str, np.ndarray]:
    """(n, hidden_size) or twice that of graphs by a checkpoint, or by random weights in the shape of another; after all layers, or so many."""
    model = MoleBlendModel.from_pretrained(like)
    if name == RANDOM:
        torch.manual_seed(0)
        model = MoleBlendModel(model.config)
    model.layers = model.layers[:layers]
    processor = MoleBlendProcessor.from_pretrained(like, modality=modality)
    token = np.stack(embed_graphs(model, processor, graphs))
    atoms = np.stack([states.mean(0) for states in embed_graphs(model, processor, graphs, atoms=True)])
    return {"graph token": token, "mean of atoms": atoms, BOTH: np.hstack([token, atoms])}


def probed(train: np.ndarray, labels: np.ndarray, held: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Metrics of a linear model of one target, fitted to the training molecules that have a label."""
    known, tested = ~np.isnan(labels), ~np.isnan(measured)
    if not known.any() or not tested.any():
        return {"no labels": np.nan}
    if set(np.unique(labels[known])) <= {0, 1}:
        if len(np.unique(labels[known])) < 2 or len(np.unique(measured[tested])) < 2:
            return {"roc_auc": np.nan}  # of one class alone nothing is learned, and nothing ranked
        linear = GridSearchCV(LogisticRegression(max_iter=1000), {"C": 1 / PENALTIES}, scoring="roc_auc")
        model = make_pipeline(StandardScaler(), linear).fit(train[known], labels[known])
        return {"roc_auc": float(roc_auc_score(measured[tested], model.predict_proba(held[tested])[:, 1]))}
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(train[known], labels[known])
    values = model.predict(held[tested])
    return {
        "mae": float(mean_absolute_error(measured[tested], values)),
        "r2": float(r2_score(measured[tested], values)),
    }


def drawn_rows(dataset: PreprocessedDataset, part: str, num: int) -> np.ndarray:
    """Rows of a part: all, or so many drawn by a fixed seed."""
    return np.sort(np.random.default_rng(0).permutation(len(dataset.part(part)))[:num])


def results(
    models: list[str], data: str, targets: str | None, part: str, modality: str, num_molecules: int, layers: int | None
) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Checkpoint, embedding, target, metrics; the arguments are the flags."""
    dataset = open_dataset(data)
    names = targets.split(",") if targets else [target["name"] for target in dataset.about["targets"]]
    rows = {name: drawn_rows(dataset, name, num_molecules) for name in ("train", part)}
    graphs = {name: graphs_of(dataset.part(name), found) for name, found in rows.items()}
    labels = {name: labelled(dataset.part(name), names).labels[found] for name, found in rows.items()}
    for model in [*models, RANDOM, ECFP4]:
        if model == ECFP4:
            found = {name: {ECFP4: fingerprints(dataset.part(name).select(rows[name])["smiles"])} for name in rows}
        else:
            like = models[0] if model == RANDOM else model
            found = {name: embeddings(model, like, graphs[name], modality, layers) for name in rows}
        for kind in found[part]:
            for column, target in enumerate(names):
                (train, known), (held, measured) = (
                    (found[name][kind], labels[name][:, column]) for name in ("train", part)
                )
                yield model, kind, target, probed(train, known, held, measured)


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, help="checkpoint folders, A,B")
    parser.add_argument("--data", required=True, help="dataset with parts, as preprocess.py writes it")
    parser.add_argument("--targets", help="A,B; left out: all of the dataset")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--modality", default="auto", choices=("auto", "2d", "3d"))
    parser.add_argument("--num_molecules", type=int, default=4000, help="of each part, at most")
    parser.add_argument("--layers", type=int, help="embed with so many of the lowest; left out: all")
    print("| checkpoint | embedding | target | metrics |\n|---|---|---|---|")
    args = vars(parser.parse_args(argv))
    for name, kind, target, metrics in results(**args | {"models": args["models"].split(",")}):
        told = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        print(f"| {Path(name).name} | {kind} | {target} | {told} |", flush=True)


if __name__ == "__main__":
    main()
