"""Benchmarks of pretrained models run from end to end, as RESULTS.md does: probes, ablations, curves, MoleculeNet, recovery."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_config

from moleblend_hf import MoleBlendForPreTraining, MoleBlendModel, MoleBlendProcessor

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("training", "benchmarks")]
import ablations
import corpus_overlap
import learning_curves
import linear_probe
import loss_curves
import moleculenet
import recovery
import retrieval

import pretrain

SAMPLE = Path(__file__).parents[1] / "training" / "sample"
ESOL = "measured log solubility in mols per litre"
TINY = ["--model", "num_hidden_layers=1", "hidden_size=16", "intermediate_size=16", "num_attention_heads=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """48 molecules of the sample in three parts, with their number of atoms as a target, and whether it is even."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    table = pq.read_table(next((SAMPLE / "data").glob("*.parquet"))).slice(900, 48)
    sizes = np.array([len(atoms) for atoms in table["atom_features"].to_pylist()], dtype=float)
    table = table.append_column("size", pa.array(sizes)).append_column("even", pa.array(np.arange(48) % 2.0))
    for part, rows in (("train", table.slice(0, 24)), ("validation", table.slice(24, 16)), ("test", table.slice(40))):
        pq.write_table(rows, folder / "data" / f"{part}-00000-of-00001.parquet")
    about = json.loads((SAMPLE / "preprocessing.json").read_text())
    about["targets"] = [{"name": "size", "unit": None, "task": "regression"}]
    (folder / "preprocessing.json").write_text(json.dumps(about))
    return folder


def test_recipes_are_pretrained_once_then_probed_and_fine_tuned_with_what_they_were_shown(
    dataset, tmp_path, on_cpu, monkeypatch, capsys
):
    flags = ["--data", dataset, "--max_steps", "2", "--seeds", "0,1", "--recipes", "small,ablation_2d_only"]
    flags += ["--output_dir", tmp_path, "--batch_size", "8", "--held_out_molecules", "8", "--trackers", "", *TINY]
    flags = [str(flag) for flag in flags]
    with pytest.raises(SystemExit, match=r"small-0 was stopped\. The same command goes on"):
        ablations.main([*flags, "--max_hours", "1e-9"])
    capsys.readouterr()
    ablations.main(flags)
    first = capsys.readouterr().out
    lines = [line for line in first.splitlines() if line.startswith("|")]
    assert lines[0] == "| recipe (probed with) | size (mae) |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *("| small (2d)", "| ablation_2d_only (2d)", "| random weights (2d)"),
        *("| small (3d)", "| random weights (3d)"),
        *("| small (auto)", "| random weights (auto)"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{recipe}-{seed}" for recipe in ("small", "ablation_2d_only") for seed in (0, 1)
    }
    monkeypatch.setattr(ablations.pretrain, "main", None)  # nothing is trained again
    ablations.main(flags)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == lines

    ablations.main([*flags, "--shown", "2d", "--finetuning", "--epochs 1 --max_training_molecules 16"])
    tables = rows_of(capsys.readouterr().out)
    assert tables[:5] == rows_of("\n".join(lines))[:5]
    titles, _, *rows = tables[5:]
    assert titles == ["recipe (fine-tuned with)", "size (mae)"]
    assert [row[0] for row in rows] == ["small (2d)", "ablation_2d_only (2d)", "random weights (2d)"]
    for (_, figure), name in zip(rows, ("small-{}", "ablation_2d_only-{}", "from_scratch"), strict=True):
        found = [tmp_path / "finetuned" / f"{name.format(seed)}-2d-{seed}" / "metrics.json" for seed in (0, 1)]
        of_seeds = [json.loads(path.read_text()) for path in found]
        assert [(run["settings"]["modality"], run["settings"]["seed"]) for run in of_seeds] == [("2d", 0), ("2d", 1)]
        scores = [next(iter(run["models"].values()))["runs"][0]["validation"]["targets"]["size"] for run in of_seeds]
        errors = [score["mae"] for score in scores]
        assert figure == f"{np.mean(errors):.4f} ± {np.std(errors, ddof=1):.4f}"


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
    one_class = linear_probe.probed(train, np.zeros(400), held, labels["held"])
    assert np.isnan(one_class["roc_auc"])
    assert np.isnan(linear_probe.probed(train, np.full(400, np.nan), held, value["held"])["no labels"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pretrained checkpoint, but for the pretraining."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    MoleBlendForPreTraining(tiny_config()).save_pretrained(folder)
    MoleBlendProcessor().save_pretrained(folder)
    return folder


def test_a_probe_of_fewer_layers_sees_the_state_after_them(model):
    graphs = [MoleBlendProcessor().featurize(smiles) for smiles in ("CCO", "c1ccccc1O")]
    found = linear_probe.embeddings(str(model), str(model), graphs, "2d", layers=1)["graph token"]
    batch = MoleBlendProcessor().pad(graphs)
    states = MoleBlendModel.from_pretrained(model).eval()(**batch, output_hidden_states=True).hidden_states
    assert len(states) > 2
    np.testing.assert_allclose(found, states[1][:, 0].detach().numpy(), atol=1e-5)


def rows_of(told: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]


def test_learning_curves_have_a_point_for_each_size_and_input(model, dataset, tmp_path, on_cpu, capsys):
    flags = ["--model", model, "--input", dataset, "--targets", "size", "--sizes", "8,24", "--epochs", "2,1"]
    flags = [*map(str, flags), "--batch_size", "8", "--output_dir", str(tmp_path), "--from_scratch", "also"]
    learning_curves.main(flags)
    titles, _, *rows = rows_of(capsys.readouterr().out)
    assert titles == ["target (MAE)", "input, model", "8", "24"]
    assert [row[1] for row in rows] == [
        *("bonds alone", "bonds alone, MoleBLEND from scratch"),
        *("bonds and geometry", "bonds and geometry, MoleBLEND from scratch"),
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
    for modality, size, epochs in (("2d", 8, 2), ("2d", 24, 1), ("auto", 8, 2), ("auto", 24, 1)):
        settings = json.loads((tmp_path / f"{modality}-{size}" / "metrics.json").read_text())["settings"]
        told = (settings["modality"], settings["max_training_molecules"], settings["epochs"])
        assert told == (modality, size, epochs)
    assert (tmp_path / "size.png").is_file()


def test_sets_of_moleculenet_are_run_once_and_told_by_part(model, tmp_path, on_cpu, monkeypatch, capsys):
    smiles = [f"{'C' * size}{end}" for size in range(1, 17) for end in ("O", "N", "c1ccccc1", "C1CC1", "C(=O)O")]
    for name, columns in (("bace", ("mol", "CID", "Class")), ("esol", ("smiles", "Compound ID", ESOL))):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows((text, index, (index // 5) % 2) for index, text in enumerate(smiles))
    flags = ["--model", model, "--data", tmp_path, "--sets", "bace,esol", "--output_dir", tmp_path / "out"]
    flags = [*map(str, flags), "--epochs", "1", "--seeds", "2", "--split", "random", "--max_training_molecules", "20"]
    moleculenet.main(flags)
    titles, _, *rows = rows_of(capsys.readouterr().out)
    models = ["MoleBLEND, ensemble", "MoleBLEND", "MoleBLEND from scratch", "ECFP4 + random forest"]
    assert titles == ["set", "metric", "targets scored", "trained on", *models, "ahead", "longest run, s"]
    assert [row[:4] for row in rows] == [["bace", "roc_auc", "1 of 1", "20"], ["esol", "rmse", "1 of 1", "20"]]
    assert all(re.fullmatch(r"\d\.\d{3} ± \d\.\d{3}", cell) for row in rows for cell in row[5:8])
    assert all(re.fullmatch(r"[012] of 2", row[8]) for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(moleculenet.finetune, "main", None)  # nothing is run again
        moleculenet.main([*flags, "--part", "validation"])
        assert [row[:3] for row in rows_of(capsys.readouterr().out)[2:]] == [row[:3] for row in rows]
        with pytest.raises(ValueError, match=r"bace holds a run with epochs=1, but 2 is asked for. Take another"):
            moleculenet.main([*flags, "--epochs", "2"])
        assert flags[-2] == "--max_training_molecules"
        with pytest.raises(ValueError, match=r"max_training_molecules=20, but None is asked for"):
            moleculenet.main(flags[:-2])
    moleculenet.main([*flags, "--sets", "esol", "--draws", "2"])
    titles, _, row = rows_of(capsys.readouterr().out)
    assert titles[4:7] == models[1:]
    drawn = [json.loads((tmp_path / "out" / f"esol-{draw}" / "metrics.json").read_text()) for draw in (0, 1)]
    assert drawn[0]["split"]["parts"]["train"] != drawn[1]["split"]["parts"]["train"]
    rmse = [found["models"]["MoleBLEND"]["runs"][0]["test"]["mean"]["rmse"] for found in drawn]
    assert row[4] == f"{np.mean(rmse):.3f} ± {np.std(rmse, ddof=1):.3f}"


def test_what_sets_share_with_a_pretraining_is_counted(dataset, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    for part in ("train", "validation"):
        (other / "data" / f"{part}-00000-of-00001.parquet").unlink()
    corpus_overlap.main(["--pretraining", str(dataset), "--evaluation", f"{dataset},{other}"])
    told = capsys.readouterr().out
    assert told.startswith("Pretraining: 24 molecules")
    _, _, whole, test = rows_of(told)
    assert whole[:5] == [dataset.name, "48", "24", "24", "24"]
    assert test[:5] == ["other", "8", "0", "0", "0"]  # the sample has no molecule twice
    assert whole[5] == "100.0%"  # none of its elements occurs a thousand times


def test_what_is_recovered_is_told_by_class_with_examples(model, dataset, capsys):
    recovery.main(["--model", str(model), "--data", str(dataset), "--part", "validation", "--num_examples", "2"])
    told = capsys.readouterr().out
    titles = re.findall(r"^(.*): [\d.]+% of ([\d,]+) recovered", told, flags=re.MULTILINE)
    assert [title for title, _ in titles] == [
        "In a blend, shortest paths of pairs that show their distance",
        "In a blend, shortest paths of pairs that show their bonds",
        "In a blend, types of bonds of pairs that show their distance",
        "In a blend, types of bonds of pairs that show their shortest path",
        "From distances alone, shortest paths",
        "From distances alone, types of bonds",
    ]
    tables = re.findall(r"^\| ([\w ]+) \| ([\d,]+) \|", told, flags=re.MULTILINE)
    assert dict(tables)["1 bond"] == titles[5][1]  # each bond has a type
    numbers = [int(num.replace(",", "")) for _, num in titles]
    assert numbers[0] + numbers[1] < numbers[4]  # in a blend, some pairs show what is asked
    perceived = re.search(r"DetermineConnectivity: ([\d.]+)% of the shortest paths", told)
    assert float(perceived[1]) > 95  # of QM9's DFT geometries
    assert len(re.findall(r"^- `.*angstrom apart: \d+ bonds, (?:recovered|mistaken) as \d+", told, re.MULTILINE)) >= 2


def test_ranks_count_the_keys_of_the_group_that_are_nearer_than_ones_own():
    own = np.eye(6) + np.random.default_rng(0).normal(scale=0.01, size=(6, 6))
    together, apart = np.zeros(6), np.arange(6) // 2
    assert (
        retrieval.ranks(retrieval.cosines(3 * own + 1, own), together).tolist() == [0] * 6
    )  # another scale and origin
    exchanged = retrieval.cosines(own, own[[1, 0, 3, 2, 5, 4]])
    assert retrieval.ranks(exchanged, apart).tolist() == [1] * 6
    assert retrieval.ranks(exchanged, np.arange(6)).tolist() == [0] * 6


def test_what_the_geometry_of_a_molecule_finds_is_told_for_all_and_for_alike_molecules(model, capsys):
    retrieval.main(["--model", str(model), "--data", str(SAMPLE), "--part", "train", "--num_molecules", "300"])
    rows = rows_of(capsys.readouterr().out)
    table = [row for row in rows[2:] if len(row) == 6]
    assert [row[1] for row in table] == [kind for kind in ("graph token", "mean of atoms", "both") for _ in "12"] * 2
    assert table[0][2] == "all 300"
    assert 1 < int(table[1][2].removeprefix("alike, ")) < 300
    for row in table:
        guess, *found = (float(cell.rstrip("%")) for cell in row[3:])
        assert 0 < guess <= 50 or row[2].startswith("all")
        assert all(0 <= share <= 100 for share in found)


def test_loss_curves_compare_each_way_with_the_plain_one(tmp_path, on_cpu, monkeypatch, capsys):
    def run_here(command, **_):
        pretrain.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(loss_curves, "subprocess", SimpleNamespace(run=run_here))
    flags = ["--steps", "3", "--window", "2", "--ways", "parts", "--plot", str(tmp_path / "curves.png")]
    flags += ["--batch_size", "8", "--held_out_molecules", "8", "--trackers", ""]  # which go to pretrain.py
    without = ["attention_dropout=0", "activation_dropout=0", "drop_path_rate=0"]
    loss_curves.main([*flags, *TINY, *without])
    lines = capsys.readouterr().out.splitlines()
    largest = {
        title: float(line.split(" / ")[0].split()[-1])
        for title in ("the same with another seed", "parts by size")
        for line in lines
        if line.startswith(title)
    }
    assert largest["parts by size"] < 1e-4 < largest["the same with another seed"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
