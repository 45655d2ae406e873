"""The files of predictions at scale: the rows of the input, with the predictions as further columns."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from mnist_ray.output import finite


class ParquetFile:
    """Writes tables."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pa.Table, columns: dict[str, np.ndarray]) -> None:
        """Write rows. Raises pyarrow.ArrowException if they do not fit those before."""
        for name, values in columns.items():
            rows = rows.append_column(name, _array(values))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, rows.schema)
        self._writer.write_table(rows.cast(self._writer.schema))

    def close(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()


class LinesFile:
    """Writes rows as JSON lines or as CSV."""

    def __init__(self, stream: Any, *, is_csv: bool) -> None:
        self._text = io.TextIOWrapper(stream, "utf-8", newline="")
        self._csv = csv.writer(self._text, lineterminator="\n") if is_csv else None
        self._is_empty = True

    def write(self, rows: list[dict[str, Any]], columns: dict[str, np.ndarray]) -> None:
        """Write rows. NaN becomes null in JSON, and an empty cell in CSV."""
        lists = [values.tolist() for values in columns.values()]
        added = (dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True))
        for row, prediction in zip(rows, added, strict=True):
            if self._csv is None:
                self._text.write(json.dumps(finite({**row, **prediction})) + "\n")
                continue
            if self._is_empty:
                self._csv.writerow([*row, *prediction])
            self._csv.writerow([*row.values(), *finite(prediction).values()])
            self._is_empty = False

    def close(self) -> None:
        """Write what is in the buffer."""
        self._text.flush()
        self._text.detach()


def _array(values: np.ndarray) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)
