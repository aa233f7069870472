"""Checkpoints of a run: written whole or not at all, checked before they are resumed from, the oldest deleted."""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.constants import RNG_STATE_NAME, SCALER_NAME
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

logger = get_logger(__name__)

STATE_FILE = "run_state.json"
AVERAGE_FILE = "average.safetensors"
LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks say
NOT_SHARED = "{} has to lie on a file system that all machines share."


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    settings: dict[str, Any],
    average: AveragedModel | None = None,
    to_keep: int | None = None,
) -> None:
    """Save model, average, optimizer, schedule and random states as `folder/step-N`; called by every process.

    The folder gets its name only when everything in it is on the disk, with the hash of each file, so that what has the name
    can be resumed from, and what was damaged since is noticed. Accelerate writes safetensors, and for optimizer, schedule
    and random states files that it reads with `weights_only=True`: nothing in them is executed. What is registered with it for
    checkpointing it unpickles, so the average is not.
    """
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if accelerator.is_main_process:
        for left in folder.glob(".step-*.partial"):  # by a run that was ended while it saved
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    expected = [f"{RNG_STATE_NAME}_{index}.pkl" for index in range(accelerator.num_processes)]
    missing = [name for name in expected if not (partial / name).is_file()]
    [missing] = broadcast_object_list([missing])  # as the main process sees it, which writes the rest
    if missing:
        raise RuntimeError(
            f"The main process does not see {missing[0]}, which another has saved: {NOT_SHARED.format(folder)}"
        )
    if accelerator.is_main_process:
        if average is not None:
            save_file(average.state_dict(), partial / AVERAGE_FILE)
        state = {
            "step": step,
            "num_processes": accelerator.num_processes,
            "settings": settings,
            "sha256": {str(path.relative_to(partial)): _on_disk(path) for path in _files(partial)},
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _on_disk(partial / STATE_FILE)
        _sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_folder(folder)
        # A later one was damaged, or the run would have gone on from it; kept, it would take the place of a sound one.
        found = checkpoints_in(folder) if to_keep else []
        until_now = [path for path in found if _step(path) <= step]
        for old in [*found[len(until_now) :], *until_now[: -to_keep or None]] if to_keep else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)


def _on_disk(path: Path) -> str:
    """SHA-256 of a file, once its content has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))  # and no copies
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def independent_of_wrapping(accelerator: Accelerator) -> None:
    """Let checkpoints hold the names of the model's weights as they are without DDP, so that any number of processes resumes."""

    def without_prefix(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for states in weights:
            for name in list(states):
                states[name.removeprefix("module.")] = states.pop(name)

    def unwrapped(models: list[torch.nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(without_prefix)
    accelerator.register_load_state_pre_hook(unwrapped)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        hashes = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError):
        return f"{STATE_FILE} is no record of a checkpoint"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return f"{name} is not as it was written"
    return None


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a folder, or with "auto" the newest sound one; None to start from nothing."""
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoints_in(folder)
        for checkpoint in reversed(found):
            if (reason := damage(checkpoint)) is None:
                return checkpoint
            logging.warning(f"{checkpoint} is damaged and is not resumed from: {reason}.")
        if found:
            raise ValueError(
                f"Each checkpoint in {str(folder)!r} is damaged. Start anew with --overwrite and without --resume."
            )
        return None
    if not (Path(resume) / STATE_FILE).is_file():
        there = ", ".join(str(path) for path in checkpoints_in(folder)) or "none"
        raise FileNotFoundError(f"{resume!r} is no checkpoint. Complete ones in {str(folder)!r}: {there}.")
    if reason := damage(Path(resume)):
        raise ValueError(f"The checkpoint {resume!r} is damaged: {reason}. Resume from an older one, or with auto.")
    step = json.loads((Path(resume) / STATE_FILE).read_text(encoding="utf-8"))["step"]
    if later := [path.name for path in checkpoints_in(folder) if _step(path) > step]:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(later)}, which --resume auto would go on with after a run from {resume!r} is "
            "interrupted. Delete what is later, or take another --output_dir."
        )
    return Path(resume)


def agreed(accelerator: Accelerator, checkpoint: Path | None, folder: Path) -> Path | None:
    """The checkpoint to resume from, if every process found the same; or else each would train its own weights."""
    record = None if checkpoint is None else (checkpoint.name, (checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    found = gather_object([(platform.node(), record)])
    for index, (host, other) in enumerate(found):
        if other != found[0][1]:
            ours, theirs = ("no checkpoint" if each is None else each[0] for each in (found[0][1], other))
            theirs = f"another {theirs}" if ours == theirs else theirs
            raise RuntimeError(
                f"Process 0 on {found[0][0]} resumes from {ours}, but process {index} on {host} finds {theirs}: "
                f"{NOT_SHARED.format(folder)}"
            )
    return checkpoint


@contextmanager
def claimed(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Hold a folder to write into, so that no other run does; the system lets go of it when the process ends, however it does."""
    # No soft lock where the system has none: a killed run would leave it behind.
    lock, taken = FileLock(folder / LOCK_FILE, timeout=0, fallback_to_soft=False), False
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            taken = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning(f"{folder} cannot be locked ({error.strerror}). Let no other run write into it.")
    [taken] = broadcast_object_list([taken])
    if taken:
        raise RuntimeError(
            f"Another run is writing into {folder}. Wait for it or end it, or choose another --output_dir."
        )
    try:
        yield
    finally:
        lock.release()


def load_checkpoint(
    accelerator: Accelerator, path: Path, settings: dict[str, Any], average: AveragedModel | None = None
) -> int:
    """Restore what `save_checkpoint` saved into the prepared objects and return the step; says what is not as it was."""
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    now, then = settings | {"num_processes": accelerator.num_processes}, state["settings"] | state
    changed = [f"{key} {then.get(key)!r} -> {value!r}" for key, value in now.items() if then.get(key) != value]
    if changed:
        logger.warning(f"Resuming with other settings, so not as if never interrupted: {'; '.join(changed)}.")
    if average is not None:
        if not (path / AVERAGE_FILE).is_file():
            raise ValueError(f"The checkpoint {str(path)!r} holds no moving average. Resume without ema_decay.")
        average.load_state_dict(load_file(path / AVERAGE_FILE))
    if accelerator.scaler is not None and not (path / SCALER_NAME).is_file():
        raise ValueError(
            f"The checkpoint {str(path)!r} was made without fp16. Resume with --mixed_precision {then['mixed_precision']}."
        )
    accelerator.load_state(str(path))
    return int(state["step"])
