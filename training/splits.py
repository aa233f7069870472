"""Named splits into training, validation and test: which molecules belong together, and where they go.

"Scaffold split" means several things in the literature. Each name here is one of them, to the letter: the same rows in
the same order are assigned as by the named source.

| name              | scaffold          | order in which the sets of one scaffold are taken               | seed |
|-------------------|-------------------|-----------------------------------------------------------------|------|
| random            | none              | each row is a set of its own, in random order                   | yes  |
| scaffold          | without chirality | largest first; of equal size, the one that appears last first   | no   |
| scaffold-unimol   | with chirality    | the same                                                        | no   |
| scaffold-balanced | without chirality | above half the validation or test size first; both parts random | yes  |

A set goes to the first of training, validation and test where it fits whole, so a smaller one may still go where a
larger one did not fit. In "scaffold" and "scaffold-unimol" validation may also take the room that training left over,
in "scaffold-balanced" it may not. All molecules without a ring have the empty scaffold, and are one set. What RDKit
cannot parse is left out before anything is counted.

Sources:
    scaffold: DeepChem's `ScaffoldSplitter` (deepchem/splits/splitters.py), the split of MoleculeNet (Wu et al. 2018,
        doi:10.1039/C7SC02664A). OGB publishes row numbers, and how they were made is not settled
        (snap-stanford/ogb#487): take those from OGB.
    scaffold-unimol: `ScaffoldSplitter` of GEM (PaddlePaddle/PaddleHelix, pahelix/utils/splitters.py), before it
        `scaffold_split` of Hu et al. (snap-stanford/pretrain-gnns, chem/splitters.py). Uni-Mol publishes its splits as
        files and says that they are GEM's (deepmodeling/Uni-Mol#147); MoleBLEND takes Uni-Mol's. The `unimol_tools` do
        something else: scikit-learn's `GroupKFold` over the same scaffolds, so k folds and no test set.
    scaffold-balanced: `scaffold_split(balanced=True)` of chemprop 1 (chemprop/data/scaffold.py), equal for every seed.
        chemprop 2 gives the name to another algorithm, the scaffold sampler of the package `astartes`.
"""

import hashlib
import math
import random
from collections.abc import Iterable

import numpy as np
from rdkit import Chem
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

SCAFFOLD_SPLITS = ("scaffold", "scaffold-balanced", "scaffold-unimol")
SPLITS = ("random", *SCAFFOLD_SPLITS)
TRAIN, VALIDATION, TEST = range(3)


def scaffold_of(mol: Chem.Mol, definition: str) -> str:
    """SMILES of the Bemis-Murcko scaffold (doi:10.1021/jm9602928): rings, linkers, atoms double-bonded to them.

    Args:
        mol: A molecule; its hydrogens are ignored, as the definitions read SMILES.
        definition: One of `SCAFFOLD_SPLITS`. Only "scaffold-unimol" tells stereoisomers of a scaffold apart.

    Returns:
        RDKit's `MurckoScaffoldSmiles`, "" for a molecule without a ring.

    Raises:
        ValueError: If the definition has no scaffolds, or RDKit fails on this molecule (as in all of the sources).
    """
    if definition not in SCAFFOLD_SPLITS:
        raise ValueError(f"{definition!r} is no split by scaffold. Those there are: {', '.join(SCAFFOLD_SPLITS)}.")
    try:
        heavy = mol if mol.GetNumAtoms() == mol.GetNumHeavyAtoms() else Chem.RemoveHs(mol)
        return str(MurckoScaffoldSmiles(mol=heavy, includeChirality=definition == "scaffold-unimol"))
    except ValueError as error:  # what RDKit raises for chemistry it rejects derives from it
        raise ValueError(
            f"RDKit finds no scaffold of {Chem.MolToSmiles(mol)!r}: {error}. "
            "Leave the molecule out, or split at random."
        ) from error


def assign_splits(
    definition: str,
    rows: int | np.ndarray,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> np.ndarray:
    """The split of each row, int8: 0 training, 1 validation, 2 test.

    Args:
        definition: One of `SPLITS`; the docstring of this file says what each does.
        rows: For "random" the number of rows; for the others an integer for each row, equal where the scaffolds are.
            Which integers does not matter, the order of the rows does.
        fractions: Shares of training, validation and test. Scaffold sets stay whole, so those are approached, not met.
        seed: Of the random order; "scaffold" and "scaffold-unimol" have none.

    Raises:
        ValueError: If an argument is none of these.
    """
    if definition not in SPLITS:
        raise ValueError(f"Unknown split {definition!r}. Those there are: {', '.join(SPLITS)}.")
    check_fractions(fractions)
    if definition == "random":
        return _assign_rows(rows, fractions, seed)

    scaffolds = np.asarray(rows)
    if scaffolds.ndim != 1 or not np.issubdtype(scaffolds.dtype, np.integer):
        raise ValueError(
            f"The split {definition!r} takes an integer for each row, equal where the scaffolds are, in an array of "
            f"one dimension; got {scaffolds.dtype} of shape {scaffolds.shape}. "
            "`numpy.unique(scaffolds, return_inverse=True)[1]` makes them from SMILES."
        )
    _, first_row, set_of_row, sizes = np.unique(scaffolds, return_index=True, return_inverse=True, return_counts=True)
    if definition == "scaffold-balanced":
        order = _large_sets_then_small(sizes, first_row, fractions, seed)
        split_of_set = _fill(sizes, order, fractions, share_room=False)
    else:
        order = np.lexsort((first_row, sizes))[::-1]
        split_of_set = _fill(sizes, order, fractions, share_room=True)
    return split_of_set[set_of_row]


def split_hash(ids: Iterable[str]) -> str:
    r"""What a part of a split holds, as one number: SHA-256 (hex) of its sorted ids, joined by "\n", in UTF-8.

    Ids sort by code point, which is also the order of their bytes; repeated ids stay. In a shell, for a file with an
    id on each line: `LC_ALL=C sort ids.txt | head -c -1 | sha256sum`. Holds the ids in memory, about 100 bytes each.
    """
    digest = hashlib.sha256()
    separator = ""
    for name in sorted(ids):
        digest.update(f"{separator}{name}".encode())
        separator = "\n"
    return digest.hexdigest()


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Refuse fractions that are not three shares of one."""
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(
            "fractions must be three non-negative numbers that add up to 1 (training, validation, test), "
            f"got {fractions}. For example (0.8, 0.1, 0.1), or (0.9, 0.1, 0) without a test set."
        )


def _assign_rows(num_rows: int | np.ndarray, fractions: tuple[float, float, float], seed: int) -> np.ndarray:
    """Random split of rows; the sizes are the fractions to the nearest row."""
    if not isinstance(num_rows, int | np.integer) or num_rows < 0:
        raise ValueError(
            f"The split 'random' takes the number of rows, got {num_rows!r}. "
            f"Give len(rows), or choose one of {', '.join(SCAFFOLD_SPLITS)}."
        )
    end_of_train, end_of_validation = np.rint(np.cumsum(fractions[:2]) * num_rows).astype(int)
    order = np.random.default_rng(seed).permutation(num_rows)
    splits = np.full(num_rows, TEST, np.int8)
    splits[order[:end_of_train]] = TRAIN
    splits[order[end_of_train:end_of_validation]] = VALIDATION
    return splits


def _large_sets_then_small(
    sizes: np.ndarray, first_row: np.ndarray, fractions: tuple[float, float, float], seed: int
) -> np.ndarray:
    """Order of "scaffold-balanced": sets above half the validation or test size, then the rest, each part shuffled."""
    num_rows = int(sizes.sum())
    is_large = (sizes > fractions[VALIDATION] * num_rows / 2) | (sizes > fractions[TEST] * num_rows / 2)
    by_appearance = np.argsort(first_row)
    large = by_appearance[is_large[by_appearance]].tolist()
    small = by_appearance[~is_large[by_appearance]].tolist()
    # Python's generator and its shuffle of lists, and one generator for both parts: so the order is chemprop's.
    generator = random.Random(seed)
    generator.shuffle(large)
    generator.shuffle(small)
    return np.array(large + small, dtype=int)


def _fill(sizes: np.ndarray, order: np.ndarray, fractions: tuple[float, float, float], share_room: bool) -> np.ndarray:
    """The split of each set, taken in `order`; `share_room` lets validation have what training left over."""
    num_rows = int(sizes.sum())
    train_room = fractions[TRAIN] * num_rows
    # The sum of the fractions before the product, as in the sources: at a limit, rounding decides.
    validation_room = (fractions[TRAIN] + fractions[VALIDATION] if share_room else fractions[VALIDATION]) * num_rows
    split_of_set = np.full(len(sizes), TEST, np.int8)
    in_train = in_validation = 0
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if in_train + size <= train_room:
            split_of_set[index] = TRAIN
            in_train += size
        elif in_validation + size + (in_train if share_room else 0) <= validation_room:
            split_of_set[index] = VALIDATION
            in_validation += size
    return split_of_set
