"""A hash of the rows of a dataset that does not depend on how they are cut into files, row groups or batches."""

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ContentHash:
    """SHA-256 of tables that come one after the other, the same however they are cut.

    Each column has hashes of its own: which values are null, the lengths of lists and texts, and the values; what is nested
    in a list is a column too. The result is the hash of the column names and these.
    """

    def __init__(self) -> None:
        """Of no rows yet."""
        self._hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def add(self, table: pa.Table) -> None:
        """Take in the rows of a table."""
        for name in table.column_names:
            for chunk in table[name].chunks:
                self._add(name, chunk)

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        lines = (f"{name} {found.hexdigest()}\n" for name, found in sorted(self._hashes.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _add(self, name: str, values: pa.Array) -> None:
        self._take(f"{name} valid", values.is_valid())
        if pa.types.is_nested(values.type):
            self._take(f"{name} lengths", pc.list_value_length(values).fill_null(0))
            self._add(f"{name}[]", values.flatten())
        elif pa.types.is_string(values.type):
            self._take(f"{name} lengths", pc.binary_length(values).fill_null(0))
            self._hashes[f"{name} values"].update("".join(values.drop_null().to_pylist()).encode())
        else:
            self._take(f"{name} values", values.fill_null(0))

    def _take(self, name: str, values: pa.Array) -> None:
        self._hashes[name].update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)))
