r"""What each part of the pretraining is worth: the recipes at an equal number of steps, judged by linear probes and by fine-tuning.

    python benchmarks/ablations.py --data data/qm9 --targets gap,homo,lumo,mu,alpha --max_steps 1500 --seeds 0,1,2 \
        --model num_hidden_layers=6 hidden_size=256 intermediate_size=256 num_attention_heads=16
    python benchmarks/ablations.py ... --finetuning "--max_training_molecules 1000 --epochs 20 --max_validation_molecules 1000"

Each recipe is a run of training/pretrain.py with `training/configs/RECIPE.yaml`, in OUTPUT_DIR/RECIPE-SEED; one that was stopped
goes on, one that is finished is not made again. Flags that are not named here go to pretrain.py, the same to all of them.
Probes (linear_probe.py) show the molecules in each way that the recipe trained: bonds alone (2d), distances alone (3d), both (auto);
atoms and their features are shown in all of them. Compare recipes within one way. `random weights` is one draw for the probes.
With --finetuning each run is fine-tuned in the same ways by finetune.py, with its own seed, and so are random weights; the epoch is
chosen on validation. Figures are of the validation part, by which one may choose; --part test is for once, at the end.
"""

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import linear_probe
import numpy as np
from accelerate.state import AcceleratorState, GradientState
from kept_runs import FILLED_IN, check_settings, finetuned
from linear_probe import RANDOM

import pretrain
from report import FROM_SCRATCH, MODEL
from settings import as_flags

ALL = ("2d", "3d", "auto")
# What is shown in a probe is what the recipe trained: the embeddings of the other relations are random.
SHOWN = {
    "small": ALL,
    "ablation_no_blending": ("3d",),
    "ablation_2d_only": ("2d",),
    "ablation_3d_only": ("3d",),
    "ablation_distance_target": ALL,
    "ablation_no_denoising": ALL,
    "ablation_without_shortest_path": ("3d",),
    "ablation_without_bond_path": ("3d",),
    "ablation_without_distance": ("2d",),
}
CONFIGS = Path(pretrain.__file__).parent / "configs"


def pretrained(recipe: str, seed: int, args: argparse.Namespace, flags: list[str]) -> Path:
    """The folder of a run, made if it is not there."""
    folder = Path(args.output_dir, f"{recipe}-{seed}")
    settings = {
        "config": CONFIGS / f"{recipe}.yaml",
        "dataset": args.data,
        "output_dir": folder,
        "resume": "auto" if folder.exists() else None,
        "max_steps": args.max_steps,
        "warmup_steps": args.max_steps // 10,
        "eval_steps": args.max_steps,
        "seed": seed,
    }
    asked = as_flags(settings) + flags
    if (folder / "model.safetensors").is_file():
        made = json.loads((folder / "training_settings.json").read_text(encoding="utf-8"))
        settings = pretrain.parse_args(asked)
        chosen = {name for name in FILLED_IN if getattr(settings, name) is None}
        check_settings(folder, made["settings"], settings, chosen)
    else:
        pretrain.main(asked)
        # One run after the other in one process: Accelerate keeps what the first one chose.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        if not (folder / "model.safetensors").is_file():
            raise SystemExit(f"{folder} was stopped. The same command goes on there.")
    return folder


def errors(folder: Path, seed: int, shown: str, args: argparse.Namespace, from_scratch: bool) -> dict[str, float]:
    """Mean absolute error of each target after fine-tuning, done in OUTPUT_DIR/finetuned if it is not there."""
    settings = {
        "model": folder,
        "input": args.data,
        "targets": args.targets,
        "modality": shown,
        "seed": seed,
        "split_seed": seed,  # draws the training molecules, the same for all recipes
        "from_scratch": "only" if from_scratch else "no",
        "output_dir": Path(
            args.output_dir, "finetuned", f"{'from_scratch' if from_scratch else folder.name}-{shown}-{seed}"
        ),
        "baseline": False,
    }
    models = finetuned([*as_flags(settings), *shlex.split(args.finetuning)])["models"]
    (run,) = models[FROM_SCRATCH if from_scratch else MODEL]["runs"]
    return {name: figures["mae"] for name, figures in run[args.part]["targets"].items()}


def print_table(found: Mapping[tuple[str, str], list[float]], title: str) -> None:
    """Mean and sample standard deviation of the values of each row and column."""
    columns = list(dict.fromkeys(column for _, column in found))
    print(f"| {title} | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row in dict.fromkeys(row for row, _ in found):
        cells = []
        for column in columns:
            values = found[row, column]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        print(f"| {row} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing, probe all and fine-tune them, print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset with geometries and parts, as preprocess.py writes it")
    parser.add_argument("--targets", help="of the probes, A,B; left out: all of the dataset")
    parser.add_argument("--recipes", default=",".join(SHOWN))
    parser.add_argument("--shown", default=",".join(ALL), help="ways to show the molecules, of those a recipe trained")
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--num_molecules", type=int, default=4000, help="of each part that a probe sees, at most")
    parser.add_argument("--layers", type=int, help="probe after so many of the lowest; left out: all")
    parser.add_argument(
        "--finetuning",
        help="fine-tune with these flags of finetune.py, too, one seed each; targets are regressions then",
    )
    parser.add_argument("--output_dir", default="outputs/ablations")
    args, flags = parser.parse_known_args(argv)
    if unknown := sorted(set(args.recipes.split(",")) - set(SHOWN)):
        parser.error(f"recipes has {unknown[0]!r}, but has to be some of {', '.join(SHOWN)}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    folders = {recipe: [pretrained(recipe, seed, args, flags) for seed in seeds] for recipe in args.recipes.split(",")}
    found: dict[tuple[str, str], list[float]] = {}
    for shown in args.shown.split(","):
        recipe_of = {
            str(folder): recipe for recipe, runs in folders.items() if shown in SHOWN[recipe] for folder in runs
        }
        if not recipe_of:
            continue
        probes = linear_probe.results(
            list(recipe_of), args.data, args.targets, args.part, shown, args.num_molecules, args.layers
        )
        for name, kind, target, metrics in probes:
            if kind == linear_probe.BOTH:
                metric, value = next(iter(metrics.items()))
                title = f"{recipe_of.get(name, name)} ({shown})"
                found.setdefault((title, f"{target} ({metric})"), []).append(value)
    print_table(found, "recipe (probed with)")
    if args.finetuning is None:
        return
    found = {}
    for shown in args.shown.split(","):
        judged = [(recipe, runs) for recipe, runs in folders.items() if shown in SHOWN[recipe]]
        for recipe, runs in [*judged, (RANDOM, next(iter(folders.values())))] if judged else ():
            for seed, folder in zip(seeds, runs, strict=True):
                for target, error in errors(folder, seed, shown, args, recipe == RANDOM).items():
                    found.setdefault((f"{recipe} ({shown})", f"{target} (mae)"), []).append(error)
    print()
    print_table(found, "recipe (fine-tuned with)")


if __name__ == "__main__":
    main()
