"""training/: what the pretraining script promises, on a few molecules of the sample and a tiny model, on CPU."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from huggingface_hub import ModelCard
from rdkit import Chem
from rdkit.Chem.rdDistGeom import EmbedMolecule
from safetensors.torch import load_file

import data
import make_sample
import pretrain
import push_to_hub
import release
import reporting
import run_state
from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor
from rows import GraphTable, flat_graphs, graph_columns
from run_state import checkpoints_in, damage

TRAINING = Path(pretrain.__file__).parent
SAMPLE = TRAINING / "sample"
TINY = [
    "hidden_size=16",
    "intermediate_size=16",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "num_distance_kernels=8",
    # The sample's recipe drops nothing; here the random state of a run must matter.
    "attention_dropout=0.1",
    "activation_dropout=0.1",
    "drop_path_rate=0.1",
]
SHORT = ["--max_steps", "2", "--warmup_steps", "1", "--batch_size", "8", "--held_out_molecules", "8"]


SAMPLE_ROWS = SAMPLE / "data" / "train-00000-of-00001.parquet"
pytestmark = pytest.mark.usefixtures("on_cpu")


def write_dataset(folder: Path, about: dict | None = None, **splits: pa.Table) -> Path:
    """A dataset like the sample, of these rows."""
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        pq.write_table(rows, folder / "data" / f"{name}-00000-of-00001.parquet")
    described = json.loads((SAMPLE / "preprocessing.json").read_text()) | (about or {})
    (folder / "preprocessing.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """48 molecules of the sample."""
    return write_dataset(
        tmp_path_factory.mktemp("parent") / "dataset", train=pq.read_table(SAMPLE_ROWS).slice(1000, 48)
    )


def run(dataset: Path, output_dir: Path, *flags: str, model: tuple[str, ...] = ()) -> Path:
    """Pretrain in this process; later flags win."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    pretrain.main(
        ["--dataset", str(dataset), "--output_dir", str(output_dir), *SHORT, *flags, "--model", *TINY, *model]
    )
    return output_dir


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished_run(dataset, tmp_path_factory) -> Path:
    """Eight steps, crossing from the first epoch (5 batches of 8) into the second, with a checkpoint at each third step."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(dataset, folder, "--max_steps", "8", "--checkpointing_steps", "3", "--logging_steps", "1")


def test_a_run_leaves_a_folder_for_the_hub_with_card_curves_and_settings(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "modeling_moleblend.py",
        "losses.png",
        "metrics.jsonl",
        "training_settings.json",
        "tensorboard",
    }
    card = ModelCard.load(finished_run / "README.md")
    assert "QM9 (<http://quantum-machine.org/datasets/>): Ramakrishnan" in card.content
    assert "Licence: cc0-1.0.\n" in card.content
    assert push_to_hub.problems(finished_run) == []
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    last = metrics(finished_run)[-1]
    assert last["step"] == 8
    assert f"{last['held_out/shortest_path_loss']:.3f}" in card.content
    assert re.search(r"\| molecules a second, median \| [\d,]+ \|\n\| share of the time spent waiting", card.content)
    facts = json.loads((finished_run / "training_settings.json").read_text())
    assert facts["settings"]["batch_size"] == 8
    assert facts["environment"]["versions"]["torch"]
    assert (finished_run / "losses.png").stat().st_size > 10_000


def test_the_saved_folder_loads_and_computes_what_was_trained(finished_run, dataset):
    model = MoleBlendForPreTraining.from_pretrained(finished_run).eval()
    processor = MoleBlendProcessor.from_pretrained(finished_run)
    table = pq.read_table(dataset / "data")
    batch = processor(table["smiles"].to_pylist()[:4], coordinates=table["coordinates"].to_pylist()[:4])
    with torch.no_grad():
        outputs = model(**batch, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(outputs.loss)
    saved = load_file(finished_run / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def python_block(document: Path) -> str:
    return re.search(r"```python\n(.*?)```", document.read_text(), re.DOTALL).group(1)


def test_the_readmes_example_runs_on_the_folder(finished_run):
    names: dict = {}
    exec(python_block(TRAINING.parent / "README.md").replace("model_cards/moleblend-small", str(finished_run)), names)
    assert names["embeddings"].shape == (2, 16)


def test_the_cards_example_runs_in_a_process_that_does_not_import_the_package(finished_run):
    code = python_block(finished_run / "README.md").replace("path/to/this/folder", str(finished_run))
    code += "import sys; assert 'moleblend_hf' not in sys.modules; print(tuple(molecule_embeddings.shape))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "(2, 16)\n", result.stderr[-3000:]


def test_a_resumed_run_ends_in_the_same_weights_and_log_bit_for_bit(finished_run, dataset, tmp_path):
    """From the middle of an epoch, with dropout, in a folder that holds what a killed run leaves behind."""
    resumed = tmp_path / "resumed"
    shutil.copytree(finished_run / "checkpoints" / "step-3", resumed / "checkpoints" / "step-3")
    shutil.copytree(finished_run / "checkpoints" / "step-6", resumed / "checkpoints" / ".step-6.partial")
    shutil.copy(finished_run / "metrics.jsonl", resumed)
    torch.manual_seed(12345)  # whatever state the process is in
    run(dataset, resumed, "--max_steps", "8", "--checkpointing_steps", "3", "--logging_steps", "1", "--resume", "auto")

    expected, got = (load_file(folder / "model.safetensors") for folder in (finished_run, resumed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    def without_rates(folder):
        measured = ("per_second", "wait", "memory")
        return [{k: v for k, v in row.items() if not any(part in k for part in measured)} for row in metrics(folder)]

    assert without_rates(resumed) == without_rates(finished_run)


def test_another_seed_gives_other_weights(finished_run, dataset, tmp_path):
    """Guards the test above: equal weights must not come from nothing having been trained or drawn."""
    other = run(dataset, tmp_path, "--max_steps", "8", "--seed", "1")
    expected, got = (load_file(folder / "model.safetensors") for folder in (finished_run, other))
    assert not any(torch.equal(expected[name], got[name]) for name in expected if name.endswith("qkv_proj.weight"))


def test_resuming_with_other_settings_says_so(finished_run, dataset, tmp_path, caplog):
    run(dataset, tmp_path, "--max_steps", "7", "--resume", str(finished_run / "checkpoints" / "step-6"))
    assert "max_steps 8 -> 7" in caplog.text


def test_a_budget_that_is_left_to_the_device_is_recorded_and_goes_on_elsewhere_as_the_same_run(
    finished_run, dataset, tmp_path, caplog, monkeypatch
):
    """Molecules that are over the budget of a CPU but not of a GPU are trained on, on both."""
    facts = json.loads((finished_run / "training_settings.json").read_text())
    assert (facts["settings"]["max_tokens"], facts["settings"]["max_pairs"]) == (2048, 16384)
    on, checkpoint = pretrain.Budget.on, str(finished_run / "checkpoints" / "step-6")
    assert on("cuda") == pretrain.Budget(16_384, 400_000)
    assert on("cpu", 16, None) == pretrain.Budget(16, 16_384)
    monkeypatch.setattr(pretrain.Budget, "on", lambda device, *given: on("cuda") if device == "cuda" else on("cpu", 5))
    elsewhere = run(dataset, tmp_path, "--max_steps", "8", "--checkpointing_steps", "3", "--resume", checkpoint)
    assert "other settings" not in caplog.text
    facts = json.loads((elsewhere / "training_settings.json").read_text())
    assert (facts["settings"]["max_tokens"], facts["num_oversized"], facts["largest_allowed"]) == (5, 0, 631)


def test_without_trackers_a_run_writes_its_metrics_alone(dataset, tmp_path):
    folder = run(dataset, tmp_path, "--trackers", "")
    assert not (folder / "tensorboard").exists()
    assert metrics(folder)


STILL = ("hidden_dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0", "drop_path_rate=0.0")


def test_many_small_parts_train_as_one_large_one(dataset, tmp_path):
    """All four losses, molecules of different sizes. A large epsilon makes AdamW's step proportional to the gradient."""
    flags = ["--adam_epsilon", "1.0", "--learning_rate", "1.0", "--warmup_steps", "0", "--max_steps", "6"]
    one, many, original = (
        run(dataset, tmp_path / name, *flags, *extra, model=STILL)
        for name, extra in (
            ("one", []),
            ("many", ["--max_tokens", "24", "--max_pairs", "250"]),
            ("original", ["--max_tokens", "24", "--max_pairs", "250", "--loss_mean", "part"]),
        )
    )
    weights = [load_file(folder / "model.safetensors") for folder in (one, many, original)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
    # The means over parts are other losses: close, and not the same.
    difference = max((weights[0][name] - weights[2][name]).abs().max() for name in weights[0])
    assert 1e-4 < difference < 0.1
    assert metrics(one)[-1]["held_out/bond_path_loss"] == pytest.approx(metrics(many)[-1]["held_out/bond_path_loss"])


def test_evaluation_draws_the_same_each_time(finished_run, dataset, tmp_path):
    """The first evaluation of another run with the same seed is the same to the last digit."""
    again = run(dataset, tmp_path)
    assert metrics(again)[0] == metrics(finished_run)[0]


def test_no_molecule_is_on_both_sides_of_the_split():
    table = pq.read_table(SAMPLE_ROWS)
    keys = np.array([Chem.MolToInchiKey(Chem.MolFromSmiles(smiles)) for smiles in table["smiles"].to_pylist()])
    training, held_out = data.training_and_held_out(data.open_dataset(SAMPLE), 200, seed=0)
    assert (len(training), len(held_out)) == (1800, 200)
    assert not set(keys[training.indices]) & set(keys[held_out.indices])
    again = data.training_and_held_out(data.open_dataset(SAMPLE), 200, seed=0)
    assert np.array_equal(held_out.indices, again[1].indices)
    training, held_out = data.split_held_out(pa.chunked_array([["C", "CC"], ["C", "CCC", "C"]]), 1, seed=0)
    assert {0, 2, 4} <= set(training) or {0, 2, 4} == set(held_out)


def test_a_validation_split_is_what_is_evaluated_on(tmp_path):
    table = pq.read_table(SAMPLE_ROWS)
    folder = write_dataset(tmp_path / "dataset", train=table.slice(0, 40), validation=table.slice(100, 30))
    training, held_out = data.training_and_held_out(data.open_dataset(folder), 12, seed=0)
    assert (len(training), len(held_out)) == (40, 12)
    assert held_out.rows.num_rows == 30
    run(folder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "training_settings.json").read_text())
    assert (facts["num_training"], facts["num_held_out"]) == (40, 8)


def test_several_datasets_are_one_and_no_molecule_of_the_validation_split_is_trained_on(tmp_path):
    table = pq.read_table(SAMPLE_ROWS)
    first = write_dataset(tmp_path / "first", train=table.slice(0, 40), validation=table.slice(100, 30))
    second = write_dataset(tmp_path / "second", train=table.slice(90, 25).append_column("logp", [[1.0] * 25]))
    folder = run(f"{first},{second}", tmp_path / "run")
    facts = json.loads((folder / "training_settings.json").read_text())
    assert (facts["num_training"], facts["num_held_out"]) == (40 + 10, 8)
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["first", "second"]
    assert [corpus["held_out"] for corpus in facts["corpora"]] == [True, False]
    assert "one seed.\nThey are from QM9 alone: nothing is said" in card.content
    training, _ = data.training_and_held_out(data.open_together([str(first), str(second)]), 8, seed=0)
    assert training.indices.tolist() == list(
        range(50)
    )  # of the second, the first ten are not in the first's validation


def test_molecules_are_told_apart_alike_in_all_splits(tmp_path):
    """Also where one of the datasets has no InChIKeys."""
    table = pq.read_table(SAMPLE_ROWS)
    first = write_dataset(tmp_path / "first", train=table.slice(0, 40), validation=table.slice(100, 30))
    second = write_dataset(tmp_path / "second", train=table.slice(90, 25).drop_columns(["inchikey"]))
    training, _ = data.training_and_held_out(data.open_together([str(first), str(second)]), 8, seed=0)
    assert training.indices.tolist() == list(range(50))


def test_a_dataset_without_a_training_part_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "data", test=pq.read_table(SAMPLE_ROWS).slice(0, 20))
    with pytest.raises(ValueError, match=r"has no part 'train'; it has test"):
        run(folder, tmp_path / "run")


def test_datasets_made_with_other_settings_are_not_put_together(tmp_path, dataset):
    about = json.loads((SAMPLE / "preprocessing.json").read_text())
    other = write_dataset(
        tmp_path / "other",
        {"processor": about["processor"] | {"hydrogens": "keep"}},
        train=pq.read_table(SAMPLE_ROWS).slice(0, 10),
    )
    with pytest.raises(ValueError, match=r"other' was made with hydrogens='keep', but .* 'drop'"):
        run(f"{dataset},{other}", tmp_path / "run")


def test_the_samples_coordinates_are_in_the_order_of_its_smiles():
    """Heavy atoms that are bonded are 1.1 to 1.8 angstrom apart in QM9, and a hydrogen 1.0 from its atom."""
    table = pq.read_table(SAMPLE_ROWS)
    for smiles, (coordinates,) in zip(table["smiles"].to_pylist(), table["coordinates"].to_pylist(), strict=True):
        bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in Chem.MolFromSmiles(smiles).GetBonds()]
        lengths = [np.linalg.norm(np.subtract(coordinates[i], coordinates[j])) for i, j in bonds]
        assert 0.9 < min(lengths) <= max(lengths) < 2.0, smiles


def test_make_sample_takes_each_molecule_once_and_names_no_path(tmp_path, capsys):
    molecules = []
    for number, smiles in enumerate(("OC[C@@H](C)N", "C1CC1O", "OCC", "CCO"), start=1):
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        EmbedMolecule(molecule, randomSeed=7)
        molecule.SetProp("_Name", f"gdb_{number}")
        molecules.append(molecule)
    with Chem.SDWriter(str(tmp_path / "gdb9.sdf")) as writer:
        for molecule in molecules:
            writer.write(molecule)
    (tmp_path / "gdb9.sdf.csv").write_text(
        "mol_id,mu,alpha,homo,lumo,gap\n" + "".join(f"gdb_{number},1,2,-0.1,0.1,0.2\n" for number in range(1, 5))
    )
    make_sample.main(["--qm9", str(tmp_path), "--output", str(tmp_path / "sample")])
    assert "3 of 4 molecules; passed over: 1 doubles" in capsys.readouterr().out  # ethanol was there twice
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "sample" / "data").to_pylist()}
    assert rows["gdb_1"]["smiles"] == Chem.CanonSmiles("OC[C@@H](C)N")
    assert rows["gdb_1"]["gap"] == pytest.approx(0.2 * 27.211386)
    heavy = Chem.RemoveHs(molecules[0])
    order = heavy.GetSubstructMatch(Chem.MolFromSmiles(rows["gdb_1"]["smiles"]))
    positions = heavy.GetConformer().GetPositions()[list(order)]
    np.testing.assert_allclose(rows["gdb_1"]["coordinates"], [positions], atol=1e-3)
    assert str(tmp_path) not in (tmp_path / "sample" / "preprocessing.json").read_text()


@pytest.mark.parametrize("name", ["sample", "released", "paper"])
def test_every_recipe_is_readable(name):
    settings = pretrain.parse_args(["--config", str(TRAINING / "configs" / f"{name}.yaml"), "--dataset", "somewhere"])
    assert settings.warmup_steps < settings.max_steps


def test_a_flag_wins_over_the_file_and_numbers_are_numbers(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("max_steps: 5\nbatch_size: 4\nlearning_rate: 1e-3\nwarmup_steps: 1\nmodel: {hidden_size: 64}\n")
    settings = pretrain.parse_args(
        ["--config", str(config), "--max_steps", "7", "--model", "num_hidden_layers=2", "drop_path_rate=0.5"]
    )
    assert (settings.max_steps, settings.learning_rate) == (7, 0.001)
    assert settings.model == {"hidden_size": 64, "num_hidden_layers": 2, "drop_path_rate": 0.5}
    settings = pretrain.parse_args(["--config", str(config), "--model", "noise_std=2e-1", "hidden_act=gelu"])
    assert settings.model == {"hidden_size": 64, "noise_std": 0.2, "hidden_act": "gelu"}  # YAML wants a point in it


def test_a_card_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "data" / "qm9"
    given = ["--dataset=/home/me/qm9", f"{here},/home/me/b", "data/qm9,../secret/c", "--model", "a=1,2", "C/C=C/C", 3]
    assert reporting.without_places(given) == [
        *("--dataset=qm9", "data/qm9,b", "data/qm9,c", "--model", "a=1,2", "C/C=C/C", 3),
    ]


def test_molecules_are_told_apart_by_inchikey_or_the_card_says_so(dataset, tmp_path):
    rows = pq.read_table(SAMPLE_ROWS).slice(1000, 48).drop_columns("inchikey")
    folder = run(write_dataset(tmp_path / "data", train=rows), tmp_path / "run")
    assert "(no molecule in both, as far as their SMILES tell)" in (folder / "README.md").read_text()
    folder = run(dataset, tmp_path / "other")
    assert "(no molecule in both)" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "trackers"), [("", []), ("wandb", ["wandb"]), (" wandb, tensorboard,", ["wandb", "tensorboard"])]
)
def test_a_list_may_be_empty(given, trackers):
    assert pretrain.parse_args(["--trackers", given]).trackers == trackers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1.0}, "Unknown key 'learning_rat' in .* Known keys: .*learning_rate"),
        ({"model": {"hiden_size": 8}}, "Unknown key 'hiden_size' in model. Known keys: .*hidden_size"),
        ({"max_steps": "many"}, "max_steps must be of type int, got 'many'"),
        ({"batch_size": 2.5}, "batch_size must be of type int, got 2.5"),
        ({"eval_steps": 0}, "eval_steps must be 1 or more, got 0"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"mixed_precision": False}, r"one of 'no', 'fp16', 'bf16' \(in quotes\), got False"),  # YAML's reading of no
        ({"dataset": None}, "names no dataset. .* --dataset"),
        ({"warmup_steps": "missing"}, "gives no warmup_steps"),
        ({"warmup_steps": "missing", "warmup_step": 1}, "Unknown key 'warmup_step' in"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_remedy(change, message, tmp_path):
    recipe = {"max_steps": 5, "batch_size": 4, "learning_rate": 0.001, "warmup_steps": 1} | change
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value != "missing"}))
    with pytest.raises(ValueError, match=message):
        pretrain.parse_args(["--config", str(config)])


def test_a_wrong_dataset_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset folder .*nowhere'. Make one with training/preprocess.py"):
        data.open_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no data/\*.parquet"):
        data.open_dataset(tmp_path)
    rows = pq.read_table(SAMPLE_ROWS).slice(0, 4)
    with pytest.raises(ValueError, match=r"has format 99, but this version reads 1. Preprocess it again"):
        data.open_dataset(write_dataset(tmp_path / "newer", {"format_version": 99}, train=rows))
    with pytest.raises(ValueError, match="has no column 'bonds'"):
        data.open_dataset(write_dataset(tmp_path / "no_bonds", train=rows.drop_columns(["bonds"])))
    (tmp_path / "newer" / "preprocessing.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no preprocessing.json"):
        data.open_dataset(tmp_path / "newer")


def test_a_dataset_of_other_graphs_than_the_processors_is_refused(dataset, tmp_path):
    message = r"made with hydrogens='drop', but the model's processor has 'keep'.* Preprocess with --hydrogens keep"
    with pytest.raises(ValueError, match=message):
        run(dataset, tmp_path, "--processor", "hydrogens=keep")
    assert run(dataset, tmp_path / "fitting", "--processor", "hydrogens=drop").is_dir()


def test_the_parts_of_a_step_are_what_the_processor_makes_of_the_molecules(dataset):
    rows = data.GraphRows(data.open_dataset(dataset).splits["train"], np.arange(40, 0, -1))
    processor = data.open_dataset(dataset).processor()
    table = pq.read_table(dataset / "data")
    parts = data.collate(rows.__getitems__([[3, 30, 3, 7], [0]]), processor)
    for part, numbers in zip(parts, ([37, 10, 37, 33], [40]), strict=True):
        assert part.pop("rows").tolist() == numbers
        picked = table.take(numbers)
        expected = processor(picked["smiles"].to_pylist(), coordinates=picked["coordinates"].to_pylist())
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], expected[name]) for name in part)
    assert rows.sizes().tolist() == pc.list_value_length(table["atom_features"]).to_numpy()[40:0:-1].tolist()


@pytest.mark.parametrize("rows_a_batch", [1, 7, 48])
def test_picked_graphs_are_those_of_the_rows_whatever_batches_they_lie_in(rows_a_batch):
    """Also where a molecule has several conformers, none, or no bond."""
    molecules = ["CCO", "C", "[Na+].[Cl-]", "c1ccccc1", "CC(C)=O", "O"]
    conformers = [
        np.arange(num * size * 3, dtype=np.float32).reshape(num, size, 3) for num, size in ((2, 3), (0, 1), (1, 2))
    ]
    graphs = MoleBlendProcessor().featurize_many(molecules)
    graphs[:3] = [dataclasses.replace(graph, coordinates=xyz) for graph, xyz in zip(graphs, conformers, strict=False)]
    columns = pa.table(graph_columns(graphs))
    table = pa.concat_tables([columns.slice(3), *[columns] * 7]).combine_chunks()
    batches = pa.Table.from_batches(table.to_batches(max_chunksize=rows_a_batch))
    picked = np.random.default_rng(0).permutation(len(table))[:30]
    found, expected = GraphTable(batches).take(picked), flat_graphs(table.take(picked))
    for field in dataclasses.fields(expected):
        values = getattr(expected, field.name)
        np.testing.assert_array_equal(getattr(found, field.name), values)
    assert GraphTable(batches).sizes().tolist() == [graphs[(row + 3) % 6].num_atoms for row in range(len(table))]


def test_selected_and_shuffled_rows_have_their_own_sizes_and_keys(dataset):
    opened = data.open_dataset(dataset)
    train = opened.splits["train"]
    opened.splits["train"] = train.select(range(40)).shuffle(seed=0)
    training, held_out = data.training_and_held_out(opened, 8, seed=0)
    for rows in (training, held_out):
        graphs, numbers = rows.__getitems__([list(range(len(rows)))])[0]
        assert rows.sizes().tolist() == graphs.num_atoms.tolist()
        assert max(numbers) < 40
    smiles = opened.splits["train"]["smiles"]
    assert not {smiles[i] for i in training.indices} & {smiles[i] for i in held_out.indices}


def test_worker_processes_change_nothing(finished_run, dataset, tmp_path):
    again = run(dataset, tmp_path, "--num_workers", "1")
    one = run(dataset, tmp_path / "one")
    expected, got = (load_file(folder / "model.safetensors") for folder in (one, again))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_checkpoints_of_another_run_are_neither_overwritten_nor_mistaken(finished_run, dataset):
    with pytest.raises(FileExistsError, match="--resume auto, start anew and delete them with --overwrite"):
        run(dataset, finished_run)
    with pytest.raises(
        FileNotFoundError, match=r"step-99' is no checkpoint. Complete ones .*step-3, .*step-6, .*step-8"
    ):
        run(dataset, finished_run, "--resume", str(finished_run / "checkpoints" / "step-99"))


def test_a_model_whose_checkpoints_are_gone_is_not_replaced_unasked(finished_run, dataset, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    for flags in ([], ["--resume", "auto"]):
        with pytest.raises(FileExistsError, match=r"holds a model, and no checkpoints .* Replace it with --overwrite"):
            run(dataset, tmp_path, *flags)


def test_overwriting_deletes_the_old_checkpoints_once_the_new_run_can_begin(finished_run, dataset, tmp_path):
    """Not before, so that a mistake costs nothing, and behind a link, too."""
    shutil.copytree(finished_run / "checkpoints", tmp_path / "scratch")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(ValueError, match="batch_size is 1,000, but there are 40 training molecules"):
        run(dataset, tmp_path / "run", "--overwrite", "--batch_size", "1000")
    names = ["step-3", "step-6", "step-8"]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == names
    run(dataset, tmp_path / "run", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["step-2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoints_to_keep", "-1"], "checkpoints_to_keep must be 0 or more, got -1"),
        (["--held_out_molecules", "0"], "held_out_molecules must be 1 or more, got 0"),
        (["--max_grad_norm", "0"], r"max_grad_norm must be above 0 \(inf: do not clip\), got 0.0"),
        (["--ema_decay", "1"], "ema_decay must be 0 or more and below 1, got 1.0"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU: on a CPU it would be float32"),
        (["--processor", "max_path_bonds=3"], "max_path_bonds is the model's: give it as --model"),
        (["--trackers", "tensorboard,nosuch"], "The tracker 'nosuch' is not installed, or none of Accelerate's"),
        (["--max_tokens", "10", "--max_pairs", "2", "--oversized", "skip"], "All held-out molecules are left out"),
        (["--dataset", "data/nosuch"], "no folder 'data/nosuch', and a dataset of that name could not be had"),
    ],
)
def test_settings_that_cannot_work_are_refused(dataset, tmp_path, flags, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(dataset, tmp_path, *flags)
    with pytest.raises(ValueError, match="blend_per_molecule must be true"):
        run(dataset, tmp_path, model=("blend_per_molecule=false",))


def launched(
    dataset: Path, output_dir: Path, *flags: str, command: tuple[str, ...] = (), **options
) -> subprocess.Popen:
    """The script in a process of its own, or in several by another `command`."""
    environment = os.environ | {"PYTHONPATH": str(TRAINING.parent), "ACCELERATE_USE_CPU": "true"}
    arguments = ["--dataset", str(dataset), "--output_dir", str(output_dir), *SHORT, *flags]
    return subprocess.Popen(
        [*(command or (sys.executable,)), str(TRAINING / "pretrain.py"), *arguments, "--model", *TINY, *STILL],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_deepspeed_is_refused_with_the_reason(dataset, tmp_path, monkeypatch):
    class Launched(pretrain.Accelerator):
        distributed_type = pretrain.DistributedType.DEEPSPEED

    monkeypatch.setattr(pretrain, "Accelerator", Launched)
    with pytest.raises(
        ValueError, match=r"DeepSpeed is not supported: .* pickles.* training/configs/accelerate/fsdp\.yaml"
    ):
        run(dataset, tmp_path / "run")


TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_train_on_distances_alone(dataset, tmp_path):
    """The weights that read bonds get no gradient, for which neither process waits."""
    flags = ["--processor", "modality=3d", "--max_tokens", "64"]
    process = launched(dataset, tmp_path / "run", *flags, command=TWO_RANKS)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def test_two_processes_train_as_one(tmp_path):
    """Two gloo ranks see the same batches with the same draws: the same losses within 1e-5 over 50 steps.

    AdamW makes of a difference by rounding in a gradient near 0 one of its step: a tenth of the sample's rate. Half of the
    molecules have no geometry, so that many a part has none; a checkpoint of the two is one for a process alone, too.
    """
    rows = pq.read_table(SAMPLE_ROWS).slice(1000, 48)
    column = rows.schema.get_field_index("coordinates")
    geometries = [found if index % 2 else [] for index, found in enumerate(rows["coordinates"].to_pylist())]
    rows = rows.set_column(column, rows.schema.field(column), pa.array(geometries, rows.schema.field(column).type))
    dataset = write_dataset(tmp_path / "dataset", train=rows)
    flags = ["--max_steps", "50", "--logging_steps", "1", "--warmup_steps", "5", "--max_tokens", "24"]
    flags += ["--checkpointing_steps", "40"]
    flags += ["--learning_rate", "1e-4"]
    process = launched(dataset, tmp_path / "two", *flags, command=TWO_RANKS)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "2 process(es)" in output
    names = {path.name for path in (tmp_path / "two" / "checkpoints" / "step-50").glob("random_states_*")}
    assert names == {"random_states_0.pkl", "random_states_1.pkl"}
    one = metrics(run(dataset, tmp_path / "one", *flags, model=STILL))
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-40", tmp_path / "on" / "checkpoints" / "step-40")
    went_on = metrics(run(dataset, tmp_path / "on", *flags, "--resume", "auto", model=STILL))
    assert [row["step"] for row in went_on] == [*range(41, 51), 50]
    for expected, found in ((one, metrics(tmp_path / "two")), (one[-11:], went_on)):
        for first, second in zip(expected, found, strict=True):
            losses = [name for name in first if name.endswith("_loss")]
            assert first.keys() == second.keys()
            assert all(abs(first[name] - second[name]) < 1e-5 for name in losses), (first, second)


# What happens on the way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_as_if_it_had_not_been(number, dataset, tmp_path):
    """SIGTERM saves and stops in order, also if the workers of the DataLoader get it; SIGKILL leaves the last checkpoint."""
    every = "120" if number == signal.SIGTERM else "7"
    flags = ["--max_steps", "120", "--eval_steps", "120", "--logging_steps", "1", "--checkpointing_steps", every]
    process = launched(dataset, tmp_path / "ended", *flags, "--num_workers", "1", start_new_session=True)
    log = tmp_path / "ended" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.is_file() or log.read_text().count("train/bond_path_loss") < 10):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    saved = run_state.checkpoints_in(tmp_path / "ended" / "checkpoints")
    assert saved[-1].name != "step-120"
    if number == signal.SIGTERM:
        assert process.returncode == 0, errors[-3000:]
        assert re.search(r"Stopped at step \d+: it was told to stop. Continue with --resume auto", output)
        assert len(saved) == 1
    else:
        assert process.returncode == -number
    resumed = run(dataset, tmp_path / "ended", *flags, "--resume", "auto", model=STILL)
    whole = run(dataset, tmp_path / "whole", *flags[:-1], "120", model=STILL)
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_after_max_hours_the_run_saves_and_stops(dataset, tmp_path, capsys):
    run(dataset, tmp_path, "--max_steps", "1000", "--max_hours", "1e-9")
    assert "Stopped at step 1: its hours are up" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished_run, tmp_path, caplog):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(finished_run / "checkpoints", checkpoints)
    weights = checkpoints / "step-8" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (checkpoints / "step-6" / "optimizer.bin").unlink()
    assert run_state.find_checkpoint("auto", checkpoints) == checkpoints / "step-3"
    assert "step-8 is damaged and is not resumed from: model.safetensors is not as it was written" in caplog.text
    assert "step-6 is damaged and is not resumed from: optimizer.bin is missing" in caplog.text
    with pytest.raises(ValueError, match=r"damaged: model.safetensors .* Resume from an older one, or with auto"):
        run_state.find_checkpoint(str(checkpoints / "step-8"), checkpoints)
    with pytest.raises(ValueError, match=r"holds step-6, step-8, which --resume auto would go on with .* Delete"):
        run_state.find_checkpoint(str(checkpoints / "step-3"), checkpoints)
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-3-best")  # a copy is none of the run's
    assert run_state.find_checkpoint("auto", checkpoints) == checkpoints / "step-3"
    (checkpoints / "step-3" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match=r"Each checkpoint in .* is damaged. Start anew with --overwrite"):
        run_state.find_checkpoint("auto", checkpoints)


def test_only_the_newest_checkpoints_are_kept(dataset, tmp_path):
    run(dataset, tmp_path, "--max_steps", "5", "--checkpointing_steps", "1", "--checkpoints_to_keep", "2")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_a_full_disk_leaves_the_last_checkpoint_good(dataset, tmp_path, monkeypatch):
    save = accelerate.Accelerator.save_state

    def full_at_the_second(self, folder, *arguments, **options):
        if "step-2" in str(folder):
            Path(folder).mkdir()
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, folder, *arguments, **options)

    monkeypatch.setattr(accelerate.Accelerator, "save_state", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        run(dataset, tmp_path, "--max_steps", "3", "--checkpointing_steps", "1")
    checkpoints = tmp_path / "checkpoints"
    assert run_state.find_checkpoint("auto", checkpoints) == checkpoints / "step-1"
    monkeypatch.undo()
    assert (checkpoints / ".step-2.partial").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tr')  # as a full disk cuts it
    run(dataset, tmp_path, "--max_steps", "3", "--checkpointing_steps", "1", "--resume", "auto")
    assert run_state.find_checkpoint("auto", checkpoints) == checkpoints / "step-3"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-2", "step-3"]


def test_a_step_whose_loss_is_not_finite_is_left_out(dataset, tmp_path, monkeypatch):
    """The weights are as before it, the log says so with its rows, and the run goes on."""
    clip, draw, seen, rows = accelerate.Accelerator.clip_grad_norm_, pretrain.drawn, [], []

    def spoil_the_third(part, seeds, config):
        found = draw(part, seeds, config)
        if len(seen) == 2:
            rows.append(len(seeds))
            found["coordinate_noise"] = found["coordinate_noise"] * float("nan")
        return found

    def look(self, parameters, *arguments):
        parameters = list(parameters)
        seen.append([parameter.detach().clone() for parameter in parameters])
        return clip(self, parameters, *arguments)

    monkeypatch.setattr(pretrain, "drawn", spoil_the_third)
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", look)
    folder = run(dataset, tmp_path, "--max_steps", "5", "--logging_steps", "2", "--warmup_steps", "0")
    before = [all(map(torch.equal, seen[step], seen[step + 1])) for step in range(4)]
    assert before == [False, False, True, False]  # the step from the third to the fourth was left out
    assert [row["step"] for row in metrics(folder) if "train/left_out" in row] == [3]
    (left_out,) = (json.loads(line) for line in (folder / "left_out_steps.jsonl").read_text().splitlines())
    assert left_out["step"] == 3
    assert len(left_out["rows"]) == sum(rows) == 8
    assert all(math.isfinite(value) for row in metrics(folder) for value in row.values())
    assert all(torch.isfinite(value).all() for value in load_file(folder / "model.safetensors").values())

    monkeypatch.setattr(pretrain, "drawn", draw)  # run again, it is left out no more
    run(dataset, tmp_path, "--max_steps", "2", "--overwrite")
    assert (folder / "left_out_steps.jsonl").read_text() == ""


def test_what_is_behind_a_checkpoint_is_in_the_log_however_seldom_that_is_written(dataset, tmp_path, monkeypatch):
    """A step that is left out between two lines of the log and before a stop is neither forgotten nor told twice."""
    draw, calls = pretrain.drawn, []

    def spoil_the_fifth(part, seeds, config):
        calls.append(int(part["attention_mask"].sum()))  # one part a step, after the evaluation's one
        found = draw(part, seeds, config)
        return found | {"coordinate_noise": found["coordinate_noise"] * float("nan")} if len(calls) == 5 else found

    monkeypatch.setattr(pretrain, "drawn", spoil_the_fifth)
    monkeypatch.setattr(
        pretrain.StopRequest, "reason", lambda self, step: "it was told to stop" if step == 6 else None
    )
    flags = ["--max_steps", "8", "--logging_steps", "4", "--warmup_steps", "0"]
    run(dataset, tmp_path, *flags)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(dataset, tmp_path, *flags, "--resume", "auto")
    assert [row["step"] for row in metrics(tmp_path) if "train/left_out" in row] == [5]
    assert [json.loads(line)["step"] for line in (tmp_path / "left_out_steps.jsonl").open()] == [5]
    assert [row["step"] for row in metrics(tmp_path) if "train/bond_path_loss" in row] == [4, 6, 8]
    assert "| steps left out | 1 |" in (tmp_path / "README.md").read_text()


def test_a_loss_without_targets_or_without_a_finite_value_has_no_line(dataset, tmp_path):
    folder = run(dataset, tmp_path, "--logging_steps", "1", "--processor", "modality=2d")
    rows = [row for row in metrics(folder) if "train/bond_path_loss" in row]
    assert len(rows) == 2
    assert not any("train/relative_position_loss" in row or "train/coordinate_denoising_loss" in row for row in rows)
    assert "0 of\n  these with a geometry" in (folder / "README.md").read_text()


def test_a_finished_run_is_evaluated_once_however_often_it_is_resumed(finished_run, dataset, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    flags = ["--max_steps", "8", "--checkpointing_steps", "3", "--logging_steps", "1", "--resume", "auto"]
    run(dataset, tmp_path, *flags)
    assert metrics(tmp_path) == metrics(finished_run)


def test_too_many_bad_steps_in_a_row_end_the_run(dataset, tmp_path, monkeypatch):
    def spoil(self, parameters, *arguments):
        return torch.tensor(float("inf"))

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", spoil)
    with pytest.raises(FloatingPointError, match=r"gradients of 4 steps in a row were not finite"):
        run(dataset, tmp_path, "--max_steps", "50", "--logging_steps", "2", "--max_left_out_steps", "4")
    assert [json.loads(line)["step"] for line in (tmp_path / "left_out_steps.jsonl").open()] == [1, 2, 3, 4]


def test_a_molecule_over_the_budget_is_an_error_or_left_out_and_counted(dataset, tmp_path):
    with pytest.raises(
        ValueError, match=r"exceed the budget .* largest has \d+ atoms. Raise max_tokens to 11 .* skip"
    ):
        run(dataset, tmp_path / "error", "--max_tokens", "10")
    folder = run(dataset, tmp_path / "skip", "--max_tokens", "10", "--oversized", "skip")
    facts = json.loads((folder / "training_settings.json").read_text())
    assert facts["num_oversized"] > 0
    assert facts["num_training"] + facts["num_held_out"] + facts["num_oversized"] == 48


def test_a_moving_average_of_the_weights_is_evaluated_saved_and_resumed(dataset, tmp_path):
    flags = ["--ema_decay", "0.5", "--checkpointing_steps", "2", "--max_steps", "4"]
    whole = run(dataset, tmp_path / "whole", *flags, model=STILL)
    plain = run(dataset, tmp_path / "plain", "--max_steps", "4", model=STILL)
    average, last = (load_file(folder / "model.safetensors") for folder in (whole, plain))
    assert not torch.equal(average["moleblend.graph_token"], last["moleblend.graph_token"])
    shutil.copytree(whole / "checkpoints" / "step-2", tmp_path / "resumed" / "checkpoints" / "step-2")
    resumed = load_file(
        run(dataset, tmp_path / "resumed", *flags, "--resume", "auto", model=STILL) / "model.safetensors"
    )
    assert all(torch.equal(average[name], resumed[name]) for name in average)
    files = {path.name for path in (whole / "checkpoints" / "step-2").iterdir()}
    assert "average.safetensors" in files
    assert not any(name.startswith("custom_checkpoint") for name in files)  # which Accelerate unpickles
    with pytest.raises(ValueError, match=r"step-4' holds no moving average. Resume without ema_decay"):
        run(dataset, plain, *flags, "--resume", "auto", model=STILL)


def test_a_release_has_half_the_bytes_and_says_what_that_changes(finished_run, tmp_path, capsys):
    text = tmp_path / "evaluation.md"
    text.write_text("### Solubility\n\nAs good as its data.\n")
    folder = tmp_path / "moleblend-tiny"
    release.main(["--folder", str(finished_run), "--output", str(folder), "--evaluation", str(text)])
    assert f"{folder} is the model that was saved" in capsys.readouterr().out
    assert push_to_hub.problems(folder) == []
    given, rounded = (load_file(path / "model.safetensors") for path in (finished_run, folder))
    assert {values.dtype for values in rounded.values()} == {torch.float16}
    model = MoleBlendForPreTraining.from_pretrained(folder)
    assert model.dtype == torch.float32
    for name, values in model.state_dict().items():
        assert torch.equal(values, given[name].half().float())
    card = (folder / "README.md").read_text()
    changed = re.search(
        r"stored as float16 and loaded as float32: on the reference molecules, outputs differ .*\n?.* by (\S+) of the largest",
        card,
    )
    assert 0 < float(changed[1]) < 1e-2
    assert "## Evaluation\n\n### Solubility\n\nAs good as its data.\n\n## Limits" in card
    assert "# MoleBLEND, moleblend-tiny" in card
    assert "Evaluation" not in (finished_run / "README.md").read_text()
    with pytest.raises(SystemExit, match="--output is --folder"):
        release.main(["--folder", str(folder), "--output", str(folder)])


def test_what_the_log_says_of_each_window(finished_run):
    rows = [row for row in metrics(finished_run) if "train/molecules_per_second" in row]
    assert len(rows) == 8
    for row in rows:
        assert 0 <= row["train/data_wait_share"] < 1
        assert 0 <= row["train/padded_tokens_share"] <= row["train/padded_pairs_share"] < 0.6
        assert row["train/peak_memory_mib"] > 100


SHARDED = """
import sys
import torch
from accelerate import state
from accelerate.utils import DistributedType

def on_cpu(self, *arguments, **options):  # Accelerate shards on accelerators only; torch shards anywhere
    self.device = torch.device("cpu")
    return "gloo", DistributedType.MULTI_GPU

state.PartialState._prepare_backend = on_cpu
import pretrain
pretrain.main(sys.argv[1:])
"""


def test_sharded_weights_train_resume_and_load_as_whole_ones(dataset, tmp_path):
    """FSDP 2 with the settings of fsdp.yaml, on two gloo ranks."""
    config = yaml.safe_load((TRAINING / "configs" / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    environment = {
        names.get(name, name.upper()): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in config.items()
    }
    environment |= {
        "ACCELERATE_USE_FSDP": "true",
        "PYTHONPATH": os.pathsep.join([str(TRAINING.parent), str(TRAINING)]),
    }
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    flags = [
        "--dataset",
        str(dataset),
        *SHORT,
        "--max_steps",
        "4",
        "--checkpointing_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    flags += ["--learning_rate", "1e-4", "--output_dir", str(tmp_path / "sharded")]

    def launch(*extra):
        return subprocess.run(
            [*TWO_RANKS, str(script), *flags, *extra, "--model", *TINY, *STILL],
            env={name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    result = launch()
    assert result.returncode == 0, result.stderr[-3000:]
    sharded = tmp_path / "sharded"
    whole = run(dataset, tmp_path / "whole", *flags[:-2], model=STILL)
    assert {path.name for path in sharded.iterdir()} == {path.name for path in whole.iterdir()}
    weights = [MoleBlendForPreTraining.from_pretrained(folder).state_dict() for folder in (sharded, whole)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=1e-5)
    first = (sharded / "model.safetensors").read_bytes()
    shutil.rmtree(sharded / "checkpoints" / "step-4")
    result = launch("--resume", "auto")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (sharded / "model.safetensors").read_bytes() == first


def test_two_runs_do_not_write_into_one_folder(dataset, tmp_path):
    """The system lets go of the folder when a run ends, also when it is killed."""
    first = launched(dataset, tmp_path / "run", "--max_steps", "100000", "--checkpointing_steps", "1")
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert first.poll() is None, first.stderr.read()[-3000:]
        time.sleep(0.1)
    with pytest.raises(RuntimeError, match=r"Another run is writing into"):
        run(dataset, tmp_path / "run", "--resume", "auto", "--max_steps", "100000", model=STILL)
    first.kill()
    first.communicate()
    step = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    run(dataset, tmp_path / "run", "--resume", "auto", "--max_steps", str(step + 1), model=STILL)


def test_a_folder_is_held_before_it_is_looked_at(tmp_path):
    """Else a run that ends while another one reads its data would lose its checkpoints to it."""
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / run_state.LOCK_FILE),
        pytest.raises(RuntimeError, match=r"Another run is writing into"),
    ):
        run(tmp_path / "no such dataset", tmp_path / "run")


@pytest.mark.parametrize("code", run_state.NO_LOCKS)
def test_a_file_system_without_locks_is_said(dataset, tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    accelerator = accelerate.Accelerator()
    with run_state.claimed(accelerator, tmp_path):
        pass
    assert f"{tmp_path} cannot be locked ({os.strerror(code)}). Let no other run write into it." in caplog.text
    monkeypatch.undo()
    with run_state.claimed(accelerator, tmp_path):  # nothing was left that looks like a lock
        pass


def test_what_is_saved_is_kept_and_damaged_later_checkpoints_are_not(dataset, tmp_path):
    flags = ["--checkpointing_steps", "1", "--checkpoints_to_keep", "2", "--max_steps", "4"]
    checkpoints = run(dataset, tmp_path, *flags) / "checkpoints"
    (checkpoints / "step-4" / "optimizer.bin").write_bytes(b"damaged")
    run(dataset, tmp_path, *flags, "--checkpoints_to_keep", "1", "--max_hours", "1e-9", "--resume", "auto")
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-4"]
    assert damage(checkpoints / "step-4") is None
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-9")  # a later one that cannot be resumed from
    (checkpoints / "step-9" / "optimizer.bin").write_bytes(b"damaged")
    run(dataset, tmp_path, *flags, "--checkpoints_to_keep", "1", "--max_steps", "5", "--resume", "auto")
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-5"]


def ranks_on_two_machines(dataset: Path, folders: list[Path], *flags: str) -> list[tuple[int, str]]:
    """Two processes as on machines with a disk each: the exit status and what is said by each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = ("env", *(f"{name}={value}" for name, value in environment.items()), sys.executable)
        processes.append(launched(dataset, Path("out"), *flags, command=command, cwd=folder))
    return [(process.returncode, found[1]) for process in processes if (found := process.communicate(timeout=300))]


def test_machines_that_do_not_share_the_output_are_told_at_the_first_checkpoint(dataset, tmp_path):
    found = ranks_on_two_machines(dataset, [tmp_path / "a", tmp_path / "b"], "--checkpointing_steps", "1")
    for status, errors in found:
        assert status != 0
        assert "The main process does not see random_states_1.pkl" in errors


def test_machines_that_find_other_checkpoints_do_not_resume(dataset, tmp_path):
    (tmp_path / "a").mkdir()
    run(dataset, tmp_path / "a" / "out", "--checkpointing_steps", "1", model=STILL)
    found = ranks_on_two_machines(dataset, [tmp_path / "a", tmp_path / "b"], "--resume", "auto", "--max_steps", "4")
    for status, errors in found:
        assert status != 0
        assert "resumes from step-2, but process 1" in errors
