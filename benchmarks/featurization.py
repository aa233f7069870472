"""SMILES -> padded batch on one core: ours, a plain implementation, and RDKit's parser alone.

    python benchmarks/featurization.py                                              # 32 drugs, seconds
    python benchmarks/featurization.py --input bace.csv.gz --smiles_column mol      # the claim in the README

The contestants take turns, so that whatever else the machine does slows all of them; medians over the rounds. Times are
of the process (CPU), with one thread. All molecules are featurized and then padded in batches of like size, as training
does it. What RDKit cannot read is left out beforehand and counted.
"""

import argparse
import csv
import gzip
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import torch
from drug_molecules import DRUG_SMILES
from plain_featurization import featurize_plainly, pad_plainly
from rdkit import Chem, rdBase

from moleblend_hf import MoleBlendProcessor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="CSV or CSV.gz with SMILES; a list of drugs if left out")
    parser.add_argument("--smiles_column", default="smiles", help="its column of SMILES")
    parser.add_argument("--batch_size", type=int, default=32, help="molecules a batch")
    parser.add_argument("--rounds", type=int, default=7, help="how often each takes its turn")
    parser.add_argument("--num_plain", type=int, default=200, help="molecules for the plain implementation")
    return parser.parse_args(argv)


def read_smiles(path: Path, column: str) -> list[str]:
    """Returns the column of SMILES of a CSV."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if column not in (rows.fieldnames or []):
            raise SystemExit(f"{path} has no column {column!r}. Pass --smiles_column, one of {rows.fieldnames}.")
        return [row[column] for row in rows]


def seconds_a_molecule(function: Callable[[list[str]], None], smiles: list[str]) -> float:
    """Returns CPU seconds for a molecule."""
    start = time.process_time()
    function(smiles)
    return (time.process_time() - start) / len(smiles)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints a table; returns the median seconds a molecule of each contestant."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    given = read_smiles(args.input, args.smiles_column) if args.input else DRUG_SMILES * 20
    with rdBase.BlockLogs():
        mols = [Chem.MolFromSmiles(text) for text in given]
    smiles = [text for text, mol in zip(given, mols, strict=True) if mol is not None and mol.GetNumAtoms()]
    sizes = [mol.GetNumAtoms() for mol in mols if mol is not None and mol.GetNumAtoms()]
    del mols

    def padded(graphs: list, pad: Callable[[list], object], num_atoms: Callable[[Any], int]) -> None:
        graphs.sort(key=num_atoms)
        for start in range(0, len(graphs), args.batch_size):
            pad(graphs[start : start + args.batch_size])

    def parse(texts: list[str]) -> None:
        for text in texts:
            Chem.MolFromSmiles(text)

    def featurize(processor: MoleBlendProcessor) -> Callable[[list[str]], None]:
        return lambda texts: padded(processor.featurize_many(texts), processor.pad, lambda graph: graph.num_atoms)

    def plain(texts: list[str]) -> None:
        graphs = [featurize_plainly(text) for text in texts[: args.num_plain]]
        padded(graphs, pad_plainly, lambda graph: len(graph["degree"]))

    largest = max(sizes)
    contestants = {
        "RDKit's parser alone": parse,
        "ours": featurize(MoleBlendProcessor(modality="2d", max_atoms=largest)),
        "ours, atoms as written": featurize(
            MoleBlendProcessor(modality="2d", max_atoms=largest, canonical_atom_order=False)
        ),
        "plain, atoms as written": plain,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():  # warm up
        function(smiles[:64])
    for _ in range(args.rounds):
        for name, function in contestants.items():
            share = len(smiles[: args.num_plain]) / len(smiles) if function is plain else 1.0
            times[name].append(seconds_a_molecule(function, smiles) / share)
    medians = {name: statistics.median(values) for name, values in times.items()}
    parser_times = times["RDKit's parser alone"]

    print(
        f"{len(smiles)} molecules, {len(given) - len(smiles)} left out; {statistics.mean(sizes):.1f} atoms on average"
    )
    print(f"batches of {args.batch_size}, one thread, medians of {args.rounds} rounds\n")
    print(f"{'SMILES -> padded batch':<26}{'us/molecule':>12}{'molecules/s':>13}{'of the parser':>15}{'x plain':>9}")
    for name, median in medians.items():
        ratio = statistics.median(p / t for p, t in zip(parser_times, times[name], strict=True))
        faster = medians["plain, atoms as written"] / median
        print(f"{name:<26}{1e6 * median:>12.0f}{1 / median:>13,.0f}{ratio:>15.3f}{faster:>9.1f}")
    return medians


if __name__ == "__main__":
    main()
