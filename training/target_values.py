"""What a cell of a target says -> the number that is stored, or why there is none; of atoms, in the order of the graph.

The values of atoms are given in the order in which the input writes its atoms, one for each of them or one for each atom of
the graph, which may lack hydrogens that are written, or have some that are not. Another number of values is no list of that
molecule. As text they are separated by spaces or semicolons, or are a JSON list; `null`, `nan` and `n/a` are missing. A
list that starts with a word in brackets has that word where a value is missing: `[?] 7.3 ? 4.1`, as RDKit writes it.
"""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from rdkit import Chem

from corpora import Target
from moleblend_hf.molecules_moleblend import FeaturizationSettings, MoleculeError, input_atoms

TASKS = ("regression", "classification", "classes")  # numbers; 0 and 1; indices of classes
MISSING_VALUES = frozenset(("", "nan", "na", "n/a", "none", "null"))
BOOLEANS = {"false": 0.0, "true": 1.0}
LARGEST = float(np.finfo(np.float32).max)  # value of an atom that is stored

_MARKER = re.compile(r"\[([^\s\]]*)\]\s+")
_SEPARATOR = re.compile(r"\s*[;,]\s*|\s+")


def check_class_names(names: Sequence[str], targets: Iterable[Target]) -> None:
    """Raise unless these names, which the targets have that are of classes, tell their classes apart."""
    if len(names) == 1 or len(set(names)) < len(names):
        raise ValueError(f"class_names must be two or more different names, got {', '.join(map(repr, names))}.")
    if missing := [name for name in names if name.strip().lower() in MISSING_VALUES]:
        raise ValueError(f"A cell {missing[0]!r} is a missing value, so no class can have this name. Rename it there.")
    named = [target for target in targets if target.class_names]
    if names and not named:
        raise ValueError(
            "class_names are given, but no target is of classes. Say which is with --tasks NAME=classes, or "
            "NAME=classification if there are two."
        )
    for target in named:
        if target.task == "classification" and len(names) != 2:
            raise ValueError(
                f"Target {target.name!r} has the task 'classification', of two classes, but there are {len(names)} "
                f"class_names. Take --tasks {target.name}=classes."
            )


def stored_number(value: str | float, target: Target, factor: float = 1.0) -> float:
    """The number that a cell of a target is stored as: the index of a class, else the value times `factor`."""
    if target.task == "classification" and isinstance(value, str) and value.strip() not in target.class_names:
        value = {name: bool(number) for name, number in BOOLEANS.items()}.get(value.strip().lower(), value)
    if isinstance(value, bool):
        # Classes that are named so may be in any order; else it is 1 or 0.
        booleans = [name for name in target.class_names if name.lower() in BOOLEANS]
        named = next((name for name in booleans if BOOLEANS[name.lower()] == value), str(value))
        value = named if booleans else float(value)
    text = value.strip() if isinstance(value, str) else f"{value:g}"
    if text in target.class_names:
        return float(target.class_names.index(text))
    number = _as_number(text if isinstance(value, str) else value) * factor
    if target.class_names:
        # Where names are numbers, 1.0 is the class "1", and a number that is no name is a mistake and no index.
        names = [_as_number(name) for name in target.class_names]
        if number in names and not any(map(math.isnan, names)):
            return float(names.index(number))
        fits = number in range(len(names)) and all(map(math.isnan, names))
        expected = f"none of its classes {', '.join(target.class_names)}"
    elif target.task == "classes":
        fits, expected = number >= 0 and number.is_integer(), "no index of a class (0, 1, 2, ...)"
    else:
        fits, expected = (
            math.isfinite(number) and abs(number) <= (LARGEST if target.of_atoms else math.inf),
            "no number",
        )
        if fits and target.task == "classification":
            fits, expected = number in (0, 1), "neither 0 nor 1"
    if not fits:
        raise MoleculeError(f"has {value!r} for target {target.name!r}, which is {expected}", "target", "Fix it")
    return number


def stored_numbers(values: str | list, target: Target, factor: float = 1.0) -> list[float | None]:
    """`stored_number` of each value of a list, or of the text of one; None where missing."""
    if isinstance(values, str):
        marker = _MARKER.match(values)
        missing = {*MISSING_VALUES, marker[1].lower()} if marker else MISSING_VALUES
        text = values[marker.end() :] if marker else values.removeprefix("[").removesuffix("]")
        items = [token.strip('"') for token in _SEPARATOR.split(text.strip())] if text.strip() else []
        values = [None if token.lower() in missing else token for token in items]
    return [
        None if value is None or value != value else stored_number(value, target, factor)  # NaN is not itself
        for value in values
    ]


class AtomOrder:
    """Puts values of atoms, as the input has them, into the order of the graph's atoms."""

    def __init__(
        self, molecule: str | Chem.Mol, settings: FeaturizationSettings, num_atoms: int, order: Sequence[int] | None
    ) -> None:
        """Of one molecule.

        Args:
            molecule: the input.
            settings: by which it became a graph.
            num_atoms: of the graph.
            order: for each atom of the graph its place among them in the order of the input; None if that is the same.
        """
        self._order = list(range(num_atoms)) if order is None else order
        self._input_of_atom, self._num_written = input_atoms(molecule, settings)
        if len(self._input_of_atom) != num_atoms:
            raise MoleculeError(
                f"has {num_atoms} atoms, but {len(self._input_of_atom)} if its hydrogens are dropped after it is read, so "
                "that values of atoms have no place",
                "target",
                "Leave out hydrogens that are written",
            )

    def arranged(self, values: list, name: str) -> list:
        """The values for the atoms of the graph; None for hydrogens that were added and have none."""
        if len(values) == len(self._order):
            return [values[index] for index in self._order]
        if len(values) != self._num_written:
            raise MoleculeError(
                f"has {len(values)} values for the target of atoms {name!r}, but {self._num_written} atoms are written, of "
                f"which the graph has {len(self._order)}",
                "target",
                "Give one for each",
            )
        sources = [int(self._input_of_atom[index]) for index in self._order]
        return [None if source < 0 else values[source] for source in sources]


def _as_number(value: str | float) -> float:
    try:
        return math.nan if "_" in str(value) else float(value)  # Python reads 1_000, where it is no number
    except ValueError:
        return math.nan
