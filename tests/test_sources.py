"""training/sources.py: every kind of source gives its rows as they are written, and says what it cannot read."""

import bz2
import csv
import gzip
import io
import itertools
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from corpora import MOLECULENET_SETS
from sources import SOURCES, Record, Source, Target, open_source

METHANE = "\n     RDKit          3D\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    0.0000    0.0000    0.0000 C   0  0\nM  END\n"


def write(path: Path, content: str | bytes, packed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


def sdf(*titles: str, fields: str = "") -> str:
    return "".join(f"{title}{METHANE}{fields}$$$$\n" for title in titles)


def rows(source: Source) -> list[Record]:
    """All records; reading them again gives the same."""
    records = list(source.records())
    assert list(source.records()) == records
    assert [record.row for record in records] == list(range(len(records)))
    assert all(len(record.targets) == len(source.targets) for record in records if record.stage is None)
    assert all((record.stage is None) == (record.reason is None) for record in records)
    return records


def cut(content: bytes, fraction: float = 0.5) -> bytes:
    """A gzip that ends in mid-stream."""
    packed = gzip.compress(content, compresslevel=1, mtime=0)
    return packed[: int(len(packed) * fraction)]


# Delimited text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_columns_are_guessed_and_told(tmp_path, kind, delimiter, packed):
    lines = ["mol_id,Canonical SMILES,y,part,z", "m1, CCO ,0.5,train,1", "", '"m,2",C,NaN,,2', "m3,,null,test,3"]
    # A gzip may have any name.
    path = write(tmp_path / "a.csv", "\r\n".join(lines).replace(",", delimiter).replace("m\t2", "m,2"), packed)
    source = open_source(kind, str(path), targets=["y"], units={"y": "eV"}, split_column="part")
    assert rows(source) == [
        Record(0, "m1", "CCO", targets=("0.5",), split="train"),
        Record(1, "m,2", "C", targets=(None,)),
        Record(2, "m3", "", targets=(None,), split="test"),
    ]
    assert source.targets == (Target("y", "eV"),)
    assert source.files == (path,)
    assert (source.name, source.title, source.id_column, source.id_guessed) == (kind, "a.csv", "mol_id", True)
    assert source.notes == (
        "SMILES column: 'Canonical SMILES' (guessed; --smiles_column names another).",
        "Id column: 'mol_id' (guessed; --id_column names another).",
        "Columns not taken: 'z'.",
    )


def test_named_columns_go_before_guesses(tmp_path):
    path = write(tmp_path / "a.csv", "smiles,reactant,id,code\nC,N,1,x\nC,N,2,\n")
    source = open_source("csv", path, smiles_column="reactant", id_column="code", tasks={}, targets=[])
    assert [(record.id, record.smiles) for record in rows(source)] == [("x", "N"), ("row 1", "N")]
    assert source.notes == ("Columns not taken: 'smiles', 'id'.",)
    assert not source.id_guessed


def test_ids_are_not_guessed_among_several(tmp_path):
    source = open_source("csv", write(tmp_path / "a.csv", "smiles,name,CID\nC,methane,297\n"))
    assert rows(source)[0].id == "0"
    assert "Ids: row numbers, because 'name', 'CID' could hold ids (--id_column names a column)." in source.notes


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("mol,smiles", "smiles"),
        ("canonical_smiles,isomeric_smiles", "isomeric_smiles"),
        ("x,SMILES_std", "SMILES_std"),
        ("Structure,x", "Structure"),
    ],
)
def test_smiles_column_is_guessed(tmp_path, header, expected):
    source = open_source("csv", write(tmp_path / "a.csv", f"{header}\nC,C\n"))
    assert source.notes[0] == f"SMILES column: {expected!r} (guessed; --smiles_column names another)."


def test_semicolons_are_recognised(tmp_path):
    source = open_source("csv", write(tmp_path / "a.csv", "smiles;y\nC;1\n"), targets=["y"])
    assert rows(source) == [Record(0, "0", "C", targets=("1",))]
    assert "Delimiter: ';' (guessed; --delimiter names another)." in source.notes
    assert rows(open_source("csv", write(tmp_path / "b.csv", "smiles|y\nC|1\n"), delimiter="|"))[0].smiles == "C"


def test_an_empty_cell_of_a_table_of_one_column_is_a_row_and_a_blank_line_is_none(tmp_path):
    path = write(tmp_path / "a.csv", 'smiles\nCCO\n""\n\n  \nCCC\n')
    assert [record.smiles for record in rows(open_source("csv", path))] == ["CCO", "", "CCC"]


def test_columns_of_one_name_are_numbered(tmp_path):
    path = write(tmp_path / "a.csv", "smiles,y,y,y.1\nC,1,2,3\n")
    assert rows(open_source("csv", path, targets=["y", "y.1", "y.1.1"]))[0].targets == ("1", "2", "3")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_any_encoding_is_survived(tmp_path, encoding):
    path = write(tmp_path / "a.csv", "smiles,id\nC,Å\n".encode(encoding))
    (record,) = rows(open_source("csv", path))
    assert (record.smiles, record.id) == ("C", "Å")


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_utf_8_is_read_as_excel_writes_it(tmp_path, packed):
    ascii_rows = b"C,a,1\n" * 20_000  # so that it is seen late, and after what is decoded at once
    content = "smiles,id,Löslichkeit\n".encode("cp1252") + ascii_rows + "C,Ä1,1\nC,Ö1,2\nC,€".encode("cp1252")
    path = write(tmp_path / "a.csv", content + b"\x81,3\nC,\x90,4\nC,\xe2", packed)
    with pytest.warns(
        UserWarning, match=r"text that is not UTF-8; it is read as Windows-1252, .*save the file as UTF-8"
    ):
        records = list(open_source("csv", path, targets=["Löslichkeit"]).records())[20_000:]
    assert [record.id for record in records] == ["Ä1", "Ö1", "€\x81", "\x90", "20004"]
    assert [record.targets for record in records[:4]] == [("1",), ("2",), ("3",), ("4",)]


def test_rows_that_cannot_be_read_are_records(tmp_path):
    path = write(tmp_path / "a.csv", 'smiles,y,id\nC,1,a\nC,1\nC,1,b,\nC,1,c"\n"C"C,1,d\nN,2,e\nC,"1,f\nC,1,g\n')
    records = rows(open_source("csv", path, targets=["y"], id_column="id"))
    assert [record.id for record in records] == ["a", "1", "2", 'c"', "4", "e", "6"]
    assert [record.stage for record in records] == [None, "csv", "csv", None, "csv", None, "csv"]
    reasons = [record.reason for record in records if record.reason]
    assert reasons[0] == "has 2 fields, but the header has 3"
    assert reasons[1] == "has 4 fields, but the header has 3"
    assert reasons[2].startswith("cannot be read from line 6: ")
    # The quote is never closed, so both lines are one row that is rejected, not one that swallowed the other.
    assert (
        reasons[3] == "cannot be read from lines 8 to 9: unexpected end of data; is there a stray or unclosed quote?"
    )


def test_unclosed_quote_loses_no_more_than_the_limit_of_a_field(tmp_path):
    lines = ["smiles,id", '"C,0', *(f"C,{index}" for index in range(200_000))]
    records = rows(open_source("csv", write(tmp_path / "a.csv", "\n".join(lines)), id_column="id"))
    assert records[0].stage == "csv"
    assert "field larger than field limit" in records[0].reason
    assert len(records) > 50_000
    assert all(record.stage is None for record in records[1:])


@pytest.mark.parametrize("kind", ["csv", "smi"])
def test_truncated_gzip_gives_the_rows_before_and_says_so(tmp_path, kind):
    rng = np.random.default_rng(0)
    text = "smiles id\n" + "".join(f"{'C' * rng.integers(1, 60)} {rng.integers(1 << 60)}\n" for _ in range(20_000))
    path = write(tmp_path / "a.gz", cut(text.replace(" ", "," if kind == "csv" else " ").encode()))
    *before, last = rows(open_source(kind, path))
    assert 5_000 < len(before) < 15_000
    assert all(record.stage is None for record in before)
    assert (last.stage, last.id) == ("csv", str(len(before)))
    assert re.match(r"lies where a\.gz is damaged.*ended before the end-of-stream marker", last.reason)


# SMILES files


@pytest.mark.parametrize("header", ["", "SMILES Name\n"])
def test_smi(tmp_path, header):
    lines = "\u00a0CCO ethanol\n\nC\nC1CC1 |$R1;;$| ring, small\tnote\nC |a|\n  N\tammonia\n\tCO\n \tCO\n CO\n  \t \n"
    source = open_source("smi", write(tmp_path / "a.smi", header + lines))
    assert [(record.id, record.smiles) for record in rows(source)] == [
        ("ethanol", "CCO"),
        ("1", "C"),
        ("ring, small", "C1CC1 |$R1;;$|"),
        ("3", "C |a|"),
        ("ammonia", "N"),
        *[("CO", "")] * 2,
        ("7", "CO"),
    ]


# SDF


@pytest.mark.parametrize("packed", [False, True])
def test_sdf_titles_fields_and_broken_records(tmp_path, packed):
    fields = "> <E>  (1)\n-1.5\n\n>  <set>\ntrain\n\n> <note>\na\nb\n\n"
    text = sdf(" a ", fields=fields) + "$$$$\n" + "broken\n$$$$\n" + sdf("", fields="> <E>\nNaN\n") + f"last{METHANE}"
    path = write(tmp_path / "a.sdf", text.replace("\n", "\r\n"), packed)
    plain = open_source("sdf", path)
    assert [record.id for record in rows(plain)] == ["a", "1", "broken", "3", "last"]
    assert [record.sdf for record in rows(plain)][1:3] == ["", "broken\n"]
    assert rows(plain)[4].sdf == f"last{METHANE}"
    assert plain.notes == ("Data fields not taken: 'E', 'set', 'note'.",)

    source = open_source("sdf", path, targets=["E", "note"], units={"E": "eV"}, split_column="set", id_column="note")
    assert source.targets == (Target("E", "eV"), Target("note"))
    assert [record.targets for record in rows(source)] == [
        ("-1.5", "a\nb"),
        (None, None),
        (None, None),
        (None, None),
        (None, None),
    ]
    assert [record.split for record in rows(source)] == ["train", None, None, None, None]
    assert [record.id for record in rows(source)] == ["a\nb", "row 1", "row 2", "row 3", "row 4"]
    assert source.notes == ()


def test_sdf_field_that_no_record_has(tmp_path):
    path = write(tmp_path / "a.sdf", sdf("a", fields="> <E>\n1\n\n> <F>\n2\n\n"))
    with pytest.raises(
        ValueError, match=r"None of the first 1,000 records .* data field 'G'\. Their fields: 'E', 'F'"
    ):
        open_source("sdf", path, targets=["G"])
    with pytest.raises(ValueError, match="data field 'name'"):
        open_source("sdf", path, id_column="name")


@pytest.mark.parametrize("archive", [False, True])
def test_truncated_sdf_gives_the_records_before_and_says_so(tmp_path, archive):
    rng = np.random.default_rng(0)
    text = sdf(*(str(rng.integers(1 << 60)) for _ in range(5_000)))
    content = tar({"a.sdf": text}) if archive else text.encode()
    *before, last = rows(open_source("sdf", write(tmp_path / "a.gz", cut(content))))
    assert 1_000 < len(before) < 4_000
    assert all(record.stage is None for record in before)
    assert last.stage == "sdf"
    assert last.reason.startswith("lies where the file is damaged: ")
    if archive:  # not gzipped, so that the archive itself ends too early
        records = rows(open_source("sdf", write(tmp_path / "a.tar", content[: len(content) // 2])))
        assert [record.stage for record in records[-2:]] == [None, "sdf"]


def tar(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


# PCQM4Mv2


def pcqm4mv2(folder: Path, num_rows: int = 4, column: str = "idx") -> Path:
    lines = "".join(f"{row},{'C' * (row + 1)},{row / 2 if row < 3 else ''}\n" for row in range(num_rows))
    write(folder / "raw" / "data.csv.gz", f"{column},smiles,homolumogap\n{lines}", packed=True)
    return folder


@pytest.mark.parametrize("name", ["raw/t.sdf", "t.sdf.gz", "t.sdf.tar.gz"])
def test_pcqm4mv2_joins_by_order(tmp_path, name):
    content = (
        tar({"readme.txt": "x", "._t.sdf": "metadata", "folder/t.sdf": sdf("", "")}) if "tar" in name else sdf("", "")
    )
    path = write(pcqm4mv2(tmp_path) / name, content, packed=name.endswith("gz"))
    source = open_source("pcqm4mv2", tmp_path)
    assert source.files == (tmp_path / "raw" / "data.csv.gz", path)
    assert source.targets == (Target("homolumogap", "eV"),)
    assert (source.license, source.id_column) == ("cc-by-4.0", "idx")
    records = rows(source)
    assert [record.smiles for record in records] == ["C", "CC", "CCC", "CCCC"]
    assert [record.sdf for record in records] == [METHANE, METHANE, None, None]
    assert [record.targets for record in records] == [("0.0",), ("0.5",), ("1.0",), (None,)]


def test_pcqm4mv2_without_sdf_is_2d(tmp_path):
    source = open_source("pcqm4mv2", pcqm4mv2(tmp_path, column="row"))
    assert all(record.sdf is None for record in rows(source))
    assert any("No SDF file" in note for note in source.notes)


def test_pcqm4mv2_reports_what_does_not_join(tmp_path):
    write(pcqm4mv2(tmp_path, 2) / "a.sdf", sdf("", "", "x"))
    records = rows(open_source("pcqm4mv2", tmp_path))
    assert [record.stage for record in records] == [None, None, "join"]
    assert records[2].reason == "is a record of the SDF beyond the last row of the table"
    rng = np.random.default_rng(0)
    write(pcqm4mv2(tmp_path, 500) / "a.sdf", cut(sdf(*(str(rng.integers(1 << 60)) for _ in range(400))).encode()))
    records = rows(open_source("pcqm4mv2", tmp_path))
    assert all(record.smiles is not None and record.stage is None for record in records)
    assert len(records) == 500
    read = [record.sdf is not None for record in records]
    assert 50 < read.index(False) < 350
    for record, was_read in zip(records, sorted(read, reverse=True), strict=True):
        reason = record.missing_3d
        assert (
            was_read if reason is None else reason.startswith("has an SDF record that lies where the file is damaged")
        )


def test_pcqm4mv2_several_sdf_files(tmp_path):
    write(pcqm4mv2(tmp_path) / "a.sdf", sdf(""))
    write(tmp_path / "b.sdf.gz", sdf(""), packed=True)
    with pytest.raises(ValueError, match=r"several SDF files: .*a\.sdf, .*b\.sdf\.gz"):
        open_source("pcqm4mv2", tmp_path)


@pytest.mark.parametrize("written_by", ["numpy 2", "numpy 1", "torch"])
def test_pcqm4mv2_splits(tmp_path, written_by):
    splits = {
        "train": np.array([0, 3]),
        "valid": np.array([1], np.int32),
        "test-dev": np.array([99]),
        "test-challenge": np.array([], int),
    }
    if written_by == "torch":
        splits = {name: torch.from_numpy(indices) for name, indices in splits.items()}
    buffer = io.BytesIO()
    torch.save(splits, buffer, _use_new_zipfile_serialization=written_by != "numpy 1")
    content = buffer.getvalue()
    if written_by == "numpy 1":  # OGB's file is of 2021
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = write(pcqm4mv2(tmp_path / "corpus") / "split_dict.pt", content)
    source = open_source("pcqm4mv2", tmp_path / "corpus")
    assert path in source.files
    assert [record.split for record in rows(source)] == ["train", "validation", None, "train"]
    path.rename(tmp_path / "split_dict.pt")
    assert rows(open_source("pcqm4mv2", tmp_path / "corpus"))[1].split == "validation"


class Harmful:
    """What a pickle could do."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": Harmful()}, r"needs (builtins\.)?print, which is not allowed to run"),
        ([1, 2], "holds a list; a dict of index arrays was expected"),
        ({"train": torch.tensor([0.5])}, "Split 'train' in .* is no list of indices"),
    ],
)
def test_pcqm4mv2_split_file_that_is_none(tmp_path, capsys, splits, message):
    torch.save(splits, pcqm4mv2(tmp_path) / "split_dict.pt")
    with pytest.raises(ValueError, match=message):
        open_source("pcqm4mv2", tmp_path)
    assert "run" not in capsys.readouterr().out


def test_pcqm4mv2_damaged_split_file(tmp_path):
    write(pcqm4mv2(tmp_path) / "split_dict.pt", b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"split_dict\.pt is damaged: .* Fetch OGB's split_dict\.pt again"):
        open_source("pcqm4mv2", tmp_path)
    write(tmp_path / "split_dict.pt", b"")
    with pytest.raises(ValueError, match=r"split_dict\.pt is damaged"):
        open_source("pcqm4mv2", tmp_path)


def test_pcqm4mv2_folder_without_a_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither data\.csv\.gz nor raw/data\.csv\.gz"):
        open_source("pcqm4mv2", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; the folder of PCQM4Mv2 was expected"):
        open_source("pcqm4mv2", tmp_path / "none")


# QM9


def qm9(folder: Path, ids: str = "gdb_1 gdb_2 gdb_3", titles: str = "gdb_1 gdb_2 gdb_3", packed: bool = False) -> Path:
    table = "mol_id,A,mu,homo,cv,u0_atom,other\n" + "".join(f"{name},1,2,-0.3,6.5,-395.9,x\n" for name in ids.split())
    ending = ".gz" if packed else ""
    write(folder / f"gdb9.sdf.csv{ending}", table, packed)
    write(folder / f"gdb9.sdf{ending}", sdf(*titles.split()), packed)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_qm9(tmp_path, packed):
    source = open_source("qm9", qm9(tmp_path, packed=packed))
    assert source.targets == (
        Target("A", "GHz"),
        Target("mu", "D"),
        Target("homo", "hartree"),
        Target("cv", "cal/(mol K)"),
        Target("u0_atom", "kcal/mol"),
    )
    records = rows(source)
    assert [record.id for record in records] == ["gdb_1", "gdb_2", "gdb_3"]
    assert records[1] == Record(1, "gdb_2", sdf=f"gdb_2{METHANE}", targets=("1", "2", "-0.3", "6.5", "-395.9"))
    assert "10.1038/sdata.2014.22" in source.citation
    assert source.notes == ("Columns not taken: 'other'.",)
    chosen = open_source("qm9", tmp_path, targets=["homo"], units={"homo": "eV"})
    assert chosen.targets == (Target("homo", "eV"),)
    assert [record.split for record in rows(open_source("qm9", tmp_path, split_column="other"))] == ["x"] * 3


@pytest.mark.parametrize(
    "text",
    [
        "\nList of molecules among the 133885 GDB9 molecules\n====\n#   Index   GDB17 SMILES\n====\n      2   NC   C   1.5\n====\n\n",
        "gdb_2\n",
        "2\n",
    ],
)
def test_qm9_exclusions_are_records(tmp_path, text):
    path = write(qm9(tmp_path) / "uncharacterized.txt", text)
    assert "uncharacterized.txt is there, but nothing is excluded" in open_source("qm9", tmp_path).notes[-1]
    source = open_source("qm9", tmp_path, exclude=path)
    assert path in source.files
    records = rows(source)
    assert [record.stage for record in records] == [None, "excluded", None]
    assert records[1].reason == "is listed in uncharacterized.txt"
    assert source.notes[-1] == "Excluded: 1 ids listed in uncharacterized.txt."


def test_qm9_ids_and_titles_must_agree(tmp_path):
    records = rows(open_source("qm9", qm9(tmp_path, titles="gdb_1 gdb_3")))
    assert [record.stage for record in records] == [None, "join", "join"]
    assert records[1].reason == "is 'gdb_2' in the table, but 'gdb_3' in gdb9.sdf"
    assert records[2].reason == "has no record in gdb9.sdf"


def test_qm9_without_a_table_has_no_targets(tmp_path):
    (qm9(tmp_path) / "gdb9.sdf.csv").unlink()
    source = open_source("qm9", tmp_path)
    assert (source.targets, source.id_column) == ((), None)
    assert source.notes == (f"No gdb9.sdf.csv in {tmp_path}: there are no targets.",)
    assert [record.id for record in rows(source)] == ["gdb_1", "gdb_2", "gdb_3"]
    with pytest.raises(ValueError, match=r"no table in .* could hold the column 'part'"):
        open_source("qm9", tmp_path, split_column="part")


# MoleculeNet

HEADERS = {
    "bace.csv": "mol,CID,Class,Model,pIC50",
    "BBBP.csv": "num,name,p_np,smiles",
    "clintox.csv.gz": "smiles,FDA_APPROVED,CT_TOX",
    "delaney-processed.csv": "Compound ID,measured log solubility in mols per litre,Polar Surface Area,smiles",
    "SAMPL.csv": "iupac,smiles,expt,calc",
    "HIV.csv": "smiles,activity,HIV_active",
    "Lipophilicity.csv": "CMPD_CHEMBLID,exp,smiles",
    "qm8.csv": "smiles,E1-CC2,f1-CC2,E1-PBE0,E1-PBE0",
    "sider.csv.gz": 'smiles,Eye disorders,"Neoplasms benign, malignant"',
    "tox21.csv.gz": "NR-AR,SR-p53,mol_id,smiles",
    "toxcast_data.csv.gz": "smiles,TOX21_p53,ACEA_T47D",
    "muv.csv.gz": "MUV-466,MUV-548,mol_id,smiles",
}
CLASSES, VALUES = "classification", "regression"
EXPECTED = {
    "bace.csv": ("bace", "CID", [Target("Class", task=CLASSES)]),
    "BBBP.csv": ("bbbp", "num", [Target("p_np", task=CLASSES)]),
    "clintox.csv.gz": ("clintox", None, [Target("FDA_APPROVED", task=CLASSES), Target("CT_TOX", task=CLASSES)]),
    "delaney-processed.csv": (
        "esol",
        "Compound ID",
        [Target("measured log solubility in mols per litre", "log10(mol/L)")],
    ),
    "SAMPL.csv": ("freesolv", "iupac", [Target("expt", "kcal/mol")]),
    "HIV.csv": ("hiv", None, [Target("HIV_active", task=CLASSES)]),
    "Lipophilicity.csv": ("lipophilicity", "CMPD_CHEMBLID", [Target("exp")]),
    "qm8.csv": (
        "qm8",
        None,
        [
            Target("E1-CC2", "hartree"),
            Target("f1-CC2"),
            Target("E1-PBE0", "hartree"),
            Target("E1-PBE0.1", "hartree"),
        ],
    ),
    "sider.csv.gz": (
        "sider",
        None,
        [Target("Eye disorders", task=CLASSES), Target("Neoplasms benign, malignant", task=CLASSES)],
    ),
    "tox21.csv.gz": ("tox21", "mol_id", [Target("NR-AR", task=CLASSES), Target("SR-p53", task=CLASSES)]),
    "toxcast_data.csv.gz": ("toxcast", None, [Target("TOX21_p53", task=CLASSES), Target("ACEA_T47D", task=CLASSES)]),
    "muv.csv.gz": ("muv", None, [Target("MUV-466", task=CLASSES), Target("MUV-548", task=CLASSES)]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_moleculenet_sets_are_known_by_their_files(tmp_path, name):
    header = HEADERS[name]
    (fields,) = csv.reader([header])
    row = ["C " if column in ("smiles", "mol") else str(index) for index, column in enumerate(fields)]
    path = write(tmp_path / name, f"{header}\n{','.join(row)}\n", packed=name.endswith("gz"))
    source = open_source("moleculenet", path)
    set_name, identifier, targets = EXPECTED[name]
    assert (source.name, source.id_column, list(source.targets)) == (f"moleculenet/{set_name}", identifier, targets)
    assert not source.id_guessed
    (record,) = rows(source)
    assert record.smiles == "C"  # some have a trailing space
    first = re.sub(r"\.1$", "", targets[0].name)
    assert record.targets[0] == row[fields.index(first)]


def test_every_moleculenet_set_is_tested():
    assert {expected[0] for expected in EXPECTED.values()} == set(MOLECULENET_SETS)


def test_moleculenet_other_targets_and_names(tmp_path):
    path = write(tmp_path / "bace.csv", "mol,CID,Class,Model,pIC50\nC,BACE_1,1,Train,9.1\n")
    source = open_source("moleculenet", path, targets=["pIC50"], split_column="Model")
    assert source.targets == (Target("pIC50"),)
    assert rows(source) == [Record(0, "BACE_1", "C", targets=("9.1",), split="Train")]
    with pytest.raises(ValueError, match=r"no column 'mol'\. Its columns: 'smiles', 'Class'"):
        open_source("moleculenet", write(tmp_path / "bace_2.csv", "smiles,Class\nC,1\n"))
    with pytest.raises(ValueError, match=r"'pdbbind.csv' starts with the name of no MoleculeNet set.*'bace', 'bbbp'"):
        open_source("moleculenet", write(tmp_path / "pdbbind.csv", "smiles\nC\n"))


# Parquet and datasets

XYZ = [[0.0, 0.0, 0.0], [1.5, 0.0, 0.0]]
COLUMNS = {
    "smiles": ["CC ", "CO", None],
    "id": ["a", None, "c"],
    "y": [1.5, float("nan"), None],
    "label": [True, False, None],
    "note": ["x", "NA", "2"],
    "coordinates": [XYZ, None, []],
}


def as_read(coordinates: list | None, split: str | None = None) -> list[Record]:
    return [
        Record(0, "a", "CC", coordinates=coordinates, targets=(1.5, 1.0, "x"), split=split),
        Record(1, "row 1", "CO", targets=(None, 0.0, None), split=split),
        Record(2, "c", "", targets=(None, None, "2"), split=split),
    ]


@pytest.mark.parametrize("conformers", [False, True])
def test_parquet(tmp_path, conformers):
    table = pa.table(COLUMNS | {"coordinates": [[XYZ, XYZ], None, []]} if conformers else COLUMNS)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    source = open_source("parquet", tmp_path / "b.parquet", targets=["y", "label", "note"], tasks={"label": CLASSES})
    assert rows(source) == as_read([XYZ, XYZ] if conformers else [XYZ])
    assert source.targets == (Target("y"), Target("label", task=CLASSES), Target("note"))
    pq.write_table(table, tmp_path / "a.parquet")
    both = open_source("parquet", tmp_path, targets=["y"])
    assert both.files == (tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert [record.id for record in rows(both)] == ["a", "row 1", "c", "a", "row 4", "c"]


def test_parquet_that_is_none_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.parquet file"):
        open_source("parquet", tmp_path)
    pq.write_table(
        pa.table({"smiles": [f"C{'C' * (i % 40)}" for i in range(20_000)]}),
        path := tmp_path / "a.parquet",
        row_group_size=5_000,
        compression="none",
        use_dictionary=False,
    )
    content = path.read_bytes()
    write(path, content[: len(content) // 2])
    with pytest.raises(ValueError, match="is cut short: it does not end with 'PAR1'"):
        open_source("parquet", path)
    write(path, "smiles\nC\n")
    with pytest.raises(ValueError, match="is no Parquet file: it does not start with 'PAR1'"):
        open_source("parquet", path)
    write(path, b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(ValueError, match=r"The schema of .* could not be read"):
        open_source("parquet", path)
    middle = len(content) // 2
    write(path, content[:middle] + b"\xff" * (len(content) // 4) + content[middle + len(content) // 4 :])
    *before, last = rows(open_source("parquet", path))
    assert len(before) >= 5_000
    assert last.stage == "parquet"
    assert "a.parquet is damaged" in last.reason


def test_parquet_types_and_columns_of_every_file(tmp_path):
    pq.write_table(pa.table({"smiles": ["C"], "y": [[1.0]], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Column 'y' of .* has the type list.*numbers or text were expected"):
        open_source("parquet", tmp_path, targets=["y"])
    with pytest.raises(ValueError, match=r"Column 'n' of .* has the type int64, but text was expected"):
        open_source("parquet", tmp_path, smiles_column="n")
    pq.write_table(pa.table({"SMILES": ["C"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'smiles'\. Its columns: 'SMILES'"):
        open_source("parquet", tmp_path)
    pq.write_table(pa.table({"smiles": ["C"], "coordinates": [[0.0, 0.0, 0.0]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"Column 'coordinates' of .* lists \(atoms, 3\) were expected"):
        open_source("parquet", tmp_path / "b.parquet")


def test_dataset_on_disk(tmp_path):
    dataset = datasets.Dataset.from_dict(COLUMNS)
    dataset.with_format("torch").save_to_disk(tmp_path / "one")
    options = {"targets": ["y", "label", "note"]}
    source = open_source("dataset", tmp_path / "one", **options)
    assert rows(source) == as_read([XYZ])
    assert all(path.is_file() for path in source.files)
    assert source.files
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    both = rows(open_source("dataset", tmp_path / "two", **options))
    assert [record.split for record in both] == ["train"] * 3 + ["test"] * 3
    assert rows(open_source("dataset", f"{tmp_path / 'two'}:test", **options)) == as_read([XYZ], "test")
    with pytest.raises(ValueError, match=r"has no split 'x'\. Its splits: 'train', 'test'"):
        open_source("dataset", f"{tmp_path / 'two'}:x")
    with pytest.raises(ValueError, match="is no folder saved by `datasets`"):
        open_source("dataset", tmp_path)
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a dataset on the Hub"):
        open_source("dataset", tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no column 'z'\. Its columns: 'smiles', 'id', 'y'"):
        open_source("dataset", tmp_path / "one", targets=["z"])


def test_dataset_with_fixed_shapes(tmp_path):
    features = datasets.Features(
        {"smiles": datasets.Value("string"), "coordinates": datasets.Array2D((2, 3), "float32")}
    )
    datasets.Dataset.from_dict({"smiles": ["CC"], "coordinates": [XYZ]}, features).save_to_disk(tmp_path)
    assert rows(open_source("dataset", tmp_path))[0].coordinates == [XYZ]


def test_dataset_on_the_hub_is_streamed(monkeypatch):
    def load_dataset(
        name: str, split: str | None, streaming: bool
    ) -> datasets.IterableDataset | datasets.IterableDatasetDict:
        assert (name, streaming) == ("user/name", True)
        # As from CSV files: the columns are known from the first row only.
        parts = {
            part: datasets.IterableDataset.from_generator(lambda: ({"smiles": "C" * n, "y": str(n)} for n in (1, 2)))
            for part in ("train", "test")
        }
        return datasets.IterableDatasetDict(parts) if split is None else parts[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("dataset", "user/name", targets=["y"])
    assert [(record.smiles, record.targets, record.split) for record in rows(source)] == [
        ("C", ("1",), "train"),
        ("CC", ("2",), "train"),
        ("C", ("1",), "test"),
        ("CC", ("2",), "test"),
    ]
    assert source.files == ()
    assert [record.split for record in rows(open_source("dataset", "user/name:test"))] == ["test", "test"]


# What is checked before the first record


def test_kinds():
    assert SOURCES == ("pcqm4mv2", "qm9", "moleculenet", "csv", "tsv", "smi", "sdf", "parquet", "dataset")
    with pytest.raises(ValueError, match=r"There is no source 'xyz'. Choose one of 'pcqm4mv2'"):
        open_source("xyz", "a")


@pytest.mark.parametrize("kind", ["moleculenet", "csv", "tsv", "smi", "sdf", "parquet"])
def test_missing_file(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"does not exist; an? .* was expected"):
        open_source(kind, tmp_path / "bace.csv")


@pytest.mark.parametrize("kind", ["csv", "smi", "sdf"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv.gz", b"smiles\nC\n", "is not gzipped, as its name says"),
        ("a.csv", b"\n<!DOCTYPE html><html>", "is a web page; .* Download the file again"),
        ("a.sdf.gz", b"<HTML>", "is a web page"),
        ("a.csv", gzip.compress(b"<html>", mtime=0), "is a web page"),
        ("a.xlsx", b"PK\x03\x04...", "is a zip archive or an Excel workbook"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS.*git lfs pull"),
        ("a.csv", b"PAR1\x15\x04\x15", "is a Parquet file.*source 'parquet'"),
        ("a.csv", bz2.compress(b"smiles\nC\n"), "is compressed by bzip2; .* Unpack it"),
        ("a.csv", bz2.compress(b""), "is compressed by bzip2"),
        ("a.csv", b"", "is empty"),
        ("a.csv", gzip.compress(b"smiles\nC\n", mtime=0)[:11], "is damaged: nothing in it can be unpacked"),
    ],
)
def test_file_that_is_not_what_its_name_says(tmp_path, kind, name, content, message):
    with pytest.raises(ValueError, match=message):
        open_source(kind, write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["PAR1_pIC50", "par1", "BZh1", "pk", "version https"])
def test_a_column_may_be_named_like_the_start_of_another_file(tmp_path, name):
    path = write(tmp_path / "a.csv", f"{name},smiles\n1,C\n")
    assert rows(open_source("csv", path, targets=[name])) == [Record(0, "0", "C", targets=("1",))]


def test_what_is_no_sdf(tmp_path):
    with pytest.raises(ValueError, match=r"is no SDF or MOL file: no line of its first .* 'M  END'"):
        open_source("sdf", write(tmp_path / "a.sdf", "smiles\nC\n"))
    with pytest.raises(ValueError, match=r"holds no file that ends in \.sdf"):
        open_source("sdf", write(tmp_path / "a.tar", tar({"a.txt": "x"})))
    with pytest.raises(ValueError, match="is a tar archive; a text table was expected"):
        open_source("csv", write(tmp_path / "a.tar", tar({"a.csv": "x"})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["z"]}, r"a\.csv has no column 'z'\. Its columns: 'smiles', 'y'\."),
        ({"id_column": "z"}, "has no column 'z'"),
        ({"split_column": "z"}, "has no column 'z'"),
        ({"smiles_column": "z"}, "has no column 'z'"),
        ({"targets": "y"}, r"targets must be a list of names, got the text 'y'"),
        ({"targets": ["y"], "units": {"z": "eV"}}, r"'z' has a unit or a task, but is no target\. The targets: 'y'"),
        ({"units": {"y": "eV"}}, r"'y' has a unit or a task, but is no target\. No target is named"),
        (
            {"targets": ["y"], "tasks": {"y": "ranking"}},
            "must be one of 'regression', 'classification', 'classes', got 'ranking'",
        ),
        ({"delimiter": "ab"}, "delimiter must be one character, got 'ab'"),
        ({"exclude": "a.txt"}, "exclude has no meaning for source 'csv'. It takes 'smiles_column'"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source("csv", write(tmp_path / "a.csv", "smiles,y\nC,1\n"), **options)


def test_options_without_a_use(tmp_path):
    with pytest.raises(ValueError, match=r"targets has no meaning for source 'smi'. It takes no options"):
        open_source("smi", write(tmp_path / "a.smi", "C\n"), targets=["y"])


def test_no_column_of_smiles(tmp_path):
    with pytest.raises(
        ValueError, match=r"can be told to hold the SMILES\. Name it with --smiles_column\. .*'a', 'b'"
    ):
        open_source("csv", write(tmp_path / "a.csv", "a,b\n1,2\n"))


def test_list_of_no_ids(tmp_path):
    with pytest.raises(ValueError, match="lists no ids: no line starts with a number or gdb_N"):
        open_source("qm9", qm9(tmp_path), exclude=write(tmp_path / "a.txt", "none\n"))


def test_records_are_read_as_they_are_asked_for(tmp_path):
    """The first records of a long file do not wait for the rest, which may even be missing by then."""
    path = write(tmp_path / "a.csv", "smiles\n" + "C\n" * 1_000_000)
    records = open_source("csv", path).records()
    first = list(itertools.islice(records, 3))
    path.write_bytes(b"")
    assert [record.smiles for record in first] == ["C", "C", "C"]
    assert sum(1 for _ in records) < 500_000
