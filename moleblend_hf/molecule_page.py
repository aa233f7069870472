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
"""What the demo shows of a molecule: its pictures, its prediction and its neighbours, or why there are none."""

import warnings
from collections.abc import Iterable
from html import escape
from textwrap import shorten
from typing import Any, NamedTuple

from rdkit import Chem

from .attribution import atom_attributions, attributions_svg, mol_with_atoms
from .demo_html import message, molecule_svg, neighbour_cards, picture, prediction_table
from .geometry_view import view_geometry
from .graphs_moleblend import MolecularGraph
from .molecule_files import MoleculeRow, read_molecules
from .molecules_moleblend import MoleculeError
from .neighbours import Neighbours, embedder_of
from .pipeline_moleblend import MoleBlendPipeline
from .prediction_moleblend import prediction_type, shown_modality, target_names

NUM_NEIGHBOURS = 6
MAX_ATTRIBUTED = 150  # atoms; the time grows with their square, and the page answers one after the other
SHOWN = {"2d": "bonds alone", "3d": "the geometry alone", "2d+3d": "bonds and geometry"}
UNIT_OF_LOGITS = {"multi_label_classification": "log-odds", "single_label_classification": "log-probability"}


class Answer(NamedTuple):
    """What is shown of a molecule: HTML, a plotly figure or None, and the graph; of one that cannot be read a message alone."""

    message: str = ""
    picture: str = ""
    prediction: str = ""
    geometry: Any = None
    geometry_note: str = ""
    neighbours: str = ""
    graph: MolecularGraph | None = None


class MoleculePage:
    """A checkpoint, and what it says of one molecule after the other.

    Args:
        predictor: any checkpoint, from `open_checkpoint`; one that is not fine-tuned predicts nothing.
        name: of the checkpoint, shown.
        rows: molecules to compare with; they are embedded here.
    """

    def __init__(self, predictor: MoleBlendPipeline, name: str, rows: Iterable[MoleculeRow] | None = None):
        self.predictor, self.embedder = predictor, embedder_of(predictor)
        self.model: Any = predictor.model
        self.processor = predictor.feature_extractor
        self.name, self.neighbours = name, None if rows is None else Neighbours.of(self.embedder, rows)
        kind = type(self.model).__name__
        self.of_atoms = kind.endswith("ForTokenClassification")
        self.of_molecules = kind.endswith("ForSequenceClassification")
        self.targets = target_names(self.model.config) if self.of_atoms or self.of_molecules else []

    def heading(self) -> str:
        """Returns what the checkpoint is."""
        members = getattr(self.model.config, "num_members", 1)
        what = f"An ensemble of {members} models" if members > 1 else "A model"
        listed = shorten(", ".join(self.targets), 300, placeholder=" and others")
        if not self.targets:
            does = "embeds molecules and predicts nothing: it is not fine-tuned"
        elif prediction_type(self.model.config) == "single_label_classification":
            does = f"tells {'atoms' if self.of_atoms else 'molecules'} apart: {listed}"
        else:
            does = f"predicts for {'atoms' if self.of_atoms else 'molecules'}: {listed}"
        return f"<h1>{escape(self.name)}</h1><p>{what} that {escape(does)}.</p>"

    def answer(self, molecule: Any) -> Answer:
        """Returns what is shown of a SMILES or an RDKit molecule, but for the attributions, which take longer."""
        try:
            graph = self.processor.featurize(molecule)
            mol = mol_with_atoms(molecule, graph.num_atoms)
            prediction = self._prediction(mol, graph) if self.targets else ""
            neighbours = self._neighbours(graph, self.neighbours) if self.neighbours else ""
        except MoleculeError as error:
            return Answer(message(" ".join(str(error).split())))
        drawn = picture(molecule_svg(mol, numbered=self.of_atoms))
        if self.of_atoms:
            drawn += "<p>Atoms are numbered as in the table. Attributions are there for models of molecules alone.</p>"
        return Answer("", drawn, prediction, *self._geometry(molecule, graph), neighbours, graph)

    def attributed(self, molecule: Any, graph: MolecularGraph, target: int) -> str:
        """Returns the picture of a molecule that was answered, coloured by what its atoms contribute to a target."""
        drawn = picture(molecule_svg(mol_with_atoms(molecule, graph.num_atoms)))
        if graph.num_atoms > MAX_ATTRIBUTED:
            return drawn + message(f"Attributions are shown of molecules with at most {MAX_ATTRIBUTED} atoms.", "note")
        coordinates = graph.coordinates if len(graph.coordinates) else None  # those that were made are not made again
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                values = atom_attributions(self.model, self.processor, molecule, target, coordinates=coordinates)
        except ImportError as error:
            return drawn + message(str(error), "note")
        units = self.model.config.target_units
        unit = UNIT_OF_LOGITS.get(prediction_type(self.model.config)) or (units and units[target])
        legend = f"{self.targets[target]} ({unit})" if unit else self.targets[target]
        told = [message(str(warning.message), "note") for warning in caught]
        return picture(attributions_svg(molecule, values, legend)) + "".join(told)

    def _ask(self, pipeline: MoleBlendPipeline, graph: MolecularGraph, output: str) -> dict[str, Any]:
        answer = pipeline.forward({"graph": graph, "error": None}, output=output)["answer"]
        if answer["error"] is not None:
            raise MoleculeError(answer["error"], "size", "Try a smaller one")
        return answer

    def _prediction(self, mol: Chem.Mol, graph: MolecularGraph) -> str:
        atoms = [f"{atom.GetSymbol()} {atom.GetIdx()}" for atom in mol.GetAtoms()]
        caption = f"Prediction of {self.name} from {SHOWN[shown_modality(graph, self.processor.modality)]}"
        return prediction_table(self._ask(self.predictor, graph, "prediction"), self.model.config, atoms, caption)

    def _neighbours(self, graph: MolecularGraph, neighbours: Neighbours) -> str:
        embedding = self._ask(self.embedder, graph, "molecule_embedding")["molecule_embedding"]
        return neighbour_cards(neighbours.nearest(embedding, NUM_NEIGHBOURS), self.targets)

    def _geometry(self, molecule: Any, graph: MolecularGraph) -> tuple[Any, str]:
        """The view of what the model was shown, or else of a geometry that is made for the view."""
        shown = shown_modality(graph, self.processor.modality) != "2d"
        if not len(graph.coordinates):
            try:
                graph = self.processor.featurize(molecule, modality="2d+3d")
            except MoleculeError as error:  # given coordinates that are none
                return None, message(f"No geometry: it {error.reason}.", "note")
        if not len(graph.coordinates):
            return None, message(f"No geometry: it {graph.missing_coordinates_reason}.", "note")
        given = isinstance(molecule, Chem.Mol) and any(conformer.Is3D() for conformer in molecule.GetConformers())
        text = "Geometry of the file" if given else "Geometry from RDKit"
        if len(graph.coordinates) > 1:
            text += f", the first of {len(graph.coordinates)}"
        text += ", as the model was shown it" if shown else "; the model was shown bonds alone"
        return view_geometry(graph), f"<p>{text}</p>"


def read_first(path: str) -> tuple[Any, str]:
    """Returns the first molecule of an SDF or MOL file, which may be an error to show, and a message if there are more."""
    rows = read_molecules(path, "sdf")
    first = next(rows, None)
    if first is None:
        return MoleculeError("is missing: the file is empty", "sdf", "Choose another file"), ""
    has_more = next(rows, None) is not None
    return first.molecule, message("This is the first of the molecules in the file.", "note") if has_more else ""


__all__ = ["Answer", "MoleculePage", "read_first"]
