r"""What each part of the pretraining is worth: the recipes at an equal number of steps, judged by linear probes on validation.

    python benchmarks/ablations.py --data data/qm9 --targets gap,homo,lumo,mu,alpha --max_steps 1500 --seeds 0,1,2 \
        --model num_hidden_layers=6 hidden_size=256 intermediate_size=256 num_attention_heads=16

Each recipe is a run of training/pretrain.py with `training/configs/RECIPE.yaml`, in OUTPUT_DIR/RECIPE-SEED; one that was stopped
goes on, one that is finished is not made again. Flags that are not named here go to pretrain.py, the same to all of them.
Probes (linear_probe.py) show the molecules in each way that the recipe trained: bonds alone (2d), distances alone (3d), both (auto);
atoms and their features are shown in all of them. Compare recipes within one way. `random weights` is one draw.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import linear_probe
import numpy as np
from accelerate.state import AcceleratorState, GradientState
from kept_runs import check_settings

import pretrain
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
        check_settings(folder, made["settings"], pretrain.parse_args(asked))
    else:
        pretrain.main(asked)
        # One run after the other in one process: Accelerate keeps what the first one chose.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        if not (folder / "model.safetensors").is_file():
            raise SystemExit(f"{folder} was stopped. The same command goes on there.")
    return folder


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing, probe all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset with geometries and parts, as preprocess.py writes it")
    parser.add_argument("--targets", help="of the probes, A,B; left out: all of the dataset")
    parser.add_argument("--recipes", default=",".join(SHOWN))
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--num_molecules", type=int, default=4000, help="of each part that a probe sees, at most")
    parser.add_argument("--layers", type=int, help="probe after so many of the lowest; left out: all")
    parser.add_argument("--output_dir", default="outputs/ablations")
    args, flags = parser.parse_known_args(argv)
    if unknown := sorted(set(args.recipes.split(",")) - set(SHOWN)):
        parser.error(f"recipes has {unknown[0]!r}, but has to be some of {', '.join(SHOWN)}")
    folders = {
        recipe: [str(pretrained(recipe, int(seed), args, flags)) for seed in args.seeds.split(",")]
        for recipe in args.recipes.split(",")
    }
    found: dict[tuple[str, str], list[float]] = {}
    for shown in ALL:
        recipe_of = {folder: recipe for recipe, runs in folders.items() if shown in SHOWN[recipe] for folder in runs}
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
    columns = list(dict.fromkeys(column for _, column in found))
    print("| recipe (probed with) | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for title in dict.fromkeys(title for title, _ in found):
        cells = []
        for column in columns:
            values = found[title, column]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
