"""Does the geometry of a molecule find its bonds? Nearest neighbours among embeddings of distances alone and of bonds alone.

    python benchmarks/retrieval.py --model outputs/small --data data/qm9 --part test

Each molecule is embedded twice: with its distances and without its bonds, and the reverse. Embeddings are standardised, apart for
each way, and compared by cosine. The atoms and their features (degree, hydrogens, hybridisation, ring, ...) are shown in both, and
tell most molecules apart; so the second kind of row looks among alike molecules alone, those with the same atoms and features,
that differ in what is bound to what. A row is a checkpoint (or its architecture with random weights, one draw) and an embedding;
columns are how often the molecule itself is the nearest of the other way, and how often a guess would be right. Examples are
molecules whose geometry finds an alike one first.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
from linear_probe import RANDOM, drawn_rows, embeddings

from data import open_dataset
from labels import graphs_of


def cosines(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(n, n) of standardised embeddings, (n, width) each."""
    unit = []
    for values in (queries, keys):
        scaled = (values - values.mean(0)) / (values.std(0) + 1e-6)
        unit.append(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    return unit[0] @ unit[1].T


def ranks(near: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n,) how many keys of its group are nearer to a query than its own."""
    return ((near > np.diag(near)[:, None]) & (groups[:, None] == groups)).sum(1)


def main(argv: list[str] | None = None) -> None:
    """Print the table and the examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--data", required=True, help="dataset with geometries and parts, as preprocess.py writes it")
    parser.add_argument("--part", default="test", help="of the dataset; none of its molecules should be trained on")
    parser.add_argument("--num_molecules", type=int, default=4000)
    parser.add_argument("--num_examples", type=int, default=4)
    args = parser.parse_args(argv)
    dataset = open_dataset(args.data)
    rows = dataset.part(args.part).select(drawn_rows(dataset, args.part, args.num_molecules))
    graphs = graphs_of(rows)
    has_geometry = [index for index, graph in enumerate(graphs) if len(graph.coordinates)]
    graphs, smiles = [graphs[index] for index in has_geometry], rows.select(has_geometry)["smiles"]
    atoms = [str(sorted(graph.atom_features.tolist())) for graph in graphs]
    _, kinds, sizes = np.unique(atoms, return_inverse=True, return_counts=True)
    alike = sizes[kinds] > 1
    pools = {
        f"all {len(graphs):,}": (np.zeros_like(kinds), np.full(len(graphs), True), 1 / len(graphs)),
        f"alike, {alike.sum():,}": (kinds, alike, np.mean(1 / sizes[kinds[alike]])),
    }

    print("| checkpoint | embedding | molecules | a guess | geometry finds bonds | bonds find geometry |")
    print("|---" * 6 + "|")
    mistaken: list[str] = []
    for name in (args.model, RANDOM):
        by_bonds, by_distances = (embeddings(name, args.model, graphs, modality) for modality in ("2d", "3d"))
        for kind in by_bonds:
            near = cosines(by_distances[kind], by_bonds[kind])
            for title, (groups, asked, guess) in pools.items():
                found = [np.mean(ranks(each, groups)[asked] == 0) for each in (near, near.T)]
                cells = [f"{value:.1%}" for value in (guess, *found)]
                print(f"| {Path(name).name} | {kind} | {title} | {' | '.join(cells)} |", flush=True)
            if name == args.model:
                among = np.where(kinds[:, None] == kinds, near, -np.inf).argmax(1)
                wrong = np.flatnonzero(among != np.arange(len(graphs)))[: args.num_examples]
                mistaken = [f"| `{smiles[query]}` | `{smiles[among[query]]}` |" for query in wrong]
    print("\n| geometry of | finds first the bonds of |\n|---|---|", *mistaken, sep="\n")


if __name__ == "__main__":
    main()
