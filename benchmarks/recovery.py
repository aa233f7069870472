"""Which hidden relations of a molecule a pretrained model recovers: bonds along paths, from distances and from a blend.

    python benchmarks/recovery.py --model outputs/small --data data/qm9 --part test

Molecules of a part of a dataset, with their geometries. First the blend of pretraining: a pair shows one of its three relations, by
the config's probabilities, and is asked for those that it hides; that its bonds tell the length of a path of up to five bonds, if
they are what it shows, and that the reverse pair may show what this one hides, is part of the task. Then distances alone: every pair
shows its distance. The atoms and their features (degree, hydrogens, hybridisation, ring, ...) are shown in both. Pairs are ordered.

Tables of how often the likeliest class is right, by what is right, beside the share of the commonest class, and beside RDKit's
DetermineConnectivity, which takes atoms for bonded by their distance; and examples: of the first molecules, the surest mistake
and the longest path that was recovered.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem import rdDetermineBonds
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

from data import open_dataset
from labels import graphs_of
from moleblend_hf.blending_moleblend import (
    ATOM_DISTANCE,
    IGNORED_LABEL,
    PAIR_BOND_PATH,
    PAIR_DISTANCE,
    PAIR_SHORTEST_PATH,
)
from moleblend_hf.featurization_moleblend import BOND_TYPES

BATCH_SIZE = 64
LONGEST = 6  # shortest paths of so many bonds or more are one row of the table


def predicted(model, batch, from_distances: bool, generator: torch.Generator) -> dict[str, np.ndarray]:
    """What is shown, right, likeliest and how sure the model is, (B, N, N) each; a pair without a target is -100."""
    draws = {}
    if from_distances:
        shape = batch["coordinates"].shape[:2]
        draws = {
            "pair_modality_ids": torch.full((*shape, shape[1]), PAIR_DISTANCE),
            "atom_modality_ids": torch.full(shape, ATOM_DISTANCE),
            "coordinate_noise": torch.zeros_like(batch["coordinates"]),
        }
    with torch.inference_mode():
        outputs = model(**batch, **draws, generator=None if from_distances else generator)
    probabilities, likeliest = outputs.shortest_path_logits.float().softmax(-1).max(-1)
    hops = outputs.bond_path_logits[..., 0, :].float().argmax(-1)
    found = {
        "shown": outputs.pair_modality_ids,
        "path": outputs.shortest_path_labels,
        "predicted_path": likeliest,
        "sureness": probabilities,
        "bond": outputs.bond_path_labels[..., 0],
        "predicted_bond": hops,
    }
    return {name: values.numpy() for name, values in found.items()}


def perceived_paths(smiles: str, coordinates: np.ndarray, shape: int) -> np.ndarray:
    """(shape, shape) class of the shortest path of each pair, by the bonds that RDKit perceives from distances."""
    mol = Chem.RWMol()
    for atom in Chem.MolFromSmiles(smiles, sanitize=False).GetAtoms():
        mol.AddAtom(Chem.Atom(atom.GetAtomicNum()))
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(coordinates.astype(float))
    mol.AddConformer(conformer)
    rdDetermineBonds.DetermineConnectivity(mol)
    found = np.full((shape, shape), IGNORED_LABEL)
    found[: mol.GetNumAtoms(), : mol.GetNumAtoms()] = Chem.GetDistanceMatrix(mol) - 1
    return found


def table(title: str, right: np.ndarray, likeliest: np.ndarray, names: list[str]) -> None:
    """Print how many there are of each class, and how many of those were recovered."""
    commonest = np.bincount(right).max() / len(right)
    print(
        f"\n{title}: {np.mean(right == likeliest):.1%} of {len(right):,} recovered; the commonest class is {commonest:.1%}\n"
    )
    print("| what is right | pairs | recovered |\n|---|---|---|")
    for index in np.unique(right):
        of_class = right == index
        print(f"| {names[index]} | {of_class.sum():,} | {np.mean(likeliest[of_class] == index):.1%} |")


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--data", required=True, help="dataset with geometries, as preprocess.py writes it")
    parser.add_argument("--part", default="test", help="of the dataset; none of its molecules should be trained on")
    parser.add_argument("--num_molecules", type=int, default=1000)
    parser.add_argument("--num_examples", type=int, default=4)
    args = parser.parse_args(argv)
    model = AutoModelForPreTraining.from_pretrained(args.model).eval()
    processor = AutoFeatureExtractor.from_pretrained(args.model, modality="auto")
    rows = open_dataset(args.data).part(args.part)
    rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[: args.num_molecules]))
    graphs, smiles = graphs_of(rows), rows["smiles"]
    paths = [f"{bonds} bond{'s' * (bonds > 1)}" for bonds in range(1, LONGEST)] + [f"{LONGEST} bonds or more"]
    types = [name.lower() for name in BOND_TYPES]
    _, stereo, conjugated = model.config.bond_class_sizes
    # What the pairs of a table show.
    hiding = {
        False: {
            "In a blend, shortest paths of pairs that show their distance": ("path", PAIR_DISTANCE),
            "In a blend, shortest paths of pairs that show their bonds": ("path", PAIR_BOND_PATH),
            "In a blend, types of bonds of pairs that show their distance": ("bond", PAIR_DISTANCE),
            "In a blend, types of bonds of pairs that show their shortest path": ("bond", PAIR_SHORTEST_PATH),
        },
        True: {
            "From distances alone, shortest paths": ("path", PAIR_DISTANCE),
            "From distances alone, types of bonds": ("bond", PAIR_DISTANCE),
        },
    }
    for from_distances, titles in hiding.items():
        seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {title: [] for title in titles}
        perceived, generator = [], torch.Generator().manual_seed(0)
        for start in range(0, len(graphs), BATCH_SIZE):
            batch = processor.pad(graphs[start : start + BATCH_SIZE])
            found = predicted(model, batch, from_distances, generator)
            for title, (name, shown) in titles.items():
                where = (found[name] != IGNORED_LABEL) & (found["shown"] == shown)
                if name == "bond":  # of atoms that are bonded
                    where &= found["path"] == 0
                seen[title].append((found[name][where], found[f"predicted_{name}"][where]))
            if from_distances:
                width, where = found["path"].shape[1], found["path"] != IGNORED_LABEL
                baseline = [
                    perceived_paths(text, graph.coordinates[0], width)
                    for text, graph in zip(
                        smiles[start : start + BATCH_SIZE], graphs[start : start + BATCH_SIZE], strict=True
                    )
                ]
                longest = LONGEST - 1  # so many bonds and more are one class
                right, likeliest = np.minimum(found["path"], longest), np.minimum(np.stack(baseline), longest)
                perceived.append((right == likeliest)[where])
                if start == 0:
                    examples = found
        for title, (name, _) in titles.items():
            right, likeliest = (np.concatenate(values) for values in zip(*seen[title], strict=True))
            if name == "path":
                table(title, np.minimum(right, LONGEST - 1), np.minimum(likeliest, LONGEST - 1), paths)
            else:
                table(title, right // (stereo * conjugated), likeliest // (stereo * conjugated), types)
    print(
        f"\nRDKit's DetermineConnectivity: {np.concatenate(perceived).mean():.1%} of the shortest paths from distances alone"
    )
    print("\nExamples from distances alone, atoms by their place in the SMILES:\n")
    for row in range(min(args.num_examples, len(graphs))):
        right, likeliest, sureness = (examples[name][row] for name in ("path", "predicted_path", "sureness"))
        for what, where in (("recovered", right == likeliest), ("mistaken", right != likeliest)):
            where = where & (right != IGNORED_LABEL)
            if not where.any():
                continue
            rank = np.where(where, right + sureness if what == "recovered" else sureness, -1)
            one, other = np.unravel_index(rank.argmax(), rank.shape)
            distance = np.linalg.norm(graphs[row].coordinates[0][one] - graphs[row].coordinates[0][other])
            print(
                f"- `{smiles[row]}`, atoms {one} and {other}, {distance:.2f} angstrom apart: {right[one, other] + 1} bonds, {what} as "
                f"{likeliest[one, other] + 1} (probability {sureness[one, other]:.2f})"
            )


if __name__ == "__main__":
    main()
