"""What ends a run early but in order, and what keeps one bad step from spoiling it."""

import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

STOP_SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
# Several processes on GPUs agree on a stop so often, in steps: to ask is to wait for the device, but torchrun kills 30 s after SIGTERM.
STEPS_BETWEEN_QUESTIONS = 10


def ignore_stop_signals(worker: int) -> None:
    """In a worker of a DataLoader: a scheduler signals all processes, and the one that trains needs its workers to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether the run is to save and stop: it was sent SIGTERM (or SIGUSR1, as schedulers do before they kill), or its hours are up."""

    def __init__(self, accelerator: Accelerator, max_hours: float | None) -> None:
        """Take over the signals; `restore` gives them back."""
        self._accelerator = accelerator
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reason(self, step: int) -> str | None:
        """Why to stop after this step, the same answer for every process; called by all of them after each."""
        device, num_processes = self._accelerator.device, self._accelerator.num_processes
        if num_processes > 1 and device.type != "cpu" and step % STEPS_BETWEEN_QUESTIONS:
            return None
        here = 1 if self._signal is not None else 2 if self._deadline and time.monotonic() > self._deadline else 0
        if num_processes > 1:
            answers = self._accelerator.gather(torch.tensor([here], device=device)).tolist()
            here = min((answer for answer in answers if answer), default=0)
        return {0: None, 1: "it was told to stop", 2: "its hours are up"}[here]


class FiniteSteps:
    """Leaves out optimizer steps whose gradient is not finite, without waiting for the device to know.

    The fused optimizers of torch take a tensor `found_inf` and skip the update where it is 1. Which steps those were is
    read when the losses are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, limit: int) -> None:
        """`limit` is how many left-out steps in a row end the run."""
        self._optimizer, self._limit = optimizer, limit
        self._in_a_row = torch.zeros((), device=device)
        self._worst = torch.zeros((), device=device)
        self._flags: list[tuple[int, torch.Tensor]] = []

    def before_step(self, step: int, gradient_norm: torch.Tensor) -> None:
        """Arm the optimizer for this step."""
        bad = (~torch.isfinite(gradient_norm)).float()
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.grad_scale = None  # type: ignore[attr-defined]
        bad = bad.full_tensor() if isinstance(bad, DTensor) else bad  # sharded by FSDP, as the weights are
        self._in_a_row = (self._in_a_row + 1) * bad
        self._worst = torch.maximum(self._worst, self._in_a_row)
        self._flags.append((step, bad))

    def left_out(self) -> list[int]:
        """Steps left out since the last call."""
        if not self._flags:
            return []
        bad = torch.stack([flag for _, flag in self._flags]).tolist()
        steps = [step for (step, _), flag in zip(self._flags, bad, strict=True) if flag]
        self._flags.clear()
        return steps

    def check(self) -> None:
        """Raise FloatingPointError if too many steps in a row were left out; reads the device, so called when the losses are."""
        if float(self._worst) >= self._limit:
            raise FloatingPointError(
                f"The gradients of {int(self._worst)} steps in a row were not finite. Lower the learning rate, or use bf16 or no "
                "mixed precision. Their rows are in left_out_steps.jsonl; the last checkpoint is as it was."
            )
