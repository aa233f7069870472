"""What is known about the published corpora that `sources.py` reads: columns, units, tasks and whom to cite."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A property that a source gives for its molecules."""

    name: str
    unit: str | None = None
    task: str = "regression"  # or "classification", which is binary, or "classes", of which each has an index
    class_names: tuple[str, ...] = ()  # in the order of their indices, if cells may hold them
    of_atoms: bool = False  # a list for each molecule, one value for each of its atoms


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a dataset card says about a corpus; None where it is not settled."""

    title: str
    citation: str | None = None
    license: str | None = None
    homepage: str | None = None


PCQM4MV2 = Corpus(
    "PCQM4Mv2",
    "Hu, Fey, Ren, Nakata, Dong, Leskovec: OGB-LSC: A Large-Scale Challenge for Machine Learning on Graphs (2021), "
    "arXiv:2103.09430",
    "cc-by-4.0",
    "https://ogb.stanford.edu/docs/lsc/pcqm4mv2/",
)
PCQM4MV2_TARGETS = (Target("homolumogap", "eV"),)

QM9 = Corpus(
    "QM9",
    "Ramakrishnan, Dral, Rupp, von Lilienfeld: Quantum chemistry structures and properties of 134 kilo molecules. "
    "Scientific Data 1, 140022 (2014), doi:10.1038/sdata.2014.22",
    homepage="http://quantum-machine.org/datasets/",
)
QM9_TARGETS = (
    *(Target(name, "GHz") for name in ("A", "B", "C")),
    Target("mu", "D"),
    Target("alpha", "bohr^3"),
    *(Target(name, "hartree") for name in ("homo", "lumo", "gap")),
    Target("r2", "bohr^2"),
    *(Target(name, "hartree") for name in ("zpve", "u0", "u298", "h298", "g298")),
    Target("cv", "cal/(mol K)"),
    *(Target(name, "kcal/mol") for name in ("u0_atom", "u298_atom", "h298_atom", "g298_atom")),  # of atomization
)

MOLECULENET = Corpus(
    "MoleculeNet",
    "Wu, Ramsundar, Feinberg, Gomes, Geniesse, Pappu, Leswing, Pande: MoleculeNet: a benchmark for molecular machine "
    "learning. Chemical Science 9, 513-530 (2018), doi:10.1039/C7SC02664A",
    homepage="https://moleculenet.org",
)


@dataclass(frozen=True, slots=True)
class MoleculeNetSet:
    """What is known about a file of MoleculeNet."""

    title: str
    file_names: tuple[str, ...]  # how they start, in lower case
    task: str = "classification"
    targets: tuple[Target, ...] = ()  # none: all columns but those of SMILES and id
    others: tuple[Target, ...] = ()  # can be asked for
    smiles: str = "smiles"
    id: str | None = None  # only where the ids are unique
    unit_of_prefix: tuple[str, str] = ("", "")  # for sets whose targets are all columns


MOLECULENET_SETS = {
    "bace": MoleculeNetSet(
        "BACE",
        ("bace",),
        targets=(Target("Class", task="classification"),),
        others=(Target("pIC50"),),
        smiles="mol",
        id="CID",
    ),
    "bbbp": MoleculeNetSet("BBBP", ("bbbp",), targets=(Target("p_np", task="classification"),), id="num"),
    "clintox": MoleculeNetSet(
        "ClinTox",
        ("clintox",),
        targets=tuple(Target(name, task="classification") for name in ("FDA_APPROVED", "CT_TOX")),
    ),
    "esol": MoleculeNetSet(
        "ESOL",
        ("esol", "delaney"),
        "regression",
        (Target("measured log solubility in mols per litre", "log10(mol/L)"),),
        (Target("ESOL predicted log solubility in mols per litre", "log10(mol/L)"),),
        id="Compound ID",
    ),
    "freesolv": MoleculeNetSet(
        "FreeSolv",
        ("freesolv", "sampl"),
        "regression",
        (Target("expt", "kcal/mol"),),
        (Target("calc", "kcal/mol"),),
        id="iupac",
    ),
    "hiv": MoleculeNetSet("HIV", ("hiv",), targets=(Target("HIV_active", task="classification"),)),
    "lipophilicity": MoleculeNetSet(
        "Lipophilicity", ("lipophilicity", "lipo"), "regression", (Target("exp"),), id="CMPD_CHEMBLID"
    ),
    # E: excitation energies in atomic units; f: oscillator strengths, which have none.
    "qm8": MoleculeNetSet("QM8", ("qm8",), "regression", unit_of_prefix=("E", "hartree")),
    "sider": MoleculeNetSet("SIDER", ("sider",)),
    "tox21": MoleculeNetSet("Tox21", ("tox21",), id="mol_id"),
    "toxcast": MoleculeNetSet("ToxCast", ("toxcast",)),
    "muv": MoleculeNetSet("MUV", ("muv",)),
}
