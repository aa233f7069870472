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
"""What the demo shows, as HTML: tables, pictures and messages. Whatever comes from a file, a config or a user is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D

from .molecule_files import MoleculeRow
from .prediction_moleblend import prediction_type

NOTHING = "–"  # noqa: RUF001


def message(text: str, kind: str = "error") -> str:
    """Returns a paragraph that stands out: of kind "error" or "note"."""
    return f'<p class="message {kind}" role="alert">{escape(text)}</p>'


def table(rows: Sequence[Mapping[str, str]], caption: str) -> str:
    """Returns rows of cells by the names of their columns; a cell that a row lacks is a dash."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[row.get(name, NOTHING) for name in header] for row in rows]
    return (
        f'<div class="table"><table><caption>{escape(caption)}</caption><thead>{_line(header, "th")}</thead>'
        f"<tbody>{''.join(_line(cells, 'td') for cells in lines)}</tbody></table></div>"
    )


def _line(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def number(value: float | None) -> str:
    """Returns a number as it is shown everywhere on the page."""
    return NOTHING if value is None else f"{value:.4g}"


def prediction_table(answer: Mapping[str, Any], config: Any, atoms: Sequence[str], caption: str) -> str:
    """Returns the predictions of a molecule, an answer of the pipeline: a row for each target or class, or for each of them and atom.

    Args:
        answer: of the pipeline.
        config: of the model.
        atoms: names of the molecule's atoms, which are shown if the model predicts for atoms.
        caption: above the table.
    """
    is_classes = prediction_type(config) == "single_label_classification"
    rows = []
    for name, told in answer["predictions"].items():
        first = {"Class" if is_classes else "Target": name}
        if isinstance(told["value"], list):
            for index, atom in enumerate(atoms):
                of_atom = {key: value[index] if isinstance(value, list) else value for key, value in told.items()}
                rows.append({"Atom": atom, **first, **_cells(of_atom, config)})
        else:
            rows.append({**first, **_cells(told, config)})
    if is_classes and not isinstance(answer["prediction"], list):
        caption += f" · most likely {answer['prediction']}"
        if "prediction_set" in answer:
            caption += f" · {_coverage(config)}set {_members(answer['prediction_set'])}"
    return table(rows, caption)


def _cells(told: Mapping[str, Any], config: Any) -> dict[str, str]:
    is_number = prediction_type(config) == "regression"
    cells = {"Value" if is_number else "Probability": number(told["value"])}
    if told.get("unit"):
        cells["Unit"] = told["unit"]
    for key, title in (("ensemble_spread", "± models"), ("conformer_spread", "± conformers")):
        if key in told:
            cells[title] = number(told[key])
    if "lower" in told:
        cells[f"{_coverage(config)}interval"] = f"{number(told['lower'])} to {number(told['upper'])}"
    if "prediction_set" in told:
        cells[f"{_coverage(config)}set"] = _members(told["prediction_set"])
    return cells


def _coverage(config: Any) -> str:
    return "" if config.conformal_coverage is None else f"{config.conformal_coverage:.0%} "


def _members(prediction_set: Sequence[Any]) -> str:
    return ", ".join(map(str, prediction_set)) or "none"


def neighbour_cards(found: Sequence[tuple[float, MoleculeRow]], columns: Sequence[str]) -> str:
    """Returns molecules with their cosines, and what their file has in those columns."""
    cards = []
    for cosine, row in found:
        told = [f"{name}: {row.values[name]}" for name in columns if row.values.get(name) not in (None, "")]
        told = [f"cosine {cosine:.3f}", *told]
        mol = Chem.MolFromSmiles(row.smiles or "")
        drawn = picture(molecule_svg(mol, 200, 140)) if mol is not None else ""
        lines = "".join(f"<span>{escape(line)}</span>" for line in told)
        cards.append(f"<figure>{drawn}<figcaption><b>{escape(row.id)}</b>{lines}</figcaption></figure>")
    return f'<div class="cards">{"".join(cards)}</div>'


def picture(svg: str) -> str:
    """Returns an SVG as a part of the page."""
    return f'<div class="picture">{svg[svg.index("<svg") :]}</div>'  # without the declaration of a file


def molecule_svg(mol: Chem.Mol, width: int = 600, height: int = 420, numbered: bool = False) -> str:
    """Returns a drawing of a molecule, in pixels; `numbered` writes the index of each atom beside it."""
    mol = Chem.Mol(mol)
    mol.RemoveAllConformers()  # a drawing, not the projection of a geometry
    canvas = rdMolDraw2D.MolDraw2DSVG(width, height)
    canvas.drawOptions().addAtomIndices = numbered
    canvas.DrawMolecule(rdMolDraw2D.PrepareMolForDrawing(mol, addChiralHs=False))
    canvas.FinishDrawing()
    return canvas.GetDrawingText()


__all__ = ["message", "molecule_svg", "neighbour_cards", "number", "picture", "prediction_table", "table"]
