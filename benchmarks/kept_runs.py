"""Runs of training that benchmarks keep: one that is there is used again, if it was made with the settings that are asked for."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import finetune
from reporting import without_places

WITHOUT_EFFECT = {"description", "output_dir", "overwrite", "num_proc", "resume"}
FILLED_IN = {"mixed_precision", "max_tokens", "max_pairs"}  # by a pretraining, where nothing is asked for
SEARCHED = {"learning_rate", "batch_size", "layer_decay", "weight_decay"}  # by a fine-tuning with search_trials


def finetuned(flags: list[str]) -> dict[str, Any]:
    """metrics.json of the run that training/finetune.py makes of these flags, made if it is not there."""
    settings = finetune.parse_args(flags)
    path = Path(settings.output_dir, "metrics.json")
    if not path.is_file():
        finetune.main([*flags, "--overwrite"])
    results = json.loads(path.read_text(encoding="utf-8"))
    check_settings(path.parent, results["settings"], settings, SEARCHED if settings.search_trials else set())
    return results


def last_names(value: Any) -> Any:
    """A path without its folders, which are others from another working directory; a list of them likewise."""
    if isinstance(value, list):
        return [last_names(item) for item in value]
    return Path(value).name if isinstance(value, str) else value


def check_settings(folder: Path, stored: Mapping[str, Any], asked: Any, of_the_run: set[str]) -> None:
    """Raise if a run was made with other settings, but for those that the run chose itself; of paths only the name counts."""
    for name, value in json.loads(json.dumps(without_places(dataclasses.asdict(asked)))).items():
        found = stored.get(name)
        if name not in WITHOUT_EFFECT | of_the_run and last_names(found) != last_names(value):
            raise ValueError(
                f"{folder} holds a run with {name}={found!r}, but {value!r} is asked for. Take another --output_dir, or delete it."
            )
