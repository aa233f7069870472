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
"""Which atoms a prediction comes from: attributions with captum (`pip install captum`), and a picture of them.

What is attributed are the atom features, embedded: an atom without them is one that the model knows nothing of but its place,
for which the table has a row, padding, of zeros. Bonds, degrees and geometry stay as they are, and so does the element where it
enters the distance term.
"""

import io
import os
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont  # comes with RDKit
from rdkit import Chem, rdBase
from rdkit.Chem.Draw import rdMolDraw2D

from .eval_mode_moleblend import eval_mode
from .graphs_moleblend import MolecularGraph
from .modeling_moleblend import MoleBlendForSequenceClassification
from .modeling_moleblend_ensemble import MoleBlendEnsembleForSequenceClassification
from .molecules_moleblend import FeaturizationSettings, MoleculeError, describe_molecule, parse_molecule
from .processing_moleblend import MoleBlendProcessor
from .targets_moleblend import problem_type_of

try:
    import matplotlib
    from captum.attr import LayerFeatureAblation, LayerIntegratedGradients
except ImportError:
    LayerIntegratedGradients = None

METHODS = ("integrated_gradients", "ablation")
MAX_PAIRS = 100_000  # pairs of atoms in one forward pass, with which memory grows
MAX_ATOMS = 2**31 - 1  # of what is drawn: all that the processor let through
INCOMPLETE = 0.01  # of the attributions' absolute sum: what the quadrature may leave unexplained without a warning
# Ends of the colour scale, with white between them (RdBu of ColorBrewer).
RAISES, LOWERS = (0.94, 0.54, 0.38), (0.40, 0.66, 0.81)
WIDTH, HEIGHT, LINE_HEIGHT, FONT_SIZE, LINE_LENGTH = 600, 420, 22, 15, 64  # pixels; letters


def atom_attributions(
    model: MoleBlendForSequenceClassification | MoleBlendEnsembleForSequenceClassification,
    processor: MoleBlendProcessor,
    molecule: Any,
    target: int | str = 0,
    method: str = "integrated_gradients",
    steps: int = 64,
    coordinates: Any = None,
) -> np.ndarray:
    """Returns what each atom contributes to a prediction, `(num_atoms,)` float64 in the atom order of the input.

    In the target's own units for regression, in log-odds for a binary task, in log-probability for a class. For an
    ensemble and for several conformers, the mean of the attributions of each. Atoms are those of the graph: hydrogens that
    the processor drops have none.

    Args:
        model: a fine-tuned model, or an ensemble of them.
        processor: that of the checkpoint.
        molecule: in any form that the processor takes.
        target: index or name (`config.id2label`) of the target, task or class.
        method: `"integrated_gradients"` (Sundararajan et al. 2017): gradients along the straight path from no atom with
            features to all with them. The attributions sum to the difference of the two outputs; a warning says if not.
            `"ablation"`: by how much the output falls if this atom alone has no features. They do not sum to anything.
        steps: points of the quadrature of integrated gradients. A model that is shown no bonds may need more: nothing but a
            geometry is left of an atom without features, and the output changes fast where the path begins.
        coordinates: as the processor takes them, in angstrom.

    Raises:
        MoleculeError: if the molecule cannot be read.
    """
    _require_captum()
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, but has to be one of {', '.join(map(repr, METHODS))}. Pass one.")
    members = list(getattr(model, "members", [model]))
    if not type(members[0]).__name__.endswith("ForSequenceClassification"):
        raise TypeError(
            f"{type(model).__name__} predicts no property of a molecule. Pass a fine-tuned "
            "MoleBlendForSequenceClassification or an ensemble of them."
        )
    column = _column(model.config, target)
    graph = processor.featurize(molecule, coordinates)
    attributions = []
    with eval_mode(model):
        for member in members:
            for conformer in range(max(len(graph.coordinates), 1)):
                arguments = (member, processor, graph, conformer, column, method, steps)
                attributions.append(_attributions(*arguments))
    return np.mean(attributions, axis=0)


def _require_captum() -> None:
    if LayerIntegratedGradients is None:
        raise ImportError("Attributions need captum, which is not installed. Run `pip install captum`.")


def _column(config: Any, target: int | str) -> int:
    names = [config.id2label[index] for index in range(config.num_labels)]
    if target in names:
        return names.index(str(target))
    if isinstance(target, Integral) and 0 <= target < len(names):
        return int(target)
    listed = textwrap.shorten(", ".join(f"{index}: {name}" for index, name in enumerate(names)), 300)
    raise ValueError(f"`target` is {target!r}, but the model predicts {listed}. Pass one of these indices or names.")


def _attributions(
    model: MoleBlendForSequenceClassification,
    processor: MoleBlendProcessor,
    graph: MolecularGraph,
    conformer: int,
    column: int,
    method: str,
    steps: int,
) -> np.ndarray:
    """`(num_atoms,)` for one model and one geometry."""
    batch = dict(processor.pad([graph], conformer_index=conformer).to(model.device))
    atom_features = batch.pop("atom_features")
    is_class = problem_type_of(model.config) == "single_label_classification"

    def output(atom_features: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        logits = model(atom_features, **dict(zip(batch, others, strict=True))).logits
        return (logits.log_softmax(-1) if is_class else logits)[:, column]

    layer = model.get_input_embeddings()
    inputs: dict[str, Any] = {"inputs": atom_features, "additional_forward_args": tuple(batch.values())}
    at_once = max(1, MAX_PAIRS // graph.num_atoms**2)
    if method == "ablation":
        atoms = torch.arange(graph.num_atoms, device=atom_features.device)[None, :, None]
        ablation = LayerFeatureAblation(output, layer)
        falls = ablation.attribute(**inputs, layer_baselines=0, layer_mask=atoms, perturbations_per_eval=at_once)
        return falls[0, :, 0].detach().cpu().double().numpy()  # the same for each element of an atom's embedding
    gradients = LayerIntegratedGradients(output, layer)
    parts = gradients.attribute(
        **inputs, baselines=torch.zeros_like(atom_features), n_steps=steps, internal_batch_size=at_once
    )
    attributions = parts[0].detach().cpu().double().sum(-1).numpy()
    _warn_if_incomplete(attributions, output, layer, inputs)
    return attributions


@torch.no_grad()
def _warn_if_incomplete(
    attributions: np.ndarray, output: Callable[..., torch.Tensor], layer: nn.Module, inputs: dict[str, Any]
) -> None:
    arguments = (inputs["inputs"], *inputs["additional_forward_args"])
    with_features = output(*arguments).item()
    hook = layer.register_forward_hook(lambda module, arguments, embeddings: torch.zeros_like(embeddings))
    try:
        without_features = output(*arguments).item()
    finally:
        hook.remove()
    difference = with_features - without_features
    if abs(attributions.sum() - difference) > INCOMPLETE * np.abs(attributions).sum():
        warnings.warn(
            f"The attributions sum to {attributions.sum():.4g}, but the output with atom features less that without is "
            f"{difference:.4g}. Raise `steps`.",
            stacklevel=4,
        )


def draw_attributions(molecule: Any, attributions: np.ndarray, path: str | os.PathLike, legend: str = "") -> None:
    """Writes a picture of a molecule with its atoms coloured: red raises the prediction, blue lowers it, white does neither.

    Args:
        molecule: as it was given to `atom_attributions`. Hydrogens are drawn if they have attributions.
        attributions: `(num_atoms,)`, from `atom_attributions`.
        path: ends in `.svg` or `.png`.
        legend: text below the picture, such as a name and the predicted value with its unit; any characters.
    """
    _require_captum()
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"{str(path)!r} ends in neither .svg nor .png. Pass a name that says which is wanted.")
    write = _svg if path.suffix.lower() == ".svg" else _png
    path.write_bytes(write(*_drawing(molecule, attributions, legend)))


def attributions_svg(molecule: Any, attributions: np.ndarray, legend: str = "") -> str:
    """Returns the picture that `draw_attributions` writes, as the text of an SVG."""
    return _svg(*_drawing(molecule, attributions, legend)).decode()


def _drawing(
    molecule: Any, attributions: np.ndarray, legend: str
) -> tuple[Chem.Mol, list[tuple[float, ...]], list[str]]:
    """What is drawn: a molecule, the colours of its atoms, and the lines below it."""
    values = np.asarray(attributions, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"`attributions` has shape {values.shape} or is not finite. Pass a finite number for each atom."
        )
    mol = mol_with_atoms(molecule, len(values))
    largest = float(np.abs(values).max())
    shades = values / (largest or 1.0)
    colors = [_color(shade) for shade in shades]
    text = "".join(letter if letter.isprintable() else " " for letter in legend)
    return mol, colors, [*textwrap.wrap(text, LINE_LENGTH), f"red raises, blue lowers; darkest: {largest:.3g}"]


def mol_with_atoms(molecule: Any, num_atoms: int) -> Chem.Mol:
    """Returns the RDKit molecule of which these are the atoms, whatever the processor does with hydrogens."""
    counts = {}
    for hydrogens in ("drop", "keep", "add"):
        mol = _parsed(molecule, hydrogens)
        if mol.GetNumAtoms() == num_atoms:
            return mol
        counts[hydrogens] = mol.GetNumAtoms()
    raise ValueError(
        f"There are {num_atoms} attributions, but {describe_molecule(molecule)} has {counts['drop']} atoms without hydrogens, "
        f"{counts['keep']} with those that are written and {counts['add']} with all. Pass the attributions of this molecule."
    )


def _parsed(molecule: Any, hydrogens: str) -> Chem.Mol:
    """The molecule, of a pair without bonds where RDKit determines none."""
    settings = FeaturizationSettings(modality="2d", hydrogens=hydrogens, bonds="determine", max_atoms=MAX_ATOMS)
    try:
        with rdBase.BlockLogs():
            try:
                return parse_molecule(molecule, None, settings).mol
            except MoleculeError as error:
                if error.stage != "bonds":
                    raise
                return parse_molecule(molecule, None, replace(settings, modality="3d", bonds=None)).mol
    except MoleculeError as error:
        error.molecule = describe_molecule(molecule)
        raise


def _color(shade: float) -> tuple[float, ...]:
    """Red, green and blue of a value in -1..1."""
    end = RAISES if shade > 0 else LOWERS
    return tuple(1 - abs(shade) * (1 - channel) for channel in end)


def _draw(canvas: Any, mol: Chem.Mol, colors: list[tuple[float, ...]]) -> Any:
    mol = Chem.Mol(mol)
    mol.RemoveAllConformers()  # a drawing, not the projection of a geometry
    mol = rdMolDraw2D.PrepareMolForDrawing(mol, addChiralHs=False)
    canvas.drawOptions().useBWAtomPalette()  # colours are the attributions'
    canvas.drawOptions().highlightRadius = 0.4
    canvas.drawOptions().fixedBondLength = 60  # pixels, less where there is no room
    canvas.DrawMolecule(
        mol, highlightAtoms=list(range(len(colors))), highlightAtomColors=dict(enumerate(colors)), highlightBonds=[]
    )
    canvas.FinishDrawing()
    return canvas.GetDrawingText()


def _svg(mol: Chem.Mol, colors: list[tuple[float, ...]], lines: list[str]) -> bytes:
    canvas = rdMolDraw2D.MolDraw2DSVG(WIDTH, HEIGHT + LINE_HEIGHT * len(lines), WIDTH, HEIGHT)
    # RDKit's own legends have no letters beyond ASCII, nor has Pillow's font.
    texts = [
        f"<text x='{WIDTH // 2}' y='{HEIGHT + LINE_HEIGHT * row}' text-anchor='middle' font-family='sans-serif' "
        f"font-size='{FONT_SIZE}'>{escape(line)}</text>\n"
        for row, line in enumerate(lines)
    ]
    drawing, end, _ = _draw(canvas, mol, colors).rpartition("</svg>")
    return f"{drawing}{''.join(texts)}{end}\n".replace("encoding='iso-8859-1'", "encoding='utf-8'").encode()


def _png(mol: Chem.Mol, colors: list[tuple[float, ...]], lines: list[str]) -> bytes:
    canvas = rdMolDraw2D.MolDraw2DCairo(WIDTH, HEIGHT + LINE_HEIGHT * len(lines), WIDTH, HEIGHT)
    image = Image.open(io.BytesIO(_draw(canvas, mol, colors)))
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # it comes with captum
    pen, font = ImageDraw.Draw(image), ImageFont.truetype(fonts / "DejaVuSans.ttf", FONT_SIZE)
    for row, line in enumerate(lines):
        pen.text((WIDTH / 2, HEIGHT + LINE_HEIGHT * row), line, fill="black", font=font, anchor="ms")
    written = io.BytesIO()
    image.save(written, "png")
    return written.getvalue()
