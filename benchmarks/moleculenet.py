"""Fine-tuning on sets of MoleculeNet: pretrained beside from scratch beside ECFP4 and a random forest, with spreads over seeds.

    python benchmarks/moleculenet.py --model outputs/small --data DIR                     # the five small sets and SIDER
    python benchmarks/moleculenet.py --model outputs/small --data DIR --sets bace,tox21 --output_dir outputs/moleculenet
    python benchmarks/moleculenet.py --model outputs/small --data DIR --draws 3 --max_training_molecules 100 --epochs 50 --output_dir outputs/hundred

DIR holds the CSV file of each set, plain or gzipped, as it is downloaded (BBBP.csv, delaney-processed.csv ...) or named after
it (esol.csv.gz). Each set is a run of training/finetune.py with the recipe moleculenet_small.yaml (--config for another) and
what else is given; a run that is there already is not made again. The table is printed as it comes out: test part of the
scaffold split (to choose by: --part validation), the epoch chosen on validation, mean and sample standard deviation over the
seeds. With --draws each seed is a run with other training molecules, too. `ahead` counts the seeds for which the pretrained
model is better than the same model from scratch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
from kept_runs import finetuned

import finetune
from corpora import MOLECULENET_SETS
from metrics import LOWER_IS_BETTER
from report import FROM_SCRATCH, MODEL

# Epochs for a small model on two slow cores; nothing was tuned.
SETS = {
    "bbbp": 6, "bace": 7, "clintox": 6, "tox21": 3, "sider": 4, "esol": 12, "freesolv": 24, "lipophilicity": 4,
}  # fmt: skip
DEFAULT = ("bbbp", "bace", "sider", "esol", "freesolv", "lipophilicity")
METRICS = {"regression": "rmse", "multi_label_classification": "roc_auc"}
RECIPE = Path(finetune.__file__).parent / "configs" / "finetuning" / "moleculenet_small.yaml"


def known_as(name: str) -> tuple[str, ...]:
    """How the file of a set may start, in lower case: as its own name, or as it is downloaded."""
    return MOLECULENET_SETS[name].file_names if name in MOLECULENET_SETS else (name,)


def results(name: str, args: argparse.Namespace, flags: list[str]) -> list[dict[str, Any]]:
    """metrics.json of each run of a set."""
    paths = [path for path in Path(args.data).glob("*.csv*") if path.name.lower().startswith(known_as(name))]
    if len(paths) != 1:
        raise SystemExit(
            f"{args.data} has {len(paths)} CSV files whose names start with {' or '.join(known_as(name))}; expected one."
        )
    arguments = ["--config", str(args.config), "--model", args.model, "--input", str(paths[0])]
    arguments += ["--epochs", str(SETS[name])] if name in SETS else []
    if args.draws == 1:
        return [finetuned([*arguments, "--output_dir", str(Path(args.output_dir, name)), *flags])]
    found = []
    for draw in map(str, range(args.draws)):
        seeds = ["--seed", draw, "--split_seed", draw, "--seeds", "1"]
        folder = Path(args.output_dir, f"{name}-{draw}")
        found.append(finetuned([*arguments, "--output_dir", str(folder), *flags, *seeds]))
    return found


def cells(found: list[dict[str, Any]], part: str) -> dict[str, str]:
    """A row of the table, by column."""
    first = found[0]
    metric = METRICS[first["problem_type"]]
    values: dict[str, list[float]] = {}  # of each seed
    scored, seconds = set(), [0.0]
    for result in found:
        for name, model in result["models"].items():
            for run in model["runs"]:
                values.setdefault(name, []).append(run[part]["mean"][metric] if part in run else np.nan)
                if part in run:
                    scored.add(run[part]["mean"]["num_targets"][metric])
                if run["seed"] is not None:
                    seconds.append(run["seconds"] or 0.0)
    row = {
        "metric": metric,
        "targets scored": " to ".join(map(str, sorted({min(scored), max(scored)}))) + f" of {len(first['targets'])}",
        "trained on": f"{first['split']['parts']['train']['rows']:,}",
    }
    values = {name: [np.nan if value is None else value for value in each] for name, each in values.items()}
    for name, each in values.items():
        spread = f" ± {np.std(each, ddof=1):.3f}" if len(each) > 1 else ""
        row[name] = "" if np.isnan(each).any() else f"{np.mean(each):.3f}{spread}"
    if MODEL in values and FROM_SCRATCH in values:
        pairs = zip(values[MODEL], values[FROM_SCRATCH], strict=True)
        wins = sum((ours < theirs) if metric in LOWER_IS_BETTER else (ours > theirs) for ours, theirs in pairs)
        row["ahead"] = f"{wins} of {len(values[MODEL])}"
    return row | {"longest run, s": f"{max(seconds):.0f}"}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--data", required=True, help="folder of the CSV files")
    parser.add_argument("--sets", default=",".join(DEFAULT))
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument(
        "--draws", type=int, default=1, help="runs of a seed each, which draw molecules and weights by it"
    )
    parser.add_argument("--part", default="test", choices=("validation", "test"), help="that the table is of")
    parser.add_argument("--output_dir", default="outputs/moleculenet")
    args, flags = parser.parse_known_args(argv)
    rows = {name: cells(results(name, args, flags), args.part) for name in args.sets.split(",")}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print("| set | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row.get(column, "") for column in columns) + " |")


if __name__ == "__main__":
    main()
