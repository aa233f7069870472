"""Splits: literal assignments, plain re-statements of the sources as oracles, and refusals by message."""

import hashlib
import random

import numpy as np
import pytest
from rdkit import Chem

from splits import SCAFFOLD_SPLITS, SPLITS, assign_splits, scaffold_of, split_hash

LACTONES = ("C[C@H]1CC[C@@H](C2CC2)O1", "C[C@H]1CC[C@H](C2CC2)O1")  # stereoisomers, also of the scaffold


def random_groups(seed: int) -> np.ndarray:
    """Up to 400 rows of scaffolds with sizes as uneven as in real data: a few large ones, many of one molecule."""
    generator = np.random.default_rng(seed)
    return np.minimum(generator.zipf(1.3, generator.integers(1, 400)), 1000)


def sets_in_order_of_appearance(groups: np.ndarray) -> list[list[int]]:
    sets: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        sets.setdefault(group, []).append(row)
    return list(sets.values())


def as_codes(parts: tuple[list[int], list[int], list[int]]) -> list[int]:
    code_of = {row: code for code, rows in enumerate(parts) for row in rows}
    return [code_of[row] for row in range(len(code_of))]


def deepchem_assignment(groups: np.ndarray, fractions: tuple[float, float, float]) -> list[int]:
    """What DeepChem's and GEM's splitters do, row lists and all."""
    train, validation, test = parts = ([], [], [])
    train_cutoff, validation_cutoff = fractions[0] * len(groups), (fractions[0] + fractions[1]) * len(groups)
    for rows in sorted(sets_in_order_of_appearance(groups), key=lambda rows: (len(rows), rows[0]), reverse=True):
        if len(train) + len(rows) <= train_cutoff:
            train += rows
        elif len(train) + len(validation) + len(rows) <= validation_cutoff:
            validation += rows
        else:
            test += rows
    return as_codes(parts)


def chemprop_assignment(groups: np.ndarray, fractions: tuple[float, float, float], seed: int) -> list[int]:
    """What chemprop 1 does when balanced, row lists and all."""
    train, validation, test = parts = ([], [], [])
    train_size, validation_size, test_size = (fraction * len(groups) for fraction in fractions)
    large, small = [], []
    for rows in sets_in_order_of_appearance(groups):
        is_large = len(rows) > validation_size / 2 or len(rows) > test_size / 2
        (large if is_large else small).append(rows)
    generator = random.Random(seed)
    generator.shuffle(large)
    generator.shuffle(small)
    for rows in large + small:
        if len(train) + len(rows) <= train_size:
            train += rows
        elif len(validation) + len(rows) <= validation_size:
            validation += rows
        else:
            test += rows
    return as_codes(parts)


# Scaffolds


@pytest.mark.parametrize("definition", SCAFFOLD_SPLITS)
@pytest.mark.parametrize(
    ("smiles", "scaffold"),
    [
        ("Cc1cc(Oc2nccc(CCC)c2)ccc1", "c1ccc(Oc2ccccn2)cc1"),  # RDKit's own example
        ("CCO", ""),
        ("[Na+].[Cl-]", ""),
        ("CC(=O)O.CCc1ccccc1", "c1ccccc1"),
        ("O=C1CCCCC1C", "O=C1CCCCC1"),  # what is double-bonded to the ring stays
    ],
)
def test_scaffold_is_rings_and_linkers_and_empty_without_a_ring(definition, smiles, scaffold):
    assert scaffold_of(Chem.MolFromSmiles(smiles), definition) == scaffold


def test_only_unimols_scaffolds_have_chirality():
    found = {name: {scaffold_of(Chem.MolFromSmiles(smiles), name) for smiles in LACTONES} for name in SCAFFOLD_SPLITS}
    assert found == {
        "scaffold": {"C1COC(C2CC2)C1"},
        "scaffold-balanced": {"C1COC(C2CC2)C1"},
        "scaffold-unimol": {"C1CO[C@H](C2CC2)C1", "C1CO[C@@H](C2CC2)C1"},
    }


@pytest.mark.parametrize("definition", SCAFFOLD_SPLITS)
def test_explicit_hydrogens_do_not_change_the_scaffold(definition):
    for smiles in (*LACTONES, "CCc1ccc[nH]1", "CCO"):
        mol = Chem.MolFromSmiles(smiles)
        assert scaffold_of(Chem.AddHs(mol), definition) == scaffold_of(mol, definition)


def test_a_molecule_that_rdkit_fails_on_is_named():
    mol = Chem.MolFromSmiles("CN1(=O)(=O)CC1", sanitize=False)
    Chem.FastFindRings(mol)
    with pytest.raises(ValueError, match=r"no scaffold of 'CN1\(=O\)\(=O\)CC1': .*valence.* Leave the molecule out"):
        scaffold_of(mol, "scaffold")


def test_a_split_without_scaffolds_is_refused():
    with pytest.raises(ValueError, match=r"'random' is no split by scaffold. Those there are: scaffold, scaffold-bal"):
        scaffold_of(Chem.MolFromSmiles("C"), "random")


# Assignments

# Set 0 has 3 rows, the sets 1 and 2 have 2, and 3, 4 and 5 have 1; they first appear in the order 3, 0, 2, 1, 4, 5.
GROUPS = np.array([3, 0, 2, 1, 0, 4, 2, 1, 0, 5])


@pytest.mark.parametrize("definition", ["scaffold", "scaffold-unimol"])
def test_largest_sets_go_first_and_of_equal_ones_the_last_to_appear(definition):
    # Taken in the order 0 (3 rows), 1 (2), 2 (2), 5, 4, 3 (1 each): 6 places, 2 places, 2 places.
    # Training: 0, 1, then 2 does not fit, 5 does. Validation: 2. Test: 4 and 3.
    expected = [2, 0, 1, 0, 0, 2, 1, 0, 0, 0]
    assert assign_splits(definition, GROUPS, (0.6, 0.2, 0.2)).tolist() == expected


def test_validation_takes_the_room_that_training_left_in_scaffold_but_not_in_balanced():
    # Room for 5, 2 and 3 rows. The set of 4 goes to training; one of 3 fits validation only with the place left over.
    groups = np.repeat([0, 1, 2], [4, 3, 3])
    assert assign_splits("scaffold", groups, (0.5, 0.2, 0.3)).tolist() == [0] * 4 + [2] * 3 + [1] * 3
    for seed in range(9):
        assert 1 not in assign_splits("scaffold-balanced", groups, (0.5, 0.2, 0.3), seed)


@pytest.mark.parametrize(
    ("seed", "expected"), [(1, [0, 2, 0, 0, 2, 1, 0, 0, 2, 0]), (2, [1, 2, 0, 0, 2, 0, 0, 0, 2, 0])]
)
def test_balanced_takes_sets_above_half_of_validation_or_test_first(seed, expected):
    # 6 places, 2 places, 2 places: the sets 0, 1 and 2 are above half of 2, and both seeds shuffle them to 2, 1, 0.
    # Then come 5, 3, 4 or 5, 4, 3. Training: 2, 1, the first two small ones. Test: 0. Validation: the last small one.
    assert assign_splits("scaffold-balanced", GROUPS, (0.6, 0.2, 0.2), seed).tolist() == expected


def test_random_assignment_of_ten_rows():
    assert assign_splits("random", 10, seed=0).tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1, 0]
    assert assign_splits("random", 10, seed=1).tolist() == [0, 0, 0, 2, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.9, 0.1, 0.0), (0.5, 0.0, 0.5), (1, 0, 0)])
def test_assignments_are_those_of_the_sources(fractions):
    for seed in range(100):
        groups = random_groups(seed)
        assert assign_splits("scaffold", groups, fractions).tolist() == deepchem_assignment(groups, fractions)
        assert assign_splits("scaffold-unimol", groups, fractions).tolist() == deepchem_assignment(groups, fractions)
        balanced = assign_splits("scaffold-balanced", groups, fractions, seed)
        assert balanced.tolist() == chemprop_assignment(groups, fractions, seed)


@pytest.mark.parametrize("definition", SPLITS)
def test_every_row_is_in_one_split_and_no_scaffold_in_two(definition):
    groups = random_groups(3)
    splits = assign_splits(definition, len(groups) if definition == "random" else groups)
    assert (splits.dtype, splits.shape) == (np.int8, groups.shape)
    assert set(splits.tolist()) == {0, 1, 2}
    if definition != "random":
        assert all(len(set(splits[groups == group].tolist())) == 1 for group in np.unique(groups))


@pytest.mark.parametrize("definition", SCAFFOLD_SPLITS)
def test_which_integers_stand_for_the_scaffolds_does_not_matter(definition):
    groups = random_groups(5)
    renamed = np.random.default_rng(0).permutation(1001)[groups].astype(np.int32)
    assert np.array_equal(assign_splits(definition, groups), assign_splits(definition, renamed))


def test_the_seed_matters_where_there_is_one():
    groups = random_groups(7)
    for definition, rows in (("random", len(groups)), ("scaffold-balanced", groups)):
        first, again, other = (assign_splits(definition, rows, seed=seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
    assert np.array_equal(assign_splits("scaffold", groups, seed=1), assign_splits("scaffold", groups, seed=2))


@pytest.mark.parametrize("num_rows", [0, 1, 9, 10, 1234])
def test_random_sizes_are_the_fractions_to_the_nearest_row(num_rows):
    sizes = np.bincount(assign_splits("random", num_rows), minlength=3)
    assert sizes.sum() == num_rows
    assert np.abs(sizes - np.array([0.8, 0.1, 0.1]) * num_rows).max() <= 1


@pytest.mark.parametrize("definition", SCAFFOLD_SPLITS)
def test_no_rows_give_no_splits(definition):
    assert assign_splits(definition, np.array([], int)).tolist() == []


# Refusals


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (float("nan"), 0.5, 0.5), ()])
def test_fractions_must_be_three_shares_of_one(fractions):
    with pytest.raises(ValueError, match=r"three non-negative numbers that add up to 1 .*got .*For example"):
        assign_splits("random", 10, fractions)


def test_unknown_split_lists_those_there_are():
    with pytest.raises(
        ValueError, match=r"Unknown split 'murcko'. Those there are: random, scaffold, scaffold-balanced, sc"
    ):
        assign_splits("murcko", 10)


@pytest.mark.parametrize("rows", [10, np.ones((2, 2), int), np.array([0.0, 1.0]), np.array(["c1ccccc1"])])
def test_scaffold_splits_take_an_integer_for_each_row(rows):
    with pytest.raises(ValueError, match=r"'scaffold' takes an integer for each row.*got .* of shape.*return_inverse"):
        assign_splits("scaffold", rows)


@pytest.mark.parametrize("rows", [np.arange(3), -1, 2.0])
def test_random_split_takes_a_number_of_rows(rows):
    with pytest.raises(ValueError, match=r"'random' takes the number of rows, got .*choose one of scaffold"):
        assign_splits("random", rows)


# Hash


def test_hash_is_sha256_of_the_sorted_ids_joined_by_newlines():
    assert split_hash(["b", "a", "Ω", "B"]) == hashlib.sha256("B\na\nb\nΩ".encode()).hexdigest()
    assert split_hash([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_hash_depends_on_the_ids_and_not_on_their_order():
    ids = [f"gdb_{index}" for index in range(100)]
    assert split_hash(iter(ids)) == split_hash(reversed(ids)) != split_hash(ids[1:])
    assert split_hash(["a", "a"]) != split_hash(["a"])
