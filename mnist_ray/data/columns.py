"""Turns columns of tables into arrays: numbers, lists of equal lengths, tensors of Ray Data, images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from mnist_ray.data.data import Arrays
from mnist_ray.data.images import open_picture
from mnist_ray.errors import UsageError, first_line

_KINDS_OF_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
REMEDY = "pass decode=, which turns a row into an example"


def of_rows(function: Callable[[Any], Any], rows: Iterable[Any], place_of: Callable[[int], str]) -> list[Any]:
    """Apply a function to rows. Raises UsageError with the place of the first row for which it fails."""
    results = []
    for row, values in enumerate(rows):
        try:
            results.append(function(values))
        except UsageError as error:
            raise UsageError(f"{place_of(row)}: {first_line(error)}") from error
        except Exception as error:  # of the user's code, or of Pillow's decoders
            raise UsageError(f"{place_of(row)}: {type(error).__name__}: {first_line(error)}") from error
    return results


def check_kinds(schema: pa.Schema) -> None:
    """Raise UsageError if a column holds pickled objects of Ray Data: a value of it could run any code."""
    for field in schema:
        if _is_pickled(field.type):
            raise UsageError(f"column {field.name} holds pickled objects, which could run any code: leave it out")


def _is_pickled(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return "pickled" in kind.extension_name or _is_pickled(kind.storage_type)
    return any(_is_pickled(kind.field(index).type) for index in range(kind.num_fields))


def arrays_of(table: pa.Table, columns: Sequence[str], prefix: str = "") -> Arrays:
    """Return columns as arrays: those of the inputs, then that of the targets.

    Raises UsageError, whose message begins with ``prefix``: the table's place.
    """
    *inputs, targets = (_array_of(table, name, f"{prefix}column {name}") for name in columns)
    if len(inputs) == 1:
        return Arrays(inputs[0], targets)
    if any(values.ndim > 1 for values in inputs):
        raise UsageError(f"{prefix}several columns of inputs must hold a number each; or {REMEDY}")
    return Arrays(np.stack(inputs, axis=1).astype(np.float32), targets)


def _array_of(table: pa.Table, name: str, where: str) -> np.ndarray:
    """Return a column as an array, (rows, ...). Raises UsageError if that is not possible."""
    try:
        return _decoded(table.field(name), table[name], where)
    except (pa.ArrowException, TypeError, ValueError) as error:  # of damaged metadata, for example
        raise UsageError(f"{where} cannot be read: {first_line(error)}; {REMEDY}") from error


def _decoded(field: pa.Field, column: pa.ChunkedArray, where: str) -> np.ndarray:
    values = column.combine_chunks()
    if values.null_count:
        raise UsageError(f"{where} has nulls; {REMEDY}")
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = values.field("bytes")
    if pa.types.is_binary(values.type):
        return _pictures(values, where)
    if isinstance(values, pa.FixedShapeTensorArray) and not values.storage.flatten().null_count:
        return values.to_numpy_ndarray()
    tensor_shape, values = _storage_of(field, values)
    numbers, lengths = _flattened(values, where)
    if not pa.types.is_primitive(numbers.type) or pa.types.is_temporal(numbers.type):
        raise UsageError(f"{where} holds {numbers.type}, not numbers; {REMEDY}")
    return numbers.to_numpy(zero_copy_only=False).reshape([len(column), *(tensor_shape or lengths)])


def _pictures(values: pa.Array, where: str) -> np.ndarray:
    pictures = of_rows(_picture, values.to_pylist(), lambda row: f"{where}, row {row}")
    if len({picture.shape for picture in pictures}) > 1:
        raise UsageError(f"{where} has pictures of different sizes; {REMEDY}")
    return np.stack(pictures)


def _storage_of(field: pa.Field, values: pa.Array) -> tuple[Sequence[int], pa.Array]:
    """Return the shape of each row's tensor and the tensors' lists of numbers; for other columns, () and ``values``."""
    if isinstance(values, pa.ExtensionArray):  # of Ray Data, if this process has imported it
        return values.type.shape, values.storage
    metadata = json.loads((field.metadata or {}).get(b"ARROW:extension:metadata", "[]"))
    return (metadata if all(isinstance(size, int) for size in metadata) else ()), values  # of Ray Data, or of others


def _flattened(values: pa.Array, where: str) -> tuple[pa.Array, list[int]]:
    """Return the numbers in nested lists, and the lengths of the lists on each level. Raises UsageError."""
    lengths: list[int] = []
    while any(is_kind(values.type) for is_kind in _KINDS_OF_LIST):
        found = compute.list_value_length(values).unique().to_pylist()
        if len(found) > 1:
            raise UsageError(f"{where} has lists of different lengths; {REMEDY}")
        values, lengths = values.flatten(), lengths + found
        if values.null_count:
            raise UsageError(f"{where} has nulls in its lists; {REMEDY}")
    return values, lengths


def _picture(content: bytes) -> np.ndarray:
    picture = open_picture(io.BytesIO(content))
    return np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
