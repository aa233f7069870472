"""training/finetune.py: what a fine-tuning promises, on a few molecules and a tiny model, on CPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from datasets import load_dataset
from huggingface_hub import ModelCard
from rdkit import Chem
from safetensors.torch import load_file
from tiny import tiny_config, without_dropout
from transformers import AutoModelForSequenceClassification, AutoProcessor, Trainer, TrainingArguments, pipeline

import evaluate
import finetune
import preprocess
import push_to_hub
from calibration import conformal_quantile, conformal_quantiles
from moleblend_hf import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendProcessor,
)
from moleblend_hf.prediction_moleblend import predict_graphs
from optimization import freeze, parameter_groups
from tasks import Task, spreads

TRAINING = Path(finetune.__file__).parent
RECIPES = sorted((TRAINING / "configs" / "finetuning").glob("*.yaml"))
SHORT = ["--epochs", "2", "--batch_size", "8", "--learning_rate", "1e-3", "--no-baseline"]
pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pretrained checkpoint, but for the pretraining."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    MoleBlendForPreTraining(tiny_config()).save_pretrained(folder)
    MoleBlendProcessor().save_pretrained(folder)
    return folder


MOLECULES = [f"{'C' * length}{end}" for length in range(1, 13) for end in ("O", "N", "F", "C(=O)O", "c1ccccc1")]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """60 molecules: their number of atoms, whether they have oxygen, a class, a gap, a broken row."""
    path = tmp_path_factory.mktemp("table") / "molecules.csv"
    lines = ["SMILES,size,oxygen,kind,part"]
    for index, smiles in enumerate(MOLECULES):
        mol = Chem.MolFromSmiles(smiles)
        size = "" if index == 7 else mol.GetNumAtoms() * 10.0
        part = ("train", "train", "train", "valid", "test")[(3 * index + index // 5) % 5]
        lines.append(f"{smiles},{size},{int('O' in smiles)},{index % 3},{part}")
    lines.append("C1CC,1.0,0,0,train")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(base: Path, data: Path, output: Path, *flags: str) -> dict:
    """Fine-tune in this process on the parts that the table names; later flags win."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = ["--split", "given", "--preprocessing", "split_column=part"] if data.suffix == ".csv" else []
    return finetune.main(
        ["--model", str(base), "--input", str(data), "--output_dir", str(output), *given, *SHORT, *flags]
    )


def test_a_run_that_its_minutes_end_says_so(base, table, tmp_path):
    flags = ["--targets", "size", "--epochs", "5", "--max_minutes", "1e-9", "--no-baseline"]
    results = run(base, table, tmp_path, *flags)
    assert any("seed 0: ended by max_minutes after 1 of 5 epochs" in note for note in results["notes"])
    assert "ended by max_minutes" in (tmp_path / "README.md").read_text()


def test_fewer_molecules_are_drawn_for_training_and_validation_and_the_test_stays(base, table, tmp_path):
    flags = ["--targets", "size", "--epochs", "1", "--no-baseline", "--max_training_molecules", "9"]
    split = run(base, table, tmp_path, *flags, "--max_validation_molecules", "4")["split"]
    num_test = sum(line.endswith(",test") for line in table.read_text().splitlines())
    assert [split["parts"][name]["rows"] for name in ("train", "validation", "test")] == [9, 4, num_test]
    assert set(split["leakage"].values()) == {0}  # of the molecules that were drawn
    card = (tmp_path / "README.md").read_text()
    assert f"| used | {13 + num_test} |" in card
    assert f"| not used: without a label, not drawn, or in another part | {60 - 13 - num_test} |" in card


def test_a_column_that_names_the_parts_needs_no_other_word(base, table, tmp_path):
    flags = ["--targets", "oxygen", "--preprocessing", "split_column=part"]
    results = finetune.main(
        ["--model", str(base), "--input", str(table), "--output_dir", str(tmp_path), *SHORT, *flags]
    )
    num_test = sum(line.endswith(",test") for line in table.read_text().splitlines())
    assert results["split"]["parts"]["test"]["rows"] == num_test
    assert results["split"]["name"] == "given"


def test_what_is_measured_is_what_the_saved_folder_computes(base, table, tmp_path):
    """Also where the training has another arithmetic."""
    results = run(base, table, tmp_path / "model", "--targets", "size", "--mixed_precision", "bf16")
    flags = ["--model", str(tmp_path / "model"), "--input", str(tmp_path / "model" / "data"), "--split", "test"]
    again = evaluate.main([*flags, "--output_dir", str(tmp_path / "again")])
    found, expected = (each["models"]["MoleBLEND"]["test"]["mean"]["rmse"]["mean"] for each in (results, again))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_table_becomes_a_folder_that_predicts_what_the_report_says(base, table, tmp_path):
    output = tmp_path / "model"
    run(
        base, table, output, "--targets", "size", "--smiles_column", "SMILES", "--seeds", "2", "--from_scratch", "also"
    )
    model = AutoModelForSequenceClassification.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    assert model.config.num_members == 2
    assert model.config.id2label == {0: "size"}
    assert processor.modality == "2d"  # there was no geometry, so none will be read
    metrics = json.loads((output / "metrics.json").read_text())
    text = json.dumps(metrics)
    for name in ("MoleBLEND, ensemble", "MoleBLEND from scratch", "MoleBLEND"):
        assert name in text
    assert ModelCard.load(output / "README.md").data.library_name == "transformers"
    # A folder to push: nothing in it tells where it lay on this machine.
    assert push_to_hub.problems(output) == []
    assert str(tmp_path) not in text + (output / "README.md").read_text()
    # The test rows, predicted anew, have the error of the report.
    rows = load_dataset("parquet", data_files=str(output / "data" / "data" / "test-*.parquet"), split="train")
    graphs = processor.featurize_many(list(rows["smiles"]))
    found = predict_graphs(model, processor, graphs)
    known = ~np.isnan(np.array(rows["size"], float))
    rmse = np.sqrt(np.mean((found.values[known, 0] - np.array(rows["size"], float)[known]) ** 2))
    assert f"{rmse:.4f}"[:5] in text
    assert ((found.lower <= found.values) & (found.values <= found.upper)).all()
    # So does the folder in a process without this package, as a pipeline.
    code = (
        "import sys, json; sys.modules['moleblend_hf'] = None\n"
        "from transformers import pipeline\n"
        f"predict = pipeline(model={str(output)!r}, trust_remote_code=True, device='cpu')\n"
        f"answers = predict({list(rows['smiles'])!r})\n"
        "print(json.dumps([answer['predictions']['size']['value'] for answer in answers]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), found.values[:, 0], rtol=1e-6)
    # Each member is a checkpoint too, and the broken row is written down.
    members = [AutoModelForSequenceClassification.from_pretrained(output / "members" / str(seed)) for seed in (0, 1)]
    values = [predict_graphs(member, processor, graphs).values for member in members]
    np.testing.assert_allclose(np.mean(values, axis=0), found.values, rtol=1e-6)
    rejected = load_dataset("parquet", data_files=str(output / "data" / "rejected.parquet"), split="train")
    assert list(rejected["input"]) == ["C1CC"]


def test_the_same_command_gives_the_same_weights(base, table, tmp_path):
    weights = []
    for name in ("one", "two"):
        run(base, table, tmp_path / name, "--targets", "size", "--seed", "3")
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_parts_of_a_step_do_not_change_what_is_learned(base, table, tmp_path):
    """The loss of a step is the mean over its labels, gaps and class weights included, however it is cut."""
    weights = []
    off = ["--model_settings", "attention_dropout=0", "activation_dropout=0", "drop_path_rate=0"]
    for name, tokens in (("whole", "10000"), ("parts", "40")):
        flags = ["--targets", "oxygen", "--task", "classification", "--class_weights", "balanced"]
        run(base, table, tmp_path / name, *flags, "--max_tokens", tokens, *off)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], atol=1e-5, rtol=1e-4)


def test_two_processes_learn_what_one_does(base, table, tmp_path):
    flags = [
        "--targets",
        "size",
        "--model_settings",
        "attention_dropout=0",
        "activation_dropout=0",
        "drop_path_rate=0",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    run(base, table, one, *flags)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = ["--model", str(base), "--input", str(table), "--split", "given", *SHORT, *flags]
    arguments += ["--preprocessing", "split_column=part", "--output_dir", str(two)]
    subprocess.run([*launch, str(TRAINING / "finetune.py"), *arguments], check=True)
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, values in expected.items():
        torch.testing.assert_close(values, found[name], atol=1e-5, rtol=1e-4)


def test_it_learns(base, table, tmp_path):
    """The number of atoms is learned from the bonds to within a fraction of its spread."""
    flags = ["--targets", "size", "--epochs", "60", "--patience", "60", "--learning_rate", "3e-3"]
    run(base, table, tmp_path / "model", *flags, "--model_settings", "readout=mean")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    values = predict_graphs(model, processor, processor.featurize_many(MOLECULES)).values[:, 0]
    sizes = np.array([Chem.MolFromSmiles(smiles).GetNumAtoms() * 10.0 for smiles in MOLECULES])
    assert np.abs(values - sizes).mean() < 0.3 * sizes.std()


def test_folds_validate_on_what_they_were_not_trained_on(base, table, tmp_path):
    run(base, table, tmp_path / "model", "--targets", "size", "--folds", "3")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.num_members == 3
    assert model.config.conformal_quantiles[0] > 0
    run(base, table, tmp_path / "other", "--targets", "size", "--folds", "3", "--seed", "5")
    assert sorted(path.name for path in (tmp_path / "other" / "members").iterdir()) == ["0", "1", "2"]
    weights = (load_file(tmp_path / name / "members" / "0" / "model.safetensors") for name in ("model", "other"))
    first, other = (each["classifier.dense.weight"] for each in weights)
    assert not torch.equal(first, other)


def test_folds_learn_a_target_that_only_the_validation_part_has(base, table, tmp_path):
    lines = [line.split(",") for line in table.read_text().splitlines()]
    late = ["late", *(kind if part == "valid" else "" for *_, kind, part in lines[1:])]
    path = tmp_path / "late.csv"
    path.write_text("\n".join(",".join([*line, cell]) for line, cell in zip(lines, late, strict=True)))
    run(base, path, tmp_path / "model", "--targets", "size,late", "--folds", "2", "--epochs", "1")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config
    assert np.isfinite(config.target_means).all()


def test_folds_never_share_a_molecule(base, table, tmp_path):
    run(base, table, tmp_path / "model", "--targets", "size")
    dataset = finetune.open_dataset(tmp_path / "model" / "data")
    data = finetune.Data.of(dataset, ("size",))
    rows = np.concatenate([data.parts["train"], data.parts["validation"]])
    folds = list(finetune.fold_rows(data, rows, 4, 0))
    assert sorted(np.concatenate([validation for _, validation in folds]).tolist()) == sorted(rows.tolist())
    for training, validation in folds:
        keys = [{data.labelled.inchikeys[row] for row in part} for part in (training, validation)]
        assert not keys[0] & keys[1]


def test_classes_are_probabilities_that_add_up_to_one(base, table, tmp_path):
    flags = ["--targets", "kind", "--task", "classes", "--class_weights", "balanced"]
    results = run(base, table, tmp_path / "model", *flags, "--max_validation_molecules", "4")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    found = predict_graphs(model, processor, processor.featurize_many(MOLECULES))
    assert found.values.shape == (60, 3)
    np.testing.assert_allclose(found.values.sum(1), 1)
    # Four molecules are too few to calibrate with, so nothing is promised.
    assert model.config.conformal_quantiles == [None]
    assert "coverage" not in results["models"]["MoleBLEND"]["runs"][0]["test"]["targets"]["kind"]
    assert "Conformal" not in (tmp_path / "model" / "README.md").read_text()


def test_a_fine_tuned_checkpoint_goes_on(base, table, tmp_path):
    """The same target keeps head and scales; another one has a new head."""
    run(base, table, tmp_path / "first", "--targets", "size", "--epochs", "3")
    run(tmp_path / "first", table, tmp_path / "again", "--targets", "size", "--learning_rate", "0")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    run(tmp_path / "first", table, tmp_path / "other", "--targets", "size,oxygen", "--task", "regression")
    other = MoleBlendForSequenceClassification.from_pretrained(tmp_path / "other")
    assert list(other.config.id2label.values()) == ["size", "oxygen"]


def test_a_head_that_goes_on_in_another_unit_has_other_scales(base, table, tmp_path):
    units = ["--preprocessing", "split_column=part", "units={size: kcal/mol}"]
    run(base, table, tmp_path / "first", "--targets", "size", "--epochs", "1", *units)
    run(
        tmp_path / "first",
        table,
        tmp_path / "again",
        "--targets",
        "size",
        "--epochs",
        "1",
        *units,
        "convert={size: kJ/mol}",
    )
    first, again = (MoleBlendForSequenceClassification.from_pretrained(tmp_path / name) for name in ("first", "again"))
    assert (first.config.target_units, again.config.target_units) == (["kcal/mol"], ["kJ/mol"])
    np.testing.assert_allclose(again.config.target_means, 4.184 * np.array(first.config.target_means))


def test_a_logarithm_is_learned_and_predicted_back(base, table, tmp_path):
    run(base, table, tmp_path / "model", "--targets", "size", "--transforms", "size=log10")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    found = predict_graphs(model, processor, processor.featurize_many(MOLECULES))
    assert (found.values > 0).all()
    assert model.config.target_means[0] < 3  # of the logarithms
    np.testing.assert_allclose(found.upper / found.values, found.values / found.lower, rtol=1e-5)


def test_frozen_layers_do_not_move_and_lower_layers_learn_slower(base, table, tmp_path):
    run(base, table, tmp_path / "model", "--targets", "size", "--frozen_layers", "1")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    moved = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("moleblend.layers.1.") for name in moved)
    model = MoleBlendForSequenceClassification(tiny_config())
    rates = {id(p): group["lr"] for group in parameter_groups(model, 1.0, 0.5, 0.1) for p in group["params"]}
    assert rates[id(model.classifier.out_proj.weight)] == 1.0
    assert rates[id(model.moleblend.layers[1].attention.qkv_proj.weight)] == 0.5
    assert rates[id(model.moleblend.graph_token)] == 0.125
    freeze(model, 2)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier"}


def test_conformers_are_drawn_in_training_and_averaged_in_prediction(base, table, tmp_path):
    lines = table.read_text().splitlines()
    small = tmp_path / "small.csv"
    small.write_text("\n".join([lines[0], *lines[11:41]]) + "\n")
    flags = ["--targets", "size", "--modality", "2d+3d", "--num_conformers", "3"]
    settings = ["split_column=part", "conformer_seed=7", "max_mmff_iterations=0"]
    run(base, small, tmp_path / "model", *flags, "--preprocessing", *settings)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert (processor.modality, processor.num_conformers) == ("2d+3d", 3)
    assert (processor.conformer_seed, processor.max_mmff_iterations) == (7, 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    found = predict_graphs(model, processor, processor.featurize_many(["CCCCO"]))
    assert found.modalities == ["2d+3d"]
    assert np.isfinite(found.conformer_spread).all()
    rows = load_dataset("parquet", data_files=str(tmp_path / "model" / "data" / "data" / "*.parquet"), split="train")
    assert {len(conformers) for conformers in rows["coordinates"]} == {3}
    # A dataset is what it is: its processor is saved, and what contradicts it is refused.
    MoleBlendForPreTraining(tiny_config()).save_pretrained(tmp_path / "other")
    MoleBlendProcessor(conformer_seed=5, max_atoms=99, bonds="determine").save_pretrained(tmp_path / "other")
    dataset = tmp_path / "model" / "data"
    run(tmp_path / "other", dataset, tmp_path / "again", "--targets", "size", "--epochs", "1")
    again = MoleBlendProcessor.from_pretrained(tmp_path / "again")
    assert again.to_dict() == processor.to_dict() | {"bonds": "determine"}
    with pytest.raises(ValueError, match=r"made with modality='2d\+3d'.*--modality auto, or leave the setting out"):
        run(base, dataset, tmp_path / "out", "--targets", "size", "--modality", "auto")
    with pytest.raises(ValueError, match=r"made with num_conformers=3, but 2 are asked for.*--num_conformers 2"):
        run(base, dataset, tmp_path / "out", "--targets", "size", "--num_conformers", "2")


def test_targets_of_atoms(base, tmp_path):
    """A chemical shift, say, for each atom: labels, scaling and gaps as for molecules."""
    path = tmp_path / "atoms.csv"
    lines = ["smiles,charge,part"]
    for index, smiles in enumerate(MOLECULES[:40]):
        values = [atom.GetAtomicNum() for atom in Chem.MolFromSmiles(smiles).GetAtoms()]
        part = ("train", "train", "valid", "test")[index // 2 % 4]
        lines.append(f'{smiles},"{json.dumps(values)}",{part}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--atom_targets", "charge"]
    run(base, path, tmp_path / "model", *flags, "--epochs", "40", "--patience", "40", "--learning_rate", "3e-3")
    model = MoleBlendForTokenClassification.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = model(**processor("FCCCCO")).logits[0, :, 0]
    assert abs(found[0] - 9) < 1
    assert abs(found[-1] - 8) < 1
    assert (found[1:-1] - 6).abs().max() < 1
    answer = pipeline(model=str(tmp_path / "model"), trust_remote_code=True, device="cpu")("FCCCCO")
    np.testing.assert_allclose(answer["predictions"]["charge"]["value"], found, atol=1e-5)


def test_trainer_fine_tunes_the_model(base, tmp_path):
    """transformers' own Trainer, from SMILES to a checkpoint that predicts."""
    processor = MoleBlendProcessor.from_pretrained(base)
    model = MoleBlendForSequenceClassification.from_pretrained(base, num_labels=1, problem_type="regression")
    rows = [{"smiles": smiles, "size": float(Chem.MolFromSmiles(smiles).GetNumAtoms())} for smiles in MOLECULES]

    def collate(examples):
        return processor([row["smiles"] for row in examples], labels=[row["size"] for row in examples])

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), num_train_epochs=12, per_device_train_batch_size=10, learning_rate=3e-3,
        remove_unused_columns=False, eval_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=rows[:50],
        eval_dataset=rows[50:],
        processing_class=processor,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0] / 2
    trainer.save_model(str(tmp_path / "saved"))
    saved = MoleBlendForSequenceClassification.from_pretrained(tmp_path / "saved")
    inputs = MoleBlendProcessor.from_pretrained(tmp_path / "saved")(MOLECULES)
    with torch.no_grad():
        torch.testing.assert_close(saved(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6, rtol=0)


def test_trainer_pretrains_the_model_and_knows_its_loss_on_other_molecules(tmp_path):
    """The targets are the inputs: there are no labels by which the Trainer could tell that there is a loss."""
    processor = MoleBlendProcessor()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=25, learning_rate=3e-3, eval_strategy="steps", eval_steps=1,
        prediction_loss_only=True, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(
        MoleBlendForPreTraining(tiny_config()),
        arguments,
        data_collator=processor,
        train_dataset=MOLECULES[:50],
        eval_dataset=MOLECULES[50:],
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]


def test_accumulated_gradients_of_the_trainer_are_those_of_the_whole_batch(tmp_path):
    """The Trainer divides by the number of parts for models whose loss does not."""
    torch.manual_seed(0)
    start = MoleBlendForSequenceClassification(without_dropout(num_labels=1, problem_type="regression"))
    processor = MoleBlendProcessor()
    rows = [{"smiles": smiles, "size": 0.1 * len(smiles)} for smiles in MOLECULES[:20]]

    def collate(examples):
        return processor([row["smiles"] for row in examples], labels=[row["size"] for row in examples])

    changes = []
    for batch_size, num_parts in ((20, 1), (5, 4)):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=num_parts, optim="sgd", learning_rate=0.1, max_grad_norm=0,
            remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, data_collator=collate, train_dataset=rows).train()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        changes.append(torch.cat([(after - before).detach().flatten() for after, before in pairs]))
    assert changes[0].abs().max() > 1e-3
    torch.testing.assert_close(*changes, atol=1e-6, rtol=1e-3)


def test_optuna_chooses_on_validation(base, table, tmp_path, capsys):
    pytest.importorskip("optuna")
    run(base, table, tmp_path / "model", "--targets", "size", "--search_trials", "2", "--epochs", "1")
    assert "best of 2 trials" in capsys.readouterr().out


def test_a_trial_that_diverges_is_none_of_the_good_ones(monkeypatch):
    pytest.importorskip("optuna")
    rates = []

    def train(finetuning, *_):
        rates.append(finetuning.settings.learning_rate)
        if len(rates) != 2:
            raise finetune.DivergedError("seed 0 diverged")
        return finetune.Trained(None, 0.5, 1, 1.0)

    monkeypatch.setattr(finetune.Finetuning, "train", train)
    settings = finetune.parse_args(["--input", "some.csv", "--search_trials", "3"])
    finetuning = finetune.Finetuning(finetune.Accelerator(), settings, None, None, None, {})
    assert finetune.searched(finetuning, None, None)["learning_rate"] == rates[1]
    with pytest.raises(finetune.DivergedError, match="All 3 trials diverged"):
        finetune.searched(finetuning, None, None)


def test_a_training_that_diverges_says_so(base, table, tmp_path):
    with pytest.raises(ValueError, match=r"seed 0 diverged: after epoch 1 .* Lower learning_rate \(1e\+30\)"):
        run(base, table, tmp_path, "--targets", "size", "--learning_rate", "1e30")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path):
    settings = finetune.parse_args(["--config", str(path), "--model", "somewhere", "--input", "something"])
    assert settings.description
    tiny_config(**settings.model_settings)


def test_what_cannot_work_is_said(base, table, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'weight'"):
        run(base, table, out, "--targets", "weight")
    with pytest.raises(ValueError, match="'Smiles'"):
        run(base, table, tmp_path / "out2", "--smiles_column", "Smiles", "--targets", "size")
    with pytest.raises(ValueError, match=r"targets of molecules or of atoms"):
        run(base, table, tmp_path / "out3", "--targets", "kind", "--atom_targets", "charge")
    with pytest.raises(ValueError, match="does not end in"):
        run(base, Path("molecules.txt"), tmp_path / "out4", "--targets", "size")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(base, table, full, "--targets", "size")
    with pytest.raises(ValueError, match=r"The output, .*, holds model"):
        run(base, table, base, "--targets", "size", "--overwrite")
    with pytest.raises(ValueError, match=r"The output, .*, holds input"):
        run(base, table, table.parent, "--targets", "size", "--overwrite")
    assert (base / "model.safetensors").is_file()
    assert table.is_file()
    with pytest.raises(ValueError, match="folds must be 2 or more"):
        run(base, table, tmp_path / "out5", "--folds", "1")


def test_nothing_is_deleted_before_the_data_are_checked(base, table, tmp_path):
    """A label that is no class is found before the training, in whatever part it stands; OUT may be a link."""
    data, folder, link = tmp_path / "data", tmp_path / "folder", tmp_path / "link"
    flags = ["--targets", "size,kind,oxygen", "--split_column", "part"]
    preprocess.main(["--source", "csv", "--input", str(table), "--output", str(data), *flags])
    (folder / "old").mkdir(parents=True)
    link.symlink_to(folder, target_is_directory=True)
    for given, source, message in (
        (["--targets", "z"], table, "'z'"),
        (["--targets", "size", "--transforms", "z=log10"], table, "'z'"),
        (
            ["--targets", "size", "--preprocessing", "split_column=part", "tasc=x"],
            table,
            "Unknown key 'tasc' in preproc",
        ),
        (["--targets", "size", "--preprocessing", "hydrogens=add"], table, "hydrogens='add'"),
        (["--targets", "size", "--preprocessing", "without=nosuch"], table, "no dataset folder 'nosuch'"),
        (["--targets", "size", "--preprocessing", f"without={folder / 'old'}"], table, "holds without"),
        (["--targets", "z"], data, "'z'"),
        (
            ["--targets", "oxygen", "--modality", "2d+3d"],
            data,
            r"has no geometries of 60 of 60 .*--modality 2d\+3d",
        ),
        (["--targets", "kind", "--task", "classification"], data, "has 2 for target 'kind'.* takes 0 and 1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(base, source, link, "--overwrite", *given)
        assert (folder / "old").is_dir()
    names = ["--preprocessing", "split_column=part", "class_names=without,with"]
    flags = ["--targets", "oxygen", "--task", "classification", "--epochs", "1"]
    results = run(base, table, link, "--overwrite", *flags, *names)
    assert results["binary_class_names"] == {"oxygen": ["without", "with"]}
    assert "probabilities of class 1 (0 = without, 1 = with)" in (folder / "README.md").read_text()
    assert not (folder / "old").exists()
    assert link.is_symlink()


def test_a_label_outside_of_training_that_is_no_class_is_refused(base, tmp_path):
    path = tmp_path / "stray.csv"
    rows = [f"{'C' * size}O,{size % 2},{('train', 'valid')[size > 6]}" for size in range(1, 10)]
    path.write_text("\n".join(["SMILES,active,part", *rows, "CCN,1,test", "CCS,2,test"]))
    with pytest.raises(ValueError, match=r"has 2 for target 'active', but task 'classification' takes 0 and 1"):
        run(base, path, tmp_path / "out", "--targets", "active", "--preprocessing", "split_column=part",
            "tasks={active: regression}", "--task", "classification")  # fmt: skip


def test_names_of_columns_are_handed_on_as_they_are(tmp_path):
    path = tmp_path / "settings.yaml"
    recipe = yaml.safe_load((TRAINING / "configs" / "finetuning" / "default.yaml").read_text())
    names = ["logS, mol/L", "act (>=5)", "-logIC50"]
    path.write_text(yaml.safe_dump(recipe | {"targets": names, "input": "some.csv", "task": "classification"}))
    made = finetune.preprocessing(finetune.parse_args(["--config", str(path)]), MoleBlendProcessor())
    assert made.targets == names
    assert made.tasks == dict.fromkeys(names, "classification")


def test_labels_of_the_wrong_kind_are_rejected_rows(base, table, tmp_path):
    run(base, table, tmp_path / "out", "--targets", "kind", "--task", "classification")
    rejected = load_dataset("parquet", data_files=str(tmp_path / "out" / "data" / "rejected.parquet"), split="train")
    assert len(rejected) == 20 + 1
    assert sum("'2'" in reason or "2" in reason for reason in rejected["reason"]) >= 20


def test_a_dataset_without_the_three_parts_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"has no part 'validation'.*\n?.*Preprocess it with --split scaffold"):
        run(base, TRAINING / "sample", tmp_path / "out", "--targets", "gap")
    chains = tmp_path / "chains.csv"
    chains.write_text("SMILES,size\n" + "".join(f"{'C' * size},{size}\n" for size in range(1, 9)))
    with pytest.raises(ValueError, match=r"The scaffold split puts none of its 8 molecules there: take more of them"):
        run(base, chains, tmp_path / "out", "--targets", "size", "--split", "scaffold", "--preprocessing", "limit=8")


def test_a_checkpoint_with_another_processor_is_refused(table, base, tmp_path):
    run(base, table, tmp_path / "model", "--targets", "size")
    other = tmp_path / "other"
    MoleBlendForPreTraining(tiny_config()).save_pretrained(other)
    MoleBlendProcessor(hydrogens="add").save_pretrained(other)
    with pytest.raises(ValueError, match="hydrogens"):
        run(other, tmp_path / "model" / "data", tmp_path / "out", "--targets", "size")


def test_a_logarithm_of_zero_is_refused(base, table, tmp_path):
    with pytest.raises(ValueError, match=r"no log10.*signed_log10"):
        run(
            base,
            table,
            tmp_path / "out",
            "--targets",
            "oxygen",
            "--task",
            "regression",
            "--transforms",
            "oxygen=log10",
        )


@pytest.mark.parametrize("flags", [[], ["--folds", "2"]])
def test_a_label_without_a_logarithm_is_refused_wherever_it_is_looked_at(base, tmp_path, flags):
    """Validation decides and calibrates on the scale that is learned; folds train on it."""
    rows = [f"{'C' * size}O,{size if size < 8 else 0},{'train' if size < 8 else 'valid'}" for size in range(1, 10)]
    path = tmp_path / "zeros.csv"
    path.write_text("\n".join(["SMILES,ic50,part", *rows, "CCN,1,test"]))
    with pytest.raises(ValueError, match=r"'ic50' has the value 0, of which there is no log10"):
        run(base, path, tmp_path / "out", "--targets", "ic50", "--transforms", "ic50=log10", *flags)


def test_an_epoch_is_chosen_on_the_scale_that_is_learned():
    task = Task("regression", ("ic50",), ("nM",), ("log10",))
    finetuning = finetune.Finetuning(None, None, None, task, None, {})
    labels = np.array([[1.0], [1e3], [1e6]])
    np.testing.assert_allclose(finetuning.score(labels, 10 * labels, np.array([2.0])), -0.5)
    np.testing.assert_allclose(task.in_own_units(task.learned(labels)), labels)


def test_the_fingerprint_baseline_learns_the_same_scale(base, table, tmp_path, monkeypatch):
    given = []

    def forest(smiles, labels, others, *rest, **flags):
        given.append(labels)
        return np.full((len(others), 1), 2.0)

    monkeypatch.setattr(finetune, "fingerprint_baseline", forest)
    results = run(base, table, tmp_path, "--targets", "size", "--transforms", "size=log10", "--baseline")
    assert np.nanmax(given[0]) < 3
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert rows == results
    sizes = [
        float(line.split(",")[1])
        for line in table.read_text().splitlines()
        if line.endswith(",test") and line.split(",")[1]
    ]
    expected = np.sqrt(np.mean((np.array(sizes) - 100) ** 2))
    assert results["models"]["ECFP4 + random forest"]["test"]["mean"]["rmse"]["mean"] == pytest.approx(expected)


def test_a_target_that_never_varies_has_no_spread_of_rounding():
    np.testing.assert_array_equal(spreads(np.array([[5.3, 0.0, 1.0]] * 50 + [[np.nan, 0.0, 3.0]]))[:2], [1, 1])


def test_scales_are_those_of_the_transformed_labels():
    labels = np.array([[1.0, 5.0], [100.0, np.nan], [np.nan, 7.0]])
    values = Task("regression", ("a", "b"), ("nM", None), ("log10", "none")).config_values(labels)
    np.testing.assert_allclose(values["target_means"], [1.0, 6.0])
    np.testing.assert_allclose(values["target_scales"], [1.0, 1.0])
    assert values["target_units"] == ["nM", ""]


def test_conformal_quantiles_cover_what_they_promise():
    """Of exchangeable scores, a new one is below the quantile at least as often as stated."""
    generator = np.random.default_rng(0)
    for coverage in (0.5, 0.9):
        covered = [generator.normal() <= conformal_quantile(generator.normal(size=39), coverage) for _ in range(4000)]
        assert coverage - 0.02 < np.mean(covered) < coverage + 0.05
    assert conformal_quantile(np.arange(8.0), 0.9) is None
    assert conformal_quantile(np.arange(9.0), 0.9) == 8.0


def test_conformal_scores_of_each_kind_of_task():
    labels, values = np.array([[0.0], [1.0], [np.nan]]), np.array([[0.2], [0.9], [0.5]])
    assert conformal_quantiles("multi_label_classification", labels, values, 0.6) == pytest.approx([0.2])
    classes = np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    assert conformal_quantiles("single_label_classification", labels, classes, 0.6) == pytest.approx([0.4])
    assert conformal_quantiles("regression", labels, labels + 2, 0.6) == pytest.approx([2.0])


def test_what_cannot_work_is_refused_before_the_old_model_is_deleted(base, table, tmp_path):
    run(base, table, tmp_path / "out", "--targets", "size")
    for flags, reason in (
        (["--targets", "size", "--transforms", "size=ln"], "`target_transforms` has"),
        (["--targets", "size", "--model_settings", "readout=median"], "readout"),
        (["--targets", "size", "--frozen_layers", "99"], "frozen_layers must lie between 0 and"),
        (["--targets", "size", "--layer_decay", "-1"], "layer_decay must be above 0"),
        (["--targets", "size", "--warmup_fraction", "2"], "warmup_fraction must lie"),
        (["--targets", "size", "--max_training_molecules", "0"], "max_training_molecules must be 1 or more"),
    ):
        with pytest.raises(Exception, match=reason):
            run(base, table, tmp_path / "out", "--overwrite", *flags)
        assert (tmp_path / "out" / "model.safetensors").is_file(), flags


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--model_settings", "num_hidden_layers=9"],
            r"gives no weights for \d+ parts of the encoder, the first layers\.2",
        ),
        (["--model_settings", "hidden_size=64"], r"gives no weights for \d+ parts of the encoder"),
        (["--folds", "100"], r"There are 47 molecules with a label for 100 folds\. Take fewer --folds"),
        (["--targets", "oxygen", "--max_validation_molecules", "1"], r"ROC-AUC is undefined for every target"),
        (["--targets", "kind", "--task", "classes"], r"has labels up to 3, but no molecule has 0.*--class_names"),
    ],
)
def test_what_data_and_settings_tell_is_said_before_anything_is_deleted(base, table, tmp_path, flags, reason):
    shifted = tmp_path / "shifted.csv"
    lines = table.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    shifted.write_text(
        "\n".join([lines[0], *(",".join([*row[:3], str(int(row[3]) + 1), row[4]]) for row in rows)]) + "\n"
    )
    preprocess.main(["--source", "csv", "--input", str(shifted), "--output", str(tmp_path / "data"), "--targets", "size,oxygen,kind",
                     "--tasks", "kind=classes", "oxygen=classification", "--split_column", "part", "--split", "given"])  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=reason):
        run(base, tmp_path / "data", tmp_path / "out", "--targets", "size", "--overwrite", *flags)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_that_is_trained_on_keeps_what_zero_and_one_mean(base, table, tmp_path):
    flags = ["--targets", "oxygen", "--task", "classification", "--epochs", "1"]
    names = ["--preprocessing", "split_column=part"]
    run(base, table, tmp_path / "first", *flags, *names, "class_names=without,with")
    run(tmp_path / "first", table, tmp_path / "second", *flags)
    config = MoleBlendForSequenceClassification.from_pretrained(tmp_path / "second").config
    assert config.target_class_names == [["without", "with"]]
    with pytest.raises(ValueError, match=r"0 for 'with' and 1 for 'without', but for the model 0 is 'without'"):
        run(tmp_path / "second", table, tmp_path / "third", *flags, *names, "class_names=with,without")
    run(tmp_path / "second", table, tmp_path / "third", *flags, *names, "class_names=no,yes")  # other words


def test_a_head_of_other_targets_is_not_continued(base, table, tmp_path, capsys):
    flags = ["--epochs", "1", "--learning_rate", "1e-12"]
    run(base, table, tmp_path / "first", "--targets", "oxygen", "--task", "classification", *flags)
    first = MoleBlendForSequenceClassification.from_pretrained(tmp_path / "first").classifier.state_dict()
    for target, task, name in (("size", "regression", "other"), ("oxygen", "classification", "same")):
        capsys.readouterr()
        run(tmp_path / "first", table, tmp_path / name, "--targets", target, "--task", task, *flags)
        found = MoleBlendForSequenceClassification.from_pretrained(tmp_path / name).classifier.state_dict()
        assert torch.allclose(found["dense.weight"], first["dense.weight"], atol=1e-6) == (name == "same")
        assert ("so new: nothing; its head is continued" in capsys.readouterr().out) == (name == "same")


def test_a_checkpoint_in_half_precision_is_trained_in_float32(base, table, tmp_path):
    half = MoleBlendForPreTraining.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    MoleBlendProcessor().save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in MoleBlendForPreTraining.from_pretrained(tmp_path / "half").parameters()} == {
        torch.bfloat16
    }
    run(tmp_path / "half", table, tmp_path / "out", "--targets", "size", "--epochs", "1")
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_notes_say_what_users_may_not_have_meant(base, table, tmp_path):
    notes = run(base, table, tmp_path / "out", "--targets", "oxygen,size", "--epochs", "1")["notes"]
    assert [note for note in notes if "Target 'oxygen' is 0 or 1 everywhere" in note]
    assert not [note for note in notes if "'size'" in note]
    with pytest.raises(ValueError, match=r"The target 'size' is named 2 times\. Name it once\."):
        run(base, tmp_path / "out" / "data", tmp_path / "new", "--targets", "size,oxygen,size")
    with pytest.raises(ValueError, match=r"No target is named, and .*Name the columns of a file with --targets"):
        run(base, table, tmp_path / "new")
    empty = tmp_path / "empty.csv"
    empty.write_text(
        "\n".join(
            f"{line},{'nothing' if index == 0 else ''}" for index, line in enumerate(table.read_text().splitlines())
        )
    )
    with pytest.raises(ValueError, match=r"has a label of nothing: all cells are empty"):
        run(base, empty, tmp_path / "new", "--targets", "nothing")


def test_a_checkpoint_that_is_not_there_is_not_asked_of_the_hub(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no 'nothing' in '.*'\. Name the folder of a checkpoint"):
        run(tmp_path / "nothing", table, tmp_path / "out", "--targets", "size")


def test_classes_that_are_not_counted_from_zero_are_refused(base, table, tmp_path):
    shifted = tmp_path / "shifted.csv"
    lines = table.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    shifted.write_text(
        "\n".join([lines[0], *(",".join([*row[:3], str(int(row[3]) + 1), row[4]]) for row in rows)]) + "\n"
    )
    with pytest.raises(ValueError, match=r"has labels up to 3, but no molecule has 0.*class_names=1,2,3"):
        run(base, shifted, tmp_path / "out", "--targets", "kind", "--task", "classes")


def test_a_large_mean_takes_no_digits_from_what_is_learned_and_predicted(base, table, tmp_path):
    """As of total energies: the same model but for the mean."""
    far = tmp_path / "far.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    for row in lines[1:]:
        row[1] = row[1] and repr(float(row[1]) / 100 + 2.0**24)
    near = tmp_path / "near.csv"
    far.write_text("\n".join(map(",".join, lines)) + "\n")
    for row in lines[1:]:
        row[1] = row[1] and repr(float(row[1]) - 2.0**24)
    near.write_text("\n".join(map(",".join, lines)) + "\n")
    found = [
        run(base, path, tmp_path / path.stem, "--targets", "size")["models"]["MoleBLEND"]["test"]
        for path in (near, far)
    ]
    assert found[0]["mean"]["rmse"]["mean"] == pytest.approx(found[1]["mean"]["rmse"]["mean"], rel=1e-4)


def test_more_processes_than_molecules_of_a_part_share_what_there_is(base, table, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = ["--model", str(base), "--input", str(table), "--split", "given", *SHORT, "--targets", "size"]
    arguments += ["--preprocessing", "split_column=part", "--output_dir", str(tmp_path / "out")]
    command = [*launch, str(TRAINING / "finetune.py"), *arguments, "--max_validation_molecules", "1", "--epochs", "1"]
    subprocess.run(command, check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_card_of_folds_says_what_was_done(base, table, tmp_path):
    results = run(base, table, tmp_path / "out", "--targets", "size", "--folds", "2", "--baseline")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 models, one a fold" in card
    assert "made on the folds that a model was not trained on" in card
    assert not any("over seeds" in sentence for sentence in results["comparison"])
    assert all("MoleBLEND, ensemble" not in sentence for sentence in results["comparison"])
