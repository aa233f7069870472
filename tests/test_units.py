"""Units: literature values, round trips, and refusals by message."""

import itertools

import numpy as np
import pytest

from units import UNITS, convert, dimension_of, factor

PAIRS = [pair for units in UNITS.values() for pair in itertools.permutations(units, 2)]


@pytest.mark.parametrize(
    ("unit", "to", "value"),
    [
        # NIST, CODATA 2022 and older: the digits given do not differ between adjustments.
        ("hartree", "eV", 27.211386),
        ("hartree", "meV", 27211.386),
        ("hartree", "kcal/mol", 627.5095),
        ("hartree", "kJ/mol", 2625.4996),
        ("eV", "kcal/mol", 23.060548),
        ("eV", "kJ/mol", 96.485332),
        ("kcal/mol", "kJ/mol", 4.184),
        ("bohr", "angstrom", 0.529177211),
        ("bohr^2", "angstrom^2", 0.280028521),
        ("bohr^3", "angstrom^3", 0.148184711),
        ("e bohr", "D", 2.5417464),
        ("GHz", "MHz", 1000.0),
        ("cal/(mol K)", "J/(mol K)", 4.184),
    ],
)
def test_factors_are_those_of_the_literature(unit, to, value):
    assert factor(unit, to) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize(("unit", "to"), PAIRS)
def test_there_and_back_is_the_same_value(unit, to):
    values = np.array([[-76.4, 0.0], [1e-6, np.nan]])
    np.testing.assert_allclose(convert(convert(values, unit, to), to, unit), values, rtol=1e-15)


def test_a_unit_to_itself_changes_nothing():
    for unit in itertools.chain.from_iterable(UNITS.values()):
        assert factor(unit, unit) == 1.0


def test_conversion_keeps_shape_and_precision_and_leaves_its_argument_alone():
    values = np.array([[1.0, 2.0]], np.float32)
    converted = convert(values, "eV", "meV")
    assert (converted.dtype, converted.tolist()) == (np.float32, [[1000.0, 2000.0]])
    assert values.tolist() == [[1.0, 2.0]]
    np.testing.assert_allclose(convert(np.array([1, 2]), "hartree", "eV"), [27.211386, 54.422772], rtol=1e-7)


def test_no_unit_has_two_dimensions():
    names = list(itertools.chain.from_iterable(UNITS.values()))
    assert len(set(names)) == len(names)
    assert dimension_of("bohr^3") == "volume"


def test_unknown_unit_lists_the_units_there_are():
    with pytest.raises(
        ValueError, match=r"Unknown unit 'Hartree'.*energy: hartree, eV, meV, kcal/mol, kJ/mol; length"
    ):
        factor("Hartree", "eV")
    with pytest.raises(ValueError, match=r"Unknown unit 'ev'.*cal/\(mol K\)"):
        convert(np.ones(2), "hartree", "ev")


def test_units_of_different_dimensions_name_both():
    with pytest.raises(
        ValueError, match=r"'eV' is a unit of energy and 'D' one of dipole moment.*one of: hartree, eV"
    ):
        factor("eV", "D")
