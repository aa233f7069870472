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
"""A geometry as an interactive picture: balls and sticks that turn with the mouse, with plotly."""

from typing import Any

import numpy as np
from rdkit import Chem

from .graphs_moleblend import MolecularGraph

try:
    import plotly.graph_objects as go
except ImportError:
    go = None

# CPK colours of the elements that organic molecules have; others are pink.
COLORS = {
    1: "#ffffff", 5: "#ffb5b5", 6: "#5f6368", 7: "#3050f8", 8: "#ee2010", 9: "#70c040", 11: "#ab5cf2", 14: "#c8a080",
    15: "#ff8000", 16: "#e6c200", 17: "#1fb01f", 19: "#8f40d4", 34: "#ffa100", 35: "#a62929", 53: "#940094",
}  # fmt: skip
OTHER_COLOR = "#dd77b0"
MAX_ELEMENT = 118  # what is above is an atom of no element
BALL = 0.22  # of van der Waals radii
STICK, MARGIN = 0.1, 0.5  # angstrom
ROWS, SEGMENTS = 11, 20  # of a ball: parallels and meridians


def view_geometry(graph: MolecularGraph) -> Any:
    """Returns a plotly figure of a graph's first geometry, with a trace for each element: its atoms and their halves of bonds."""
    require_plotly()
    positions = _facing(graph.coordinates[0].astype(np.float64))
    elements = graph.atom_features[:, 0].tolist()  # OGB index + 1: the atomic number
    table = Chem.GetPeriodicTable()
    shapes: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for element, position in zip(elements, positions, strict=True):
        radius = table.GetRvdw(element) if element <= MAX_ELEMENT else 2.0
        shapes.setdefault(element, []).append(_ball(position, BALL * radius))
    for first, second in graph.bonds.astype(int):
        middle = (positions[first] + positions[second]) / 2
        for atom in (first, second):
            shapes[elements[atom]].append(_stick(positions[atom], middle))
    half = np.abs(positions).max() + MARGIN
    axes = {name: {"visible": False, "range": [-half, half]} for name in ("xaxis", "yaxis", "zaxis")}
    camera = {"eye": {"x": 0, "y": 0, "z": 1.3}, "up": {"x": 0, "y": 1, "z": 0}}
    no_clicks = {"itemclick": False, "itemdoubleclick": False}
    return go.Figure(
        [_trace(element, parts) for element, parts in sorted(shapes.items())],
        {
            "scene": {**axes, "camera": camera, "aspectmode": "cube", "dragmode": "orbit"},
            "legend": {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0, **no_clicks},
            "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
            "height": 360,
            "paper_bgcolor": "white",
        },
    )


def require_plotly() -> None:
    """Raises an ImportError that says what to install, if plotly is missing."""
    if go is None:
        raise ImportError("The view of a geometry needs plotly, which is not installed. Run `pip install plotly`.")


def _facing(positions: np.ndarray) -> np.ndarray:
    """Turns a geometry so that its longest axis is x, the next y, and z, its flattest, points at the viewer; centred."""
    centered = positions - positions.mean(0)
    axes = np.linalg.svd(centered.T @ centered)[2].T
    turned = centered @ axes * np.array([1, 1, np.linalg.det(axes)])  # no mirror image
    return turned - (turned.min(0) + turned.max(0)) / 2


def _trace(element: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    x, y, z = np.concatenate([vertices for vertices, _ in parts]).round(3).T
    i, j, k = np.concatenate([faces + start for (_, faces), start in zip(parts, starts, strict=False)]).T
    return go.Mesh3d(
        **{"x": x, "y": y, "z": z, "i": i, "j": j, "k": k},
        name=Chem.GetPeriodicTable().GetElementSymbol(element) if element <= MAX_ELEMENT else "other",
        color=COLORS.get(element, OTHER_COLOR),
        hoverinfo="name",
        showlegend=True,
        lighting={"ambient": 0.55, "diffuse": 0.6, "specular": 0.25, "roughness": 0.4},
        lightposition={"x": 2000, "y": 2000, "z": 4000},
    )


def _ball(center: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    angles = np.linspace(0, np.pi, ROWS)
    vertices, faces = _revolved(np.sin(angles), -np.cos(angles))
    return center + radius * vertices, faces


def _stick(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = _revolved(np.full(2, STICK), np.arange(2.0))
    axis = end - start
    first = np.linalg.qr(np.column_stack([axis, np.eye(3)]))[0][:, 1]  # one of the directions across the axis
    second = np.cross(axis, first) / np.linalg.norm(axis)
    return start + vertices @ np.stack([first, second, axis]), faces


def _revolved(radii: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of a profile turned around the z axis."""
    angles = np.linspace(0, 2 * np.pi, SEGMENTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    rings = np.concatenate(
        [radii[:, None, None] * circle, np.broadcast_to(heights[:, None, None], (len(radii), SEGMENTS, 1))], axis=-1
    )
    low = np.arange((len(radii) - 1) * SEGMENTS).reshape(-1, SEGMENTS)
    corners = low, np.roll(low, -1, axis=1), low + SEGMENTS, np.roll(low, -1, axis=1) + SEGMENTS
    a, b, c, d = (corner.ravel() for corner in corners)
    return rings.reshape(-1, 3), np.concatenate([np.stack([a, b, d], -1), np.stack([a, d, c], -1)])


__all__ = ["require_plotly", "view_geometry"]
