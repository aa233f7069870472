"""Benchmarks of pretraining run from end to end: recipes at equal steps, each probed with what it was shown."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_config

from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("training", "benchmarks")]
import ablations
import linear_probe
import recovery

SAMPLE = Path(__file__).parents[1] / "training" / "sample"
TINY = ["--model", "num_hidden_layers=1", "hidden_size=16", "intermediate_size=16", "num_attention_heads=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """48 molecules of the sample in two parts, with their number of atoms as a target, and whether it is even."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    table = pq.read_table(next((SAMPLE / "data").glob("*.parquet"))).slice(900, 48)
    sizes = np.array([len(atoms) for atoms in table["atom_features"].to_pylist()], dtype=float)
    table = table.append_column("size", pa.array(sizes)).append_column("even", pa.array(np.arange(48) % 2.0))
    for part, rows in (("train", table.slice(0, 32)), ("validation", table.slice(32))):
        pq.write_table(rows, folder / "data" / f"{part}-00000-of-00001.parquet")
    about = json.loads((SAMPLE / "preprocessing.json").read_text())
    about["targets"] = [{"name": "size", "unit": None, "task": "regression"}]
    (folder / "preprocessing.json").write_text(json.dumps(about))
    return folder


def test_recipes_are_pretrained_once_and_probed_with_what_they_were_shown(
    dataset, tmp_path, on_cpu, monkeypatch, capsys
):
    flags = ["--data", dataset, "--max_steps", "2", "--seeds", "0,1", "--recipes", "small,ablation_2d_only"]
    flags += ["--output_dir", tmp_path, "--batch_size", "8", "--held_out_molecules", "8", "--trackers", "", *TINY]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, flags)])
    ablations.main()
    first = capsys.readouterr().out
    lines = [line for line in first.splitlines() if line.startswith("|")]
    assert lines[0] == "| recipe (probed with) | size (mae) |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| small (auto)",
        "| random weights (auto)",
        "| ablation_2d_only (2d)",
        "| random weights (2d)",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{recipe}-{seed}" for recipe in ("small", "ablation_2d_only") for seed in (0, 1)
    }
    monkeypatch.setattr(ablations.pretrain, "main", None)  # nothing is trained again
    ablations.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == lines


def test_a_probe_finds_what_the_embedding_holds_and_nothing_in_noise():
    draw = np.random.default_rng(0)
    train, held = draw.normal(size=(400, 4)), draw.normal(size=(200, 4))
    value = {"train": 3 * train[:, 0] - 2, "held": 3 * held[:, 0] - 2}
    value["train"][::7] = np.nan
    assert linear_probe.probed(train, value["train"], held, value["held"])["r2"] > 0.999
    labels = {
        "train": np.where(np.isnan(value["train"]), np.nan, value["train"] > 0),
        "held": (value["held"] > 0) * 1.0,
    }
    assert linear_probe.probed(train, labels["train"], held, labels["held"])["roc_auc"] > 0.99
    noise = linear_probe.probed(train, draw.normal(size=400), held, draw.normal(size=200))
    assert noise["r2"] < 0.05


def test_what_is_recovered_is_told_by_class_with_examples(dataset, tmp_path, capsys):
    torch.manual_seed(0)
    MoleBlendForPreTraining(tiny_config()).save_pretrained(tmp_path)
    MoleBlendProcessor().save_pretrained(tmp_path)
    recovery.main(["--model", str(tmp_path), "--data", str(dataset), "--part", "validation", "--num_examples", "2"])
    told = capsys.readouterr().out
    titles = re.findall(r"^(.*): [\d.]+% of ([\d,]+) recovered", told, flags=re.MULTILINE)
    assert [title for title, _ in titles] == [
        "In a blend, shortest paths",
        "In a blend, types of bonds",
        "From the geometry alone, shortest paths",
        "From the geometry alone, types of bonds",
    ]
    tables = re.findall(r"^\| ([\w ]+) \| ([\d,]+) \|", told, flags=re.MULTILINE)
    assert dict(tables)["1 bond"] == titles[3][1]  # each bond has a type
    numbers = [int(num.replace(",", "")) for _, num in titles]
    assert numbers[0] < numbers[2]  # in a blend, some pairs show what is asked
    assert len(re.findall(r"^- `.*angstrom apart: \d+ bonds, (?:recovered|mistaken) as \d+", told, re.MULTILINE)) >= 2
