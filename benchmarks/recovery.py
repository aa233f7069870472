"""Which hidden relations of a molecule a pretrained model recovers: bonds along paths, from the geometry and a blend.

    python benchmarks/recovery.py --model outputs/small --data data/qm9 --part test

Molecules of a part of a dataset, with their geometries. First the blend of pretraining: a pair shows one of its three relations, by
the config's probabilities, and the shortest path of those that show another one is predicted. Then the geometry alone: every pair
shows its distance. Tables of how often the likeliest class is right, by what is right, beside the share of the commonest class;
and examples: of the first molecules, the surest mistake and the longest path that was recovered.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

from data import open_dataset
from labels import graphs_of
from moleblend_hf.blending_moleblend import ATOM_DISTANCE, IGNORED_LABEL, PAIR_DISTANCE, PAIR_SHORTEST_PATH
from moleblend_hf.featurization_moleblend import BOND_TYPES

BATCH_SIZE = 64
LONGEST = 6  # shortest paths of so many bonds or more are one row of the table


def predicted(model, batch, from_geometry: bool) -> dict[str, np.ndarray]:
    """What is shown, right, likeliest and how sure the model is, (B, N, N) each; a pair without a target is -100."""
    draws = {}
    if from_geometry:
        shape = batch["coordinates"].shape[:2]
        draws = {
            "pair_modality_ids": torch.full((*shape, shape[1]), PAIR_DISTANCE),
            "atom_modality_ids": torch.full(shape, ATOM_DISTANCE),
            "coordinate_noise": torch.zeros_like(batch["coordinates"]),
        }
    with torch.inference_mode():
        outputs = model(**batch, **draws, generator=None if from_geometry else torch.Generator().manual_seed(0))
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
    rows = open_dataset(args.data).splits[args.part]
    rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[: args.num_molecules]))
    graphs, smiles = graphs_of(rows), rows["smiles"]
    paths = [f"{bonds} bond{'s' * (bonds > 1)}" for bonds in range(1, LONGEST)] + [f"{LONGEST} bonds or more"]
    _, stereo, conjugated = model.config.bond_class_sizes
    for from_geometry, title in ((False, "In a blend"), (True, "From the geometry alone")):
        seen: dict[str, list[np.ndarray]] = {"path": [], "predicted_path": [], "bond": [], "predicted_bond": []}
        for start in range(0, len(graphs), BATCH_SIZE):
            batch = processor.pad(graphs[start : start + BATCH_SIZE])
            found = predicted(model, batch, from_geometry)
            hidden = (found["path"] != IGNORED_LABEL) & (found["shown"] != PAIR_SHORTEST_PATH)
            bonded = hidden & (found["path"] == 0) & (found["bond"] != IGNORED_LABEL)
            for name, where in (("path", hidden), ("bond", bonded)):
                seen[name].append(found[name][where])
                seen[f"predicted_{name}"].append(found[f"predicted_{name}"][where])
            if from_geometry and start == 0:
                examples = found
        joined = {name: np.concatenate(values) for name, values in seen.items()}
        classes = (np.minimum(joined[name], LONGEST - 1) for name in ("path", "predicted_path"))
        table(f"{title}, shortest paths", *classes, paths)
        types = (joined[name] // (stereo * conjugated) for name in ("bond", "predicted_bond"))
        table(f"{title}, types of bonds", *types, [name.lower() for name in BOND_TYPES])
    print("\nExamples from the geometry alone, atoms by their place in the SMILES:\n")
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
