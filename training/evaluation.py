"""Held-out molecules during pretraining: every loss, and how often each relation is recovered."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from moleblend_hf import MoleBlendConfig
from moleblend_hf.blending_moleblend import IGNORED_LABEL, PAIR_BOND_PATH, PAIR_SHORTEST_PATH
from moleblend_hf.eval_mode_moleblend import eval_mode
from objective import HELD_OUT_EPOCH, drawn, molecule_seeds

LOSSES = {
    "shortest_path_loss": "shortest path",
    "bond_path_loss": "bond path",
    "relative_position_loss": "relative position",
    "coordinate_denoising_loss": "denoising",
}


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: MoleBlendConfig,
    parts: Sequence[Mapping[str, torch.Tensor]],
    seed: int,
) -> dict[str, float]:
    """Each loss, the share of relations recovered and that of the most frequent class; the same draws at every call.

    Args:
        accelerator: of the run.
        model: the model for pretraining, as prepared.
        config: of the model.
        parts: this process's batches, as many as every other process has.
        seed: of the run.
    """
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))  # sum, and of how many
    frequencies: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1))  # of each class

    def add(name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        totals[name] += (float(total), float(count))

    with eval_mode(model):
        for held in parts:
            part = {name: values.to(accelerator.device) for name, values in held.items() if name != "rows"}
            seeds = torch.from_numpy(molecule_seeds(seed, HELD_OUT_EPOCH, held["rows"].numpy())).to(accelerator.device)
            with accelerator.autocast():
                outputs = model(**part, **drawn(part, seeds, config))
            for name, count in zip(LOSSES, outputs.num_targets, strict=True):
                add(name, outputs[name] * count, count)
            for relation, modality in (("shortest_path", PAIR_SHORTEST_PATH), ("bond_path", PAIR_BOND_PATH)):
                # A pair has one label for its shortest path and one for each bond along it: (B, N, N, 1 or P).
                shown = (outputs.pair_modality_ids == modality).unsqueeze(-1)
                labels = outputs[f"{relation}_labels"].reshape(*shown.shape[:-1], -1)
                logits = outputs[f"{relation}_logits"].reshape(*labels.shape, -1)
                known = labels != IGNORED_LABEL
                right = logits.argmax(-1) == labels
                add(f"{relation}_recovered_shown", (right & known & shown).sum(), (known & shown).sum())
                add(f"{relation}_recovered_hidden", (right & known & ~shown).sum(), (known & ~shown).sum())
                frequency = torch.bincount(labels[known], minlength=logits.shape[-1]).cpu().numpy()
                frequencies[relation] = frequencies[relation] + frequency

    metrics = {name: total / count for name, (total, count) in summed_over_processes(totals).items() if count}
    for relation, frequency in summed_over_processes(frequencies).items():
        if frequency.any():
            metrics[f"{relation}_most_frequent"] = frequency.max() / frequency.sum()
    return {name: float(value) for name, value in metrics.items()}


def summed_over_processes(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum of each entry over the processes that have it."""
    sums: dict[str, np.ndarray] = {}
    for name, value in gather_object(list(values.items())):
        sums[name] = sums[name] + value if name in sums else value
    return sums


def held_out_results(rows: list[dict[str, float]]) -> dict[str, Any]:
    """First and last evaluation among the lines of metrics.jsonl, as the card's table needs them."""
    evaluations = [row for row in rows if any(name.startswith("held_out/") for name in row)]
    first, last = evaluations[0], evaluations[-1]
    titles = {name: f"{title}: loss" for name, title in LOSSES.items()}
    for relation in ("shortest_path", "bond_path"):
        title = LOSSES[f"{relation}_loss"]
        titles[f"{relation}_recovered_shown"] = f"{title}: recovered where shown"
        titles[f"{relation}_recovered_hidden"] = f"{title}: recovered where hidden"
        titles[f"{relation}_most_frequent"] = f"{title}: share of the most frequent class"
    measured = {f"held_out/{name}": title for name, title in titles.items() if f"held_out/{name}" in last}
    return {
        "first_step": first["step"],
        "last_step": last["step"],
        "table": [(title, first[name], last[name]) for name, title in measured.items()],
    }


def run_figures(rows: list[dict[str, float]], batch_size: int) -> list[tuple[str, str]]:
    """What the log says of the run itself, however often it was resumed: time, medians over the logged windows, memory."""
    units = {
        "molecules_per_second": ("molecules a second, median", "{:,.0f}"),
        "data_wait_share": ("share of the time spent waiting for data", "{:.1%}"),
        "padded_tokens_share": ("share of padding among the tokens", "{:.1%}"),
        "padded_pairs_share": ("share of padding among the pairs", "{:.1%}"),
    }
    logged = [row for row in rows if "train/molecules_per_second" in row]
    before = [0.0, *(row["step"] for row in logged)]
    molecules = [batch_size * (row["step"] - step) for row, step in zip(logged, before, strict=False)]
    seconds = sum(num / row["train/molecules_per_second"] for num, row in zip(molecules, logged, strict=True))
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
    found = [("time of the steps, without evaluations and checkpoints", time)]
    for name, (title, form) in units.items():
        values = [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
        if values:
            found.append((title, form.format(float(np.median(values)))))
    peak = max((row.get("train/peak_memory_mib", 0.0) for row in rows), default=0.0)
    left_out = sum("train/left_out" in row for row in rows)
    return [*found, ("peak memory of the main process, MiB", f"{peak:,.0f}"), ("steps left out", str(left_out))]
