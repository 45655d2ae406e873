"""predictions.parquet: the columns of the test's predictions as arrays, whole, for pictures and for other programs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mnist_ray.data.columns import check_kinds
from mnist_ray.errors import UsageError
from mnist_ray.schema import COLUMNS_FILE
from mnist_ray.storage import RunFolder, in_one_line

_MAX_BYTES = 2**28  # of all columns; larger ones are not written


def write_columns(run: RunFolder, columns: Mapping[str, np.ndarray]) -> str:
    """Write columns, (N, ...) each; return a note if the largest are left out. Raises JobError.

    An array of more than one axis becomes a column of tensors, which pandas and Polars read as lists.
    """
    left, left_out = dict(columns), list[str]()
    while sum(values.nbytes for values in left.values()) > _MAX_BYTES:
        left_out.append(max(left, key=lambda name: left[name].nbytes))
        del left[left_out[-1]]
    arrays = {name: _as_arrow(values) for name, values in left.items()}
    # Tensors hold no truth values, so these become numbers: the type is written beside them.
    types = {name: {"dtype": str(left[name].dtype)} for name in left}
    fields = [pa.field(name, array.type, metadata=types[name]) for name, array in arrays.items()]
    content = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([*arrays.values()], schema=pa.schema(fields)), content)
    run.write_bytes(COLUMNS_FILE, content.getvalue())
    if not left_out:
        return ""
    return f"{COLUMNS_FILE} is without {', '.join(left_out)}: it would have more than {_MAX_BYTES // 2**20} MiB"


def _as_arrow(values: np.ndarray) -> Any:
    if values.ndim == 1:
        return pa.array(values)
    numbers = values.astype(np.uint8) if values.dtype == bool else values
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(numbers))


def read_columns(run: RunFolder) -> dict[str, np.ndarray]:
    """Return the columns, (N, ...) each; none if there is no file. Raises JobError."""
    with in_one_line(f"cannot read {run.inside(COLUMNS_FILE).uri}"):
        content = run.read_bytes(COLUMNS_FILE)
    if content is None:
        return {}
    try:
        file = parquet.ParquetFile(pa.BufferReader(content))
        check_kinds(file.schema_arrow)
        table = file.read().combine_chunks()
        columns = {name: table.column(name).chunk(0) for name in table.column_names}
        return {name: _as_array(column, table.field(name)) for name, column in columns.items()}
    except (pa.ArrowException, OSError, UsageError, ValueError, IndexError) as error:
        raise run.damaged(COLUMNS_FILE, error) from error


def _as_array(column: Any, field: pa.Field) -> np.ndarray:
    if not isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy(zero_copy_only=False)
    values = column.to_numpy_ndarray()
    return values.astype(bool) if (field.metadata or {}).get(b"dtype") == b"bool" else values
