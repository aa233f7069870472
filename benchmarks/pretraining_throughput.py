r"""Pretraining of the base model on corpora of small, drug-like and mixed sizes, each speed feature switched off in turn.

    python benchmarks/pretraining_throughput.py                                  # the sample, drugs, and both mixed; minutes
    python benchmarks/pretraining_throughput.py --dataset data/qm9 --dataset data/qm9+data/drugs
    python benchmarks/pretraining_throughput.py --device cuda --compile --dataset data/pcqm4mv2
    python benchmarks/pretraining_throughput.py --budgets 1024,32768 4096,131072 # which parts are fastest, and nothing else
    python benchmarks/pretraining_throughput.py --profile                        # what our step spends its time on

A turn is what `training/pretrain.py` does in a step: parts from a DataLoader, draws, forward and backward of each part,
clipping, AdamW. All contestants train on the same molecules, in turns; medians of the turns are printed. The yardstick is
`plain_model.py` in float32 on random batches of 32 padded to their largest, fed by the same DataLoader.

FLOP/s counts the encoder's matrix products on real tokens, forward and twice that backward, by formula; heads, relations,
padding and what is computed again count nothing. It is compared with a large matrix product measured between the turns in the
same arithmetic. Memory is what a turn takes above weights, optimizer and imports (on Linux, or a GPU).
"""

import argparse
import ctypes
import dataclasses
import functools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from drug_molecules import DRUG_SMILES
from plain_model import PlainMoleBlendForPreTraining
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training_step import has_bfloat16

from batches import cut
from compilation import keep_equal_sizes_apart
from data import GraphRows, collate, open_dataset
from moleblend_hf import (
    MoleBlendConfig,
    MoleBlendForPreTraining,
    MoleBlendProcessor,
    heads_moleblend,
    modeling_moleblend,
)
from moleblend_hf.graphs_moleblend import Budget
from objective import count_targets, drawn, molecule_seeds
from rows import GRAPH_COLUMNS

TRAINING = Path(__file__).parents[1] / "training"
PLAIN_BATCH = 32
MIB = 2**20
gathers = modeling_moleblend.gathers


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to train."""

    name: str
    dtype: torch.dtype = torch.float32
    plain: bool = False
    budget: Budget | None = None  # parts by size; None: random ones
    random_size: int = PLAIN_BATCH
    packed: bool = True  # only real tokens and shown pairs are computed
    own_dropout: bool = True
    fused: bool = True
    compiled: bool = False
    num_workers: int = 0


class Corpus:
    """The molecules of a turn, as training reads them."""

    def __init__(
        self, name: str, splits: Sequence[datasets.Dataset], processor: MoleBlendProcessor, num_molecules: int
    ) -> None:
        """Draw as many molecules from each split, which is repeated if it is too small."""
        columns = [split.select_columns(list(GRAPH_COLUMNS)) for split in splits]
        starts = np.cumsum([0, *map(len, splits)]).tolist()
        shares = np.diff(np.linspace(0, num_molecules, len(splits) + 1).astype(int)).tolist()
        rng = np.random.default_rng(0)
        chosen = [
            start + np.resize(rng.permutation(len(split)), share)
            for start, split, share in zip(starts, splits, shares, strict=False)
        ]
        self.name, self.processor = name, processor
        self.rows = GraphRows(datasets.concatenate_datasets(columns), np.concatenate(chosen))
        self.sizes = self.rows.sizes()

    def parts(self, contestant: Contestant) -> Iterator[list[list[int]]]:
        """Positions of each part, step by step without end."""
        rng = np.random.default_rng(0)
        while True:
            if contestant.budget is not None:
                yield [part.tolist() for part in cut(self.sizes, contestant.budget)]
            else:
                order, size = rng.permutation(len(self.sizes)), contestant.random_size
                yield [order[start : start + size].tolist() for start in range(0, len(order), size)]

    def loader(self, contestant: Contestant, device: str) -> DataLoader[Any]:
        """The parts of each step as padded batches."""
        return DataLoader(
            self.rows,
            batch_sampler=Endless(functools.partial(self.parts, contestant)),
            collate_fn=functools.partial(collate, processor=self.processor),
            num_workers=contestant.num_workers,
            pin_memory=device == "cuda",
        )

    def flops(self, config: MoleBlendConfig) -> float:
        """Of the encoder's matrix products on the real tokens of a step, forward and backward."""
        tokens = self.sizes.astype(np.float64) + 1
        width, inner = config.hidden_size, config.intermediate_size
        projections = 2 * tokens.sum() * (4 * width**2 + 2 * width * inner)
        attention = 2 * 2 * (tokens**2).sum() * width
        return float(3 * config.num_hidden_layers * (projections + attention))


@dataclasses.dataclass
class Endless:
    """What DataLoader takes for a batch sampler."""

    make: Callable[[], Iterator[list[list[int]]]]

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self.make()


@dataclasses.dataclass
class Turn:
    """What was measured in a turn of some steps."""

    seconds: float  # of a step
    waited: float
    peak: float | None  # bytes above what lay there before
    tokens: np.ndarray  # real, padded
    pairs: np.ndarray


class Trainer:
    """One set of weights, which all contestants train."""

    def __init__(self, config: MoleBlendConfig, device: str) -> None:
        """Build the model, the plain one on the same parameters, and an optimizer of each kind."""
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.model = MoleBlendForPreTraining(config).to(device).train()
        self.plain = PlainMoleBlendForPreTraining(config).train()
        self.plain._modules = self.model._modules
        self.optimizers = {
            fused: torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=fused or None)
            for fused in (True, False)
        }
        keep_equal_sizes_apart()
        self.compiled = torch.compile(self.model, dynamic=True)
        self.known: set[Contestant] = set()

    def step(self, contestant: Contestant, parts: list[dict[str, torch.Tensor]]) -> None:
        """As in `pretrain.py`, for one process."""
        draws, targets = [], torch.zeros(4, dtype=torch.int64, device=self.device)
        for part in parts:
            seeds = torch.from_numpy(molecule_seeds(0, 0, part.pop("rows").numpy()))
            part.update({name: values.to(self.device, non_blocking=True) for name, values in part.items()})
            draws.append(drawn(part, seeds.to(self.device, non_blocking=True), self.config))
            if not contestant.plain:
                targets += count_targets(part, draws[-1]["atom_modality_ids"], self.config)
        model = self.plain if contestant.plain else self.compiled if contestant.compiled else self.model
        for part, draw in zip(parts, draws, strict=True):
            with torch.autocast(self.device, contestant.dtype, enabled=contestant.dtype != torch.float32):
                if contestant.plain:
                    loss = model(**part, **draw) / len(parts)
                else:
                    loss = model(**part, **draw, num_targets=targets).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        optimizer = self.optimizers[contestant.fused]
        optimizer.step()
        optimizer.zero_grad()

    def turn(self, contestant: Contestant, corpus: Corpus, num_steps: int, num_warm: int) -> Turn:
        """Some steps on the clock, after some off it: one the first time, and `num_warm` each time.

        Of the plain ones a step is enough: on a GPU its many small parts take minutes.
        """
        num_steps, num_warm = (1, 0) if contestant.plain else (num_steps, num_warm)
        with ExitStack() as stack:
            if not contestant.packed:  # `gathers` is asked for the atoms, which are integers, and for other things
                stack.enter_context(
                    mock.patch.object(modeling_moleblend, "gathers", lambda t: t.is_floating_point() and gathers(t))
                )
            if not contestant.own_dropout:
                for module in (modeling_moleblend, heads_moleblend):
                    stack.enter_context(mock.patch.object(module, "drop_values", F.dropout))
            batches = iter(corpus.loader(contestant, self.device))
            if contestant not in self.known:
                self.known.add(contestant)
                first = next(batches)
                self.step(contestant, first if contestant.compiled else first[-1:])
            for _ in range(num_warm):
                self.step(contestant, next(batches))
            before = self.reset_peak()
            real, padded, waited = np.zeros(2), np.zeros(2), 0.0
            self.synchronize()
            start = time.perf_counter()
            for _ in range(num_steps):
                waiting = time.perf_counter()
                parts = next(batches)
                waited += time.perf_counter() - waiting
                for part in parts:
                    molecules, width = part["attention_mask"].shape
                    padded += (molecules * (width + 1), molecules * (width + 1) ** 2)
                self.step(contestant, parts)
            self.synchronize()
            seconds = time.perf_counter() - start
            sizes = corpus.sizes.astype(np.float64) + 1
            real += num_steps * np.array([sizes.sum(), (sizes**2).sum()])
            peak = self.peak()
        return Turn(
            seconds / num_steps,
            waited / num_steps,
            None if peak is None or before is None else peak - before,
            *np.stack([real, padded], axis=1),
        )

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> float | None:
        """Start the high-water mark anew, and return what is in use."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier turns left would hide what this one takes
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError, TypeError):  # not Linux with glibc, or not allowed
            return None
        return self.peak()

    def peak(self) -> float | None:
        """The high-water mark in bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
        except OSError:
            return None

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of one large matrix product."""
        size, repeats = (8192, 20) if self.device == "cuda" else (2048, 1)
        first, second = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        first @ second
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            first @ second
        self.synchronize()
        return repeats * 2 * size**3 / (time.perf_counter() - start)


def contestants(args: argparse.Namespace, sizes: np.ndarray) -> tuple[dict[str, Contestant], list[str]]:
    """Those that can be measured here, and the names of those that cannot."""
    on_cpu = args.device == "cpu"
    budget = Budget(args.max_tokens, args.max_pairs)
    best_dtype = torch.bfloat16 if has_bfloat16(args.device) else torch.float32
    mean_size = -(-len(sizes) // len(cut(sizes, budget)))
    ours = Contestant("everything on", best_dtype, budget=budget, compiled=args.compile, num_workers=args.num_workers)
    change = functools.partial(dataclasses.replace, ours)
    found = [ours, change(name=f"random parts of {mean_size}", budget=None, random_size=mean_size)]
    missing = []
    if on_cpu and not args.compile:
        found += [
            change(name="padding and hidden pairs computed", packed=False),
            change(name="dropout of torch", own_dropout=False),
        ]
    found.append(change(name="optimizer not fused", fused=False))
    if best_dtype != torch.float32:
        found.append(change(name="float32", dtype=torch.float32))
    else:
        missing.append("bfloat16")
    if args.compile:
        found.append(change(name="not compiled", compiled=False))
    else:
        missing.append("compiled")
    workers = 0 if args.num_workers else 1
    found.append(change(name=f"{workers} DataLoader workers", num_workers=workers))
    plain = Contestant("plain", plain=True)
    found += [plain] + [dataclasses.replace(plain, name="plain, bfloat16", dtype=best_dtype)] * (
        best_dtype != torch.float32
    )
    return {contestant.name: contestant for contestant in found}, missing


def measure(
    trainer: Trainer, corpus: Corpus, found: dict[str, Contestant], args: argparse.Namespace
) -> tuple[dict[str, list[Turn]], dict[torch.dtype, float]]:
    """Turns of each contestant, and the ceiling of each arithmetic."""
    turns: dict[str, list[Turn]] = {name: [] for name in found}
    rates: dict[torch.dtype, list[float]] = {contestant.dtype: [] for contestant in found.values()}
    progress = tqdm(total=args.rounds * len(found), unit="turn", leave=False)
    for _ in range(args.rounds):
        for name, contestant in found.items():
            turns[name].append(trainer.turn(contestant, corpus, args.steps, args.warm_steps))
            progress.set_postfix_str(f"{name}: {turns[name][-1].seconds:.1f} s")
            progress.update()
            progress.write(
                f"{corpus.name}, {name}: {turns[name][-1].seconds:.3f} s a step", sys.stderr
            )  # should the rest not end
            for dtype in rates:
                rates[dtype].append(trainer.matmul_rate(dtype))
    progress.close()
    return turns, {dtype: statistics.median(values) for dtype, values in rates.items()}


def print_table(
    corpus: Corpus,
    found: dict[str, Contestant],
    missing: list[str],
    turns: dict[str, list[Turn]],
    ceilings: dict[torch.dtype, float],
    config: MoleBlendConfig,
    args: argparse.Namespace,
) -> None:
    """One line a contestant."""
    num, flops = len(corpus.sizes), corpus.flops(config)
    shown = ", ".join(f"{str(dtype)[6:]} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in ceilings.items())
    print(
        f"\n{corpus.name}: {len(corpus.sizes):,} molecules, {corpus.sizes.mean():.1f} atoms on average, "
        f"{corpus.sizes.min()} to {corpus.sizes.max()}; matmul: {shown}"
    )
    print(
        f"{'':36}{'molecules/s':>12}{'slowest':>9}{'fastest':>9}{'x plain':>9}{'padding':>9}{'of pairs':>9}"
        f"{'data wait':>10}{'MiB':>8}{'GFLOP/s':>9}{'of matmul':>10}"
    )
    medians = {name: statistics.median(turn.seconds for turn in measured) for name, measured in turns.items()}
    for name, measured in turns.items():
        seconds = sorted(turn.seconds for turn in measured)
        tokens, pairs = (sum(getattr(turn, kind) for turn in measured) for kind in ("tokens", "pairs"))
        waited = sum(turn.waited for turn in measured) / sum(seconds)
        peaks = [turn.peak for turn in measured if turn.peak is not None]
        rate = flops / medians[name]
        ratio = f"{medians['plain'] / medians[name]:.2f}" if "plain" in medians else ""
        print(
            f"{name:36}{num / medians[name]:12,.1f}{num / seconds[-1]:9,.1f}{num / seconds[0]:9,.1f}{ratio:>9}"
            f"{1 - tokens[0] / tokens[1]:9.1%}{1 - pairs[0] / pairs[1]:9.1%}{waited:10.2%}"
            f"{f'{max(peaks) / MIB:,.0f}' if peaks else '-':>8}{rate / 1e9:9,.1f}"
            f"{rate / ceilings[found[name].dtype]:10.1%}",
            flush=True,
        )
    for name in missing:
        print(f"{name:36}{'not measured':>12}")


def corpora(names: list[str] | None, num_molecules: int) -> Iterator[Corpus]:
    """Those named, or the sample, drugs, and half of each."""
    if names:
        for name in names:
            opened = [open_dataset(part) for part in name.split("+")]
            if not all(dataset.about["num_with_coordinates"] for dataset in opened):
                raise ValueError(f"The dataset {name!r} has no geometries. Preprocess with --modality 2d+3d.")
            splits = [dataset.splits["train"] for dataset in opened]
            yield Corpus(name, splits, opened[0].processor(), num_molecules)
        return
    with tempfile.TemporaryDirectory() as folder:
        smiles = Path(folder) / "drugs.smi"
        smiles.write_text("\n".join(DRUG_SMILES) + "\n")
        flags = ["--source", "smi", "--input", str(smiles), "--output", f"{folder}/drugs", "--modality", "2d+3d"]
        subprocess.run(
            [sys.executable, str(TRAINING / "preprocess.py"), *flags, "--num_proc", "1"],
            check=True, capture_output=True,
        )  # fmt: skip
        sample, drugs = (open_dataset(name) for name in (TRAINING / "sample", f"{folder}/drugs"))
        small, large = sample.splits["train"], drugs.splits["train"]
        for name, splits in (("sample of QM9", [small]), ("drugs", [large]), ("both, mixed", [small, large])):
            yield Corpus(name, splits, sample.processor(), num_molecules)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; what is left out depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        action="append",
        help="folder that preprocess.py wrote, or A+B: half of each; may be given again",
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="KEY=VALUE", help="fields of MoleBlendConfig")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch_size", type=int, help="molecules a step (default: 96; on a GPU 4096)")
    parser.add_argument("--steps", type=int, help="of a turn (default: 1; on a GPU 10)")
    parser.add_argument("--warm_steps", type=int, help="of a turn, before the clock starts (default: 0; on a GPU 5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--max_tokens", type=int, help="of a part, as in pretrain.py")
    parser.add_argument("--max_pairs", type=int, help="of a part, as in pretrain.py")
    parser.add_argument(
        "--num_workers", type=int, help="of the DataLoader (default: 0; on a GPU 4, as in pretrain.py)"
    )
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which takes minutes to start")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants whose names begin so")
    parser.add_argument("--budgets", nargs="+", metavar="TOKENS,PAIRS", help="compare these budgets of a part instead")
    parser.add_argument("--profile", action="store_true", help="print what our step spends its time on, and stop")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    for name, on_cpu_value, on_gpu_value in (
        ("batch_size", 96, 4096), ("steps", 1, 10), ("warm_steps", 0, 5), ("num_workers", 0, 4),
    ):  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, on_gpu_value if on_gpu else on_cpu_value)
    vars(args).update(dataclasses.asdict(Budget.on(args.device, args.max_tokens, args.max_pairs)))
    return args


def main(argv: list[str] | None = None) -> None:
    """Print a table for each corpus."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    datasets.disable_progress_bars()
    fields = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in args.model)}
    trainer = Trainer(MoleBlendConfig(**fields), args.device)
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.num_threads} threads"
    print(
        f"{num_parameters / 1e6:.1f} M parameters on {where}; steps of {args.batch_size:,} molecules, parts of up to "
        f"{args.max_tokens:,} tokens and {args.max_pairs:,} pairs; medians of {args.rounds} turns of {args.steps} step(s)"
    )
    for corpus in corpora(args.dataset, args.batch_size):
        found, missing = contestants(args, corpus.sizes)
        if args.profile:
            ours = found["everything on"]
            trainer.turn(ours, corpus, 1, 0)
            with torch.profiler.profile() as profile:
                trainer.turn(ours, corpus, 1, 0)
            print(f"\n{corpus.name}")
            print(profile.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=25))
            continue
        if args.budgets:
            budgets = [tuple(map(int, text.split(","))) for text in args.budgets]
            ours = found["everything on"]
            found, missing = {}, []
            for tokens, pairs in budgets:
                name = f"{tokens:,} tokens, {pairs:,} pairs"
                found[name] = dataclasses.replace(ours, name=name, budget=Budget(tokens, pairs))
        if args.only:
            found = {n: c for n, c in found.items() if any(n.startswith(start) for start in args.only)}
        turns, ceilings = measure(trainer, corpus, found, args)
        print_table(corpus, found, missing, turns, ceilings, trainer.config, args)


if __name__ == "__main__":
    main()
