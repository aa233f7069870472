"""training/conformers.py: a cached conformer is the one that would be made, to the bit, and failures are kept too."""

import errno
from dataclasses import replace

import numpy as np
import pytest

import conformers
from conformers import ConformerCache
from moleblend_hf.molecules_moleblend import (
    FeaturizationSettings,
    MoleculeError,
    embed_conformers,
    generate_conformers,
    parse_molecule,
)

SETTINGS = FeaturizationSettings(modality="2d+3d", num_conformers=2)


def molecule(smiles: str):
    return parse_molecule(smiles, None, SETTINGS).mol


@pytest.fixture
def calls(monkeypatch) -> list:
    found: list = []

    def counted(*args):
        found.append(args)
        return embed_conformers(*args)

    monkeypatch.setattr(conformers, "embed_conformers", counted)
    return found


def test_a_molecule_is_embedded_once_however_it_is_written(tmp_path, calls):
    cache = ConformerCache(tmp_path / "new" / "cache.sqlite")
    for smiles in ("CCO", "OCC", "C(C)O"):
        mol = molecule(smiles)
        expected = generate_conformers(mol, SETTINGS)
        np.testing.assert_array_equal(generate_conformers(mol, SETTINGS, cache.embed), expected)
        assert expected.shape == (2, 3, 3)
    assert len(calls) == len(cache) == 1
    again = ConformerCache(tmp_path / "new" / "cache.sqlite")
    np.testing.assert_array_equal(generate_conformers(mol, SETTINGS, again.embed), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", conformers.SETTINGS)
def test_another_setting_is_another_conformer(tmp_path, calls, name):
    cache = ConformerCache(tmp_path / "cache.sqlite")
    for settings in (SETTINGS, replace(SETTINGS, **{name: getattr(SETTINGS, name) + 1})):
        generate_conformers(molecule("CCO"), settings, cache.embed)
    assert len(calls) == 2


def test_what_does_not_embed_is_remembered_with_the_reason(tmp_path, calls):
    cache, settings = ConformerCache(tmp_path / "cache.sqlite"), replace(SETTINGS, max_conformer_atoms=5)
    for _ in range(2):
        with pytest.raises(
            MoleculeError, match="9 atoms with hydrogens are more than `max_conformer_atoms` = 5"
        ) as raised:
            generate_conformers(molecule("CCO"), settings, cache.embed)
        assert raised.value.stage == "conformer"
    assert len(calls) == 1


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, and longer than the header of one" * 9)
    with pytest.raises(
        ValueError, match=r"notes.txt' cannot be used as a cache of conformers: file is not a database"
    ):
        ConformerCache(tmp_path / "notes.txt")


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    cache = ConformerCache(tmp_path / "cache.sqlite")
    (pages,) = cache._connection.execute("PRAGMA page_count").fetchone()
    cache._connection.execute(f"PRAGMA max_page_count = {pages}")
    settings = replace(SETTINGS, num_conformers=100, max_mmff_iterations=0)
    with pytest.raises(OSError, match="No space is left for the cache of conformers") as raised:
        generate_conformers(molecule("CCCCCCCCCC"), settings, cache.embed)  # 12 kB
    assert raised.value.errno == errno.ENOSPC
