r"""Pretrain MoleBLEND by blending, on one process or many, and write a folder that the Hub can take as it is.

One minute on CPU      accelerate launch --cpu training/pretrain.py --max_steps 800
Two minutes on CPU     accelerate launch training/pretrain.py
One GPU                python training/pretrain.py --mixed_precision bf16 \
                           --config training/configs/released.yaml --dataset DIR --output_dir outputs/base
Eight GPUs             accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 training/pretrain.py \
                           --config training/configs/released.yaml --dataset DIR --output_dir outputs/base
Continue               the same command with --resume auto

Where a scheduler ends runs with SIGTERM, one process is started with python as above: of one, `accelerate launch` passes no signals on.

The dataset is a folder that preprocess.py wrote, or the name of one on the Hub. Every setting below is a key of the YAML file
and a flag; a flag wins.
"""

import dataclasses
import gc
import json
import logging
import os
import shlex
import sys
import time
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    set_seed,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from batches import StepBatches, cut, fitting, shared
from compilation import keep_equal_sizes_apart
from data import collate, open_together, training_and_held_out
from evaluation import LOSSES, evaluate, held_out_results, run_figures
from files import empty
from guards import FiniteSteps, StopRequest, ignore_stop_signals
from moleblend_hf import MoleBlendConfig, MoleBlendForPreTraining, MoleBlendProcessor
from moleblend_hf.graphs_moleblend import Budget
from moleblend_hf.verification import write_reference_outputs
from objective import count_targets, drawn, molecule_seeds
from optimization import move_average
from reporting import (
    MetricsLog,
    Window,
    environment,
    keep_lines,
    plot_losses,
    read_metrics,
    without_places,
    write_card,
)
from run_state import (
    agreed,
    checkpoints_in,
    claimed,
    find_checkpoint,
    independent_of_wrapping,
    load_checkpoint,
    save_checkpoint,
)
from settings import load_settings, setting

HERE = Path(__file__).parent


@dataclasses.dataclass(kw_only=True)
class PretrainingSettings:
    """Settings of a pretraining run; the four without a default make the recipe and stand in its YAML file."""

    description: str = setting("run", "what this recipe is and how long it takes; printed before it starts", "")
    output_dir: str = setting("run", "where everything is written", "outputs/pretrain")
    resume: str | None = setting("run", "checkpoint folder, or auto: the newest in OUTPUT_DIR/checkpoints", None)
    overwrite: bool = setting(
        "run",
        "start anew in an OUTPUT_DIR with checkpoints or a model, deleting checkpoints and TensorBoard logs",
        False,
    )
    logging_steps: int = setting("run", "optimizer steps between lines of training losses", 10)
    eval_steps: int = setting("run", "optimizer steps between evaluations on the held-out molecules", 1000)
    checkpointing_steps: int = setting("run", "optimizer steps between checkpoints", 1000)
    checkpoints_to_keep: int = setting("run", "newest checkpoints that are kept; 0: all", 3)
    max_hours: float | None = setting(
        "run", "save and stop after so many hours, to be continued with --resume auto", None
    )
    num_workers: int | None = setting(
        "run", "processes that read and pad batches; 0: the one that trains (default: 4 on a GPU, else 0)", None
    )
    trackers: list[str] = setting(
        "run", "of Accelerate, beside metrics.jsonl: tensorboard, wandb ...", ["tensorboard"]
    )

    dataset: list[str] | None = setting(
        "data",
        "folder that preprocess.py wrote, or its name on the Hub; several as A,B",
        [os.path.relpath(HERE / "sample")],
    )
    held_out_molecules: int = setting("data", "molecules to evaluate on, of a validation split if there is one", 200)
    split_seed: int = setting("data", "seed of the choice of held-out molecules", 0)
    processor: dict[str, Any] = setting(
        "data", "settings of MoleBlendProcessor that the dataset must have been made with, e.g. hydrogens=drop", {}
    )
    max_tokens: int | None = setting(
        "data", "padded tokens (atoms + 1) of the molecules in one forward (default: 16,384; on a CPU 2,048)", None
    )
    max_pairs: int | None = setting(
        "data",
        "padded pairs of tokens in one forward: what memory grows with (default: 400,000; on a CPU 16,384)",
        None,
    )
    oversized: str = setting(
        "data", "a molecule that alone exceeds these (by default what a GPU takes, on each device): an error, or left out and "
        "counted", "error", choices=("error", "skip"),
    )  # fmt: skip

    model: dict[str, Any] = setting("model", "fields of MoleBlendConfig, e.g. --model hidden_size=256", {})

    max_steps: int = setting("optimization", "optimizer steps of the whole run")
    batch_size: int = setting("optimization", "molecules an optimizer step, over all processes")
    learning_rate: float = setting("optimization", "peak learning rate")
    warmup_steps: int = setting("optimization", "optimizer steps from 0 to the peak; then cosine to 0 at MAX_STEPS")
    adam_beta1: float = setting("optimization", "decay of AdamW's mean of gradients", 0.9)
    adam_beta2: float = setting("optimization", "decay of AdamW's mean of squared gradients", 0.999)
    adam_epsilon: float = setting("optimization", "AdamW's epsilon", 1e-8)
    weight_decay: float = setting("optimization", "AdamW's decoupled weight decay", 0.0)
    max_grad_norm: float = setting("optimization", "clip the gradient to this norm", 5.0)
    mixed_precision: str | None = setting(
        "optimization", "arithmetic; left out, what accelerate launch says", None, choices=("no", "fp16", "bf16")
    )
    loss_mean: str = setting(
        "optimization", "step: over all pairs, hops, molecules, atoms of a step; part: of each forward, as the original's "
        "processes do, which weighs molecules in small parts more", "step", choices=("step", "part"),
    )  # fmt: skip
    ema_decay: float | None = setting("optimization", "evaluate and save a moving average of the weights", None)
    max_left_out_steps: int = setting(
        "optimization", "steps in a row with a gradient that is not finite, then abort", 20
    )
    gradient_checkpointing: bool = setting(
        "optimization", "compute each layer twice, so that its states need no memory", False
    )
    compile: bool = setting("optimization", "torch.compile the model, for shapes of any size", False)
    seed: int = setting("optimization", "seed of weights, batch order, draws and dropout", 0)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read or built."""
        if not self.dataset:
            raise ValueError("This recipe names no dataset. Give a folder that preprocess.py wrote with --dataset.")
        for name in ("max_steps", "batch_size", "held_out_molecules", "max_left_out_steps", "max_tokens", "max_pairs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("warmup_steps", "checkpoints_to_keep", "num_workers", "weight_decay"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 (inf: do not clip), got {self.max_grad_norm}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be 0 or more and below 1, got {self.ema_decay}.")
        for name in ("logging_steps", "eval_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}; MAX_STEPS means only at the end."
                )
        known = [field.name for field in dataclasses.fields(MoleBlendConfig)]
        if unknown := sorted(set(self.model) - set(known)):
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} in model. Known keys: {', '.join(known)}.")
        if not self.model.get("blend_per_molecule", True):
            raise ValueError(
                "blend_per_molecule must be true: the draws of a molecule must not depend on the batch that it is in."
            )
        if "max_path_bonds" in self.processor:
            raise ValueError("max_path_bonds is the model's: give it as --model max_path_bonds=N.")

    def that_shape_the_result(self) -> dict[str, Any]:
        """All settings but those that say where to write and how often to look.

        A budget that was left to the device stays so: on another one the run goes on, the same but for rounding.
        """
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if field.metadata["group"] != "run"}


def parse_args(argv: list[str] | None = None) -> PretrainingSettings:
    """Settings from the YAML file and the flags."""
    return load_settings(PretrainingSettings, __doc__, HERE / "configs" / "sample.yaml", argv)


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
    write_reference_outputs(model, processor, output_dir)
    plot_losses(rows, LOSSES, output_dir / "losses.png")
    (output_dir / "training_settings.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_card(
        output_dir / "README.md",
        model_name=f"MoleBLEND, {output_dir.resolve().name}",
        config=model.config,
        results=held_out_results(rows),
        figures=run_figures(rows, facts["settings"]["batch_size"]),
        stored=None,
        evaluation=None,
        **facts,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the pretraining that the arguments describe."""
    with ExitStack() as held:
        run(parse_args(argv), sys.argv[1:] if argv is None else argv, held)


def run(settings: PretrainingSettings, arguments: list[str], held: ExitStack) -> None:
    """Pretrain; what the run holds until it ends, however it does, goes into `held`."""
    output_dir = Path(settings.output_dir)
    checkpoints = output_dir / "checkpoints"
    if unavailable := sorted(set(settings.trackers) - {*map(str, get_available_trackers()), "all"}):
        raise ValueError(
            f"The tracker {unavailable[0]!r} is not installed, or none of Accelerate's. Install it, or name others with --trackers; "
            "'' is none."
        )

    # split_batches: batch_size is that of all processes together, so the schedule advances once an optimizer step.
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=settings.trackers or None,
        # For who waits while one process makes the cache of a large dataset.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
    )
    device, num_processes = accelerator.device, accelerator.num_processes
    held.enter_context(claimed(accelerator, output_dir))
    checkpoint = find_checkpoint(settings.resume, checkpoints)
    if checkpoint is None and not settings.overwrite:
        if checkpoints_in(checkpoints):
            raise FileExistsError(
                f"{output_dir} holds checkpoints of another run. Continue it with --resume auto, start anew and delete them "
                "with --overwrite, or choose another --output_dir."
            )
        if (output_dir / "model.safetensors").exists():
            raise FileExistsError(
                f"{output_dir} holds a model, and no checkpoints to go on from. Replace it with --overwrite, or choose another "
                "--output_dir."
            )
    checkpoint = agreed(accelerator, checkpoint, output_dir)
    # Which `accelerate launch` may have chosen.
    settings = dataclasses.replace(settings, mixed_precision=accelerator.mixed_precision)
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on a CPU it would be float32. Take --mixed_precision bf16 or no.")
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed is not supported: in float32 it leaves out no step with a gradient that is not finite, and its checkpoints "
            "are pickles, which run code when they are loaded. FSDP shards as it does: training/configs/accelerate/fsdp.yaml."
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    # Data: memory-mapped rows; the held-out molecules are padded once.
    with accelerator.local_main_process_first():  # one process writes the cache of datasets, the others read it
        dataset = open_together(settings.dataset or [])
    config = MoleBlendConfig(**settings.model)
    processor = dataset.processor(max_path_bonds=config.max_path_bonds, **settings.processor)
    dataset.check(processor)
    # Shown distances alone, the weights that read the other relations get no gradient, for which processes must not wait.
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=processor.modality == "3d")
    budget = Budget.on(device.type, settings.max_tokens, settings.max_pairs)
    # Which molecules are trained on must not depend on the device. One that is over the budget is a part of its own.
    limit = Budget.on("cuda", settings.max_tokens, settings.max_pairs)
    training_rows, held_out_rows = training_and_held_out(dataset, settings.held_out_molecules, settings.split_seed)
    num_left_out = sum(fitting(rows, limit, settings.oversized) for rows in (training_rows, held_out_rows))
    if not len(held_out_rows):
        raise ValueError("All held-out molecules are left out as too large. Raise max_tokens and max_pairs.")
    padded = partial(collate, processor=processor)
    sizes = held_out_rows.sizes()
    held_out_parts = shared(cut(sizes, budget, num_processes), sizes, num_processes)[accelerator.process_index]
    held_out = padded(held_out_rows.__getitems__([part.tolist() for part in held_out_parts]))

    # Model, optimizer, schedule. The same weights on every process, then its own dropout on each.
    set_seed(settings.seed)
    model = MoleBlendForPreTraining(config)
    set_seed(settings.seed, device_specific=True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.compile:
        keep_equal_sizes_apart()
        model.compile(dynamic=True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    average = None
    if settings.ema_decay is not None:
        if is_sharded:
            raise ValueError("ema_decay needs whole weights on each process, which FSDP shards. Leave it out.")
        average = AveragedModel(model).to(device)
        average.n_averaged = average.n_averaged.cpu()  # read at each step, which must not wait for the device
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.max_steps)
    if is_sharded:
        # Autocast alone chooses the arithmetic: FSDP would round coordinates, norms and losses, which have to stay float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    else:
        independent_of_wrapping(accelerator)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    step = 0
    # What the data are, not where they lie.
    identity = settings.that_shape_the_result() | {"dataset": dataset.about["content_sha256"]}
    if checkpoint is not None:
        step = load_checkpoint(accelerator, checkpoint, identity, average)
        if step > settings.max_steps:
            raise ValueError(f"{checkpoint} is at step {step}, beyond max_steps ({settings.max_steps}).")
    batches = StepBatches(
        training_rows.sizes(),
        settings.batch_size,
        budget,
        settings.seed,
        first_step=step,
        process_index=accelerator.process_index,
        num_processes=num_processes,
    )
    num_workers = settings.num_workers if settings.num_workers is not None else 4 * (device.type == "cuda")
    # A generator of its own: DataLoader draws a number when it starts, which must not move the state just restored.
    loader: DataLoader[Any] = DataLoader(
        training_rows,
        batch_sampler=batches,
        collate_fn=padded,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )

    facts: dict[str, Any] = {
        "command": shlex.join(["accelerate", "launch", "training/pretrain.py", *without_places(arguments)]),
        "settings": without_places(dataclasses.asdict(settings) | dataclasses.asdict(budget)),
        "num_parameters": num_parameters,
        "num_training": len(training_rows),
        "num_held_out": len(held_out_rows),
        "num_oversized": num_left_out,
        "largest_allowed": limit.largest(),
        "num_with_coordinates": sum(rows.num_with_coordinates() for rows in (training_rows, held_out_rows))
        if processor.modality != "2d"
        else 0,
        "has_inchikeys": dataset.has_inchikeys(),
        # Nobody else has the path of a folder.
        "dataset_names": [
            Path(name).resolve().name if Path(name).exists() else name for name in settings.dataset or []
        ],
        "corpora": dataset.about["corpora"],
        "num_processes": num_processes,
        "environment": environment(device),
    }
    accelerator.print(
        f"{settings.description or 'Pretraining'}\n"
        f"  model    {num_parameters:,} parameters on {device.type}, {num_processes} process(es)\n"
        f"  data     {facts['num_training']:,} molecules to train on, {facts['num_held_out']:,} held out, "
        f"{num_left_out:,} left out as too large; {facts['num_with_coordinates']:,} of these have a geometry\n"
        f"  steps    {step:,} to {settings.max_steps:,} of {settings.batch_size:,} molecules "
        f"({batches.steps_per_epoch:,} steps an epoch), in parts of up to {budget.max_tokens:,} padded tokens and "
        f"{budget.max_pairs:,} pairs\n"
        f"  output   {output_dir}/ : checkpoint folder for the Hub, card, metrics.jsonl, losses.png, checkpoints/, tensorboard/"
    )
    left_out_steps = output_dir / "left_out_steps.jsonl"
    if accelerator.is_main_process:
        if checkpoint is None:
            for old in (checkpoints, output_dir / "tensorboard"):
                empty(old)
        keep_lines(left_out_steps, step)
    # A resumed run drops from its logs what was measured after the checkpoint.
    accelerator.init_trackers("moleblend", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    log = MetricsLog(accelerator, output_dir / "metrics.jsonl", step)
    stop, finite = (
        StopRequest(accelerator, settings.max_hours),
        FiniteSteps(getattr(optimizer, "optimizer", optimizer), device, settings.max_left_out_steps),
    )
    progress = tqdm(
        total=settings.max_steps, initial=step, unit="step", mininterval=1.0, disable=not accelerator.is_main_process
    )

    def evaluate_and_record() -> None:
        metrics = evaluate(accelerator, average or model, config, held_out, settings.seed)
        log.write(step, {f"held_out/{name}": value for name, value in metrics.items()})
        if accelerator.is_main_process:
            titled = ", ".join(f"{title} {metrics[name]:.3f}" for name, title in LOSSES.items() if name in metrics)
            progress.write(f"step {step:>6,} held out: {titled}")

    def record_training() -> dict[str, float]:
        """Log what was trained since the last call, and return the losses; those that no step had are left out."""
        totals, counts = accelerator.reduce(losses, "sum").tolist()
        # Each process adds its share of a step, and counts the step.
        values = {
            name: total * num_processes / count
            for name, total, count in zip(LOSSES, totals, counts, strict=True)
            if count
        }
        losses.zero_()
        log.write(
            step,
            {f"train/{name}": value for name, value in values.items()}
            | {"train/learning_rate": scheduler.get_last_lr()[0]}
            | {f"train/{name}": value for name, value in window.closed(settings.batch_size, device).items()},
        )
        for bad in finite.left_out():
            rows = training_rows.indices[batches.batch(bad - 1, batches.order((bad - 1) // batches.steps_per_epoch))]
            log.write(bad, {"train/left_out": 1.0})
            if accelerator.is_main_process:
                with left_out_steps.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": bad, "rows": rows.tolist()}) + "\n")
                progress.write(f"step {bad:>6,} left out: its gradient is not finite. Its rows: {left_out_steps}")
        finite.check()
        return values

    started = time.perf_counter()
    is_due = step % settings.eval_steps == 0 or step == settings.max_steps
    # What ended a run may have come between a checkpoint and its evaluation.
    if is_due and not log.has(step, "held_out/"):
        evaluate_and_record()
    losses, window, reason = torch.zeros(2, len(LOSSES), device=device), Window(), None  # sums, and of how many steps
    model.train()
    steps = iter(loader) if step < settings.max_steps else iter(())
    while step < settings.max_steps and reason is None:
        with window.waiting():
            parts: list[dict[str, torch.Tensor]] = next(steps)
        window.count(parts)
        epoch = step // batches.steps_per_epoch
        draws: list[dict[str, torch.Tensor]] = []
        targets = torch.zeros(len(LOSSES), dtype=torch.int64, device=device)
        for part in parts:
            seeds = torch.from_numpy(molecule_seeds(settings.seed, epoch, part.pop("rows").numpy()))
            part.update({name: values.to(device, non_blocking=True) for name, values in part.items()})
            draws.append(drawn(part, seeds.to(device, non_blocking=True), config))
            targets += count_targets(part, draws[-1]["atom_modality_ids"], config)
        # The gradients of the processes are averaged, and those of the parts added: so this is the mean over the step.
        targets = accelerator.reduce(targets, "sum")
        num_targets, scale = (targets, num_processes) if settings.loss_mean == "step" else (None, 1 / len(parts))
        of_step = torch.zeros(len(LOSSES), device=device)
        for index, (part, draw) in enumerate(zip(parts, draws, strict=True)):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last or is_sharded else accelerator.no_sync(model):
                outputs = model(**part, **draw, num_targets=num_targets)
                accelerator.backward(outputs.loss * scale)
            of_step += torch.stack([outputs[name].detach() for name in LOSSES]) * scale / num_processes
        counts = of_step.isfinite() & (targets > 0)
        losses += torch.stack([torch.where(counts, of_step, 0.0), counts])
        finite.before_step(step + 1, accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if average is not None and settings.ema_decay is not None:
            move_average(average, accelerator.unwrap_model(model), settings.ema_decay)

        step += 1
        progress.update()
        reason = stop.reason(step)
        is_saved = step % settings.checkpointing_steps == 0 or step == settings.max_steps or reason is not None
        if is_saved or step % settings.logging_steps == 0:  # what a checkpoint is behind, its log has
            titled = ", ".join(f"{LOSSES[name]} {value:.3f}" for name, value in record_training().items())
            progress.set_postfix_str(f"{window.rate:.0f} molecules/s, {titled}")
        with window.paused():  # molecules/s is that of training alone
            if is_saved:  # before anything that takes time: who asked to stop may not wait
                save_checkpoint(
                    accelerator, checkpoints, step, identity, average, settings.checkpoints_to_keep or None
                )
            if step % settings.eval_steps == 0 or step == settings.max_steps:
                evaluate_and_record()
    progress.close()
    stop.restore()

    if reason and step < settings.max_steps:
        accelerator.print(f"Stopped at step {step:,}: {reason}. Continue with --resume auto.")
    else:
        facts["seconds"] = time.perf_counter() - started
        weights = accelerator.get_state_dict(model) if average is None else average.module.state_dict()
        if accelerator.is_main_process:
            final = MoleBlendForPreTraining(config)  # as it was before it was wrapped, sharded or compiled
            final.load_state_dict(weights)
            write_folder(output_dir, final, processor, read_metrics(log.path), facts)
            print(
                f"Done in {facts['seconds']:.0f} s. {output_dir}/ loads with AutoModel.from_pretrained; see its README.md."
            )
    accelerator.wait_for_everyone()
    # The model goes before the group of processes: as its last owner it could join the group's threads while it holds Python's
    # lock, for which these may wait.
    model, optimizer, scheduler = accelerator.free_memory(model, optimizer, scheduler)
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main()
