"""training/preprocess.py: every row of a source is in the dataset or rejected, the same however the work is done."""

import errno
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import assemble
import engines
import parts
import preprocess
from content_hash import ContentHash
from data import is_preprocessed, open_dataset
from dataset_card import size_category
from moleblend_hf import MoleBlendProcessor
from moleblend_hf.molecules_moleblend import FeaturizationSettings
from parts import Part, PartSettings, after_failure
from rows import graphs
from sources import Record
from splits import split_hash

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "training" / "sample" / "data" / "train-00000-of-00001.parquet"
RECORDS_A_PART = 40


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(preprocess, "RECORDS_A_PART", RECORDS_A_PART)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """400 molecules of QM9, of which three cannot be used, in a CSV."""
    smiles = pq.read_table(SAMPLE, columns=["smiles"])["smiles"].to_pylist()[:400]
    lines = [f"{text},m{row},{row / 8},{'train' if row % 4 else 'test'}" for row, text in enumerate(smiles)]
    lines[7] = "C1CC,m7,0,train"
    lines[111] = "C,m111"
    lines[250] = "C,m250,a lot,test"
    path = tmp_path_factory.mktemp("table") / "molecules.csv"
    path.write_text("\n".join(["smiles,id,gap,part", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def done(table, tmp_path_factory) -> Path:
    """That CSV, preprocessed at once by one process."""
    output = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "RECORDS_A_PART", RECORDS_A_PART)
        preprocess.main([*arguments(table), "--output", str(output)])
    return output


def arguments(table: Path) -> list[str]:
    flags = "--targets gap --units gap=hartree --convert gap=eV --split_column part --id_column id --rows_per_file 150"
    return ["--source", "csv", "--input", str(table), *flags.split()]


def run(tmp_path: Path, content: str | dict, *flags: str, source: str = "csv") -> Path:
    """What `preprocess` makes of a file of that content."""
    path = tmp_path / f"input.{source}"
    path.write_text(content) if isinstance(content, str) else pq.write_table(pa.table(content), path)
    output = tmp_path / "out"
    preprocess.main(["--source", source, "--input", str(path), "--output", str(output), "--overwrite", *flags])
    return output


def about(folder: Path) -> dict:
    return json.loads((folder / "preprocessing.json").read_text())


def rows_of(folder: Path, split: str = "*") -> pa.Table:
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in files])


def rejected(folder: Path) -> list[tuple]:
    found = pq.read_table(folder / "rejected.parquet").to_pylist()
    return [(row["row"], row["id"], row["input"], row["stage"], row["reason"]) for row in found]


def missing(folder: Path) -> list[tuple]:
    return [(row["id"], row["reason"]) for row in pq.read_table(folder / "missing_3d.parquet").to_pylist()]


def independent_hash(folder: Path) -> str:
    """Of all rows with the names of their splits and of all rejections, in an order of their own."""
    lines = [
        repr((path.name.split("-")[0], sorted(row.items())))
        for path in [*(folder / "data").glob("*.parquet"), *folder.glob("*.parquet")]
        for row in pq.read_table(path).to_pylist()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def same(first: Path, second: Path) -> bool:
    hashes = [(about(folder)["content_sha256"], independent_hash(folder)) for folder in (first, second)]
    assert (hashes[0][0] == hashes[1][0]) == (hashes[0][1] == hashes[1][1])
    return hashes[0] == hashes[1]


# Every row is accounted for


def test_every_row_is_in_the_dataset_or_rejected_with_a_reason(table, done):
    assert rejected(done) == [
        (7, "m7", "C1CC", "parse", "could not be parsed by RDKit: unclosed ring"),
        (111, "111", None, "csv", "has 2 fields, but the header has 4"),
        (250, "m250", "C", "target", "has 'a lot' for target 'gap', which is no number"),
    ]
    kept = rows_of(done)["id"].to_pylist()
    assert len(kept) == len(set(kept))
    assert set(kept) == {f"m{row}" for row in range(400)} - {"m7", "m111", "m250"}
    facts = about(done)
    assert (facts["num_read"], facts["num_kept"], facts["num_rejected"]) == (400, 397, 3)
    assert facts["rejected_by_stage"] == {"parse": 1, "csv": 1, "target": 1}
    assert not (done / ".parts").exists()
    assert sorted(path.name for path in done.iterdir()) == [
        "README.md",
        "data",
        "missing_3d.parquet",
        "preprocessing.json",
        "rejected.parquet",
        "sizes.png",
    ]


def test_the_account_and_the_progress_are_printed(tmp_path, capsys):
    run(tmp_path, "smiles\nCC\nC1\nCC\n")
    printed = capsys.readouterr()
    assert "3 rows read = 2 in the dataset + 1 rejected (1 parse; see rejected.parquet)" in printed.out
    assert "\n  1 parse: " in printed.out
    assert "1 rows repeat the InChIKey of an earlier one and were kept" in printed.out
    assert re.search(r"100%.* 3.00/3.00 \[00:\d\d<00:\d\d, .* molecules.*, 1 rejected\]", printed.err)


def test_rows_are_in_the_order_of_the_source_and_files_are_cut(done):
    numbers = [int(name[1:]) for name in rows_of(done, "train")["id"].to_pylist()]
    assert numbers == sorted(numbers)
    assert sorted(path.name for path in (done / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert pq.read_metadata(done / "data" / "train-00000-of-00002.parquet").num_rows == 150


def test_a_source_of_which_nothing_is_left_has_its_rejections_and_is_an_error(tmp_path):
    folder = tmp_path / "out"
    message = r"is empty: 3 rows of '.*input.csv' were read, and none was kept \(2 parse: .*: unclosed ring.* \(and alike\); 1 csv: has"
    with pytest.raises(ValueError, match=rf"{message} .*See .*rejected.parquet, and repeat .* with --overwrite"):
        run(tmp_path, "smiles\nC1\nC,C\nCC1\n", "--push_to_hub", "user/name")
    assert (about(folder)["num_kept"], about(folder)["num_rejected"]) == (0, 3)
    assert [row[2] for row in rejected(folder)] == ["C1", None, "CC1"]
    assert rows_of(folder, "train").num_rows == 0
    with pytest.raises(
        ValueError, match=r"out' is empty: 3 rows were read, and none was kept. Its rejected.parquet says"
    ):
        open_dataset(folder)
    with pytest.raises(ValueError, match=r"is empty: 0 rows of .*input.csv' were read, and none was kept. See"):
        run(tmp_path, "smiles\n")


def test_targets_are_converted_and_missing_ones_are_null(tmp_path):
    folder = run(
        tmp_path,
        "smiles,gap,active\nC,0.5,1\nCC,nan,0\nCCC,1,\nCCCC,1e999,0\nN,1,2\n",
        *[
            "--targets",
            "gap,active",
            "--units",
            "gap=hartree",
            "--convert",
            "gap=meV",
            "--tasks",
            "active=classification",
        ],
    )
    half, none, one = rows_of(folder)["gap"].to_pylist()
    assert (half, one) == pytest.approx((13605.693, 27211.386), rel=1e-7)
    assert none is None
    assert rows_of(folder)["active"].to_pylist() == [1, 0, None]
    assert [row[3:] for row in rejected(folder)] == [
        ("target", "has '1e999' for target 'gap', which is no number"),
        ("target", "has '2' for target 'active', which is neither 0 nor 1"),
    ]
    card = (folder / "README.md").read_text()
    assert "| `gap` | regression, meV (in the source: hartree) |" in card
    assert "| `active` | classification |" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--targets gup", r"input.csv has no column 'gup'. Its columns: 'smiles', 'gap'"),
        ("--smiles_column SMILES", r"has no column 'SMILES'. Its columns: 'smiles', 'gap'"),
        ("--targets gap --units gap=furlong", r"target 'gap': Unknown unit 'furlong'. The units there are: .*hartree"),
        ("--targets gap --units gap=eV --convert gap=ev", r"target 'gap': Unknown unit 'ev'. The units there are: "),
        ("--targets gap --units gap=eV --convert gap=D", r"'eV' is a unit of energy and 'D' one of dipole moment"),
        ("--targets gap --convert gap=eV", r"'gap' has no unit to convert from. Name it with --units gap=UNIT"),
        ("--convert gap=eV", r"names no target 'gap'. The targets: none"),
        ("--split given", r"the source names no splits. Name their column with --split_column"),
        ("--num_proc 0", r"num_proc must be 1 or more, got 0"),
        ("--molecule_time_limit 0", r"must be more than 0 seconds, got 0.0"),
        ("--conformer_cache {folder}/input.csv", r"cannot be used as a cache of conformers: file is not a database"),
    ],
)
def test_wrong_settings_are_named(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "smiles,gap\n" + "C,1\n" * 20, *flags.format(folder=tmp_path).split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--split random --split_fractions 0.8,0.2", r"fractions must be three .*got \(0.8, 0.2\)"),
        ("--without nosuch", "There is no dataset folder 'nosuch'"),
    ],
)
def test_what_puts_the_parts_together_is_checked_before_they_are_made(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, "smiles\nC\n", *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_column_that_names_no_splits(tmp_path):
    with pytest.raises(ValueError, match="The rows name 30 splits, such as 's0' and 's1'; at most 20 were expected"):
        run(tmp_path, "smiles,s\n" + "".join(f"C,s{row}\n" for row in range(30)), "--split_column", "s")


def test_broken_records_of_an_sdf_are_rejected(tmp_path):
    good = sdf("CCO", "a")
    short = good.split("\n")[:6]
    folder = run(tmp_path, f"{good}$$$$\n" + "\n".join(short) + f"\n{good}", source="sdf")
    assert [row[3] for row in rejected(folder)] == ["sdf", "sdf"]
    assert rejected(folder)[0][4] == "is empty"
    assert rows_of(folder)["id"].to_pylist() == ["a", "a"][: rows_of(folder).num_rows]
    assert about(folder)["num_read"] == about(folder)["num_kept"] + 2


def test_ids_that_were_said_to_be_ids_are_unique_and_guessed_ones_need_not_be(tmp_path):
    content = "smiles,id\nC,a\nCC,b\nCCC,a\nCCCC,a\n"
    folder = run(tmp_path, content, "--id_column", "id")
    assert rejected(folder) == [
        (2, "a", "CCC", "id", "has the id of row 0"),
        (3, "a", "CCCC", "id", "has the id of row 0"),
    ]
    folder = run(tmp_path, content)
    assert rejected(folder) == []
    assert about(folder)["num_repeated_ids"] == 2
    folder = run(tmp_path, "smiles,id\nC,1\nCC,\nCCC,2\nCCCC,3\nN,\n", "--id_column", "id")
    assert rejected(folder) == []
    assert rows_of(folder)["id"].to_pylist() == ["1", "row 1", "2", "3", "row 4"]


def test_duplicates_are_kept_reported_or_dropped(tmp_path):
    content = "smiles,id,s\nCCO,a,train\nOCC,b,test\nCC,c,train\nC(O)C,d,train\n"
    folder = run(tmp_path, content, "--duplicates", "drop")
    assert rows_of(folder)["id"].to_pylist() == ["a", "c"]
    assert [row[:1] + row[3:] for row in rejected(folder)] == [
        (1, "duplicate", "has the InChIKey of row 0"),
        (3, "duplicate", "has the InChIKey of row 0"),
    ]
    folder = run(tmp_path, content, "--split_column", "s")
    assert (about(folder)["num_repeated_inchikeys"], about(folder)["num_in_several_splits"]) == (2, 1)
    assert "1 molecules (by InChIKey) are in more than one of them." in (folder / "README.md").read_text()
    folder = run(tmp_path, content, "--duplicates", "keep")
    assert about(folder)["num_repeated_inchikeys"] is None
    assert "inchikey" not in rows_of(folder).column_names


def test_the_largest_molecule(tmp_path):
    folder = run(tmp_path, "smiles\nCCC\nCCCC\n", "--max_atoms", "3")
    assert rejected(folder)[0][2:] == ("CCCC", "size", "has 4 atoms, but `max_atoms` is 3")


# Splits


@pytest.mark.parametrize("definition", ["random", "scaffold", "scaffold-balanced", "scaffold-unimol"])
def test_splits_have_the_hash_of_their_ids_on_the_card(tmp_path, definition):
    scaffolds = [f"C1{'C' * (size - 1)}1" for size in range(3, 13)]
    content = "smiles,id\n" + "".join(f"{scaffolds[row % 10]}{'O' * (row // 10)},m{row}\n" for row in range(50))
    folder = run(tmp_path, content, "--split", definition)
    card = (folder / "README.md").read_text()
    ids = {name: rows_of(folder, name)["id"].to_pylist() for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in ids.items()} == {"train": 40, "validation": 5, "test": 5}
    for name, part in ids.items():
        assert f"| {name} | {len(part)} | `{split_hash(part)}` |" in card
    assert f"Definition: `{definition}`" in card
    if definition != "random":
        for first in range(10):
            assert sum(not {f"m{row}" for row in range(first, 50, 10)}.isdisjoint(part) for part in ids.values()) == 1


def test_given_splits_have_the_names_that_datasets_knows(tmp_path):
    folder = run(tmp_path, "smiles,s\nC,Valid\nCC,training\nCCC,\nCCCC,odd one\n", "--split_column", "s")
    assert list(about(folder)["splits"]) == ["train", "validation", "odd_one", "unassigned"]
    assert rows_of(folder, "validation")["smiles"].to_pylist() == ["C"]


# The graph of a row is that of its SMILES


def sdf(smiles: str, title: str, flag: str = "3D", flat: bool = False) -> str:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    if flat:
        positions = mol.GetConformer().GetPositions() * np.array([1, 1, 0])
        mol.GetConformer().SetPositions(positions + np.arange(len(positions))[:, None] * np.array([0.01, 0, 0]))
    lines = Chem.MolToMolBlock(mol).split("\n")
    lines[0], lines[1] = title, f"     RDKit          {flag}"
    return "\n".join(lines) + "$$$$\n"


ODD = [
    "CC(=O)[O-].[Na+]",
    "C/C=C\\C",
    "N[C@@H](C)C(=O)O",
    "[2H]C([2H])O",
    "O[C@H]1CC[C@@H](C)CC1",
    "c1ccc2[nH]ccc2c1",
    "[CH3]",
    "C[N+](=O)[O-]",
    "CC(C)=NO",
    "[H][H]",
    "O=C1[C@H]2C[C@@H]1C2",
]


def bond_set(graph) -> set:
    return {(*sorted(ends), kind) for ends, kind in zip(graph.bonds.tolist(), graph.bond_types.tolist(), strict=True)}


@pytest.mark.parametrize("source", ["csv", "sdf", "parquet"])
@pytest.mark.parametrize("hydrogens", ["drop", "keep", "add"])
def test_whoever_reads_the_smiles_of_a_row_has_its_graph_in_the_same_order(tmp_path, hydrogens, source):
    if source == "parquet":
        sample = pq.read_table(SAMPLE, columns=["smiles", "coordinates"]).slice(0, 30)
        content = {"smiles": sample["smiles"], "coordinates": sample["coordinates"]}
    else:
        content = (
            "".join(sdf(text, text) for text in ODD) if source == "sdf" else "\n".join(["smiles", *ODD, "[H]OC[H]"])
        )
    folder = run(tmp_path, content, "--hydrogens", hydrogens, source=source)
    rows = rows_of(folder)
    assert rejected(folder) == [] or (source, hydrogens) == ("parquet", "add")  # whose hydrogens have no place
    stored = graphs(rows)
    processor = MoleBlendProcessor(hydrogens=hydrogens)
    for smiles, graph in zip(rows["smiles"].to_pylist(), stored, strict=True):
        given = graph.coordinates if len(graph.coordinates) else None
        assert (source != "csv") == (given is not None)
        again = processor.featurize(smiles, given)
        np.testing.assert_array_equal(graph.atom_features, again.atom_features)
        np.testing.assert_array_equal(graph.coordinates, again.coordinates)
        assert bond_set(graph) == bond_set(again)
        params = Chem.SmilesParserParams()
        params.removeHs = hydrogens == "drop"
        assert Chem.MolFromSmiles(smiles, params).GetNumAtoms() == graph.num_atoms


def test_coordinates_are_those_of_the_sdf(tmp_path):
    """In the order of the SMILES: by element and distance to all others, each atom is where the SDF has it."""
    record = sdf("N[C@@H](C)C(=O)O", "alanine")
    (row,) = rows_of(run(tmp_path, record, "--hydrogens", "keep", source="sdf")).to_pylist()
    mol = Chem.MolFromMolBlock(record, removeHs=False)
    positions = mol.GetConformer().GetPositions().astype(np.float32)
    expected = {(tuple(p), atom.GetSymbol()) for p, atom in zip(positions, mol.GetAtoms(), strict=True)}
    params = Chem.SmilesParserParams()
    params.removeHs = False
    symbols = [atom.GetSymbol() for atom in Chem.MolFromSmiles(row["smiles"], params).GetAtoms()]
    assert {(tuple(map(np.float32, p)), s) for p, s in zip(row["coordinates"][0], symbols, strict=True)} == expected


def test_a_flat_geometry_that_rdkit_takes_for_a_drawing_is_noted(tmp_path):
    content = sdf("CN=NC", "flat", flat=True).replace("  2  3  2  0", "  2  3  2  3")
    folder = run(tmp_path, content, source="sdf")
    assert rows_of(folder)["coordinates"].to_pylist() == [[]]
    assert missing(folder)[0][1].startswith(
        "has an SDF record that is flagged 3D, but flat and with marks of a drawing"
    )


@pytest.mark.parametrize("flat", [True, False])
def test_drawings_are_not_taken_for_geometries(tmp_path, flat):
    content = sdf("CCO", "drawing", flag="2D", flat=flat) + sdf("CCO", "geometry")
    rows = rows_of(run(tmp_path, content, "--duplicates", "keep", source="sdf"))
    assert [len(conformers) for conformers in rows["coordinates"].to_pylist()] == [0, 1]


def test_pcqm4mv2_rows_whose_geometry_is_of_another_molecule_or_broken_are_2d(tmp_path):
    folder = tmp_path / "pcqm4mv2"
    folder.mkdir()
    (folder / "data.csv").write_text("idx,smiles,homolumogap\n0,OCC,1\n1,CCN,2\n2,CC,3\n3,C1CC,4\n4,CCC,5\n5,N,6\n")
    broken = sdf("CC", "").replace(" C ", " Qq ", 1)
    flat = "\n".join(line[:20] + "    0.0000" + line[30:] if line[30:33] == " C " else line for line in sdf("CCC", "").split("\n"))  # fmt: skip
    assert flat != sdf("CCC", "")
    (folder / "a.sdf").write_text(
        sdf("CCO", "") + sdf("CCCN", "") + broken + sdf("C1CC1", "") + sdf("CCC", "") + "$$$$\n"
    )
    output = tmp_path / "out"
    preprocess.main(["--source", "pcqm4mv2", "--input", str(folder), "--output", str(output)])
    assert [row[1:] for row in rejected(output)] == [
        ("3", sdf("C1CC1", "").removesuffix("$$$$\n"), "parse", "could not be parsed by RDKit: unclosed ring")
    ]
    rows = rows_of(output)
    assert rows["smiles"].to_pylist() == ["CCO", "CCN", "CC", "CCC", "N"]
    assert [len(conformers) for conformers in rows["coordinates"].to_pylist()] == [1, 0, 0, 1, 0]
    (other, unread, empty) = missing(output)
    assert other == ("1", "has an SDF record of another molecule than its SMILES")
    assert unread[1].startswith("has an SDF record that could not be read by RDKit: Element 'Qq' not found")
    assert empty == ("5", "has an SDF record that is empty")
    assert (
        "| without the geometry that was expected, in `missing_3d.parquet` with the reason | 3 |"
        in (output / "README.md").read_text()
    )


# The same content however the work is done


@pytest.mark.parametrize(("size", "parts_a_life"), [(RECORDS_A_PART, engines.PARTS_A_LIFE), (57, 1)])
def test_two_processes_give_the_same_content(table, done, tmp_path, monkeypatch, size, parts_a_life):
    monkeypatch.setattr(preprocess, "RECORDS_A_PART", size)
    monkeypatch.setattr(engines, "PARTS_A_LIFE", parts_a_life)
    preprocess.main([*arguments(table), "--output", str(tmp_path / "out"), "--num_proc", "2"])
    assert same(done, tmp_path / "out")


def test_another_setting_gives_another_content(table, done, tmp_path):
    preprocess.main([*arguments(table), "--output", str(tmp_path / "out"), "--convert", "gap=meV", "--num_proc", "2"])
    assert not same(done, tmp_path / "out")


def test_ray_gives_the_same_content(table, done, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        preprocess.main([*arguments(table), "--output", str(tmp_path / "out"), "--engine", "ray", "--num_proc", "2"])
        with pytest.raises(OSError, match="No such file") as raised:
            list(
                engines.run_on_ray([Part(0, (), str(tmp_path / "nowhere"))], PartSettings(FeaturizationSettings()), 1)
            )
        assert raised.value.errno == errno.ENOENT
    finally:
        ray.shutdown()
    assert same(done, tmp_path / "out")


def test_the_content_hash_does_not_depend_on_how_rows_are_cut(done):
    table = rows_of(done).combine_chunks()

    def hash_of(*tables: pa.Table) -> str:
        found = ContentHash()
        for one in tables:
            found.add(one)
        return found.hexdigest()

    expected = hash_of(table)
    assert hash_of(table.slice(0, 1), table.slice(1, 100), table.slice(101)) == expected
    assert hash_of(pa.concat_tables([table.slice(0, 7), table.slice(7)])) == expected
    assert hash_of(table.slice(1), table.slice(0, 1)) != expected
    for name in table.column_names:  # any value matters, and null is none of them
        values = table[name].to_pylist()
        for changed in ([values[1], *values[1:]], [None, *values[1:]]):
            if changed != values:
                other = table.set_column(table.column_names.index(name), name, pa.array(changed, table[name].type))
                assert hash_of(other) != expected, name


# Interrupts


def test_what_is_said_about_the_data_is_kept_and_paths_are_not(tmp_path):
    said = {"title": "Ours", "citation": "Us (2026).", "license": "mit"}
    output = run(tmp_path, "smiles\nCCO\n", *(word for name, text in said.items() for word in (f"--{name}", text)))
    assert about(output)["corpus"] == said | {"homepage": None}
    card = DatasetCard.load(output / "README.md")
    assert (card.data.pretty_name, card.data.license) == ("Ours", "mit")
    assert "Us (2026).\n\nLicence of the data: mit." in card.content
    assert about(output)["settings"]["input"] == "input.csv"
    assert str(tmp_path) not in (output / "preprocessing.json").read_text()


def test_molecules_of_other_datasets_are_left_out_however_they_are_written(tmp_path):
    (tmp_path / "test").mkdir()
    tested = run(tmp_path / "test", "smiles\nOCC\nc1ccccc1\n")
    output = run(tmp_path, "smiles\nCCO\nCCN\nC1=CC=CC=C1\nCCC\n", "--without", str(tested))
    assert rejected(output) == [
        (0, "0", "CCO", "excluded", f"is in {tested.name} (InChIKey)"),
        (2, "2", "C1=CC=CC=C1", "excluded", f"is in {tested.name} (InChIKey)"),
    ]
    assert [row["smiles"] for row in pq.read_table(output / "data").to_pylist()] == ["CCN", "CCC"]
    inside = tested.rename(output / "tested")
    with pytest.raises(ValueError, match=r"The output, .*, holds without, .*tested', but is emptied at the start"):
        run(tmp_path, "smiles\nCCO\n", "--without", str(inside))
    inside.rename(tested)
    with pytest.raises(ValueError, match="without compares InChIKeys"):
        run(tmp_path, "smiles\nCCO\n", "--without", str(tested), "--duplicates", "keep")
    bare = run(tmp_path / "test", "smiles\nOCC\n", "--duplicates", "keep")
    with pytest.raises(ValueError, match=r"has no InChIKeys\. Preprocess it with --duplicates report or drop"):
        run(tmp_path, "smiles\nCCO\n", "--without", str(bare))


def run_in_process(argv: list[str], kill_in: str | None = None) -> None:
    """`preprocess.main` with small parts, in a process of its own, perhaps one that dies at a call."""
    # The server of forks that the tests have is used, instead of one more that takes seconds to start; but not their lock.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    preprocess.tqdm.set_lock(threading.RLock())
    if kill_in == "assembling":
        assemble._Files.miss = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif kill_in == "publishing":
        move = Path.replace

        def killed(path: Path, target: Path) -> None:
            if path.name == "data":
                move(path, target)
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = killed
    preprocess.main(argv)


def start(argv: list[str], kill_in: str | None = None) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run_in_process, args=(argv, kill_in))
    process.start()
    return process


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.005)


@pytest.mark.parametrize("num_parts", [0, 1, 4, 8])
def test_a_run_that_is_killed_goes_on_where_it_was(table, done, tmp_path, monkeypatch, num_parts):
    work, argv = tmp_path / "out" / ".parts", [*arguments(table), "--output", str(tmp_path / "out"), "--num_proc", "2"]
    process = start(argv)
    wait_for(lambda: list(work.glob("marker-*")) and len(list(work.glob("rows-*"))) >= num_parts)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out" / "preprocessing.json").exists()
    time.sleep(0.2)  # until its processes have ended too
    made = {int(path.name[5:12]) for path in work.glob("rows-*.parquet")}
    again: set[int] = set()

    def noted(parts, *args):
        return engines.run_locally((again.add(part.index) or part for part in parts), *args)

    monkeypatch.setattr(preprocess, "run_locally", noted)
    preprocess.main(argv)
    assert len(made) >= num_parts
    assert again == set(range(10)) - made
    assert same(done, tmp_path / "out")


@pytest.mark.parametrize("moment", ["assembling", "publishing"])
def test_a_run_that_is_killed_at_the_end_goes_on_too(table, done, tmp_path, moment):
    argv = [*arguments(table), "--output", str(tmp_path / "out")]
    process = start(argv, kill_in=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    preprocess.main(argv)
    assert same(done, tmp_path / "out")
    assert not (tmp_path / "out" / ".parts").exists()


def test_nothing_outlives_a_script_that_is_killed(tmp_path):
    """Even where RDKit holds the interpreter of a process, which then ends with its time limit."""
    (tmp_path / "in.csv").write_text("smiles\n" + "CCO\n" * 20_000)
    process = script(tmp_path, "--num_proc", "2", "--input", str(tmp_path / "in.csv"))
    try:
        wait_for(lambda: list((tmp_path / "out").glob(".parts/rows-*")))
        assert len(session(process.pid)) >= 4  # the script, the server of forks, two that work
        process.kill()
        wait_for(lambda: not session(process.pid), 5)
    finally:
        for left in session(process.pid):
            left.kill()
    process.wait()


def script(tmp_path: Path, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "training" / "preprocess.py", "--source", "csv", "--output", tmp_path / "out"]
    return subprocess.Popen(
        [*map(str, command), *flags],
        env=os.environ | environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def session(leader: int) -> list[psutil.Process]:
    """The processes that a script started, and itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def test_an_unfinished_run_is_not_continued_with_other_settings_or_files(table, tmp_path, monkeypatch):
    argv = [*arguments(table), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(preprocess, "assemble", None)
    with pytest.raises(TypeError):
        preprocess.main(argv)
    with pytest.raises(ValueError, match=r"holds an unfinished run with other settings \(max_atoms\)"):
        preprocess.main([*argv, "--max_atoms", "7"])
    os.utime(table)
    with pytest.raises(ValueError, match="holds an unfinished run with other input files or versions"):
        preprocess.main(argv)


def test_an_unfinished_run_goes_on_with_overwrite_and_where_the_parts_are_put_together_another_way(
    table, done, tmp_path, monkeypatch
):
    argv = [*arguments(table), "--output", str(tmp_path / "out"), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "assemble", None)
        with pytest.raises(TypeError):
            preprocess.main([*argv, "--rows_per_file", "7", "--duplicates", "drop", "--without", str(done)])
    made: list[int] = []

    def noted(parts, *args):
        return engines.run_locally((made.append(part.index) or part for part in parts), *args)

    monkeypatch.setattr(preprocess, "run_locally", noted)
    preprocess.main(argv)
    assert made == []
    assert same(done, tmp_path / "out")
    preprocess.main(argv)  # what is finished is replaced
    assert made == list(range(10))


def test_parts_of_another_run_are_not_gone_on_with_behind_a_link(table, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    argv = [*arguments(table), "--limit", "3", "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "assemble", None)
        with pytest.raises(TypeError):
            preprocess.main(argv)
    other = tmp_path / "other.csv"
    lines = table.read_text().splitlines(keepends=True)
    other.write_text("".join([lines[0], *lines[4:7]]))
    argv[argv.index(str(table))] = str(other)
    preprocess.main([*argv, "--overwrite"])
    assert (tmp_path / "out").is_symlink()
    preprocess.main([*argv, "--output", str(tmp_path / "plain")])
    assert same(tmp_path / "plain", tmp_path / "real")


def test_a_folder_is_not_overwritten_unasked(table, tmp_path):
    argv = [*arguments(table), "--limit", "3", "--output", str(tmp_path / "out")]
    preprocess.main(argv)
    with pytest.raises(
        FileExistsError, match=r"holds a dataset. Choose another --output, or delete it with --overwrite"
    ):
        preprocess.main(argv)
    preprocess.main([*argv, "--overwrite"])
    with pytest.raises(ValueError, match=r"The output, .*, holds input"):
        preprocess.main([*argv, "--output", str(table.parent), "--overwrite"])
    assert table.is_file()
    with pytest.raises(FileExistsError, match="is not empty, and no run of this script left it"):
        preprocess.main([*argv, "--output", str(table.parent)])


def test_the_source_is_read_no_faster_than_it_is_worked_on(tmp_path):
    taken = finished = 0

    def parts() -> Iterator[Part]:
        nonlocal taken
        for index in range(30):
            taken += 1
            yield Part(index, [Record(index, str(index), "C")], str(tmp_path))

    for _ in engines.run_locally(parts(), PartSettings(FeaturizationSettings()), 2):
        finished += 1
        assert taken - finished < engines.PARTS_A_PROCESS * 2
    assert taken == finished == 30


def test_an_error_of_the_system_is_the_same_in_the_other_process(tmp_path):
    part = Part(0, [], str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as raised:
        list(engines.run_locally([part], PartSettings(FeaturizationSettings()), 1))
    assert raised.value.errno == errno.ENOENT


# A full disk


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(table, done, tmp_path, monkeypatch):
    argv = [*arguments(table), "--output", str(tmp_path / "out")]
    open_folder = preprocess.open_folder

    def full(*args):
        work = open_folder(*args)
        (work / "marker-0000003").symlink_to("/dev/full")
        return work

    with monkeypatch.context() as patch:  # in a process that featurizes
        patch.setattr(preprocess, "open_folder", full)
        with pytest.raises(OSError, match=r"No space is left for .*out. Parts that are done are kept") as raised:
            preprocess.main(argv)
        assert raised.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:  # in the end
        patch.setattr(pq, "ParquetWriter", lambda *_, **__: os.write(os.open("/dev/full", os.O_WRONLY), b"rows"))
        with pytest.raises(OSError, match="No space is left for"):
            preprocess.main(argv)
    preprocess.main(argv)
    assert same(done, tmp_path / "out")


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    def half(table, path, **_):
        Path(path).write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space left"):
        parts.write_whole(pa.table({}), tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


# Molecules that end or stop the process

TRAPS = """
import ctypes, os, signal
from rdkit import Chem
from rdkit.Chem import rdDistGeom
parse, embed = Chem.MolFromSmiles, rdDistGeom.EmbedMultipleConfs

def hang():
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter

def MolFromSmiles(smiles, *args, **kwargs):
    if smiles == "CC[Se]CC":
        os.kill(os.getpid(), signal.SIGSEGV)
    return hang() if smiles == "CC[Te]CC" else parse(smiles, *args, **kwargs)

def EmbedMultipleConfs(mol, *args, **kwargs):
    return hang() if any(atom.GetSymbol() == "As" for atom in mol.GetAtoms()) else embed(mol, *args, **kwargs)

Chem.MolFromSmiles, rdDistGeom.EmbedMultipleConfs = MolFromSmiles, EmbedMultipleConfs
"""


def test_molecules_on_which_rdkit_crashes_or_hangs_are_rejected_and_no_others(tmp_path):
    smiles = [f"C{'C' * (row % 7)}O" for row in range(110)]
    smiles[20], smiles[21], smiles[70] = "CC[Se]CC", "CC[Te]CC", "C[As](C)C"
    (tmp_path / "in.csv").write_text("smiles,id\n" + "".join(f"{text},m{row}\n" for row, text in enumerate(smiles)))
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "sitecustomize.py").write_text(TRAPS)
    flags = [
        "--modality",
        "2d+3d",
        "--molecule_time_limit",
        "1.5",
        "--num_proc",
        "2",
        "--max_mmff_iterations",
        "0",
        "--duplicates",
        "keep",
    ]
    process = script(tmp_path, "--input", str(tmp_path / "in.csv"), *flags, PYTHONPATH=str(tmp_path / "traps"))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert rejected(tmp_path / "out") == [
        (20, "m20", "CC[Se]CC", "process", "made RDKit crash (SIGSEGV)"),
        (21, "m21", "CC[Te]CC", "process", "took RDKit more than 1.5 s"),
    ]
    assert missing(tmp_path / "out") == [("m70", "has no conformer: took RDKit more than 1.5 s")]
    rows = rows_of(tmp_path / "out")
    assert rows["id"].to_pylist() == [f"m{row}" for row in range(110) if row not in (20, 21)]
    without = [len(conformers) == 0 for conformers in rows["coordinates"].to_pylist()]
    assert [row["id"] for row, is_2d in zip(rows.to_pylist(), without, strict=True) if is_2d] == ["m70"]
    assert "110 rows read = 108 in the dataset + 2 rejected (2 process; see rejected.parquet)" in printed


@pytest.fixture
def part(tmp_path) -> Part:
    return Part(0, [Record(row, str(row), "C") for row in range(3)], str(tmp_path))


def test_a_row_is_to_blame_only_if_its_process_ended_twice_with_it_alone(part):
    settings = PartSettings(FeaturizationSettings())

    def fails_at(part: Part, row: int | None, what: bytes = b"") -> Part:
        if row is not None:
            part.path("marker").write_bytes(b"%020d" % row + what)
        return after_failure(part, settings, "made RDKit crash")

    batch = fails_at(part, 0)
    assert batch.failures == {None: ("made RDKit crash",)}
    once = fails_at(batch, 1)
    assert once.failures[1] == ("made RDKit crash",)
    assert parts.featurize_part(once, settings) == (3, 0)  # something else had ended it
    twice = fails_at(once, 1, b"Timeout (0:01:00)!\n")
    assert twice.failures[1][-1] == "took RDKit more than 60 s"
    assert parts.featurize_part(twice, settings) == (2, 1)
    assert not part.path("marker").exists()
    with pytest.raises(
        RuntimeError, match="3 processes ended at part 0, the last one at row 1, which was not even read"
    ):
        fails_at(twice, 1)
    with pytest.raises(RuntimeError, match=r"outside of any row: it made RDKit crash. If memory is short, take fewer"):
        fails_at(fails_at(fails_at(part, None), None), None)


def test_a_marker_speaks_for_one_attempt(part):
    part.path("marker").write_bytes(b"%020d" % 1)
    again = after_failure(replace(part, failures={None: ("x",)}), PartSettings(FeaturizationSettings()), "crashed")
    assert again.failures[1] == ("crashed",)
    again = after_failure(again, PartSettings(FeaturizationSettings()), "crashed")  # which left no marker
    assert again.failures == {None: ("x", "crashed"), 1: ("crashed",)}


# What others read


READ = """
import importlib.util, json, sys
import datasets
folder = sys.argv[1]
sys.modules["moleblend_hf"] = None
assert all(importlib.util.find_spec(name) is None for name in ("preprocess", "rows", "parts"))
by_file = datasets.load_dataset("parquet", data_files={"train": f"{folder}/data/train-*", "test": f"{folder}/data/test-*"})
by_folder = datasets.load_dataset(folder)
streamed = datasets.load_dataset(folder, streaming=True)
for split in ("train", "test"):
    rows = list(by_file[split])
    assert rows == list(by_folder[split]) == list(streamed[split])
assert set(by_folder) == set(streamed) == {"train", "test"}
print(json.dumps([row["id"] for split in ("train", "test") for row in by_folder[split]]))
"""


def test_a_path_may_have_the_characters_of_a_pattern(done, tmp_path):
    folder = Path(shutil.copytree(done, tmp_path / "br[v2]*"))
    assert {name: len(rows) for name, rows in open_dataset(folder).splits.items()} == {"train": 297, "test": 100}


def test_what_may_be_a_dataset_of_ours(done):
    assert is_preprocessed(str(done))
    assert is_preprocessed("user/name.v2")
    for name in ("data/nosuch.csv", "data/nosuch.SDF.gz", "nosuch", "a/b/c", str(done / "data")):
        assert not is_preprocessed(name)


def test_datasets_opens_it_with_nothing_of_ours(done, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", READ, str(done)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = [*rows_of(done, "train")["id"].to_pylist(), *rows_of(done, "test")["id"].to_pylist()]
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize(
    ("num_rows", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**7, "10M<n<100M"),
        (3 * 10**8, "100M<n<1B"),
        (10**12, "n>1T"),
    ],
)
def test_sizes_have_the_names_of_the_hub(num_rows, name):
    assert size_category(num_rows) == name


def test_the_card_is_read_back(done):
    card = DatasetCard.load(done / "README.md")
    assert card.data.size_categories == ["n<1K"] or card.data.size_categories == "n<1K"
    assert card.data.configs[0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "test", "path": "data/test-*.parquet"},
    ]
    assert (done / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert about(done)["content_sha256"] in card.text
    for text in (
        "397 molecules as graphs",
        "| rejected, in `rejected.parquet` with the reason | 3 |",
        "| &nbsp; csv: has ... fields, but the header has ... | 1 |",
        "The splits are those of the source.",
        "Licence of the data: not stated",
        "--convert gap=eV",
    ):
        assert text in card.text
    assert not re.search(r"\n{3}|None", card.text.replace("`bonds`: None", ""))


@pytest.mark.parametrize("name", ["row", "split", "id", "smiles", "coordinates", "scaffold"])
def test_a_target_cannot_share_a_column_with_the_dataset(name, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text(f"structure,{name}\nCCO,1\n")
    flags = ["--smiles_column", "structure", "--targets", name]
    with pytest.raises(ValueError, match=f"A target cannot be called '{name}'"):
        preprocess.main(["--source", "csv", "--input", str(path), "--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
