r"""Turn a corpus of molecules into a dataset that training reads: Parquet files, a card, and a list of what did not make it.

QM9                  python training/preprocess.py --source qm9 --input DIR --output data/qm9 --num_proc 2
PCQM4Mv2             python training/preprocess.py --source pcqm4mv2 --input DIR --output data/pcqm4mv2 --num_proc 16
MoleculeNet          python training/preprocess.py --source moleculenet --input bbbp.csv --output data/bbbp --split scaffold
A table of yours     python training/preprocess.py --source csv --input my.csv --output data/my --smiles_column SMILES --targets pIC50
Values of atoms      ... --source sdf --input my.sdf --atom_targets shift,charge --units shift=ppm
Not what is tested   ... --without data/bbbp,data/bace    (their molecules, by InChIKey)
With conformers      ... --modality 2d+3d --num_conformers 4 --conformer_cache conformers.sqlite
On a Ray cluster     ... --engine ray --num_proc 256, with OUTPUT on a file system that all machines share
After an interrupt   the same command: parts that are done are kept, also with --overwrite

Every row of the source ends up either in the dataset or in rejected.parquet. The content does not depend on the engine or the
number of processes.
"""

import dataclasses
import errno
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from assemble import ABOUT, Assembly, assemble, check_without, publish
from conformers import ConformerCache
from dataset_card import write_dataset_card
from engines import ENGINES, run_locally, run_on_ray
from files import check_does_not_hold, empty
from moleblend_hf.molecules_moleblend import HYDROGENS, MODALITIES, FeaturizationSettings
from parts import Part, PartSettings, makes_conformers
from reporting import versions
from settings import load_settings, setting
from sources import SOURCES, Record, Source, count_rows, open_source
from splits import SCAFFOLD_SPLITS, SPLITS, check_fractions
from units import dimension_of, factor

# What is done again after an interrupt, and how often the progress bar moves. A conformer takes 100 times longer than all
# the rest.
RECORDS_A_PART = 1000
CONFORMERS_A_PART = 100
SAID = ("title", "citation", "license")  # by the source or the user, about the data
DUPLICATES = ("keep", "report", "drop")
# The field states QM9's energies in eV.
DEFAULT_CONVERSIONS = {"qm9": {"hartree": "eV"}, "moleculenet/qm8": {"hartree": "eV"}}


@dataclasses.dataclass(kw_only=True)
class PreprocessingSettings:
    """What to read, what to do with it and where to write; the first three have to be given."""

    source: str = setting("input", "layout of the corpus", choices=SOURCES)
    input: str = setting("input", "its file or folder; for dataset also a Hub id, user/name[:split]")
    smiles_column: str | None = setting("input", "column of the SMILES; guessed from its name if left out", None)
    id_column: str | None = setting("input", "column or SDF field of the ids; else guessed, else row numbers", None)
    targets: list[str] | None = setting("input", "columns or SDF fields of the targets, A,B; else those known", None)
    atom_targets: list[str] | None = setting(
        "input", "targets of atoms, A,B: columns of lists, in an SDF RDKit's atom.dprop.A; see target_values.py", None
    )
    tasks: dict[str, str] = setting(
        "input", "regression, classification (0 and 1) or classes (0, 1, 2, ...), by target: --tasks active=classification",
        {},
    )  # fmt: skip
    class_names: list[str] | None = setting(
        "input", "what cells of classes say instead of 0, 1, 2, ...: --class_names low,medium,high", None
    )
    units: dict[str, str] = setting("input", "unit of a target in the source: --units gap=hartree", {})
    convert: dict[str, str] = setting("input", "unit to store a target in: --convert gap=meV", {})
    split_column: str | None = setting("input", "column or SDF field that names the split of a row", None)
    delimiter: str | None = setting("input", "of csv and tsv", None)
    exclude: str | None = setting("input", "list of QM9 ids to reject, as its uncharacterized.txt", None)

    modality: str = setting(
        "molecules", "auto: given geometries; 2d: none; 2d+3d: made where missing; 3d: as that, and none is a reason to reject",
        "auto", choices=MODALITIES,
    )  # fmt: skip
    hydrogens: str = setting("molecules", "as atoms: drop, keep those written, or add all", "drop", choices=HYDROGENS)
    canonical_atom_order: bool = setting("molecules", "features do not depend on the order of the atoms", True)
    max_atoms: int = setting("molecules", "largest molecule", 512)
    num_conformers: int = setting("molecules", "conformers to make for a molecule", 1)
    conformer_seed: int = setting("molecules", "seed of the conformers", 42)
    max_conformer_atoms: int = setting("molecules", "largest molecule, with hydrogens, to make conformers for", 400)
    max_embedding_attempts: int = setting("molecules", "attempts for a conformer", 10)
    max_mmff_iterations: int = setting("molecules", "steps of its relaxation; 0 leaves it as embedded", 200)
    conformer_cache: str | None = setting("molecules", "SQLite file that keeps conformers for other runs", None)
    molecule_time_limit: float = setting("molecules", "seconds after which RDKit is given up on a molecule", 60.0)

    duplicates: str = setting(
        "rows", "of an InChIKey: drop all but the first, report them in the card, or keep without looking",
        "report", choices=DUPLICATES,
    )  # fmt: skip
    without: list[str] | None = setting(
        "rows",
        "preprocessed datasets A,B whose molecules (InChIKeys) are rejected here, as those a model is tested on",
        None,
    )
    split: str | None = setting(
        "rows",
        "definition of the split; left out: that of the source, if it has one",
        None,
        choices=("given", *SPLITS),
    )
    split_fractions: list[float] = setting("rows", "of training, validation and test", [0.8, 0.1, 0.1])
    split_seed: int = setting("rows", "seed of the splits that draw", 0)
    limit: int | None = setting("rows", "read only the first so many rows", None)

    output: str = setting("output", "folder of the dataset")
    overwrite: bool = setting(
        "output", "delete what is in OUTPUT, but for an unfinished run of the same command", False
    )
    num_proc: int = setting("output", "processes that featurize; one more reads and writes", 1)
    engine: str = setting("output", "local processes or a Ray cluster", "local", choices=ENGINES)
    rows_per_file: int = setting("output", "rows of a Parquet file", 100_000)
    title: str | None = setting("output", "name of the data, for the card; known for some sources", None)
    citation: str | None = setting("output", "whom to cite for them, for the card; known for some sources", None)
    license: str | None = setting("output", "their licence, for the card; known for some sources", None)
    push_to_hub: str | None = setting("output", "also upload to this dataset of the Hub, user/name", None)
    private: bool = setting("output", "whether that dataset is private", False)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        for name in ("num_proc", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.molecule_time_limit <= 0:
            raise ValueError(f"molecule_time_limit must be more than 0 seconds, got {self.molecule_time_limit}.")
        if self.split_column is not None and self.split not in (None, "given"):
            raise ValueError(
                f"split_column names the column that says the split of each row, but split is {self.split!r}, which makes "
                "another one. Leave one of them out."
            )
        if self.without and self.duplicates == "keep":
            raise ValueError("without compares InChIKeys, which duplicates='keep' does not make. Use report or drop.")
        check_fractions(tuple(self.split_fractions))

    def that_shape_the_content(self) -> dict[str, Any]:
        """All settings but those that say where and how fast."""
        free = ("output", "overwrite", "num_proc", "engine", "push_to_hub", "private", "conformer_cache", *SAID)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def that_shape_the_parts(self) -> dict[str, Any]:
        """Of these all but what only puts the parts together, which may change before an interrupted run goes on."""
        free = ("without", "split_fractions", "split_seed", "rows_per_file")
        settings = {name: value for name, value in self.that_shape_the_content().items() if name not in free}
        scaffold = self.split if self.split in SCAFFOLD_SPLITS else None
        return settings | {"split": scaffold, "duplicates": self.duplicates == "keep"}

    def featurization(self) -> FeaturizationSettings:
        """The settings that a processor has too."""
        names = {field.name for field in dataclasses.fields(FeaturizationSettings)}
        return FeaturizationSettings(**{name: value for name, value in vars(self).items() if name in names})


def parse_args(argv: list[str] | None = None) -> PreprocessingSettings:
    """Settings from the flags, and from a YAML file if one is named."""
    return load_settings(PreprocessingSettings, __doc__, None, argv)


def opened_source(settings: PreprocessingSettings) -> Source:
    """The source that the settings name, with what they say about it."""
    source = open_source(
        settings.source,
        settings.input,
        smiles_column=settings.smiles_column,
        id_column=settings.id_column,
        targets=settings.targets,
        atom_targets=settings.atom_targets,
        units=settings.units,
        tasks=settings.tasks,
        class_names=settings.class_names,
        split_column=settings.split_column,
        exclude=settings.exclude,
        delimiter=settings.delimiter,
    )
    return dataclasses.replace(
        source, **{name: said for name in SAID if (said := getattr(settings, name)) is not None}
    )


def stored_units(settings: PreprocessingSettings, source: Source) -> dict[str, str | None]:
    """The unit in which each target is stored: as asked for, else as the field states it, else that of the source."""
    names = [target.name for target in source.targets]
    if unknown := [name for name in settings.convert if name not in names]:
        raise ValueError(f"convert names no target {unknown[0]!r}. The targets: {', '.join(names) or 'none'}.")
    for name, unit in {**settings.units, **settings.convert}.items():
        try:
            dimension_of(unit)
        except ValueError as error:
            raise ValueError(f"Of target {name!r}: {error}") from error
    usual = DEFAULT_CONVERSIONS.get(source.name, {})
    found = {}
    for target in source.targets:
        if target.name in settings.convert and target.unit is None:
            raise ValueError(
                f"Target {target.name!r} has no unit to convert from. Name it with --units {target.name}=UNIT."
            )
        found[target.name] = settings.convert.get(target.name, usual.get(target.unit or "", target.unit))
    return found


def part_settings(settings: PreprocessingSettings, source: Source) -> PartSettings:
    """What the processes that featurize need to know."""
    units = stored_units(settings, source)
    return PartSettings(
        featurization=settings.featurization(),
        targets=source.targets,
        target_factors=tuple(
            1.0 if units[target.name] == target.unit else factor(str(target.unit), str(units[target.name]))
            for target in source.targets
        ),
        with_inchikey=settings.duplicates != "keep",
        scaffold=settings.split if settings.split in SCAFFOLD_SPLITS else None,
        molecule_time_limit=settings.molecule_time_limit,
        conformer_cache=settings.conformer_cache,
    )


def part_size(settings: PreprocessingSettings) -> int:
    """How many records are worked on together."""
    return CONFORMERS_A_PART if makes_conformers(settings.modality) else RECORDS_A_PART


def check_what_is_read(settings: PreprocessingSettings, source: Source, folder: Path) -> None:
    """Raise if a folder that is emptied holds what the run reads."""
    for file in source.files:
        check_does_not_hold(folder, "input", file)
    for dataset in settings.without or ():
        check_does_not_hold(folder, "without", dataset)
    if settings.conformer_cache is not None:
        check_does_not_hold(folder, "conformer_cache", settings.conformer_cache)


def open_folder(settings: PreprocessingSettings, source: Source) -> Path:
    """The folder of the parts, new or as an interrupted run of the same settings on the same files left it."""
    output = Path(settings.output)
    work = output / ".parts"
    identity = {
        "settings": settings.that_shape_the_parts(),
        "versions": versions("moleblend_hf", "rdkit"),
        "part_size": part_size(settings),
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files],
    }
    identity = json.loads(json.dumps(identity))
    path = work / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    is_finished = (output / ABOUT).exists()
    if settings.overwrite and (is_finished or before != identity):  # or else it is a run of this command to go on with
        check_what_is_read(settings, source, output)
        if work.is_dir():  # what is left of it if the deletion ends early is nothing to go on with
            shutil.rmtree(doomed := work.with_name(".deleted"), ignore_errors=True)
            work.rename(doomed)
        empty(output)
        before = None
    elif is_finished:
        raise FileExistsError(f"{output} holds a dataset. Choose another --output, or delete it with --overwrite.")
    elif output.is_dir() and not work.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty, and no run of this script left it. Choose another --output.")
    if before is None:
        work.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # so that an interrupt leaves all of it or nothing
        partial.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    elif before != identity:
        changed = [name for name in identity["settings"] if before["settings"].get(name) != identity["settings"][name]]
        what = f"settings ({', '.join(changed)})" if changed else "input files or versions"
        raise ValueError(
            f"{output} holds an unfinished run with other {what}. Repeat that command, choose another --output, or start "
            "anew with --overwrite."
        )
    for leftover in (*work.glob("*.partial"), *work.glob("marker-*")):
        leftover.unlink()
    return work


def parts_to_do(
    records: Iterable[Record], size: int, work: Path, done: Counter[str], progress: tqdm
) -> Iterator[Part]:
    """The source in parts, without those whose rows are there; `done` counts what was read."""
    records = iter(records)
    while chunk := list(islice(records, size)):
        part = Part(done["parts"], chunk, str(work))
        done["parts"] += 1
        done["read"] += len(chunk)
        if part.path("rows").exists():
            progress.update(len(chunk))
        else:
            yield part


def featurize_all(settings: PreprocessingSettings, source: Source, work: Path) -> Counter[str]:
    """Make all parts that are not there yet, and return how many rows were read and how many parts there are."""
    done: Counter[str] = Counter()
    total = count_rows(source)
    if settings.limit is not None:
        total = settings.limit if total is None else min(total, settings.limit)
    run = run_on_ray if settings.engine == "ray" else run_locally
    rejected = 0
    with tqdm(total=total, unit=" molecules", unit_scale=True, mininterval=0.5) as progress:
        parts = parts_to_do(islice(source.records(), settings.limit), part_size(settings), work, done, progress)
        for num_rows, num_rejected in run(parts, part_settings(settings, source), settings.num_proc):
            rejected += num_rejected
            progress.update(num_rows + num_rejected)
            progress.set_postfix_str(f"{rejected:,} rejected")
    return done


def main(argv: list[str] | None = None) -> Assembly:
    """Preprocess as the arguments say."""
    return run(parse_args(argv), sys.argv[1:] if argv is None else argv)


def run(settings: PreprocessingSettings, arguments: Sequence[str]) -> Assembly:
    """Preprocess as the settings say; the card names the arguments."""
    source = opened_source(settings)
    for note in source.notes:
        print(note)
    part_settings(settings, source)  # raises for units that cannot be converted
    check_without(settings.without or ())
    if settings.conformer_cache is not None:
        ConformerCache(settings.conformer_cache)  # raises for a file that is something else
    work = open_folder(settings, source)
    folder = work / "assembled"
    try:
        done = featurize_all(settings, source, work)
        units = stored_units(settings, source)
        assembly = assemble(settings, source, work, folder, done["parts"], done["read"], units)
        write_dataset_card(settings, source, assembly, arguments, folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"No space is left for {settings.output}. Parts that are done are kept: free some and repeat the command",
        ) from error
    publish(folder, Path(settings.output))
    shutil.rmtree(work)
    print(assembly.summary())
    if not assembly.num_kept:
        reasons = "; ".join(assembly.commonest_reasons())
        raise ValueError(
            f"The dataset is empty: {assembly.num_read:,} rows of {settings.input!r} were read, and none was kept"
            f"{f' ({reasons})' if reasons else ''}. See {Path(settings.output, 'rejected.parquet')}, and repeat the command "
            "with --overwrite when they are fixed."
        )
    if settings.push_to_hub:
        push(settings)
    return assembly


def push(settings: PreprocessingSettings) -> None:
    """Upload the folder to the Hub, in place of the rows that are there."""
    from huggingface_hub import HfApi

    name, stale = (
        str(settings.push_to_hub),
        "data/*.parquet",
    )  # other numbers of files would leave old rows among the new
    api = HfApi()
    command = ["hf", "upload", "--repo-type", "dataset", "--delete", stale, name, settings.output]
    print(f"If the upload fails, repeat it with: {shlex.join(command)}")
    url = api.create_repo(name, repo_type="dataset", private=settings.private, exist_ok=True)
    if settings.private and not api.dataset_info(url.repo_id).private:
        raise ValueError(
            f"{url.repo_id} is there, and public. Make it private on the Hub first, or push to another name."
        )
    api.upload_folder(repo_id=url.repo_id, repo_type="dataset", folder_path=settings.output, delete_patterns=[stale])
    print(f"Pushed to {url}.")


if __name__ == "__main__":
    main()
