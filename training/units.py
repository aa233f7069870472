"""Conversion between the units of molecular properties; factors from the CODATA values of `scipy.constants`."""

import numpy as np
from scipy import constants

BOHR = constants.physical_constants["Bohr radius"][0]
DEBYE = 1e-21 / constants.c  # in C m: 1e-18 statcoulomb centimetre, the definition of the unit

# Dimension -> unit -> its value in SI units, per particle where the unit is per mole.
UNITS: dict[str, dict[str, float]] = {
    "energy": {
        "hartree": constants.physical_constants["Hartree energy"][0],
        "eV": constants.eV,
        "meV": constants.milli * constants.eV,
        "kcal/mol": constants.kilo * constants.calorie / constants.N_A,  # the thermochemical calorie, 4.184 J
        "kJ/mol": constants.kilo / constants.N_A,
    },
    "length": {"bohr": BOHR, "angstrom": constants.angstrom},
    "area": {"bohr^2": BOHR**2, "angstrom^2": constants.angstrom**2},
    "volume": {"bohr^3": BOHR**3, "angstrom^3": constants.angstrom**3},
    "dipole moment": {"D": DEBYE, "e bohr": constants.e * BOHR},
    "frequency": {"GHz": constants.giga, "MHz": constants.mega},
    "concentration": {"mol/L": 1e3, "mmol/L": 1.0, "umol/L": 1e-3, "nmol/L": 1e-6},
    "logarithmic concentration": {"log10(mol/L)": 1.0},  # of which a factor would make nothing else
    "charge": {"e": constants.e},
    "chemical shift": {"ppm": 1e-6},
    "heat capacity": {"cal/(mol K)": constants.calorie / constants.N_A, "J/(mol K)": 1 / constants.N_A},
}


def factor(unit: str, to: str) -> float:
    """What a value in `unit` is multiplied by to be in `to`: `factor("hartree", "eV")` is 27.2114.

    Raises:
        ValueError: If one of the units is unknown, or they are units of different dimensions.
    """
    dimension, other = dimension_of(unit), dimension_of(to)
    if dimension != other:
        raise ValueError(
            f"{unit!r} is a unit of {dimension} and {to!r} one of {other}. "
            f"Convert {unit!r} to one of: {', '.join(UNITS[dimension])}."
        )
    return UNITS[dimension][unit] / UNITS[dimension][to]


def convert(values: np.ndarray, unit: str, to: str) -> np.ndarray:
    """`values` in the unit `to`, with their shape and floating-point type; missing values (NaN) stay missing."""
    return np.asarray(values) * factor(unit, to)


def dimension_of(unit: str) -> str:
    """Name of the dimension that `unit` measures, a key of `UNITS`.

    Raises:
        ValueError: If the unit is unknown; the message lists those there are.
    """
    for dimension, units in UNITS.items():
        if unit in units:
            return dimension
    known = "; ".join(f"{dimension}: {', '.join(units)}" for dimension, units in UNITS.items())
    raise ValueError(f"Unknown unit {unit!r}. The units there are: {known}.")
