# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor for MoleBLEND: molecules in, one padded batch out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import auto_docstring

from .featurization_moleblend import featurize_molecule, featurize_molecules
from .graphs_moleblend import FlatGraphs, MolecularGraph, pair_relations
from .molecules_moleblend import (
    FeaturizationSettings,
    MoleculeError,
    RejectedMolecule,
    describe_molecule,
    input_atoms,
    portable,
    require_rdkit,
    without_column,
)

_IGNORED_LABEL = -100  # of atoms that are padding, where labels are integers
_MOLECULES_A_CHUNK = 256
_ON_ERROR = ("raise", "skip")
_METADATA = ("auto_map", "processor_class", "feature_extractor_type")
# Arguments of transformers' loading that it hands on to whatever is loaded.
_LOADING = ("_commit_hash", "code_revision", "repo_type", "return_unused_kwargs", "trust_remote_code", "user_agent")


@auto_docstring(
    custom_intro="""
    Turns molecules into the tensors that MoleBLEND takes. It owns every chemistry setting and saves them with the
    checkpoint, so that a fine-tuned model sees molecules as it was trained on.

    Atoms come back in the order of the input, but two ways to write one molecule give the same numbers.
    """
)
class MoleBlendProcessor(FeatureExtractionMixin):
    r"""
    Args:
        modality (`str`, *optional*, defaults to `"auto"`):
            What the batch shows. `"2d"`: bonds only, coordinates are ignored. `"auto"`: coordinates that were given, or
            a 3D conformer of an RDKit molecule, are used; none are made. `"2d+3d"`: coordinates are generated where
            there are none, and a molecule for which that fails stays 2D (see `fallbacks`). `"3d"`: the same without
            the 2D relations, and such a molecule is rejected.
        hydrogens (`str`, *optional*, defaults to `"drop"`):
            `"drop"` removes explicit hydrogens, `"keep"` leaves those that are written, `"add"` makes all of them atoms.
        canonical_atom_order (`bool`, *optional*, defaults to `True`):
            Whether the features are independent of the order in which the atoms are written: the smallest of several
            shortest paths, and clockwise as seen by RDKit's canonical ranks. `False` follows the order as written, as the
            original implementation does.
        bonds (`str`, *optional*):
            What to do with `(symbols, coordinates)` pairs, which have no bonds: `"determine"` lets RDKit find them, for
            which all hydrogens have to be there; `None` allows `modality="3d"` only.
        max_atoms (`int`, *optional*, defaults to 512):
            Largest molecule, counted after hydrogens are dropped or added. Memory grows with its square.
        max_path_bonds (`int`, *optional*, defaults to 5):
            Number of bonds of a shortest path that are told apart. Has to be that of the model's config.
        num_conformers (`int`, *optional*, defaults to 1):
            Number of conformers to generate for a molecule.
        conformer_seed (`int`, *optional*, defaults to 42):
            Seed of the conformer generation.
        max_conformer_atoms (`int`, *optional*, defaults to 400):
            Largest molecule, with all its hydrogens, for which conformers are generated.
        max_embedding_attempts (`int`, *optional*, defaults to 10):
            Attempts of ETKDGv3 for a conformer, and again as many from random coordinates.
        max_mmff_iterations (`int`, *optional*, defaults to 200):
            Steps of the MMFF relaxation of a generated conformer; 0 leaves it as embedded.
        max_bond_order_iterations (`int`, *optional*, defaults to 10000):
            Limit of the search that `bonds="determine"` does.
    """

    model_input_names: ClassVar[list[str]] = [
        "atom_features",
        "attention_mask",
        "degree",
        "shortest_path_distance",
        "path_bond_types",
        "coordinates",
        "coordinates_mask",
    ]
    # Saving copies the code next to the settings, whichever way the class was loaded.
    _auto_class = "AutoFeatureExtractor"  # type: ignore[assignment]
    _auto_map: ClassVar[dict[str, str]] = {
        "AutoFeatureExtractor": "processing_moleblend.MoleBlendProcessor",
        "AutoProcessor": "processing_moleblend.MoleBlendProcessor",
    }

    def __init__(
        self,
        modality: str = "auto",
        hydrogens: str = "drop",
        canonical_atom_order: bool = True,
        bonds: str | None = None,
        max_atoms: int = 512,
        max_path_bonds: int = 5,
        num_conformers: int = 1,
        conformer_seed: int = 42,
        max_conformer_atoms: int = 400,
        max_embedding_attempts: int = 10,
        max_mmff_iterations: int = 200,
        max_bond_order_iterations: int = 10_000,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(kwargs) - set(_METADATA))
        if unknown:
            known = ", ".join(field.name for field in fields(FeaturizationSettings))
            raise ValueError(f"MoleBlendProcessor has no setting {unknown}. Use one of: {known}.")
        super().__init__()
        self.modality = modality
        self.hydrogens = hydrogens
        self.canonical_atom_order = canonical_atom_order
        self.bonds = bonds
        self.max_atoms = max_atoms
        self.max_path_bonds = max_path_bonds
        self.num_conformers = num_conformers
        self.conformer_seed = conformer_seed
        self.max_conformer_atoms = max_conformer_atoms
        self.max_embedding_attempts = max_embedding_attempts
        self.max_mmff_iterations = max_mmff_iterations
        self.max_bond_order_iterations = max_bond_order_iterations
        self._settings()  # raises if one of them makes no sense
        self._reset_report()

    @auto_docstring
    def __call__(
        self,
        molecules: Any,
        coordinates: Any = None,
        labels: Any = None,
        modality: str | None = None,
        on_error: str = "raise",
        return_tensors: str | None = "pt",
        atom_labels: Any = None,
    ) -> BatchFeature:
        r"""
        molecules (`str`, `rdkit.Chem.Mol`, `tuple`, or a `list` of them):
            SMILES, RDKit molecules, or `(symbols, coordinates)` pairs. Only a list is a batch, or a column of NumPy, pandas,
            polars or datasets.
        coordinates (`np.ndarray` of shape `(num_atoms, 3)`, or a `list` of them, *optional*):
            In angstrom; for each molecule an array or `None`. Of shape `(num_conformers, num_atoms, 3)`, the first
            conformer is used.
        labels (`float`, `list[float]`, or a `list` of either, *optional*):
            For each molecule a number or several. `None` is a missing label and becomes `NaN`; integers stay integers
            if none is missing, and -100 among integers counts as missing: pass temperatures, say, as `float`. Others become
            float32, which has seven digits: subtract what all labels share where they need more (total energies).
        modality (`str`, *optional*):
            Overrides the setting for this call.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first molecule that cannot be featurized; `"skip"` leaves it out, lists it in
            `processor.rejected`, and names the others in `kept_indices`.
        atom_labels (`np.ndarray` of shape `(num_atoms,)` or `(num_atoms, num_labels)`, or a `list` of them, *optional*):
            In place of `labels`, for models of atoms: for each molecule an array in the order in which the input has its
            atoms, or `None` if none of them has a label. A value for each atom of the input, also for hydrogens that are
            dropped, or for each atom of the graph. `None` and `NaN` are missing labels; where all arrays are
            of integers they stay integers, of which -100 is missing.

        Returns:
            [`BatchFeature`] with
            - **atom_features** -- `(batch_size, num_atoms, 9)`, index + 1 in OGB's vocabularies, 0 on padding.
            - **attention_mask** -- `(batch_size, num_atoms)`, 1 for atoms.
            - **degree** -- `(batch_size, num_atoms)`; like the next two left out with `modality="3d"`.
            - **shortest_path_distance** -- `(batch_size, num_atoms, num_atoms)` in bonds.
            - **path_bond_types** -- `(batch_size, num_atoms, num_atoms, max_path_bonds)`.
            - **coordinates** -- `(batch_size, num_atoms, 3)` in angstrom, if any molecule has them.
            - **coordinates_mask** -- `(batch_size,)`, which molecules those are.
            - **labels** -- `(batch_size, num_labels)`, if given; `(batch_size, num_atoms, num_labels)` from `atom_labels`,
              `NaN` on padding, or -100 where they are integers.
            - **kept_indices** -- `(batch_size,)`, with `on_error="skip"`.
        """
        settings, molecules = self._settings(modality), without_column(molecules)
        if not isinstance(molecules, list):
            molecules = [molecules]
            coordinates = None if coordinates is None else [coordinates]
            labels = None if labels is None else [labels]
            atom_labels = None if atom_labels is None else [atom_labels]
        labels, atom_labels = _by_position(labels), _by_position(atom_labels)
        for name, given in (("labels", labels), ("atom_labels", atom_labels)):
            if given is None:
                continue
            num_entries = len(given) if hasattr(given, "__len__") else 1
            if num_entries != len(molecules) or not hasattr(given, "__len__"):
                raise ValueError(
                    f"`{name}` has {num_entries} entries for {len(molecules)} molecules. Pass one for each, None where it "
                    "is missing."
                )
        kept, graphs = self._featurize(molecules, coordinates, settings, on_error)
        if not graphs:
            raise ValueError(self._nothing_kept(len(molecules)))
        labels = None if labels is None else [labels[index] for index in kept]
        if atom_labels is not None:
            names = [f"Molecule {index} ({describe_molecule(molecules[index])})" for index in kept]
            arrays = _atom_label_arrays([atom_labels[index] for index in kept], names)
            atom_labels = [
                array if array is None else _in_graph_order(array, name, molecules[index], graph, settings)
                for array, name, index, graph in zip(arrays, names, kept, graphs, strict=True)
            ]
        batch = self.pad(graphs, labels, modality=settings.modality, return_tensors=None, atom_labels=atom_labels)
        if on_error == "skip":
            batch["kept_indices"] = np.array(kept, dtype=np.int64)
        return batch.convert_to_tensors(return_tensors)

    def featurize(self, molecule: Any, coordinates: Any = None, modality: str | None = None) -> MolecularGraph:
        """
        Returns the graph of one molecule.

        Raises:
            MoleculeError: if it cannot be featurized.
        """
        return featurize_molecule(molecule, coordinates, self._settings(modality))

    def featurize_many(
        self,
        molecules: Sequence[Any],
        coordinates: Sequence[Any] | None = None,
        modality: str | None = None,
        on_error: str = "raise",
        num_proc: int = 1,
    ) -> list[MolecularGraph]:
        """
        Returns the graphs of a list of molecules, in order; the same for any number of processes.

        With `on_error="skip"` those that cannot be featurized are left out and listed in `processor.rejected`.

        Args:
            molecules (`list`): as in `__call__`.
            coordinates (`list`, *optional*): as in `__call__`.
            modality (`str`, *optional*): overrides the setting for this call.
            on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` or `"skip"`.
            num_proc (`int`, *optional*, defaults to 1): number of worker processes; 1 works in this one.
        """
        return self._featurize(molecules, coordinates, self._settings(modality), on_error, num_proc)[1]

    def pad(
        self,
        graphs: Sequence[MolecularGraph] | FlatGraphs,
        labels: Any = None,
        modality: str | None = None,
        conformer_index: int | Sequence[int] = 0,
        return_tensors: str | None = "pt",
        atom_labels: Sequence[Any] | None = None,
    ) -> BatchFeature:
        """
        Returns graphs as one batch, padded to the largest of them; names and shapes are those of `__call__`.

        Args:
            graphs (`list[MolecularGraph]` or `FlatGraphs`): from `featurize` or `featurize_many`, or read from a dataset.
            labels (*optional*): as in `__call__`.
            modality (`str`, *optional*): overrides the setting for this call; nothing is generated here.
            conformer_index (`int` or `list[int]`, *optional*, defaults to 0):
                Which conformer to take, of all or of each graph. Graphs without conformers do not look at it.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            atom_labels (*optional*): as in `__call__`, but for each atom of the graph.
        """
        settings = self._settings(modality)
        if len(graphs) == 0:
            raise ValueError("There are no graphs to pad. Pass at least one.")
        if settings.modality != "3d" and not isinstance(graphs, FlatGraphs):
            self._check_bonds(graphs)
        flat = graphs if isinstance(graphs, FlatGraphs) else FlatGraphs.of(graphs)
        width = int(flat.num_atoms.max())
        data: dict[str, np.ndarray] = {
            "atom_features": flat.padded_atoms(flat.atom_features).astype(np.int64),
            "attention_mask": (np.arange(width) < flat.num_atoms[:, None]).astype(np.int64),
        }
        if settings.modality != "3d":
            relations = pair_relations(flat, settings.max_path_bonds, settings.canonical_atom_order)
            data |= relations._asdict()
        if settings.modality != "2d":
            has_3d = flat.num_conformers > 0
            if settings.modality == "3d" and not has_3d.all():
                raise ValueError(
                    f"Graph {int(has_3d.argmin())} has no coordinates, which modality='3d' needs. Featurize it with "
                    "modality='3d' or give it coordinates."
                )
            if has_3d.any():
                data["coordinates"] = flat.padded_atoms(_chosen_conformers(flat, conformer_index))
                data["coordinates_mask"] = has_3d
        if labels is not None:
            data["labels"] = _label_array(labels, len(graphs))
        if atom_labels is not None:
            if labels is not None:
                raise ValueError("Both `labels` and `atom_labels` are given. Pass those that the model is to predict.")
            data["labels"] = _padded_atom_labels(atom_labels, flat.num_atoms)
        return BatchFeature(data, tensor_type=return_tensors)

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Returns the saved settings with those given here, of which transformers would drop what was not saved: a setting that
        is newer than the file, and a misspelt one, at which `__init__` raises. And the arguments that are no settings.
        """
        saved, others = super().get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        # These are to be handed back, and those of a pipeline are its model's.
        keeps = kwargs.get("return_unused_kwargs") or kwargs.get("_from_pipeline")
        names = {field.name for field in fields(FeaturizationSettings)} if keeps else others.keys() - set(_LOADING)
        given = {name: others.pop(name) for name in names & others.keys()}
        return saved | given, others

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings and what the auto classes need to find this class."""
        return {
            **asdict(self._settings()),
            "auto_map": dict(self._auto_map),
            "feature_extractor_type": type(self).__name__,
            "processor_class": type(self).__name__,
        }

    def _settings(self, modality: str | None = None) -> FeaturizationSettings:
        values = {field.name: getattr(self, field.name) for field in fields(FeaturizationSettings)}
        return FeaturizationSettings(**values if modality is None else {**values, "modality": modality})

    def _reset_report(self) -> None:
        # What the last call left out, what it could give no 3D, and how many values were in no vocabulary.
        self.rejected: list[RejectedMolecule] = []
        self.fallbacks: list[RejectedMolecule] = []
        self.unknown_values: Counter[str] = Counter()

    def _featurize(
        self,
        molecules: Sequence[Any],
        coordinates: Sequence[Any] | None,
        settings: FeaturizationSettings,
        on_error: str,
        num_proc: int = 1,
    ) -> tuple[list[int], list[MolecularGraph]]:
        """Returns the indices of the molecules that can be featurized, and their graphs."""
        if on_error not in _ON_ERROR:
            raise ValueError(f"`on_error` is {on_error!r}, but has to be 'raise' or 'skip'. Pass one of them.")
        if not isinstance(num_proc, int) or num_proc < 1:
            raise ValueError(
                f"`num_proc` is {num_proc!r}, but has to be a positive integer. Pass the number of processes."
            )
        molecules, coordinates = without_column(molecules), _by_position(coordinates)
        if isinstance(molecules, str):
            raise ValueError(f"`molecules` is one SMILES, {describe_molecule(molecules)}. Pass a list of molecules.")
        if len(molecules) == 0:
            raise ValueError("The list of molecules is empty. Pass at least one molecule.")
        if coordinates is not None and len(coordinates) != len(molecules):
            raise ValueError(
                f"`coordinates` has {len(coordinates)} entries for {len(molecules)} molecules. Pass one for each, None "
                "where there are none."
            )
        require_rdkit()
        self._reset_report()
        kept, graphs = [], []
        for index, result in enumerate(_featurize_chunks(molecules, coordinates, settings, num_proc)):
            if isinstance(result, MoleculeError):
                if on_error == "raise":
                    result.index = index
                    raise result
                self.rejected.append(RejectedMolecule(index, molecules[index], result.stage, result.reason))
                continue
            kept.append(index)
            graphs.append(result)
            self.unknown_values.update(result.unknown_values)
            if result.missing_coordinates_reason is not None:
                reason = result.missing_coordinates_reason
                self.fallbacks.append(RejectedMolecule(index, molecules[index], "conformer", reason))
        return kept, graphs

    def _nothing_kept(self, num_molecules: int) -> str:
        counts = Counter(rejection.stage for rejection in self.rejected)
        stages = ", ".join(f"{count} at stage {stage!r}" for stage, count in counts.most_common())
        first = self.rejected[0]
        return (
            f"None of the {num_molecules} molecules could be featurized ({stages}). The first, "
            f"{describe_molecule(first.molecule)}, {first.reason}. See `processor.rejected` and fix the input."
        )

    @staticmethod
    def _check_bonds(graphs: Sequence[MolecularGraph]) -> None:
        for index, graph in enumerate(graphs):
            if not graph.has_bonds:
                raise ValueError(
                    f"Graph {index} has no bonds, so that its 2D relations are not known. Pad with modality='3d', or "
                    "featurize it with `bonds='determine'`."
                )


def _by_position(values: Any) -> Any:
    """A column or a table of pandas would be asked by the labels of its rows, which a shuffle moves with them."""
    return values.to_numpy() if hasattr(values, "to_numpy") else values


def _featurize_chunks(
    molecules: Sequence[Any], coordinates: Sequence[Any] | None, settings: FeaturizationSettings, num_proc: int
) -> Iterator[MolecularGraph | MoleculeError]:
    """Yields the result for each molecule in order."""
    starts = range(0, len(molecules), _MOLECULES_A_CHUNK)
    slices = [slice(start, start + _MOLECULES_A_CHUNK) for start in starts]
    molecule_chunks = (molecules[part] for part in slices)
    coordinate_chunks = (None if coordinates is None else coordinates[part] for part in slices)
    work = partial(featurize_molecules, settings=settings)
    if num_proc == 1:
        for results in map(work, molecule_chunks, coordinate_chunks):
            yield from results
        return
    with ProcessPoolExecutor(num_proc) as pool:
        for results in pool.map(work, map(portable, molecule_chunks), coordinate_chunks):
            yield from results


def _chosen_conformers(graphs: FlatGraphs, conformer_index: int | Sequence[int]) -> np.ndarray:
    """Returns (A, 3) coordinates, zeros for molecules that have none."""
    index = np.broadcast_to(np.asarray(conformer_index), len(graphs))
    wrong = (graphs.num_conformers > 0) & ((index < 0) | (index >= graphs.num_conformers))
    if wrong.any():
        position = int(wrong.argmax())
        raise ValueError(
            f"`conformer_index` is {index[position]} for graph {position}, which has {graphs.num_conformers[position]} "
            "conformers. Pass an index below that."
        )
    return graphs.conformers(index)


def _label_array(labels: Any, num_molecules: int) -> np.ndarray:
    """Returns labels as (B, T): integers if none is missing, else float32 with NaN for None."""
    try:
        array = np.asarray(labels)
        if array.dtype.kind not in "iub":  # None in a list makes it an array of objects
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`labels` cannot be turned into an array. Pass a number, or a list of as many numbers, for each molecule, "
            "and None for a missing one."
        ) from error
    if array.ndim == 0 or len(array) != num_molecules:
        raise ValueError(f"`labels` has shape {array.shape} for {num_molecules} molecules. Pass one row for each.")
    return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32).reshape(num_molecules, -1)


def _atom_label_arrays(atom_labels: Sequence[Any], names: Sequence[str]) -> list[np.ndarray | None]:
    """Returns the labels of each molecule's atoms as (num_atoms, T), all int64 or, if one is no integer, all float32."""
    arrays: list[np.ndarray | None] = []
    for labels, name in zip(atom_labels, names, strict=True):
        try:
            array = None if labels is None else np.asarray(labels)
            if array is not None and array.dtype.kind not in "iub":  # None in a list makes it an array of objects
                array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} has atom labels that cannot be turned into an array. Pass a number, or a list of as many "
                "numbers, for each atom, and None for a missing one."
            ) from error
        if array is not None and array.ndim not in (1, 2):
            raise ValueError(
                f"{name} has atom labels of shape {array.shape}, but (atoms,) or (atoms, labels) is expected. Pass one row "
                "for each atom."
            )
        arrays.append(array if array is None or array.ndim == 2 else array[:, None])
    is_integer = all(array is None or array.dtype.kind in "iub" for array in arrays)
    return [None if array is None else array.astype(np.int64 if is_integer else np.float32) for array in arrays]


def _missing_label(dtype: np.dtype) -> np.generic:
    return dtype.type(_IGNORED_LABEL if dtype.kind == "i" else np.nan)


def _in_graph_order(
    labels: np.ndarray, name: str, molecule: Any, graph: MolecularGraph, settings: FeaturizationSettings
) -> np.ndarray:
    """Returns the labels (num_atoms, T) of a molecule's atoms as those of its graph; the order is that of the input."""
    if len(labels) == graph.num_atoms:
        return labels
    input_of_atom, num_written = input_atoms(molecule, settings)
    if len(labels) != num_written or len(input_of_atom) != graph.num_atoms:
        raise ValueError(
            f"{name} has labels for {len(labels)} atoms, but the input writes {num_written}, of which the graph has "
            f"{graph.num_atoms}. Pass one for each of either, in the order of the input, and NaN where it is missing."
        )
    of_graph = labels[input_of_atom]
    of_graph[input_of_atom < 0] = _missing_label(labels.dtype)  # hydrogens that were added
    return of_graph


def _padded_atom_labels(atom_labels: Sequence[Any], num_atoms: np.ndarray) -> np.ndarray:
    """Returns (B, N, T) labels of the atoms of graphs, with NaN or -100 on padding."""
    if len(atom_labels) != len(num_atoms):
        raise ValueError(
            f"`atom_labels` has {len(atom_labels)} entries for {len(num_atoms)} graphs. Pass one for each."
        )
    arrays = _atom_label_arrays(atom_labels, [f"Graph {index}" for index in range(len(num_atoms))])
    given = [array for array in arrays if array is not None]
    if not given:
        raise ValueError("`atom_labels` is None for all molecules. Pass an array for one of them, or leave it out.")
    dtype, num_labels = given[0].dtype, given[0].shape[1]
    padded = np.full((len(num_atoms), int(num_atoms.max()), num_labels), _missing_label(dtype), dtype)
    for index, array in enumerate(arrays):
        if array is None:
            continue
        if array.shape != (num_atoms[index], num_labels):
            raise ValueError(
                f"Graph {index} has atom labels of shape {array.shape}, but ({num_atoms[index]}, {num_labels}) is "
                "expected. Pass one row for each atom, and as many labels for each molecule."
            )
        padded[index, : len(array)] = array
    return padded


__all__ = ["MoleBlendProcessor"]
