"""Error against the number of training molecules, with the geometry and without: QM9's gap and dipole moment, or targets of yours.

    python benchmarks/learning_curves.py --model outputs/small --input data/qm9 --sizes 1000,3000,10000 --epochs 30,15,8 --seeds 3
    python benchmarks/learning_curves.py ... --from_scratch also --baseline          # the same from random weights, and a random forest

Each point is a run of training/finetune.py on so many molecules of the training part, drawn at random; validation and test
are the same for all, and the epoch is chosen on validation. Flags that are not named here go to finetune.py; points that are
there already are not made again. A preprocessed input is taken with its parts, as it has to be where the pretraining saw some
of its molecules; a raw one is preprocessed in OUTPUT_DIR/data and split at random.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import numpy as np
from kept_runs import finetuned

import preprocess
from data import ABOUT, is_preprocessed
from report import ENSEMBLE, MODEL
from result_plots import plot_learning_curves
from settings import as_flags

MODALITIES = {"2d": "bonds alone", "auto": "bonds and geometry"}


def main(argv: list[str] | None = None) -> None:
    """Make the points that are missing, print and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a pretraining")
    parser.add_argument("--input", required=True, help="dataset that preprocess.py wrote, or what SOURCE reads")
    parser.add_argument("--source", default="qm9")
    parser.add_argument("--targets", default="gap,mu")
    parser.add_argument("--sizes", default="100,300,1000,3000", help="training molecules of the points")
    parser.add_argument("--epochs", default="15", help="of all points, or of each size")
    parser.add_argument("--output_dir", default="outputs/learning_curves")
    args, flags = parser.parse_known_args(argv)
    folder = Path(args.output_dir)
    sizes, epochs = ([int(number) for number in text.split(",")] for text in (args.sizes, args.epochs))
    epochs_of = dict(zip(sizes, epochs * len(sizes) if len(epochs) == 1 else epochs, strict=True))
    data = Path(args.input) if is_preprocessed(args.input) else folder / "data"
    if not (data / ABOUT).is_file():  # an interrupted one goes on
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
    errors: dict[str, dict[str, dict[int, list[float]]]] = {}  # by target, curve, size: those of the seeds
    for modality, title in MODALITIES.items():
        for size in sizes:
            settings = {
                "model": args.model,
                "input": data,
                "targets": args.targets,
                "modality": modality,
                "max_training_molecules": size,
                "epochs": epochs_of[size],
                "patience": epochs_of[size],
                "output_dir": folder / f"{modality}-{size}",
                "baseline": False,
            }
            for name, model in finetuned(as_flags(settings) + flags)["models"].items():
                if name == ENSEMBLE:
                    continue
                for target in args.targets.split(","):
                    curve = errors.setdefault(target, {}).setdefault(
                        title if name == MODEL else f"{title}, {name}", {}
                    )
                    curve[size] = [run["test"]["targets"][target]["mae"] for run in model["runs"]]
    print("| target (MAE) | input, model | " + " | ".join(map(str, sizes)) + " |")
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
