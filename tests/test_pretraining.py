"""training/: what the pretraining script promises, on a few molecules of the sample and a tiny model, on CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from rdkit import Chem
from rdkit.Chem.rdDistGeom import EmbedMolecule
from safetensors.torch import load_file

import data
import make_sample
import pretrain
from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor

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


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Runs of one process on the CPU, which Accelerate's process-wide state does not carry from test to test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SAMPLE_ROWS = SAMPLE / "data" / "train-00000-of-00001.parquet"


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
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    last = metrics(finished_run)[-1]
    assert last["step"] == 8
    assert f"{last['held_out/shortest_path_loss']:.3f}" in card.content
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
    exec(python_block(TRAINING.parent / "README.md").replace("outputs/pretrain", str(finished_run)), names)
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
        return [{k: v for k, v in row.items() if "per_second" not in k} for row in metrics(folder)]

    assert without_rates(resumed) == without_rates(finished_run)


def test_another_seed_gives_other_weights(finished_run, dataset, tmp_path):
    """Guards the test above: equal weights must not come from nothing having been trained or drawn."""
    other = run(dataset, tmp_path, "--max_steps", "8", "--seed", "1")
    expected, got = (load_file(folder / "model.safetensors") for folder in (finished_run, other))
    assert not any(torch.equal(expected[name], got[name]) for name in expected if name.endswith("qkv_proj.weight"))


def test_resuming_with_other_settings_says_so(finished_run, dataset, tmp_path, caplog):
    run(dataset, tmp_path, "--max_steps", "7", "--resume", str(finished_run / "checkpoints" / "step-6"))
    assert "max_steps 8 -> 7" in caplog.text


def test_accumulated_parts_give_the_step_of_the_whole_batch(dataset, tmp_path):
    """Nothing random (one relation shown, no dropout), and losses that weigh each molecule alike.

    Molecules of nine atoms only, without the losses of bonds and noise: those are means over bonds and drawn atoms, of
    which parts of a batch have unequal numbers, so that parts weigh them differently, as they do in the original.
    A large epsilon makes AdamW's step proportional to the gradient.
    """
    table = pq.read_table(SAMPLE_ROWS)
    nine_atoms = table.filter(pc.equal(pc.list_value_length(table["atom_features"]), 9))
    folder = write_dataset(tmp_path / "nine_atoms", train=nine_atoms.slice(0, 24))
    still = ["hidden_dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0", "drop_path_rate=0.0"]
    fixed = [
        "blend_probabilities=[1.0,0.0,0.0]",
        "atom_blend_probabilities=[1.0,0.0]",
        "loss_weights=[1.0,0.0,1.0,0.0]",
    ]
    flags = ["--adam_epsilon", "1.0", "--learning_rate", "1.0", "--warmup_steps", "0"]
    results = [
        load_file(
            run(
                folder,
                tmp_path / f"accumulated_{parts}",
                *flags,
                "--gradient_accumulation_steps",
                str(parts),
                model=(*still, *fixed),
            )
            / "model.safetensors"
        )
        for parts in (1, 4)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-6)


def test_evaluation_draws_the_same_each_time(finished_run, dataset, tmp_path):
    """The first evaluation of another run with the same seed is the same to the last digit."""
    again = run(dataset, tmp_path)
    assert metrics(again)[0] == metrics(finished_run)[0]


def test_batches_are_a_function_of_seed_and_step_alone():
    def take(count, **options):
        batches = iter(data.TrainingBatches(num_rows=21, batch_size=8, seed=3, **options))
        return [next(batches) for _ in range(count)]

    whole = take(6)
    assert whole == take(6)
    assert all(len(set(first + second)) == 16 for first, second in zip(whole[::2], whole[1::2], strict=True))
    assert whole[:2] != whole[2:4]  # the second epoch is shuffled anew
    assert take(3, first_step=3) == whole[3:]
    parts = [take(4, accumulation_steps=2, num_processes=2, process_index=rank) for rank in (0, 1)]
    rejoined = [
        parts[0][2 * step] + parts[0][2 * step + 1] + parts[1][2 * step] + parts[1][2 * step + 1] for step in (0, 1)
    ]
    assert rejoined == whole[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 22}, "batch_size is 22, but there are only 21 training molecules"),
        ({"batch_size": 8, "accumulation_steps": 3}, r"multiple of gradient_accumulation_steps x processes \(3 x 1\)"),
    ],
)
def test_batches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data.TrainingBatches(num_rows=21, seed=0, **options)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1.0}, "Unknown key 'learning_rat' in .* Known keys: .*learning_rate"),
        ({"model": {"hiden_size": 8}}, "Unknown key 'hiden_size' in model. Known keys: .*hidden_size"),
        ({"max_steps": "many"}, "max_steps must be of type int, got 'many'"),
        ({"batch_size": 2.5}, "batch_size must be of type int, got 2.5"),
        ({"eval_steps": 0}, "eval_steps must be 1 or more, got 0"),
        ({"mixed_precision": False}, r"one of 'no', 'fp16', 'bf16' \(in quotes\), got False"),  # YAML's reading of no
        ({"dataset": None}, "names no dataset. .* --dataset"),
        ({"warmup_steps": "missing"}, "gives no warmup_steps"),
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


def test_a_batch_of_rows_is_what_the_processor_makes_of_the_molecules(dataset):
    rows = data.GraphRows(data.open_dataset(dataset).splits["train"], np.arange(40, 0, -1))
    processor = data.open_dataset(dataset).processor()
    batch = data.collate(rows.__getitems__([3, 30, 3, 7]), processor)
    table = pq.read_table(dataset / "data").take([37, 10, 37, 33])
    expected = processor(table["smiles"].to_pylist(), coordinates=table["coordinates"].to_pylist())
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


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


def test_two_processes_train_as_one_and_see_the_same_held_out_molecules(finished_run, dataset, tmp_path):
    """Two gloo ranks; the checkpoint holds the random state of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [
        "--dataset",
        str(dataset),
        "--output_dir",
        str(tmp_path),
        *SHORT,
        "--eval_batch_size",
        "4",
        "--model",
        *TINY,
    ]
    environment = os.environ | {"PYTHONPATH": str(TRAINING.parent)}
    result = subprocess.run(
        [*command, str(TRAINING / "pretrain.py"), *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stdout
    assert {path.name for path in (tmp_path / "checkpoints" / "step-2").glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    one = metrics(run(dataset, tmp_path / "one", "--eval_batch_size", "4"))
    two = metrics(tmp_path)
    assert two[0].keys() == one[0].keys()
    assert all(abs(two[0][name] - value) < 1e-6 for name, value in one[0].items())
