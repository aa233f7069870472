"""Make `training/sample/`: 2,000 molecules of QM9 with their DFT geometry, as one small Parquet file.

    python training/make_sample.py --qm9 DIR          # DIR holds gdb9.sdf; about a minute

Which molecules: those whose ids have the largest SHA-256, so the choice depends neither on a random generator nor on what
else is in the file. The other end of the same order is left to test sets. Hydrogens are dropped as RDKit's `RemoveHs` does;
SMILES (with the stereo that the geometry has) and coordinates are in the same atom order.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rdkit import Chem

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("smiles", pa.string()),
        ("coordinates", pa.list_(pa.list_(pa.float32(), 3))),  # heavy atoms in the order of the SMILES, angstrom
    ]
)


def heavy_atoms_in_smiles_order(molecule: Chem.Mol) -> tuple[str, np.ndarray] | None:
    """Isomeric SMILES and coordinates (atoms, 3) of the heavy atoms in its order, or None if it does not read back as itself."""
    heavy = Chem.RemoveHs(molecule)
    smiles = Chem.MolToSmiles(heavy)
    order = list(heavy.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])
    coordinates = heavy.GetConformer().GetPositions()[order].astype(np.float32)
    reread = Chem.MolFromSmiles(smiles)
    if reread is None or Chem.MolToSmiles(reread) != smiles:
        return None
    if [atom.GetAtomicNum() for atom in reread.GetAtoms()] != [heavy.GetAtomWithIdx(i).GetAtomicNum() for i in order]:
        return None
    begin, end = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in reread.GetBonds()], int).reshape(-1, 2).T
    lengths = np.linalg.norm(coordinates[begin] - coordinates[end], axis=-1)
    # Bonds between heavy atoms of QM9 are 1.1 to 1.8 angstrom long: a wrong order of the coordinates cannot hide.
    return (smiles, coordinates) if np.all((lengths > 1.0) & (lengths < 2.0)) else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qm9", type=Path, required=True, help="folder with gdb9.sdf")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sample", help="folder to write to")
    parser.add_argument("--num_molecules", type=int, default=2000)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write `OUTPUT/qm9_sample.parquet` and print what was taken and what was passed over."""
    args = parse_args(argv)
    supplier = Chem.SDMolSupplier(str(args.qm9 / "gdb9.sdf"), removeHs=False)
    titles = [supplier.GetItemText(i).split("\n", 1)[0].strip() for i in range(len(supplier))]
    digests = [hashlib.sha256(title.replace("gdb_", "qm9-").encode()).hexdigest() for title in titles]

    rows: list[dict[str, object]] = []
    keys: set[str] = set()
    duplicates, unfit = 0, 0
    for index in sorted(range(len(titles)), key=digests.__getitem__, reverse=True):
        if len(rows) == args.num_molecules:
            break
        molecule = supplier[index]
        found = None if molecule is None else heavy_atoms_in_smiles_order(molecule)
        if found is None:
            unfit += 1
            continue
        smiles, coordinates = found
        key = Chem.MolToInchiKey(Chem.MolFromSmiles(smiles))
        if key in keys:
            duplicates += 1
            continue
        keys.add(key)
        rows.append({"id": titles[index], "smiles": smiles, "coordinates": coordinates.tolist()})

    rows.sort(key=lambda row: int(str(row["id"]).removeprefix("gdb_")))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "qm9_sample.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd", compression_level=19)
    print(
        f"{path}: {len(rows)} of {len(titles)} molecules, {path.stat().st_size / 1024:.0f} kB; passed over: "
        f"{duplicates} of an InChIKey already taken, {unfit} whose SMILES or geometry does not read back as itself"
    )


if __name__ == "__main__":
    main()
