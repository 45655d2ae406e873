"""The files of predictions at scale: the rows of the input, with the predictions as further columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq


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


def _array(values: np.ndarray) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)
