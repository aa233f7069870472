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
"""The molecules of a file that are most like one: nearest by the cosine of their embeddings."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm.auto import tqdm

from .molecule_files import MoleculeRow
from .pipeline_moleblend import MoleBlendPipeline

MAX_MOLECULES = 10_000  # with which a base model is busy for minutes on a CPU
MOLECULES_A_BATCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """Embedded molecules.

    Attributes:
        rows: of the n molecules that have an embedding.
        directions: (n, hidden_size) float32, their embeddings, scaled to length 1.
        report: how many there are, and how many rows have no embedding.
    """

    rows: list[MoleculeRow]
    directions: np.ndarray
    report: str

    @classmethod
    def of(cls, embedder: MoleBlendPipeline, rows: Iterable[MoleculeRow], limit: int = MAX_MOLECULES) -> "Neighbours":
        """Returns the first rows, embedded; progress goes to standard error."""
        rows = iter(rows)
        kept: list[MoleculeRow] = []
        embeddings: list[np.ndarray] = []
        num_read = 0
        with tqdm(desc="Embedding", unit=" molecules", disable=None) as progress:
            for batch in _batches(islice(rows, limit)):
                answers = embedder([row.molecule for row in batch], output="molecule_embedding")
                for row, answer in zip(batch, answers, strict=True):
                    if answer["error"] is None:
                        kept.append(row._replace(molecule=None))  # a geometry is not needed again
                        embeddings.append(answer["molecule_embedding"])
                num_read += len(batch)
                progress.update(len(batch))
        if not kept:
            raise ValueError(f"None of the {num_read} molecules to compare with can be embedded. Name another file.")
        report = f"{len(kept):,} molecules"
        if num_read > len(kept):
            report += f"; rows that cannot be read: {num_read - len(kept):,}"
        if next(rows, None) is not None:
            report += f"; rows after the first {limit:,} are left out"
        directions = np.stack(embeddings)
        return cls(kept, directions / np.linalg.norm(directions, axis=1, keepdims=True), report)

    def nearest(self, embedding: np.ndarray, count: int) -> list[tuple[float, MoleculeRow]]:
        """Returns the molecules nearest to an embedding, (hidden_size,), with their cosines, the largest first."""
        cosines = self.directions @ (embedding / np.linalg.norm(embedding))
        return [(float(cosines[index]), self.rows[index]) for index in np.argsort(-cosines, kind="stable")[:count]]


def embedder_of(predictor: MoleBlendPipeline) -> MoleBlendPipeline:
    """Returns what embeds molecules: of an ensemble its first member, since embeddings of members are not comparable."""
    model = getattr(predictor.model, "members", [predictor.model])[0]
    return MoleBlendPipeline(model=model, feature_extractor=predictor.feature_extractor, device=predictor.device)


def _batches(rows: Iterator[MoleculeRow]) -> Iterator[list[MoleculeRow]]:
    while batch := list(islice(rows, MOLECULES_A_BATCH)):
        yield batch


__all__ = ["Neighbours", "embedder_of"]
