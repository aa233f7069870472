"""Does the geometry of a molecule find its bonds? Nearest neighbours among embeddings of distances alone and of bonds alone.

    python benchmarks/retrieval.py --model outputs/small --data data/qm9 --part test

Each molecule is embedded twice: with its distances and without its bonds, and the reverse; the atoms and their features (degree,
hydrogens, hybridisation, ring, ...) are shown in both. Embeddings are standardised over the molecules of a pool, apart for each way, and
compared by cosine. A row is a checkpoint (or its architecture with random weights, one draw), an embedding and a pool: all molecules,
or those of the commonest formula, which are isomers. Columns: how often the molecule itself is the nearest, or among the ten nearest,
of the other way. Examples are isomers whose geometry finds another one first.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
from linear_probe import RANDOM, drawn_rows, embeddings
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from data import open_dataset
from labels import graphs_of


def similarities(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(n, n) cosines of standardised embeddings, (n, width) each."""
    unit = []
    for values in (queries, keys):
        scaled = (values - values.mean(0)) / (values.std(0) + 1e-6)
        unit.append(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    return unit[0] @ unit[1].T


def ranks(cosines: np.ndarray) -> np.ndarray:
    """(n,) how many keys are nearer to a query than its own."""
    return (cosines > np.diag(cosines)[:, None]).sum(1)


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
    formulas = [CalcMolFormula(Chem.MolFromSmiles(text)) for text in smiles]
    commonest = Counter(formulas).most_common(1)[0][0]
    isomers = np.flatnonzero([formula == commonest for formula in formulas])
    pools = {f"all {len(graphs):,}": np.arange(len(graphs)), f"{commonest}, {len(isomers):,}": isomers}

    print(
        "| checkpoint | embedding | molecules | geometry finds bonds | among ten | bonds find geometry | among ten |"
    )
    print("|---" * 7 + "|")
    found = {}
    for name in (args.model, RANDOM):
        by_bonds, by_distances = (embeddings(name, args.model, graphs, modality) for modality in ("2d", "3d"))
        for kind in by_bonds:
            for title, pool in pools.items():
                found[name, kind] = cosines = similarities(by_distances[kind][pool], by_bonds[kind][pool])
                both = [ranks(cosines), ranks(cosines.T)]
                cells = [f"{np.mean(rank < most):.1%}" for rank in both for most in (1, 10)]
                print(f"| {Path(name).name} | {kind} | {title} | {' | '.join(cells)} |", flush=True)

    cosines = found[args.model, kind]  # among isomers
    others = np.flatnonzero(ranks(cosines))[: args.num_examples]
    print("\n| geometry of | finds first the bonds of | its own are number |\n|---|---|---|")
    for query in others:
        nearest = isomers[cosines[query].argmax()]
        print(f"| `{smiles[isomers[query]]}` | `{smiles[nearest]}` | {ranks(cosines)[query] + 1} |")


if __name__ == "__main__":
    main()
