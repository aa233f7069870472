"""The labelled molecules that a script is given: a preprocessed dataset, or a file of which preprocess.py makes one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import preprocess
from assemble import check_without
from data import check_same_graphs
from files import empty
from moleblend_hf import MoleBlendProcessor
from preprocess import PreprocessingSettings
from settings import as_flags, settings_from
from sources import Source, source_of


def preprocessing_of(
    input: str,
    output_dir: str,
    processor: MoleBlendProcessor,
    values: Mapping[str, Any],
    further: Mapping[str, Any],
) -> PreprocessingSettings:
    """The settings by which preprocess.py makes a dataset in OUTPUT_DIR/data of a file.

    Args:
        input: the file.
        output_dir: of the script.
        processor: its chemistry settings, unless others are given.
        values: of settings of preprocess.py, as YAML has them.
        further: what the user says on top of these.
    """
    names = {field.name for field in dataclasses.fields(PreprocessingSettings)}
    chemistry = {name: value for name, value in processor.to_dict().items() if name in names}
    given = {"input": input, "output": str(Path(output_dir, "data")), **chemistry, **values, **further}
    if given.get("source") is None:
        given["source"] = source_of(input)
    return settings_from(PreprocessingSettings, given, "preprocessing")


def checked_source(settings: PreprocessingSettings, processor: MoleBlendProcessor, output_dir: Path) -> Source:
    """The source of a preprocessing for a checkpoint's processor, after all is checked that can be before a row is read.

    OUTPUT_DIR, which is emptied then, holds nothing that is read.
    """
    check_same_graphs(settings.input, vars(settings), processor)
    source = preprocess.opened_source(settings)
    preprocess.check_what_is_read(settings, source, output_dir)
    check_without(settings.without or ())
    preprocess.part_settings(settings, source)  # raises for units that cannot be converted
    return source


def preprocess_into(output_dir: Path, settings: PreprocessingSettings) -> None:
    """Empty a folder and make the dataset in it."""
    empty(output_dir)
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    given = {name: value for name, value in vars(settings).items() if value != usual[name]}
    preprocess.run(settings, as_flags(given))
