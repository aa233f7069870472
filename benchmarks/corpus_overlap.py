"""What evaluation sets have in common with the molecules of a pretraining, and what they have that it never showed.

    python benchmarks/corpus_overlap.py --pretraining data/qm9,data/cascade --evaluation data/bbbp,data/esol

All are datasets of preprocess.py; of those for pretraining the training part counts. Columns: molecules with the InChIKey of one of
them; with its first block, which tells neither stereoisomers nor isotopes apart, nor charges of acids and bases; the same for the
largest fragment (salts); atoms of elements that occur less than a thousand times in the pretraining; molecules with more heavy
atoms than 99 % of it, and than all of it.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import datasets
import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem.rdmolops import GetMolFrags

from data import open_dataset

RARE = 1000  # atoms
FIRST_BLOCK = 14  # letters of an InChIKey


def elements(atom_features: list[list[list[int]]]) -> Counter[int]:
    """How many atoms there are of each element, by OGB's index."""
    return Counter(atom[0] for molecule in atom_features for atom in molecule)


def largest_fragment(smiles: str) -> str | None:
    """The first block of the InChIKey of the fragment with most heavy atoms; None where RDKit gives none."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        fragments = [] if mol is None else GetMolFrags(mol, asMols=True)
        key = Chem.MolToInchiKey(max(fragments, key=lambda found: found.GetNumHeavyAtoms())) if fragments else ""
    return key[:FIRST_BLOCK] or None


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", required=True, help="datasets, A,B")
    parser.add_argument("--evaluation", required=True, help="datasets, A,B")
    args = parser.parse_args(argv)
    keys: set[str] = set()
    seen: Counter[int] = Counter()
    sizes: list[int] = []
    for name in args.pretraining.split(","):
        rows = open_dataset(name).splits["train"]
        keys |= {key for key in rows["inchikey"] if key}
        for batch in rows.select_columns(["atom_features"]).iter(10_000):
            seen += elements(batch["atom_features"])
            sizes += map(len, batch["atom_features"])
    blocks = {key[:FIRST_BLOCK] for key in keys}
    common, largest = np.quantile(sizes, 0.99), max(sizes)
    print(
        f"Pretraining: {len(sizes):,} molecules, 99 % of at most {common:.0f} heavy atoms, all of at most {largest}.\n"
    )
    print(
        "| set | molecules | same InChIKey | same first block | with salts stripped | atoms of rare elements | larger than 99 % | larger than all |"
    )
    print("|---" * 8 + "|")
    for name in args.evaluation.split(","):
        rows = datasets.concatenate_datasets(list(open_dataset(name).splits.values()))
        found, texts, features = rows["inchikey"], rows["smiles"], rows["atom_features"]
        counts = elements(features)
        rare = sum(count for element, count in counts.items() if seen[element] < RARE) / counts.total()
        of_size = np.array([len(molecule) for molecule in features])
        same = [
            sum(key in keys for key in found),
            sum(bool(key) and key[:FIRST_BLOCK] in blocks for key in found),
            sum(largest_fragment(text) in blocks for text in texts),
        ]
        cells = [
            f"{len(rows):,}",
            *map(str, same),
            f"{rare:.1%}",
            f"{np.mean(of_size > common):.0%}",
            f"{np.mean(of_size > largest):.0%}",
        ]
        print(f"| {Path(name).name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
