"""training/objective.py and batches.py: neither the cut of a batch nor its padding changes what is drawn or learned."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import SMILES, golden_model, without_dropout

from batches import StepBatches, cost, cut, shared
from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor
from moleblend_hf.graphs_moleblend import Budget
from objective import ATOMS, NOISE, PAIRS, count_targets, drawn, molecule_seeds, uniform

BUDGET = Budget(max_tokens=64, max_pairs=600)


@pytest.fixture(scope="module")
def molecules():
    """With and without a geometry, one of a single atom, one of two fragments."""
    processor = MoleBlendProcessor(modality="2d+3d")
    graphs = processor.featurize_many(SMILES[:3]) + MoleBlendProcessor(modality="2d").featurize_many(SMILES[3:])
    return processor, graphs


def batch_of(molecules, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    processor, graphs = molecules
    return dict(processor.pad([graphs[row] for row in rows])), torch.from_numpy(molecule_seeds(3, 5, np.array(rows)))


# Draws


def test_splitmix64_is_that_of_its_author():
    """First outputs of Vigna's C code for the state 1234567, in their upper 24 bits."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    from objective import GOLDEN_RATIO, _mix, _signed

    state = torch.tensor([_signed(1234567 + (index + 1) * GOLDEN_RATIO) for index in range(4)])
    assert [value % (1 << 64) for value in _mix(state).tolist()] == expected


@pytest.mark.parametrize("kind", [PAIRS, ATOMS, NOISE])
def test_draws_are_uniform_and_independent(kind):
    seeds = torch.from_numpy(molecule_seeds(0, 0, np.arange(400)))
    draws = uniform(seeds, kind, torch.arange(300)).double()
    assert 0 <= draws.min() < draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    for first, second in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        assert abs(correlation) < 4 / first.numel() ** 0.5


def test_molecules_epochs_seeds_and_kinds_draw_differently():
    counters = torch.arange(50)
    draws = [
        uniform(torch.from_numpy(molecule_seeds(seed, epoch, np.array([row]))), kind, counters)
        for seed, epoch, row, kind in ((0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 0, 0, 2))
    ]
    assert all(not torch.isclose(a, b).any() for i, a in enumerate(draws) for b in draws[:i])


def test_noise_is_normal_and_modalities_have_their_probabilities():
    config = without_dropout(noise_std=0.2)
    graph = MoleBlendProcessor(modality="2d+3d").featurize(SMILES[0])
    batch = dict(MoleBlendProcessor().pad([graph] * 300))
    found = drawn(batch, torch.from_numpy(molecule_seeds(0, 0, np.arange(300))), config)
    assert stats.kstest(found["coordinate_noise"].flatten().numpy() / 0.2, "norm").pvalue > 1e-3
    shares = torch.bincount(found["pair_modality_ids"].flatten(), minlength=3) / found["pair_modality_ids"].numel()
    np.testing.assert_allclose(shares, config.blend_probabilities, atol=0.01)
    shares = torch.bincount(found["atom_modality_ids"].flatten()) / found["atom_modality_ids"].numel()
    np.testing.assert_allclose(shares, config.atom_blend_probabilities, atol=0.03)


def test_a_molecule_draws_the_same_in_any_batch_and_at_any_padding(molecules):
    config = without_dropout()
    whole = drawn(*batch_of(molecules, [0, 1, 2, 3, 4]), config)
    for rows in ([4, 2], [1], [3, 0, 1]):
        part = drawn(*batch_of(molecules, rows), config)
        for place, row in enumerate(rows):
            n = molecules[1][row].num_atoms
            for name, values in part.items():
                dims = 2 if name == "pair_modality_ids" else 1
                assert torch.equal(values[place][(slice(n),) * dims], whole[name][row][(slice(n),) * dims])


# Losses


def test_targets_are_counted_as_the_model_counts_them(molecules):
    model = golden_model("pretrain").eval()
    for rows in ([0, 1, 2, 3, 4], [3, 4], [1], [0]):
        batch, seeds = batch_of(molecules, rows)
        found = drawn(batch, seeds, model.config)
        with torch.no_grad():
            outputs = model(**batch, **found)
        assert torch.equal(count_targets(batch, found["atom_modality_ids"], model.config), outputs.num_targets)


def test_parts_add_up_to_the_gradient_of_the_whole(molecules):
    """For each of the four losses, which are means over things of which the parts have unequal numbers."""
    torch.manual_seed(0)
    model = MoleBlendForPreTraining(without_dropout())
    batch, seeds = batch_of(molecules, [0, 1, 2, 3, 4])
    found = drawn(batch, seeds, model.config)
    whole = model(**batch, **found)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = torch.zeros(())
    for rows in ([0, 3], [2], [4, 1]):
        part, seeds = batch_of(molecules, rows)
        outputs = model(**part, **drawn(part, seeds, model.config), num_targets=whole.num_targets)
        outputs.loss.backward()
        losses += outputs.loss.detach()
    torch.testing.assert_close(losses, whole.loss.detach(), rtol=5e-7, atol=0)  # four of the last digits
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


# Batches


def test_every_part_fits_the_budget_and_every_molecule_is_in_one():
    sizes = np.random.default_rng(0).integers(1, 23, 300)
    for multiple_of in (1, 2, 3, 8):
        parts = cut(sizes, BUDGET, multiple_of)
        assert len(parts) % multiple_of == 0
        assert sorted(np.concatenate(parts).tolist()) == list(range(300))
        for part in parts:
            tokens = sizes[part].max() + 1
            assert len(part) * tokens <= BUDGET.max_tokens
            assert len(part) * tokens**2 <= BUDGET.max_pairs


@pytest.mark.parametrize("budget", [Budget(1024, 16_384), Budget.on("cuda")])
def test_processes_get_as_many_parts_of_about_the_same_cost(budget):
    sizes = np.random.default_rng(1).integers(4, 23, 4096)
    shares = shared(cut(sizes, budget, 8), sizes, 8)
    assert len({len(share) for share in shares}) == 1
    loads = [sum(cost(sizes[part]) for part in share) for share in shares]
    assert max(loads) < 1.1 * np.mean(loads)
    assert sum(map(len, shares)) <= len(cut(sizes, budget)) + 7


def test_cutting_by_size_saves_most_of_the_padding():
    sizes = np.random.default_rng(2).integers(4, 40, 1024)
    budget = Budget(2048, 60_000)

    def padded(parts):
        return sum(len(part) * (sizes[part].max() + 1) ** 2 for part in parts) / ((sizes + 1) ** 2).sum()

    assert padded(cut(sizes, budget)) < 1.1
    assert padded(np.split(np.arange(1024), 32)) > 2


def test_batches_are_a_function_of_seed_and_step_alone():
    sizes = np.random.default_rng(3).integers(1, 20, 21)

    def take(count, **options):
        batches = iter(StepBatches(sizes, batch_size=8, budget=BUDGET, seed=3, **options))
        return [next(batches) for _ in range(count)]

    def molecules(steps):
        return [sorted(row for part in step for row in part) for step in steps]

    whole = take(6)
    assert whole == take(6)
    assert all(len(set(a) | set(b)) == 16 for a, b in zip(molecules(whole)[::2], molecules(whole)[1::2], strict=True))
    assert whole[:2] != whole[2:4]  # the second epoch is shuffled anew
    assert take(3, first_step=3) == whole[3:]
    halves = [take(4, num_processes=2, process_index=rank) for rank in (0, 1)]
    assert molecules([first + second for first, second in zip(*halves, strict=True)]) == molecules(whole[:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 22}, "batch_size is 22, but there are 21 training molecules"),
        ({"batch_size": 8, "num_processes": 3}, r"batch_size must be a multiple of the processes \(3\), got 8"),
    ],
)
def test_batches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(np.ones(21, int), budget=BUDGET, seed=0, **options)
