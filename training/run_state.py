"""Checkpoints of a run: written whole or not at all, and resumed from."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__)

STATE_FILE = "run_state.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Save model, optimizer, schedule and random states as `folder/step-N`; called by every process.

    The folder gets its name only when it is complete, so that what has the name can be resumed from. Accelerate writes
    safetensors, and for optimizer, schedule and random states files that it reads with `weights_only=True`: nothing in
    them is executed.
    """
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, "num_processes": accelerator.num_processes, "settings": settings}
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    accelerator.wait_for_everyone()


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a folder, or with "auto" the newest in `folder`; None to start from nothing."""
    if resume is None:
        return None
    if resume == "auto":
        return next(reversed(checkpoints_in(folder)), None)
    if not (Path(resume) / STATE_FILE).is_file():
        there = ", ".join(str(path) for path in checkpoints_in(folder)) or "none"
        raise FileNotFoundError(f"{resume!r} is no checkpoint. Complete ones in {str(folder)!r}: {there}.")
    return Path(resume)


def load_checkpoint(accelerator: Accelerator, path: Path, settings: dict[str, Any]) -> int:
    """Restore what `save_checkpoint` saved into the prepared objects and return the step; says what is not as it was."""
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    now, then = settings | {"num_processes": accelerator.num_processes}, state["settings"] | state
    changed = [f"{key} {then.get(key)!r} -> {value!r}" for key, value in now.items() if then.get(key) != value]
    if changed:
        logger.warning(f"Resuming with other settings, so not as if never interrupted: {'; '.join(changed)}.")
    accelerator.load_state(str(path))
    return int(state["step"])
