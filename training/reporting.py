"""What a run leaves to read: a line of JSON for each measurement, the loss curves, the model card, settings and versions."""

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure

from memory import peak_memory

CARDS = Path(__file__).parent.parent / "model_cards"


class MetricsLog:
    """`metrics.jsonl`, one object a line with its `step`, and Accelerate's trackers; the main process writes."""

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int) -> None:
        """Of a file that is there, keep the lines up to `first_step`: a resumed run measures the others again."""
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process:
            keep_lines(path, first_step)

    def has(self, step: int, prefix: str) -> bool:
        """Whether there are measurements of a step whose names begin so; the same answer for every process."""
        here = (
            [row for row in read_metrics(self.path) if row["step"] == step] if self.accelerator.is_main_process else []
        )
        found = [any(name.startswith(prefix) for row in here for name in row)]
        return bool(broadcast_object_list(found)[0])

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append the measurements of a step."""
        self.accelerator.log(metrics, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")


def keep_lines(path: Path, last_step: int) -> None:
    """Keep the lines of a file like `metrics.jsonl` up to a step; none of a run that begins. An empty file is made if there is none."""
    kept = [row for row in read_metrics(path) if row["step"] <= last_step] if last_step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All lines of a `metrics.jsonl`, without a last one that was cut short; none if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_losses(rows: list[dict[str, float]], losses: dict[str, str], path: Path) -> None:
    """Save one panel for each loss (name in the metrics -> title): training and held-out molecules over the steps."""
    figure = Figure(figsize=(4.2 * len(losses), 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        for prefix, label, style in (("train", "training", {"alpha": 0.5}), ("held_out", "held out", {"marker": "o"})):
            points = [(row["step"], row[f"{prefix}/{name}"]) for row in rows if f"{prefix}/{name}" in row]
            axes.plot(*zip(*points, strict=True), label=label, **style) if points else None
        axes.set(title=title, xlabel="optimizer steps", ylabel="loss")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)


class Window:
    """What is measured between two lines of the log: rate, padding, waiting for data, memory."""

    def __init__(self) -> None:
        """Start the clock."""
        self.rate = 0.0  # molecules/s of the last window
        self._reset()

    def _reset(self) -> None:
        self.num_steps = 0
        self._waited = self._paused = 0.0
        self._tokens, self._pairs = np.zeros(2), np.zeros(2)  # real, padded
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Count the tokens and pairs of a step; its tensors are still on the CPU."""
        self.num_steps += 1
        for part in parts:
            real = part["attention_mask"].sum(-1) + 1
            num, width = part["attention_mask"].shape
            self._tokens += (int(real.sum()), num * (width + 1))
            self._pairs += (int((real**2).sum()), num * (width + 1) ** 2)

    def closed(self, batch_size: int, device: torch.device) -> dict[str, float]:
        """The measurements since the last call; the next window begins."""
        seconds = time.perf_counter() - self._start - self._paused
        self.rate = self.num_steps * batch_size / seconds
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = peak_memory()
        measured = {
            "molecules_per_second": self.rate,
            "data_wait_share": self._waited / seconds,
            "padded_tokens_share": 1 - self._tokens[0] / self._tokens[1],
            "padded_pairs_share": 1 - self._pairs[0] / self._pairs[1],
            "peak_memory_mib": memory / 2**20,
        }
        self._reset()
        return {name: float(value) for name, value in measured.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and, where the code lies in a git repository, the commit and whether files differ from it."""
    return {
        "python": platform.python_version(),
        "versions": versions(
            "moleblend_hf", "torch", "transformers", "accelerate", "datasets", "numpy", "rdkit", "pyarrow"
        ),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_processor()}",
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def without_places(value: Any) -> Any:
    """`value`, also nested, with the paths in it that are absolute or climb relative to the working directory, or else their last part.

    A card and its files are read elsewhere, where the folders of this machine mean nothing. Of text, what stands between commas is
    looked at, and what follows `--flag=` or `key=`.
    """
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    key, equals, rest = value.partition("=") if re.match(r"[\w-]+=", value) else ("", "", value)
    return key + equals + ",".join(map(_without_place, rest.split(",")))


def _without_place(text: str) -> str:
    path = Path(text)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name if path.is_absolute() or ".." in path.parts else text


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout that is not installed
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not in a repository
        return None
    return result.stdout.strip()


def write_card(
    path: Path, model_name: str, settings: Mapping[str, Any], results: Mapping[str, Any], **values: Any
) -> None:
    """Write the model card; the last figures of the held-out molecules are its model-index."""
    names = values["dataset_names"]
    dataset = " + ".join(names)
    metadata = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        pipeline_tag="graph-ml",
        tags=["chemistry", "molecules", "moleblend", "pretraining"],
        datasets=[dataset_id(name) for name in names],
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type="graph-ml",
                task_name="pretraining by blending",
                dataset_type=dataset_id(dataset),
                dataset_name=dataset,
                dataset_split="held out",
                dataset_args={"split_seed": settings["split_seed"], "molecules": values["num_held_out"]},
                metric_type=re.sub(r"\W+", "_", title),
                metric_name=title,
                metric_value=value,
            )
            for title, _, value in results["table"]
            if "most frequent class" not in title  # which is no figure of the model
        ]
        or None,
    )
    values |= {"model_name": model_name, "settings": settings, "results": results}
    path.write_text(render(CARDS / "template.md.jinja", metadata=metadata.to_yaml(), **values), encoding="utf-8")


def dataset_id(name: str) -> str:
    """The name of a dataset as the metadata of a card may have it."""
    return re.sub(r"[^\w./-]+", "-", name)


def render(template: Path, **values: Any) -> str:
    """A rendered card; a name the template uses and nobody gives is an error, not an empty place."""
    parsed = jinja2.Template(
        template.read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return parsed.render(**values)
