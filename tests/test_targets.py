"""Labels in their own units against outputs of a head: transforms and their inverses, the loss and its weights."""

import pytest
import torch
from tiny import tiny_config
from torch.nn import functional as F
from transformers.utils.generic import find_labels

from moleblend_hf import MoleBlendForSequenceClassification, MoleBlendForTokenClassification
from moleblend_hf.configuration_moleblend import TARGET_TRANSFORMS
from moleblend_hf.targets_moleblend import (
    TRANSFORMS,
    in_target_units,
    problem_type_of,
    property_loss,
    transformed,
    untransformed,
)

NAN = float("nan")
SCALED = {"target_means": [-2.0, 1.0, 5.0], "target_scales": [0.5, 2.0, 10.0]}


def regression(**changes):
    return tiny_config(num_labels=3, target_transforms=["log10", "signed_log10", "none"], **changes)


@pytest.fixture
def labels():
    """12 molecules: concentrations from 1e-9 to 1, both signs over 12 orders of magnitude with 0, anything; and gaps."""
    torch.manual_seed(0)
    wide = torch.logspace(-6, 6, 12) * torch.tensor([1.0, -1.0]).repeat(6)
    wide[3] = 0
    values = torch.stack([torch.logspace(-9, 0, 12), wide, torch.randn(12)], dim=-1)
    values[4, 0] = values[5] = NAN
    return values


def test_transforms_invert_exactly():
    wide = torch.logspace(-30, 30, 121, dtype=torch.float64)
    for name, (forward, inverse) in TRANSFORMS.items():
        values = wide if name == "log10" else torch.cat([-wide, torch.zeros(1, dtype=torch.float64), wide])
        torch.testing.assert_close(inverse(forward(values)), values, rtol=1e-12, atol=0, msg=name)
    assert set(TRANSFORMS) == set(TARGET_TRANSFORMS)


def test_transforms_are_by_target_and_keep_gaps(labels):
    config = regression()
    result = transformed(labels, config)
    expected = torch.stack(
        [labels[:, 0].log10(), labels[:, 1].sign() * (1 + labels[:, 1].abs()).log10(), labels[:, 2]], dim=-1
    )
    torch.testing.assert_close(result, expected, equal_nan=True)
    torch.testing.assert_close(untransformed(result, config), labels, equal_nan=True, rtol=1e-5, atol=1e-9)
    assert transformed(labels, tiny_config()) is untransformed(labels, tiny_config()) is labels


@pytest.mark.parametrize("scaled", [{}, SCALED], ids=["plain", "scaled"])
def test_the_loss_is_taken_of_transformed_values_in_standard_deviations(labels, scaled):
    config = regression(**scaled)
    outputs = torch.randn(12, 3, requires_grad=True)
    loss = property_loss(outputs, labels, config)
    means, scales = scaled.get("target_means", [0.0] * 3), scaled.get("target_scales", [1.0] * 3)
    by_hand = []
    for row in range(12):
        for target, transform in enumerate(
            (lambda y: y.log10(), lambda y: y.sign() * (1 + y.abs()).log10(), lambda y: y)
        ):
            if not labels[row, target].isnan():
                value = (transform(labels[row, target]) - means[target]) / scales[target]
                by_hand.append((outputs[row, target] - value) ** 2)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    loss.backward()
    assert outputs.grad.isfinite().all()
    assert ((outputs.grad == 0) == labels.isnan()).all()


def test_outputs_in_target_units_have_no_loss(labels):
    outputs = torch.randn(4, 5, 3)  # of atoms, say
    config = regression(**SCALED)
    torch.testing.assert_close(
        property_loss(outputs, in_target_units(outputs, config), config), torch.tensor(0.0), atol=1e-10, rtol=0
    )


def test_units_are_computed_in_fp32_where_there_is_anything_to_compute():
    """In bf16, -412.34 is -412."""
    config = tiny_config(num_labels=1, target_means=[-412.34], target_scales=[1.0])
    outputs = torch.zeros(2, 1, dtype=torch.bfloat16)
    assert in_target_units(outputs, config)[0, 0].item() == pytest.approx(-412.34, abs=1e-4)
    assert in_target_units(outputs, tiny_config(num_labels=1)) is outputs


def test_a_value_without_a_logarithm_spoils_the_loss_and_is_no_gap():
    config = tiny_config(num_labels=1, target_transforms=["log10"])
    assert not property_loss(torch.zeros(2, 1), torch.tensor([[-1.0], [1.0]]), config).isfinite()


def problem(kind: str) -> tuple:
    """Config, outputs and labels with gaps of 6 molecules."""
    outputs = torch.randn(6, 3)
    if kind == "single_label_classification":
        return tiny_config(num_labels=3, problem_type=kind), outputs, torch.tensor([0, 2, -100, 1, 1, 0])
    labels = torch.randint(0, 2, (6, 3)).float()
    labels[0, 1] = labels[3] = NAN
    return tiny_config(num_labels=3, problem_type=kind), outputs, labels


KINDS = ["regression", "multi_label_classification", "single_label_classification"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_are_no_weights_and_only_their_ratios_count(kind):
    config, outputs, labels = problem(kind)
    plain = property_loss(outputs, labels, config)
    torch.testing.assert_close(property_loss(outputs, labels, config, torch.ones(labels.shape)), plain)
    torch.testing.assert_close(property_loss(outputs, labels, config, torch.full(labels.shape, 0.01)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_molecule_given_twice_is_one_of_weight_two(kind):
    config, outputs, labels = problem(kind)
    weights = torch.ones(labels.shape)
    weights[1] = 2
    twice = property_loss(torch.cat([outputs, outputs[1:2]]), torch.cat([labels, labels[1:2]]), config)
    torch.testing.assert_close(property_loss(outputs, labels, config, weights), twice)
    torch.testing.assert_close(
        property_loss(outputs, labels, config, torch.arange(6) != 1 if labels.dim() == 1 else weights != 2),
        property_loss(outputs[[0, 2, 3, 4, 5]], labels[[0, 2, 3, 4, 5]], config),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_and_no_weight_is_a_loss_of_zero_with_zero_gradient(kind):
    config, outputs, labels = problem(kind)
    for missing, weights in (
        (torch.full_like(labels, -100 if labels.dim() == 1 else NAN), None),
        (labels, torch.zeros(labels.shape)),
    ):
        outputs = outputs.detach().requires_grad_()
        loss = property_loss(outputs, missing, config, weights)
        loss.backward()
        assert loss == 0
        assert (outputs.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_gap_counts_for_nothing_in_integers_and_in_floating_point(kind, dtype):
    """NaN for a missing class makes all classes floating-point numbers; integers have no NaN."""
    config, outputs, labels = problem(kind)
    labels = labels.nan_to_num(-100).long()
    complete = (labels != -100).all(-1) if labels.dim() == 2 else labels != -100
    labels[~complete] = -100
    given = labels.to(dtype)
    if dtype.is_floating_point:
        given[~complete] = NAN
    expected = property_loss(outputs[complete], labels[complete], config)
    torch.testing.assert_close(property_loss(outputs, given, config), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integers(kind, dtype):
    config, outputs, labels = problem(kind)
    labels = (labels.nan_to_num(1) > 0).long()
    expected = property_loss(outputs, labels, config)
    torch.testing.assert_close(property_loss(outputs, labels.to(dtype), config), expected)
    if dtype == torch.uint8 and kind == "regression":
        high = torch.full_like(labels, 156, dtype=dtype)  # what -100 is among these
        torch.testing.assert_close(property_loss(outputs, high, config), property_loss(outputs, high.float(), config))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_another_shape_are_an_error(kind):
    config, outputs, labels = problem(kind)
    with pytest.raises(
        ValueError, match=rf"`labels` has shape .*; expected \(6.* for 3 labels and `problem_type=\"{kind}\"`"
    ):
        property_loss(outputs, labels[:4], config)
    with pytest.raises(ValueError, match="`label_weights` has shape"):
        property_loss(outputs, labels, config, torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "labels", "expected"),
    [
        ({"num_labels": 1}, None, "regression"),
        ({"num_labels": 1}, torch.zeros(2).long(), "regression"),
        ({"num_labels": 3, **SCALED}, torch.zeros(2, 3), "regression"),
        ({"num_labels": 3}, torch.zeros(2, 3), "multi_label_classification"),
        ({"num_labels": 3}, torch.zeros(2).long(), "single_label_classification"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.zeros(2, 3), "regression"),
    ],
)
def test_kind_of_the_problem_where_the_config_leaves_it_open(changes, labels, expected):
    assert problem_type_of(tiny_config(**changes), labels) == expected


def test_classes_weigh_as_in_torch():
    config, outputs, labels = problem("single_label_classification")
    class_weights = torch.tensor([0.2, 1.0, 3.0])
    weights = class_weights[labels.clamp(min=0)]
    expected = F.cross_entropy(outputs, labels, weight=class_weights)
    torch.testing.assert_close(property_loss(outputs, labels, config, weights), expected)


@pytest.mark.parametrize("model_class", [MoleBlendForSequenceClassification, MoleBlendForTokenClassification])
def test_weights_are_optional_to_the_trainer(model_class):
    """Its evaluation has no loss where one of these is not in the batch."""
    assert find_labels(model_class) == ["labels"]
