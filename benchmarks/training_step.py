"""A pretraining step of the base model on a batch of drug-like molecules, against the same step written plainly.

    python benchmarks/training_step.py                          # CPU: float32, and bfloat16 if the processor computes in it
    python benchmarks/training_step.py --device cuda --compile

One step is forward, backward and AdamW on 32 drugs padded to N = 36, with conformers, dropout and drop path as in training.
The variants take turns in one process and their medians are compared, with the plain step in the same arithmetic and with the
plain step in float32; memory is measured in a fresh process for each. The plain step is `plain_model.py`;
`tests/test_plain_model.py` proves that it is the same function.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
from drug_molecules import DRUG_SMILES
from plain_model import PlainMoleBlendForPreTraining

from memory import peak_memory
from moleblend_hf import MoleBlendConfig, MoleBlendForPreTraining, MoleBlendProcessor

MIB = 2**20
# name: model class, gradient checkpointing
VARIANTS = {
    "plain": (PlainMoleBlendForPreTraining, False),
    "ours": (MoleBlendForPreTraining, False),
    "ours, gradient checkpointing": (MoleBlendForPreTraining, True),
}


def make_batch(batch_size: int, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """`batch_size` molecules of the list, featurized with generated conformers, and fixed draws."""
    smiles = (DRUG_SMILES * (batch_size // len(DRUG_SMILES) + 1))[:batch_size]
    batch = dict(MoleBlendProcessor()(smiles, modality="2d+3d"))
    size, num_atoms = batch["attention_mask"].shape
    generator = torch.Generator().manual_seed(seed)
    config = MoleBlendConfig()
    probabilities = torch.tensor(config.blend_probabilities)
    draws = torch.multinomial(probabilities, size * num_atoms**2, replacement=True, generator=generator)
    batch["pair_modality_ids"] = draws.view(size, num_atoms, num_atoms)
    probabilities = torch.tensor(config.atom_blend_probabilities)
    draws = torch.multinomial(probabilities, size * num_atoms, replacement=True, generator=generator)
    batch["atom_modality_ids"] = draws.view(size, num_atoms)
    batch["coordinate_noise"] = config.noise_std * torch.randn(size, num_atoms, 3, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Step:
    """A model and its optimizer; calling it makes one training step."""

    def __init__(self, variant: str, batch: dict[str, torch.Tensor], dtype: str, compiled: bool = False):
        """Build the variant's model in training mode on the batch's device."""
        model_class, checkpointing = VARIANTS[variant]
        torch.manual_seed(0)
        self.device = batch["atom_features"].device.type
        self.model = model_class(MoleBlendConfig()).to(self.device).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch, self.dtype = batch, getattr(torch, dtype)
        self.keep_gradients = False
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self) -> float:
        """Returns the seconds taken."""
        start = time.perf_counter()
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.forward(**self.batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_memory(variant: str, dtype: str, batch_size: int, device: str) -> dict[str, float]:
    """Peak memory in MiB up to: imports and batch, weights with gradients and optimizer state, and the steps."""
    batch = make_batch(batch_size, device)

    def peak() -> float:
        return (torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()) / MIB

    imports = peak()
    step = Step(variant, batch, dtype)
    step.keep_gradients = True  # so that they count with the weights
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    weights = peak()
    for _ in range(2):
        step()
    return {"imports": imports, "weights": weights - imports, "step": peak() - weights, "total": peak()}


def has_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are computed by the hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], help="default: those the device computes in"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--profile", action="store_true", help="print what our step spends its time on, and stop")
    parser.add_argument("--compile", action="store_true", help="add a variant under torch.compile")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # a child process measures one variant
    args = parser.parse_args(argv)
    torch.set_num_threads(args.num_threads)
    dtypes = args.dtypes or (["float32", "bfloat16"] if has_bfloat16(args.device) else ["float32"])
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, dtypes[0], args.batch_size, args.device)))
        return

    batch = make_batch(args.batch_size, args.device)
    if args.profile:
        step = Step("ours", batch, dtypes[0])
        for _ in range(2):
            step()
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=20))
        return
    num_atoms = batch["attention_mask"].sum().item()
    print(
        f"{args.batch_size} molecules, {num_atoms / args.batch_size:.1f} atoms each, padded to {batch['degree'].shape[1]}"
    )
    plain_float32 = None
    for dtype in dtypes:
        steps = {name: Step(name, batch, dtype) for name in VARIANTS}
        if args.compile:
            steps["ours, compiled"] = Step("ours", batch, dtype, compiled=True)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.repeats):
            for name, step in steps.items():
                step()  # finds the memory that the other variants gave back
                seconds[name].append(step())
        del steps, step
        print(f"\n{dtype}: median of {args.repeats} steps, interleaved; memory of a process of its own, MiB")
        print(
            f"{'':32}{'s/step':>8}{'mol/s':>8}{'speed-up':>10}{'over fp32':>11}{'imports':>9}{'weights':>9}{'step':>7}{'ratio':>7}{'total':>7}{'ratio':>7}"
        )
        plain_seconds = statistics.median(seconds["plain"])
        if dtype == "float32":
            plain_float32 = plain_seconds
        over_float32 = plain_float32 or float("nan")
        plain_memory: dict[str, float] = {}
        for name, values in seconds.items():
            median = statistics.median(values)
            line = f"{name:32}{median:8.3f}{args.batch_size / median:8.1f}{plain_seconds / median:9.2f}x{over_float32 / median:10.2f}x"
            if name in VARIANTS:
                flags = ["--memory_of", name, "--dtypes", dtype, "--batch_size", str(args.batch_size)]
                flags += ["--device", args.device, "--num_threads", str(args.num_threads)]
                output = subprocess.run(
                    [sys.executable, str(Path(__file__)), *flags], check=True, capture_output=True, text=True
                ).stdout
                memory = json.loads(output.splitlines()[-1])
                plain_memory = plain_memory or memory
                line += f"{memory['imports']:9.0f}{memory['weights']:9.0f}"
                line += f"{memory['step']:7.0f}{memory['step'] / plain_memory['step']:7.2f}"
                line += f"{memory['total']:7.0f}{memory['total'] / plain_memory['total']:7.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
