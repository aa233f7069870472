"""Make `training/sample/`: 2,000 molecules of QM9 with their DFT geometry and five targets, preprocessed.

    python training/make_sample.py --qm9 DIR          # DIR holds gdb9.sdf and gdb9.sdf.csv; half a minute

Which molecules: those whose ids have the largest SHA-256, so the choice depends neither on a random generator nor on what
else is in the file. The other end of the same order is left to test sets.
"""

import argparse
import csv
import hashlib
import shutil
import tempfile
from pathlib import Path

from rdkit import Chem

import preprocess
from sources import open_source

TARGETS = ("mu", "alpha", "homo", "lumo", "gap")
KEPT = ("data", "preprocessing.json", "sizes.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qm9", type=Path, required=True, help="folder with gdb9.sdf and gdb9.sdf.csv")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sample", help="folder to write to")
    parser.add_argument("--num_molecules", type=int, default=2000)
    return parser.parse_args(argv)


def chosen_ids(qm9: Path, num_molecules: int) -> set[str]:
    """Ids of the molecules to take, no InChIKey twice; prints what was passed over."""
    texts = {record.id: str(record.sdf) for record in open_source("qm9", qm9).records()}
    chosen: dict[str, str] = {}  # InChIKey -> id
    doubles = unfit = 0
    for name in sorted(
        texts, key=lambda name: hashlib.sha256(name.replace("gdb_", "qm9-").encode()).digest(), reverse=True
    ):
        if len(chosen) == num_molecules:
            break
        mol = Chem.MolFromMolBlock(texts[name])
        key = "" if mol is None else Chem.MolToInchiKey(mol)
        if not key or Chem.MolFromSmiles(Chem.MolToSmiles(mol)) is None:
            unfit += 1
        elif key in chosen:
            doubles += 1
        else:
            chosen[key] = name
    print(f"{len(chosen)} of {len(texts)} molecules; passed over: {doubles} doubles, {unfit} that do not read back")
    return set(chosen.values())


def write_part_of_qm9(qm9: Path, ids: set[str], folder: Path) -> None:
    """Write the molecules as gdb9.sdf and gdb9.sdf.csv."""
    source = open_source("qm9", qm9, targets=TARGETS)
    with (folder / "gdb9.sdf").open("w") as sdf, (folder / "gdb9.sdf.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("mol_id", *TARGETS))
        for record in source.records():
            if record.id in ids:
                sdf.write(f"{record.sdf}$$$$\n")
                rows.writerow((record.id, *record.targets))


def main(argv: list[str] | None = None) -> None:
    """Choose, preprocess, and put the result into OUTPUT; its README.md is written by hand."""
    args = parse_args(argv)
    output = args.output
    ids = chosen_ids(args.qm9, args.num_molecules)
    with tempfile.TemporaryDirectory() as folder:
        raw, made = Path(folder, "gdb9"), Path(folder, "sample")
        raw.mkdir()
        write_part_of_qm9(args.qm9, ids, raw)
        preprocess.main(["--source", "qm9", "--input", str(raw), "--output", str(made), "--license", "cc0-1.0"])
        output.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            old = output / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            shutil.move(made / name, old)
    print(f"{output}: {sum(path.stat().st_size for path in output.rglob('*')) / 1024:.0f} kB")


if __name__ == "__main__":
    main()
