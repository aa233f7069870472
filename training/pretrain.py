r"""Pretrain MoleBLEND by blending, on one process or many, and write a folder that the Hub can take as it is.

One minute on CPU      accelerate launch --cpu training/pretrain.py --max_steps 800
Two minutes on CPU     accelerate launch training/pretrain.py
One GPU                accelerate launch --num_processes 1 --mixed_precision bf16 training/pretrain.py \
                           --config training/configs/released.yaml --dataset DIR --output_dir outputs/base
Eight GPUs             accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 training/pretrain.py \
                           --config training/configs/released.yaml --dataset DIR --output_dir outputs/base
Continue               the same command with --resume auto

The dataset is a folder that preprocess.py wrote, or the name of one on the Hub. Every setting below is a key of the YAML file
and a flag; a flag wins.
"""

import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from data import TrainingBatches, collate, draw_seed, open_dataset, training_and_held_out
from moleblend_hf import MoleBlendConfig, MoleBlendForPreTraining, MoleBlendProcessor
from moleblend_hf.blending_moleblend import ATOM_DISTANCE, IGNORED_LABEL, PAIR_BOND_PATH, PAIR_SHORTEST_PATH
from reporting import MetricsLog, environment, plot_losses, read_metrics, write_card
from run_state import checkpoints_in, find_checkpoint, load_checkpoint, save_checkpoint
from settings import load_settings, setting

HERE = Path(__file__).parent
LOSSES = {
    "shortest_path_loss": "shortest path",
    "bond_path_loss": "bond path",
    "relative_position_loss": "relative position",
    "coordinate_denoising_loss": "denoising",
}


@dataclasses.dataclass(kw_only=True)
class PretrainingSettings:
    """Settings of a pretraining run; the four without a default make the recipe and stand in its YAML file."""

    description: str = setting("run", "what this recipe is and how long it takes; printed before it starts", "")
    output_dir: str = setting("run", "where everything is written", "outputs/pretrain")
    resume: str | None = setting("run", "checkpoint folder, or auto: the newest in OUTPUT_DIR/checkpoints", None)
    overwrite: bool = setting("run", "start anew in an OUTPUT_DIR with checkpoints, deleting them", False)
    logging_steps: int = setting("run", "optimizer steps between lines of training losses", 10)
    eval_steps: int = setting("run", "optimizer steps between evaluations on the held-out molecules", 1000)
    checkpointing_steps: int = setting("run", "optimizer steps between checkpoints", 1000)
    num_workers: int = setting("run", "processes that read and pad batches; 0: the one that trains", 0)

    dataset: str | None = setting(
        "data", "folder that preprocess.py wrote, or its name on the Hub", os.path.relpath(HERE / "sample")
    )
    held_out_molecules: int = setting("data", "molecules to evaluate on, of the validation split if there is one", 200)
    eval_batch_size: int = setting("data", "held-out molecules in a batch; their draws depend on it", 64)
    split_seed: int = setting("data", "seed of the choice of held-out molecules", 0)

    processor: dict[str, Any] = setting(
        "data", "settings of MoleBlendProcessor that the dataset must have been made with, e.g. hydrogens=drop", {}
    )

    model: dict[str, Any] = setting("model", "fields of MoleBlendConfig, e.g. --model hidden_size=256", {})

    max_steps: int = setting("optimization", "optimizer steps of the whole run")
    batch_size: int = setting("optimization", "molecules an optimizer step, over all processes")
    learning_rate: float = setting("optimization", "peak learning rate")
    warmup_steps: int = setting("optimization", "optimizer steps from 0 to the peak; then cosine to 0 at MAX_STEPS")
    gradient_accumulation_steps: int = setting("optimization", "parts a process cuts its share of a batch into", 1)
    adam_beta1: float = setting("optimization", "decay of AdamW's mean of gradients", 0.9)
    adam_beta2: float = setting("optimization", "decay of AdamW's mean of squared gradients", 0.999)
    adam_epsilon: float = setting("optimization", "AdamW's epsilon", 1e-8)
    weight_decay: float = setting("optimization", "AdamW's decoupled weight decay", 0.0)
    max_grad_norm: float = setting("optimization", "clip the gradient to this norm", 5.0)
    mixed_precision: str | None = setting(
        "optimization", "arithmetic; left out, what accelerate launch says", None, choices=("no", "fp16", "bf16")
    )
    seed: int = setting("optimization", "seed of weights, batch order, draws and dropout", 0)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read or built."""
        if self.dataset is None:
            raise ValueError("This recipe names no dataset. Give a folder that preprocess.py wrote with --dataset.")
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("logging_steps", "eval_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}; MAX_STEPS means only at the end."
                )
        known = [field.name for field in dataclasses.fields(MoleBlendConfig)]
        if unknown := sorted(set(self.model) - set(known)):
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} in model. Known keys: {', '.join(known)}.")

    def that_shape_the_result(self) -> dict[str, Any]:
        """All settings but those that say where to write and how often to look."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if field.metadata["group"] != "run"}


def parse_args(argv: list[str] | None = None) -> PretrainingSettings:
    """Settings from the YAML file and the flags."""
    return load_settings(PretrainingSettings, __doc__, HERE / "configs" / "sample.yaml", argv)


def summed_over_processes(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum of each entry over the processes that have it."""
    sums: dict[str, np.ndarray] = {}
    for name, value in gather_object(list(values.items())):
        sums[name] = sums[name] + value if name in sums else value
    return sums


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], seed: int
) -> dict[str, float]:
    """Each loss, the share of relations recovered and that of the most frequent class; the same draws at every call.

    A mean over batches would weigh a pair in a small batch more than one in a large batch: each loss is weighted by the
    number of pairs, bonds, molecules or atoms that it is a mean over.
    """
    model.eval()
    generator = torch.Generator(device=accelerator.device)
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))  # sum, and of how many
    frequencies: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1))  # of each class

    def add(name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        totals[name] += (float(total), float(count))

    for index in range(accelerator.process_index, len(batches), accelerator.num_processes):
        batch = {name: values.to(accelerator.device) for name, values in batches[index].items()}
        outputs = model(**batch, generator=generator.manual_seed(draw_seed(seed, index)))
        atoms = batch["attention_mask"].bool()
        has_geometry = batch.get("coordinates_mask", torch.zeros_like(atoms[:, 0]))
        noisy = atoms & has_geometry[:, None] & (outputs.atom_modality_ids == ATOM_DISTANCE)
        add("coordinate_denoising_loss", outputs.coordinate_denoising_loss * noisy.sum(), noisy.sum())
        with_pairs = (has_geometry & (atoms.sum(-1) > 1)).sum()
        add("relative_position_loss", outputs.relative_position_loss * with_pairs, with_pairs)
        for relation, modality in (("shortest_path", PAIR_SHORTEST_PATH), ("bond_path", PAIR_BOND_PATH)):
            # A pair has one label for its shortest path and one for each bond along it: (B, N, N, 1 or P).
            shown = (outputs.pair_modality_ids == modality).unsqueeze(-1)
            labels = outputs[f"{relation}_labels"].reshape(*shown.shape[:-1], -1)
            logits = outputs[f"{relation}_logits"].reshape(*labels.shape, -1)
            known = labels != IGNORED_LABEL
            right = logits.argmax(-1) == labels
            add(f"{relation}_loss", outputs[f"{relation}_loss"] * known.sum(), known.sum())
            add(f"{relation}_recovered_shown", (right & known & shown).sum(), (known & shown).sum())
            add(f"{relation}_recovered_hidden", (right & known & ~shown).sum(), (known & ~shown).sum())
            frequency = torch.bincount(labels[known], minlength=logits.shape[-1]).cpu().numpy()
            frequencies[relation] = frequencies[relation] + frequency

    model.train()
    metrics = {name: total / count for name, (total, count) in summed_over_processes(totals).items() if count}
    for relation, frequency in summed_over_processes(frequencies).items():
        if frequency.any():
            metrics[f"{relation}_most_frequent"] = frequency.max() / frequency.sum()
    return {name: float(value) for name, value in metrics.items()}


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


def write_folder(
    output_dir: Path,
    model: MoleBlendForPreTraining,
    processor: MoleBlendProcessor,
    rows: list[dict[str, float]],
    facts: dict[str, Any],
) -> None:
    """Write what the Hub takes: model, code and processor, the card and its picture, settings and versions."""
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    plot_losses(rows, LOSSES, output_dir / "losses.png")
    (output_dir / "training_settings.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_card(
        output_dir / "README.md",
        model_name=f"MoleBLEND, {output_dir.resolve().name}",
        config=model.config,
        results=held_out_results(rows),
        **facts,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the pretraining that the arguments describe."""
    settings = parse_args(argv)
    output_dir = Path(settings.output_dir)
    checkpoints = output_dir / "checkpoints"
    checkpoint = find_checkpoint(settings.resume, checkpoints)
    if checkpoint is None and checkpoints_in(checkpoints) and not settings.overwrite:
        raise FileExistsError(
            f"{output_dir} holds checkpoints of another run. Continue it with --resume auto, start anew and delete them "
            "with --overwrite, or choose another --output_dir."
        )

    # split_batches: batch_size is that of all processes together, so the schedule advances once an optimizer step.
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with="tensorboard",
        project_dir=output_dir,
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if accelerator.is_main_process:
        if checkpoint is None:
            for old in (checkpoints, output_dir / "tensorboard"):
                shutil.rmtree(old, ignore_errors=True)
        output_dir.mkdir(parents=True, exist_ok=True)

    # Data: memory-mapped rows; the held-out batches are padded once.
    with accelerator.main_process_first():  # one process writes the cache of datasets, the others read it
        dataset = open_dataset(str(settings.dataset))
    config = MoleBlendConfig(**settings.model)
    processor = dataset.processor(max_path_bonds=config.max_path_bonds, **settings.processor)
    dataset.check(processor)
    training_rows, held_out_rows = training_and_held_out(dataset, settings.held_out_molecules, settings.split_seed)
    padded = partial(collate, processor=processor)
    parts = np.array_split(
        np.arange(len(held_out_rows)), range(settings.eval_batch_size, len(held_out_rows), settings.eval_batch_size)
    )
    held_out_batches = [padded(held_out_rows.__getitems__(part.tolist())) for part in parts]

    # Model, optimizer, schedule. The same weights on every process, then its own dropout on each.
    set_seed(settings.seed)
    model = MoleBlendForPreTraining(config)
    set_seed(settings.seed, device_specific=True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    step = 0
    if checkpoint is not None:
        step = load_checkpoint(accelerator, checkpoint, settings.that_shape_the_result())
        if step > settings.max_steps:
            raise ValueError(f"{checkpoint} is at step {step}, beyond max_steps ({settings.max_steps}).")
    batches = TrainingBatches(
        len(training_rows),
        settings.batch_size,
        settings.seed,
        first_step=step,
        accumulation_steps=settings.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    # A generator of its own: DataLoader draws a number when it starts, which must not move the state just restored.
    loader: DataLoader[Any] = DataLoader(
        training_rows,
        batch_sampler=batches,
        collate_fn=padded,
        num_workers=settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),
    )
    generator = torch.Generator(device=accelerator.device)

    arguments = sys.argv[1:] if argv is None else argv
    facts: dict[str, Any] = {
        "command": shlex.join(["accelerate", "launch", "training/pretrain.py", *arguments]),
        "settings": dataclasses.asdict(settings),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_training": len(training_rows),
        "num_held_out": len(held_out_rows),
        "num_with_coordinates": dataset.about["num_with_coordinates"],
        "num_processes": accelerator.num_processes,
        "first_step": step,
        "environment": environment(accelerator.device),
    }
    accelerator.print(
        f"{settings.description or 'Pretraining'}\n"
        f"  model    {facts['num_parameters']:,} parameters on {accelerator.device.type}, {accelerator.num_processes} process(es)\n"
        f"  data     {facts['num_training']:,} molecules to train on, {facts['num_held_out']:,} held out; "
        f"{facts['num_with_coordinates']:,} of all have a geometry\n"
        f"  steps    {step:,} to {settings.max_steps:,} of {settings.batch_size:,} molecules "
        f"({batches.steps_per_epoch:,} steps an epoch)\n"
        f"  output   {output_dir}/ : checkpoint folder for the Hub, card, metrics.jsonl, losses.png, checkpoints/, tensorboard/"
    )
    # A resumed run drops from its logs what was measured after the checkpoint.
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    log = MetricsLog(accelerator, output_dir / "metrics.jsonl", step)

    def evaluate_and_record() -> None:
        metrics = evaluate(accelerator, model, held_out_batches, settings.seed)
        log.write(step, {f"held_out/{name}": value for name, value in metrics.items()})
        if accelerator.is_main_process:
            titled = ", ".join(f"{title} {metrics[name]:.3f}" for name, title in LOSSES.items() if name in metrics)
            progress.write(f"step {step:>6,} held out: {titled}")

    started = time.perf_counter()
    progress = tqdm(
        total=settings.max_steps, initial=step, unit="step", mininterval=1.0, disable=not accelerator.is_main_process
    )
    if checkpoint is None or step == settings.max_steps:
        evaluate_and_record()
    losses, window_steps, window_start = torch.zeros(len(LOSSES), device=accelerator.device), 0, time.perf_counter()
    model.train()
    part = 0
    for batch in loader if step < settings.max_steps else ():
        with accelerator.accumulate(model):
            # The draws depend on the seed, the step and the part of the batch: nothing to restore, nothing to replay.
            generator.manual_seed(draw_seed(settings.seed, step, batches.first_part + part))
            outputs = model(
                **{name: value.to(accelerator.device) for name, value in batch.items()}, generator=generator
            )
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses += torch.stack([outputs[name].detach() for name in LOSSES]) / settings.gradient_accumulation_steps
        part += 1
        if not accelerator.sync_gradients:
            continue

        step, part, window_steps = step + 1, 0, window_steps + 1
        progress.update()
        if step % settings.logging_steps == 0 or step == settings.max_steps:
            means = accelerator.reduce(losses, "mean") / window_steps
            rate = window_steps * settings.batch_size / (time.perf_counter() - window_start)
            values = dict(zip(LOSSES, means.tolist(), strict=True))
            log.write(
                step,
                {f"train/{name}": value for name, value in values.items()}
                | {"train/learning_rate": scheduler.get_last_lr()[0], "train/molecules_per_second": rate},
            )
            titled = ", ".join(f"{LOSSES[name]} {value:.3f}" for name, value in values.items())
            progress.set_postfix_str(f"{rate:.0f} molecules/s, {titled}")
            losses.zero_()
            window_steps, window_start = 0, time.perf_counter()
        pause = time.perf_counter()
        if step % settings.eval_steps == 0 or step == settings.max_steps:
            evaluate_and_record()
        if step % settings.checkpointing_steps == 0 or step == settings.max_steps:
            save_checkpoint(accelerator, checkpoints, step, settings.that_shape_the_result())
        window_start += time.perf_counter() - pause  # molecules/s is that of training alone
        if step == settings.max_steps:
            break
    progress.close()

    if accelerator.is_main_process:
        facts["seconds"] = time.perf_counter() - started
        write_folder(output_dir, accelerator.unwrap_model(model), processor, read_metrics(log.path), facts)
        print(
            f"Done in {facts['seconds']:.0f} s. {output_dir}/ loads with AutoModel.from_pretrained; see its README.md."
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
