"""training/configs/: every recipe can be read and built, and each ablation differs from the small recipe only in what it names."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import pretrain
from moleblend_hf import MoleBlendConfig, MoleBlendForPreTraining

TRAINING = Path(pretrain.__file__).parent
RECIPES = sorted((TRAINING / "configs").glob("*.yaml"))
ABLATIONS = [path for path in RECIPES if path.stem.startswith("ablation_")]
TINY = ["hidden_size=16", "intermediate_size=16", "num_hidden_layers=2", "num_attention_heads=2"]
RELATIONS = ("shortest_path", "bond_path", "relative_position", "coordinate_denoising")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_recipe_can_be_read_and_describes_a_model(path):
    settings = pretrain.parse_args(["--config", str(path), "--dataset", "somewhere"])
    assert settings.description
    assert settings.warmup_steps < settings.max_steps
    config = MoleBlendConfig(**settings.model)
    with torch.device("meta"):
        model = MoleBlendForPreTraining(config)
    if path.stem == "small" or path in ABLATIONS:
        assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6


@pytest.mark.parametrize("path", ABLATIONS, ids=named)
def test_an_ablation_is_the_small_recipe_with_what_its_file_marks_as_changed(path):
    small, ablation = read(TRAINING / "configs" / "small.yaml"), read(path)
    changed = {name: value for name, value in ablation["model"].items() if small["model"].get(name) != value}
    marked = path.read_text(encoding="utf-8").split("# changed:\n")[1].split("\n\n")[0]
    assert changed == yaml.safe_load(marked)
    assert changed
    for recipe in (small, ablation):
        del recipe["model"], recipe["description"]
    assert ablation == small


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """24 molecules of the sample."""
    folder = tmp_path_factory.mktemp("recipes") / "dataset"
    (folder / "data").mkdir(parents=True)
    rows = pq.read_table(TRAINING / "sample" / "data" / "train-00000-of-00001.parquet").slice(0, 24)
    pq.write_table(rows, folder / "data" / "train-00000-of-00001.parquet")
    (folder / "preprocessing.json").write_text((TRAINING / "sample" / "preprocessing.json").read_text())
    return folder


@pytest.mark.parametrize("path", ABLATIONS, ids=named)
def test_an_ablation_trains_and_what_it_leaves_out_gets_no_gradient(path, dataset, tmp_path, on_cpu):
    """Two steps, without weight decay: a weight that no loss reaches is what it was."""
    flags = ["--config", str(path), "--dataset", str(dataset), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_steps", "2", "--warmup_steps", "0", "--batch_size", "8", "--held_out_molecules", "8"]
    pretrain.main([*flags, "--logging_steps", "1", "--model", *TINY])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "train/shortest_path_loss" in line} == {1, 2}

    config = MoleBlendConfig.from_pretrained(tmp_path / "run")
    trained = dict(MoleBlendForPreTraining.from_pretrained(tmp_path / "run").named_parameters())
    torch.manual_seed(read(path).get("seed", 0))
    start = dict(MoleBlendForPreTraining(config).named_parameters())
    moved = {name for name, weight in trained.items() if not torch.equal(weight, start[name])}
    for relation, weight in zip(RELATIONS, config.loss_weights, strict=True):
        # Only the heads of the losses that count are trained.
        assert any(name.startswith(f"{relation}_head.") for name in moved) == (weight > 0), relation
    shown = {
        "moleblend.attention_bias.shortest_path_embedding.": config.blend_probabilities[0],
        "moleblend.attention_bias.bond_embedding.": config.blend_probabilities[1],
        "moleblend.attention_bias.distance_proj.": config.blend_probabilities[2],
        "moleblend.embeddings.degree_embedding.": config.atom_blend_probabilities[0],
        "moleblend.atom_distance_proj.": config.atom_blend_probabilities[1],
    }
    for prefix, probability in shown.items():
        # Only what is shown is read.
        assert any(name.startswith(prefix) for name in moved) == (probability > 0), prefix
