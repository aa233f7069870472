"""A cache of generated conformers, which cost a thousand times more than anything else about a molecule."""

import errno
import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rdkit import Chem, rdBase

from moleblend_hf.molecules_moleblend import FeaturizationSettings, MoleculeError, embed_conformers

# What the result depends on beside the molecule.
SETTINGS = (
    "num_conformers",
    "conformer_seed",
    "max_conformer_atoms",
    "max_embedding_attempts",
    "max_mmff_iterations",
)
TABLE = """
    CREATE TABLE IF NOT EXISTS conformers (key BLOB PRIMARY KEY, num_atoms INTEGER, coordinates BLOB, reason TEXT)
    WITHOUT ROWID
"""


class ConformerCache:
    """Conformers in an SQLite file, which many processes may read and write at once.

    The key is the canonical SMILES with the settings and RDKit's version. An InChIKey would not do: tautomers share one,
    but neither a geometry nor an order of atoms. A molecule that has no conformer is remembered with the reason.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(TABLE)
        except sqlite3.Error as error:
            raise ValueError(
                f"{str(path)!r} cannot be used as a cache of conformers: {error}. Give an SQLite file that this script "
                "made, or the name of a new one."
            ) from error

    def embed(self, canonical: Chem.Mol, settings: FeaturizationSettings) -> np.ndarray:
        """What `embed_conformers` returns or raises, computed once."""
        key = _key(canonical, settings)
        found = self._connection.execute("SELECT * FROM conformers WHERE key = ?", (key,)).fetchone()
        if found is None:
            found = (key, *_embedded(canonical, settings))
            self._keep(found)
        _, num_atoms, coordinates, reason = found
        if reason is not None:
            raise MoleculeError(
                reason, "conformer", 'Pass coordinates, or use modality="2d+3d", which falls back to 2D'
            )
        return np.frombuffer(coordinates, dtype="<f4").reshape(-1, num_atoms, 3)

    def _keep(self, row: tuple[bytes, int, bytes | None, str | None]) -> None:
        try:
            self._connection.execute("INSERT OR REPLACE INTO conformers VALUES (?, ?, ?, ?)", row)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise OSError(errno.ENOSPC, "No space is left for the cache of conformers") from error

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM conformers").fetchone()[0])


def _key(canonical: Chem.Mol, settings: FeaturizationSettings) -> bytes:
    values = {name: value for name, value in asdict(settings).items() if name in SETTINGS}
    # Not canonical: with the order of the atoms, which is that of the coordinates.
    text = json.dumps([Chem.MolToSmiles(canonical, canonical=False), values, rdBase.rdkitVersion], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _embedded(canonical: Chem.Mol, settings: FeaturizationSettings) -> tuple[int, bytes | None, str | None]:
    num_atoms = canonical.GetNumAtoms()
    try:
        return num_atoms, embed_conformers(canonical, settings).astype("<f4").tobytes(), None
    except MoleculeError as error:
        return num_atoms, None, error.reason
