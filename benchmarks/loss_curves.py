r"""Do the ways to train faster train the same? Loss curves of a small model, each way beside the plain one and two seeds of it.

    python benchmarks/loss_curves.py                        # the sample, 300 steps; about ten minutes on two CPU cores
    python benchmarks/loss_curves.py --dataset data/qm9 --config training/configs/small_cpu.yaml --batch_size 32 # 10 M parameters
    python benchmarks/loss_curves.py --ways bf16 parts      # without torch.compile, which takes most of the time

Every curve is a run of `training/pretrain.py` with the recipe of the sample, but with the method's dropout. Plain is float32,
eager, the whole batch padded to its largest molecule. Ways share the plain run's seed, and so its weights at the start, its
batches and draws; only dropout may be drawn otherwise. The two seeds differ in all of it: a difference of that size is noise.
Flags that are not named here go to pretrain.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TRAINING = Path(__file__).parents[1] / "training"
LOSSES = ("shortest_path_loss", "bond_path_loss", "relative_position_loss", "coordinate_denoising_loss")
MODEL = ["attention_dropout=0.1", "activation_dropout=0.1", "drop_path_rate=0.1"]
PLAIN = "plain"
# name: title and flags, of which later ones win
WAYS = {
    PLAIN: ("float32, eager, one padded part", ["--seed", "0"]),
    "seed": ("the same with another seed", ["--seed", "1"]),
    "bf16": ("bfloat16 autocast", ["--mixed_precision", "bf16"]),
    "parts": ("parts by size", ["--max_tokens", "PART", "--max_pairs", "1000000000"]),
    "compile": ("torch.compile", ["--compile"]),
}


def run(way: str, args: argparse.Namespace, others: list[str], folder: Path) -> tuple[dict[str, np.ndarray], float]:
    """Train, and return the losses by name, (steps,) each, with their weighted sum as "loss"; and the seconds taken."""
    flags = ["--output_dir", str(folder / way), "--dataset", args.dataset, "--max_steps", str(args.steps), *others]
    flags += ["--warmup_steps", str(args.steps // 10), "--logging_steps", "1"]
    flags += ["--eval_steps", str(args.steps), "--checkpointing_steps", str(args.steps)]
    flags += ["--mixed_precision", "no", "--max_tokens", "1000000000", "--max_pairs", "1000000000"]
    flags += [flag.replace("PART", str(args.part_tokens)) for flag in WAYS[way][1]]
    environment = os.environ | ({} if args.gpu else {"ACCELERATE_USE_CPU": "true"})
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(TRAINING / "pretrain.py"), *flags, "--model", *MODEL, *args.model],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"The run {way!r} failed:\n{done.stderr[-3000:]}")
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if f"train/{LOSSES[0]}" in line]
    if len(steps) != args.steps:
        raise RuntimeError(f"The run {way!r} logged {len(steps)} of {args.steps} steps.")
    curves = {name: np.array([line[f"train/{name}"] for line in steps]) for name in LOSSES}
    weights = json.loads((folder / way / "config.json").read_text())["loss_weights"]
    curves["loss"] = sum(weight * curves[name] for name, weight in zip(LOSSES, weights, strict=True))
    return curves, seconds


def smoothed(curve: np.ndarray, window: int) -> np.ndarray:
    """Moving mean."""
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def plot(curves: dict[str, dict[str, np.ndarray]], window: int, path: Path) -> None:
    """The weighted loss of each way, and its distance from the plain one's."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(window, len(curves[PLAIN]["loss"]) + 1)
    plain = smoothed(curves[PLAIN]["loss"], window)
    for way, losses in curves.items():
        curve, dashes = smoothed(losses["loss"], window), "--" if way == "seed" else "-"
        left.plot(steps, curve, dashes, label=WAYS[way][0], lw=1)
        if way != PLAIN:
            right.semilogy(steps, np.abs(curve - plain).clip(1e-8), dashes, color=left.lines[-1].get_color(), lw=1)
    left.set(title="weighted loss", xlabel="optimizer steps", ylabel=f"mean of {window} steps")
    right.set(title="distance from the plain curve", xlabel="optimizer steps")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    """Train each way, print how far its curves lie from the plain ones, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(TRAINING / "sample"), help="folder that preprocess.py wrote")
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[2:], choices=list(WAYS)[2:], help="to compare")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--window", type=int, default=20, help="steps of the moving mean")
    parser.add_argument("--part_tokens", type=int, default=100, help="padded tokens of a part, where cut by size")
    parser.add_argument("--model", nargs="+", default=[], metavar="KEY=VALUE", help="fields of MoleBlendConfig")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, not the CPU")
    parser.add_argument("--plot", type=Path, default=Path("loss_curves.png"), help="where the picture goes")
    args, others = parser.parse_known_args(argv)
    if args.steps < args.window:
        parser.error(f"steps must be {args.window} or more, as many as a mean is over (--window), got {args.steps}")

    curves: dict[str, dict[str, np.ndarray]] = {}
    print(f"{args.steps} steps on {args.dataset}; curves are means of {args.window} steps")
    heads = ["loss", *(name.removesuffix("_loss") for name in LOSSES)]
    print(f"{'distance from plain, largest / mean':38}" + "".join(f"{head.replace('_', ' '):>22}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        for way in [PLAIN, "seed", *args.ways]:
            curves[way], seconds = run(way, args, others, Path(folder))
            cells = []
            for name in ("loss", *LOSSES):
                plain = smoothed(curves[PLAIN][name], args.window)
                distance = np.abs(smoothed(curves[way][name], args.window) - plain)
                cells.append(
                    f"{plain[0]:.3f} to {plain[-1]:.3f}"
                    if way == PLAIN
                    else f"{distance.max():.5f} / {distance.mean():.5f}"
                )
            print(f"{WAYS[way][0]:38}" + "".join(f"{cell:>22}" for cell in cells) + f"  ({seconds:.0f} s)", flush=True)
    plot(curves, args.window, args.plot)
    print(f"{args.plot}: {args.plot.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
