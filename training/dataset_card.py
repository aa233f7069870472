"""The card of a dataset, rendered when it is written, and the histogram in it."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCardData
from matplotlib.figure import Figure

from assemble import Assembly
from moleblend_hf.featurization_moleblend import ATOM_FEATURES
from reporting import CARDS, render, without_places
from sources import Source

if TYPE_CHECKING:
    from preprocess import PreprocessingSettings


def write_dataset_card(
    settings: "PreprocessingSettings", source: Source, assembly: Assembly, arguments: Sequence[str], folder: Path
) -> None:
    """Write README.md and sizes.png into a folder."""
    plot_sizes(assembly, folder / "sizes.png")
    # Said, because the folder has other Parquet files too.
    data_files = {name: f"data/{name}-*.parquet" for name in assembly.splits}
    metadata = DatasetCardData(
        license=source.license,
        pretty_name=source.title,
        size_categories=size_category(assembly.num_kept),
        tags=["chemistry", "molecules", "moleblend"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": pattern} for name, pattern in data_files.items()],
            }
        ],
    )
    text = render(
        CARDS / "dataset.md.jinja",
        metadata=metadata.to_yaml(),
        title=source.title,
        source=source,
        assembly=assembly,
        settings=settings,
        split_definition=settings.split or ("given" if len(assembly.splits) > 1 else None),
        hashed=len(assembly.splits) > 1,
        inchikey=settings.duplicates != "keep",
        processor=asdict(settings.featurization()),
        atom_features=", ".join(ATOM_FEATURES),
        data_files=data_files,
        command=shlex.join(["python", "training/preprocess.py", *without_places(arguments)]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def plot_sizes(assembly: Assembly, path: Path) -> None:
    """Save the histogram of the molecules' numbers of atoms."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(assembly.sizes), list(assembly.sizes.values()), width=0.9)
    axes.set(xlabel="atoms", ylabel="molecules", yscale="log" if assembly.num_kept > 1000 else "linear")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


def size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows."""
    powers = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    names = [f"n<{powers[0]}", *map("<n<".join, pairwise(powers)), f"n>{powers[-1]}"]
    return names[sum(num_rows >= 10**power for power in range(3, 3 + len(powers)))]
