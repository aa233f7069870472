r"""Can a pretrained model tell how good a geometry is? DFT, MMFF and shaken geometries of the same molecules, by their scores.

    python benchmarks/geometry_check.py --model moleblend-base --dft DFT8K_DFT.sdf.gz --mmff DFT8K_FF.sdf.gz --limit 1000

The files are those of CASCADE (Guan et al. 2021), molecules of NMRShiftDB: records of the same title are the same molecule with
the same atom order. Shaken is DFT with N(0, s) angstrom added to each coordinate. All have the bonds of the DFT record,
and MMFF its orientation.

For each score of `reconstruction_scores`, two figures for each kind of geometry against DFT: ROC-AUC over all molecules (0.5: no
telling apart), and the share of molecules whose own DFT geometry scores lower (paired). A molecule of the model's training data
flatters it: pass molecules that it has not seen.
"""

import argparse
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rdkit import Chem
from scipy.spatial.transform import Rotation
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

from moleblend_hf import MoleculeError, ReconstructionScores, read_sdf, reconstruction_scores

DFT, MMFF = "DFT", "MMFF"
SCORES = [field.name for field in fields(ReconstructionScores)]


def read_titled(path: str) -> dict[str, Chem.Mol]:
    """The readable molecules of an SDF file by title; of several with one title the first."""
    mols: dict[str, Chem.Mol] = {}
    for mol in read_sdf(path):
        if not isinstance(mol, MoleculeError):
            mols.setdefault(mol.GetProp("_Name"), mol)
    return mols


def same_atoms(first: Chem.Mol, second: Chem.Mol) -> bool:
    """Whether two molecules have the same elements in the same order."""
    one, other = ([atom.GetAtomicNum() for atom in mol.GetAtoms()] for mol in (first, second))
    return one == other


def aligned(coordinates: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Coordinates moved onto a reference, as close as a rotation brings them."""
    centre = reference.mean(0)
    coordinates = coordinates - coordinates.mean(0)
    rotation, _ = Rotation.align_vectors(reference - centre, coordinates)
    return rotation.apply(coordinates) + centre


def read_geometries(args: argparse.Namespace) -> tuple[list[Chem.Mol], dict[str, list[np.ndarray]]]:
    """Molecules with the bonds of the DFT file, and their coordinates in angstrom by kind."""
    dft, mmff = read_titled(args.dft), read_titled(args.mmff)
    both = (title for title, mol in dft.items() if title in mmff and same_atoms(mol, mmff[title]))
    titles = list(islice(both, args.limit))
    if not titles:
        raise SystemExit(
            f"{args.dft} and {args.mmff} have no molecule of the same title and atoms. Pass files that do."
        )
    geometries = {
        name: [mols[title].GetConformer().GetPositions() for title in titles]
        for name, mols in ((DFT, dft), (MMFF, mmff))
    }
    # One score depends on the frame, which should not tell the files apart.
    geometries[MMFF] = [aligned(xyz, dft_xyz) for xyz, dft_xyz in zip(geometries[MMFF], geometries[DFT], strict=True)]
    rng = np.random.default_rng(args.seed)
    for scale in args.shake:
        geometries[f"shaken {scale:g} Å"] = [xyz + rng.normal(scale=scale, size=xyz.shape) for xyz in geometries[DFT]]
    return [dft[title] for title in titles], geometries


def compare(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """ROC-AUC of telling `other` from `reference` by a higher score, and the share of molecules where it is higher."""
    defined = np.isfinite(reference) & np.isfinite(other)
    reference, other = reference[defined], other[defined]
    is_other = np.repeat([0, 1], len(reference))
    paired = np.mean(other > reference) + np.mean(other == reference) / 2
    return float(roc_auc_score(is_other, np.concatenate([reference, other]))), float(paired)


def plot(scores: dict[str, ReconstructionScores], path: Path) -> None:
    """The distribution of each score by kind of geometry, and that of its difference from the molecule's DFT geometry."""
    figure = Figure(figsize=(16, 6.4), layout="constrained")
    panels = figure.subplots(2, len(SCORES))
    for (upper, lower), name in zip(panels.T, SCORES, strict=True):
        values = {kind: getattr(of_kind, name) for kind, of_kind in scores.items()}
        differences = {kind: column - values[DFT] for kind, column in values.items() if kind != DFT}
        for axes, columns in ((upper, values), (lower, differences)):
            bins = np.linspace(*np.nanpercentile(np.concatenate(list(columns.values())), [0.5, 99.5]), 31)
            for color, kind in enumerate(values):
                if kind in columns:
                    axes.hist(columns[kind], bins, histtype="step", lw=1.5, color=f"C{color}", label=kind)
            axes.grid(alpha=0.3)
        upper.set(title=name.replace("_", " "), xlabel="score")
        lower.set(xlabel="score less that of DFT")
        lower.axvline(0, color="black", lw=0.8)
    for axes in panels[:, 0]:
        axes.set(ylabel="molecules")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(scores), frameon=False
    )
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    """Score the geometries, print how well each score tells them apart, and plot the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretraining checkpoint, or its name on the Hub")
    parser.add_argument("--dft", required=True, help="SDF with DFT geometries, plain or gzipped")
    parser.add_argument("--mmff", required=True, help="SDF with force-field geometries of the same titles")
    parser.add_argument("--limit", type=int, default=1000, help="molecules to take")
    parser.add_argument("--shake", type=float, nargs="+", default=[0.05, 0.2], help="standard deviations in angstrom")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the shaking, and of the noise to denoise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--plot", type=Path, default=Path("geometry_check.png"), help="where the picture goes")
    args = parser.parse_args(argv)

    mols, geometries = read_geometries(args)
    model = AutoModelForPreTraining.from_pretrained(args.model).to(args.device)
    processor = AutoFeatureExtractor.from_pretrained(args.model)
    scores = {
        kind: reconstruction_scores(model, processor, mols, coordinates, args.batch_size, args.seed)
        for kind, coordinates in tqdm(geometries.items(), "scoring", unit="kind")
    }

    print(f"{len(mols):,} molecules of {args.dft}. Against DFT: ROC-AUC / share of molecules with DFT lower")
    others = [kind for kind in scores if kind != DFT]
    print(f"{'':28}{'DFT, median':>14}" + "".join(f"{kind:>18}" for kind in others))
    for name in SCORES:
        reference = getattr(scores[DFT], name)
        cells = (compare(reference, getattr(scores[kind], name)) for kind in others)
        line = "".join(f"{f'{auc:.3f} / {paired:.3f}':>18}" for auc, paired in cells)
        print(f"{name:28}{np.nanmedian(reference):>14.4f}{line}")
    plot(scores, args.plot)
    print(f"{args.plot}: {args.plot.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
