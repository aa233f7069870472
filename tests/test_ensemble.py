"""An ensemble is its members: their mean, their loss, their weights, in one folder."""

import pytest
import torch
from tiny import SMILES, tiny_config
from transformers import Trainer, TrainingArguments

from moleblend_hf import (
    MoleBlendEnsembleConfig,
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForSequenceClassification,
    MoleBlendProcessor,
)

KINDS = ["regression", "multi_label_classification", "single_label_classification"]


def members(kind: str, number: int = 3, **changes) -> list[MoleBlendForSequenceClassification]:
    """Models with heads drawn wide, so that they disagree."""
    if kind == "regression":
        changes = {"target_means": [-2.0, 3.0], "target_scales": [0.5, 2.0], **changes}
    models = []
    for _ in range(number):
        model = MoleBlendForSequenceClassification(tiny_config(num_labels=2, problem_type=kind, **changes)).eval()
        torch.nn.init.normal_(model.classifier.out_proj.weight, std=2)
        models.append(model)
    return models


@pytest.fixture(scope="module")
def batch():
    return dict(MoleBlendProcessor()(SMILES))


@pytest.fixture(scope="module")
def labels():
    return torch.tensor([[0.0, 1], [1, float("nan")], [1, 1], [0, 0], [float("nan")] * 2])


def probabilities(logits: torch.Tensor, kind: str) -> torch.Tensor:
    return logits.softmax(-1) if kind == "single_label_classification" else logits.sigmoid()


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_is_the_mean_of_the_members(batch, kind):
    models = members(kind)
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(models)
    with torch.no_grad():
        outputs, single = ensemble(**batch), torch.stack([model(**batch).logits for model in models])
    torch.testing.assert_close(outputs.member_logits, single)
    if kind == "regression":
        torch.testing.assert_close(outputs.logits, single.mean(0))
    else:
        torch.testing.assert_close(probabilities(outputs.logits, kind), probabilities(single, kind).mean(0))
    assert single.std(0).min() > 1e-3


def test_the_trainer_predicts_with_an_ensemble(batch, tmp_path):
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(members("regression"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, remove_unused_columns=False, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: values[index] for name, values in batch.items()} for index in range(len(SMILES))]
    found = Trainer(ensemble, arguments).predict(rows).predictions
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), ensemble(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_one_is_the_model(batch, labels, kind):
    (model,) = members(kind, 1)
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members([model])
    labels = torch.tensor([0, 1, -100, 1, 0]) if kind == "single_label_classification" else labels
    ours, theirs = ensemble(**batch, labels=labels), model(**batch, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    if kind == "regression":
        torch.testing.assert_close(ours.logits, theirs.logits)
    else:
        torch.testing.assert_close(probabilities(ours.logits, kind), probabilities(theirs.logits, kind))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_certain_members_do_not_overflow(batch, kind):
    models = members(kind)
    for model in models:
        torch.nn.init.constant_(model.classifier.out_proj.weight, 0)
        model.classifier.out_proj.bias.data.copy_(torch.tensor([500.0, -500.0]))
    logits = MoleBlendEnsembleForSequenceClassification.from_members(models)(**batch).logits
    assert logits.isfinite().all()
    assert (logits[:, 0] - logits[:, 1] >= 999).all()


def test_members_learn_each_from_its_own_loss(batch, labels):
    models = members("regression", attention_dropout=0.0, activation_dropout=0.0, drop_path_rate=0.0)
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(models)
    weights = torch.rand(labels.shape)
    loss = ensemble(**batch, labels=labels, label_weights=weights).loss
    loss.backward()
    for member, model in zip(ensemble.members, models, strict=True):
        (model(**batch, labels=labels, label_weights=weights).loss / 3).backward()
        torch.testing.assert_close(member.classifier.dense.weight.grad, model.classifier.dense.weight.grad)
    torch.testing.assert_close(
        loss, sum(model(**batch, labels=labels, label_weights=weights).loss for model in models) / 3
    )


def test_states_are_stacked_by_member(batch):
    models = members("regression")
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(models)
    states = ensemble(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[-1][1], models[1](**batch, output_hidden_states=True).hidden_states[-1])
    assert len(ensemble(**batch, return_dict=False)) == 2  # logits and those of the members


def test_members_are_copies_and_their_calibrations_stay_behind():
    models = members("regression", 2, conformal_coverage=0.9, conformal_quantiles=[0.1, 0.2])
    models[1].config.conformal_quantiles = [0.3, 0.4]
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(models)
    assert (ensemble.config.num_members, ensemble.config.model_type) == (2, "moleblend_ensemble")
    assert ensemble.config.conformal_quantiles is ensemble.config.conformal_coverage is None
    assert ensemble.config.target_means == models[0].config.target_means
    ensemble.members[0].classifier.out_proj.bias.data += 1
    assert not torch.equal(ensemble.members[0].classifier.out_proj.bias, models[0].classifier.out_proj.bias)
    assert not ensemble.training


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_ensembles_are_equal(tmp_path, batch, kind):
    ensemble = MoleBlendEnsembleForSequenceClassification.from_members(members(kind))
    ensemble.config.conformal_coverage, ensemble.config.conformal_quantiles = 0.9, [0.5]
    if kind != "single_label_classification":
        ensemble.config.conformal_quantiles = [0.5, None]
    ensemble.save_pretrained(tmp_path)
    loaded, report = MoleBlendEnsembleForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.conformal_quantiles == ensemble.config.conformal_quantiles
    torch.testing.assert_close(loaded(**batch).logits, ensemble(**batch).logits, atol=1e-6, rtol=0)


def test_members_that_do_not_belong_together_are_an_error():
    from_members = MoleBlendEnsembleForSequenceClassification.from_members
    with pytest.raises(ValueError, match="There are no models"):
        from_members([])
    models = members("regression", 1)
    for changes, different in (
        ({"target_means": [0.0, 0.0]}, "target_means"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
    ):
        with pytest.raises(ValueError, match=rf"Model 1 differs from model 0 in \['{different}'\]"):
            from_members([*models, *members("regression", 1, **changes)])
    (piped,) = members("regression", 1)
    piped.config.custom_pipelines = {"molecular-property-prediction": {}}  # as a pipeline saves it
    assert from_members([*models, piped]).config.num_members == 2
    with pytest.raises(ValueError, match="whether to average values or probabilities"):
        MoleBlendEnsembleForSequenceClassification(MoleBlendEnsembleConfig(num_hidden_layers=1))
