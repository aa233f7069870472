"""Error against the number of training molecules, with the geometry and without: QM9's gap and dipole moment, or targets of yours.

    python benchmarks/learning_curves.py --model outputs/small --input DIR_OF_QM9 --sizes 1000,3000,10000 --epochs 30,15,8 --seeds 3

Each point is a run of training/finetune.py on so many molecules of the training part, drawn at random; validation and test
are the same for all, and the epoch is chosen on validation. Flags that are not named here go to finetune.py. Points that are
there already are not made again, nor is OUTPUT_DIR/data: a dataset of other parts may be put there.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np

import finetune
import preprocess
from result_plots import plot_learning_curves
from settings import as_flags

MODALITIES = {"2d": "bonds alone", "auto": "bonds and DFT geometry"}


def main(argv: list[str] | None = None) -> None:
    """Make the points that are missing, print and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--input", required=True, help="folder of gdb9.sdf and gdb9.sdf.csv, or what SOURCE is")
    parser.add_argument("--source", default="qm9")
    parser.add_argument("--targets", default="gap,mu")
    parser.add_argument("--sizes", default="100,300,1000,3000", help="training molecules of the points")
    parser.add_argument("--epochs", default="15", help="of all points, or of each size")
    parser.add_argument("--output_dir", default="outputs/learning_curves")
    args, flags = parser.parse_known_args(argv)
    folder = Path(args.output_dir)
    sizes, epochs = ([int(number) for number in text.split(",")] for text in (args.sizes, args.epochs))
    epochs_of = dict(zip(sizes, epochs * len(sizes) if len(epochs) == 1 else epochs, strict=True))
    data = folder / "data"
    if not data.exists():
        preprocess.main(
            as_flags(
                {
                    "source": args.source,
                    "input": args.input,
                    "output": data,
                    "targets": args.targets,
                    "split": "random",
                }
            )
        )
    errors: dict[str, dict[str, dict[int, list[float]]]] = {}  # by target, input, size: those of the seeds
    for modality, title in MODALITIES.items():
        for size in sizes:
            run = folder / f"{modality}-{size}"
            if not (run / "metrics.json").is_file():
                finetune.main(
                    as_flags(
                        {
                            "model": args.model,
                            "input": data,
                            "targets": args.targets,
                            "modality": modality,
                            "max_training_molecules": size,
                            "epochs": epochs_of[size],
                            "patience": epochs_of[size],
                            "output_dir": run,
                            "overwrite": True,
                            "baseline": False,
                        }
                    )
                    + flags
                )
            runs = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["models"]["MoleBLEND"]["runs"]
            for target in args.targets.split(","):
                found = [one["test"]["targets"][target]["mae"] for one in runs]
                errors.setdefault(target, {}).setdefault(title, {})[size] = found
    print("| target (MAE) | input | " + " | ".join(map(str, sizes)) + " |")
    print("|---" * (2 + len(sizes)) + "|")
    for target, curves in errors.items():
        for title, curve in curves.items():
            cells = [
                f"{np.mean(found):.4f}" + (f" ± {np.std(found, ddof=1):.4f}" if len(found) > 1 else "")
                for found in curve.values()
            ]
            print(f"| {target} | {title} | {' | '.join(cells)} |")
        plot_learning_curves(curves, "mean absolute error", folder / f"{target}.png", target)


if __name__ == "__main__":
    main()
