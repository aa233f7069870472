"""Fine-tuning on sets of MoleculeNet: pretrained beside from scratch beside ECFP4 and a random forest, with spreads over seeds.

    python benchmarks/moleculenet.py --model outputs/small --data DIR                     # the five small sets and SIDER
    python benchmarks/moleculenet.py --model outputs/small --data DIR --sets bace,tox21 --output_dir outputs/moleculenet

DIR holds the sets as they are downloaded (bbbp.csv.gz ...). Each set is a run of training/finetune.py with the recipe
moleculenet_small.yaml (--config for another) and what else is given; a set whose metrics.json is there already is not run
again. The table is printed as it comes out: test part of the scaffold split (to choose by: --part validation), the epoch chosen on
validation, mean and sample standard deviation over the seeds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import finetune

# Epochs at which a run stays below five minutes on two slow cores; nothing was tuned.
SETS = {"bbbp": 6, "bace": 7, "sider": 4, "esol": 12, "freesolv": 24, "lipophilicity": 4}
METRICS = {"regression": "rmse", "multi_label_classification": "roc_auc"}
RECIPE = Path(finetune.__file__).parent / "configs" / "finetuning" / "moleculenet_small.yaml"


def results(name: str, args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """metrics.json of a set, made if it is not there."""
    folder = Path(args.output_dir, name)
    if not (folder / "metrics.json").is_file():
        (path,) = sorted(Path(args.data).glob(f"{name}*.csv*"))
        arguments = ["--config", str(args.config), "--model", args.model, "--input", str(path), "--overwrite"]
        epochs = ["--epochs", str(SETS[name])] if name in SETS else []
        finetune.main([*arguments, "--output_dir", str(folder), *epochs, *flags])
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--data", required=True, help="folder of the CSV files")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument("--part", default="test", choices=("validation", "test"), help="that the table is of")
    parser.add_argument("--output_dir", default="outputs/moleculenet")
    args, flags = parser.parse_known_args(argv)
    found = {name: results(name, args, flags) for name in args.sets.split(",")}
    columns = list(dict.fromkeys(name for result in found.values() for name in result["models"]))
    print("| set | metric | targets | " + " | ".join(columns) + " | longest run, s |")
    print("|---" * (len(columns) + 4) + "|")
    for name, result in found.items():
        metric = METRICS[result["problem_type"]]
        cells = []
        for column in columns:
            spread = result["models"].get(column, {}).get(args.part, {}).get("mean", {}).get(metric)
            if spread is None or spread["mean"] is None:
                cells.append("")
            else:
                cells.append(f"{spread['mean']:.3f}" + ("" if spread["std"] is None else f" ± {spread['std']:.3f}"))
        seconds = max(
            run["seconds"] or 0
            for column, model in result["models"].items()
            for run in model["runs"]
            if "ensemble" not in column
        )
        print(f"| {name} | {metric} | {len(result['targets'])} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
