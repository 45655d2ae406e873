"""The inputs of predictions at scale: pictures or texts in groups of files, or the rows of Parquet files."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from mnist_ray.data.columns import REMEDY, arrays_of, check_kinds
from mnist_ray.data.files import files_at, folder_of
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.predictions.predictor import PICTURES, Predictor, kind_of
from mnist_ray.workload.base import Workload

TABLES = "Parquet"
# The endings of the files of each kind.
_ENDINGS: dict[str, tuple[str, ...]] = {"pictures": PICTURES, "texts": (".txt",), TABLES: (".parquet",)}
_ADDED = ("prediction", "probability", "probabilities")  # the columns of predictions
_GROUP = 1000  # pictures or texts whose predictions one file has
_AT_ONCE = 256  # rows
_DAMAGE = (pa.ArrowException, EOFError, FileNotFoundError, UsageError, ValueError)


class DamagedTableError(Exception):
    """A whole file cannot be read, or the rest of it."""


class Chunk(NamedTuple):
    """Some rows with their inputs."""

    rows: pa.Table  # for pictures and texts, with a column "file"
    inputs: list[Any]  # of each row; a JobError if there is none
    places: Sequence[str]  # of the rows, for people


@dataclass(frozen=True)
class Inputs:
    """Files with inputs, in parts. Predictions for a part are written to one file."""

    filesystem: fs.FileSystem
    folder: str  # of all files, within the file system
    kind: str  # a key of _ENDINGS
    columns: tuple[str, ...]  # of a table, that hold the input
    parts: dict[str, list[str]]  # the files of a part, within the folder, by the name of the part's predictions

    def chunks(self, part: str, files: Sequence[str], predictor: Predictor) -> Iterator[Chunk]:
        """Read a part, some rows at a time. Raises DamagedTableError, and STORAGE_ERRORS."""
        if self.kind != TABLES:
            for start in range(0, len(files), _AT_ONCE):
                some = files[start : start + _AT_ONCE]
                yield Chunk(pa.table({"file": some}), [self._input_in(file, predictor) for file in some], some)
            return
        first = 1
        for rows in self._tables(part):
            yield Chunk(rows, self._inputs_of(rows, predictor), [f"{part}, row {first + n}" for n in range(len(rows))])
            first += len(rows)

    def schema(self) -> pa.Schema:
        """Return the columns of the first table that can be read. Raises UsageError if there is none."""
        for part in self.parts:
            with contextlib.suppress(DamagedTableError):
                return next(self._tables(part)).schema
        raise UsageError(f"none of the Parquet files in {self.folder} can be read")

    def _tables(self, part: str) -> Iterator[pa.Table]:
        """Yield the rows of a Parquet file; of an empty one, no rows with the file's columns.

        Raises DamagedTableError, and OSError if the storage fails or Arrow cannot decompress the file.
        """
        try:
            with self.filesystem.open_input_file(posixpath.join(self.folder, part)) as handle:
                # Otherwise, it would read a whole row group at once.
                file = pq.ParquetFile(handle, buffer_size=2**20, pre_buffer=False)
                check_kinds(file.schema_arrow)
                names = file.schema_arrow.names
                if missing := [name for name in self.columns if name not in names]:
                    raise UsageError(f"it has no column {missing[0]}")
                if doubled := [name for name in names if names.count(name) > 1 or (self.columns and name in _ADDED)]:
                    raise UsageError(f"it has several columns {doubled[0]}, or one that predictions add: rename it")
                if file.metadata.num_rows == 0:
                    yield file.schema_arrow.empty_table()
                yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(_AT_ONCE))
        except _DAMAGE as error:
            raise DamagedTableError(f"the file cannot be read: {first_line(error)}") from error

    def _input_in(self, file: str, predictor: Predictor) -> Any:
        try:
            with self.filesystem.open_input_stream(posixpath.join(self.folder, file)) as stream:
                content = stream.read()
            return predictor.decode(content.decode("utf-8") if self.kind == "texts" else content)
        except (FileNotFoundError, PermissionError) as error:
            return JobError(f"cannot be read: {error.strerror or 'it does not exist'}")
        except UnicodeDecodeError:
            return JobError("no text in UTF-8")
        except JobError as error:
            return error

    def _inputs_of(self, rows: pa.Table, predictor: Predictor) -> list[Any]:
        """Return the input of each row; a JobError for a row that has none."""
        if len(rows) == 0:
            return []
        if _is_encoded(rows.schema.field(self.columns[0]).type):
            return [_decoded(row[self.columns[0]], predictor) for row in rows.select(self.columns).to_pylist()]
        try:
            return [*arrays_of(rows, [*self.columns, self.columns[-1]]).inputs]
        except UsageError as error:
            if len(rows) == 1:
                return [JobError(str(error).removesuffix(f"; {REMEDY}"))]
            return [each for row in range(len(rows)) for each in self._inputs_of(rows.slice(row, 1), predictor)]


def _decoded(value: Any, predictor: Predictor) -> Any:
    try:
        return predictor.decode(value)
    except JobError as error:
        return error


def find_inputs(place: str, workload: Workload, columns: Sequence[str]) -> Inputs:
    """Find what a workload can take in a file, a folder or a pattern. Raises UsageError and JobError.

    ``columns``: those of a table that hold the input; if there are none, the workload's ``column_names`` or, without
    them, the table's only one.
    """
    filesystem, paths = files_at(place, sum(_ENDINGS.values(), ()), "picture, text or Parquet")
    by_kind = {kind: [path for path in paths if path.lower().endswith(endings)] for kind, endings in _ENDINGS.items()}
    kind = _kind_in(by_kind, place, workload)
    folder = folder_of(by_kind[kind])
    files = [posixpath.relpath(path, folder) for path in by_kind[kind]]
    if kind == TABLES:
        parts = {file: [file] for file in files}
        schema = Inputs(filesystem, folder, kind, (), parts).schema()
        return Inputs(filesystem, folder, kind, _columns_in(schema, place, workload, columns), parts)
    if columns:
        raise UsageError(f"--column is for tables, but {place} has {kind}")
    groups = [files[start : start + _GROUP] for start in range(0, len(files), _GROUP)]
    return Inputs(filesystem, folder, kind, (), {f"part-{n:05}.parquet": group for n, group in enumerate(groups)})


def _kind_in(by_kind: dict[str, list[str]], place: str, workload: Workload) -> str:
    """Return the only kind of files that a workload can take. Raises UsageError if there is none, or several."""
    usable = [kind for kind, found in by_kind.items() if found and kind in (kind_of(workload), TABLES)]
    if not usable:
        takes = "Parquet" if kind_of(workload) == "arrays" else f"{kind_of(workload)} or Parquet"
        raise UsageError(f"{place} has no files that {type(workload).__name__} can take: {takes}")
    if len(usable) > 1:
        pattern = f"{place.rstrip('/')}/*{_ENDINGS[usable[0]][0]}"
        raise UsageError(f"{place} has {' and '.join(usable)}: choose by a pattern, such as '{pattern}'")
    return usable[0]


def _columns_in(schema: pa.Schema, place: str, workload: Workload, given: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a table that hold the input, in the model's order. Raises UsageError."""
    known = tuple(workload.metadata.get("column_names", ()))
    if taken := [each for each in _ADDED if each in schema.names]:
        raise UsageError(f"{place} already has a column {taken[0]}: rename it")
    if known and given and sorted(given) != sorted(known):
        names = ", ".join(known)
        raise UsageError(f"--column: {type(workload).__name__} takes the columns {names}; name all of them, or none")
    columns = known or tuple(given)
    if unknown := [column for column in columns if column not in schema.names]:
        raise UsageError(f"{place} has no column {unknown[0]}, only {', '.join(schema.names)}")
    if not columns and len(schema) != 1:
        raise UsageError(f"{place} has several columns: choose with --column among {', '.join(schema.names)}")
    return columns or tuple(schema.names)


def _is_encoded(kind: pa.DataType) -> bool:
    """Return whether a column holds pictures or texts, one by one, not numbers or arrays of them."""
    types = pa.types
    is_picture = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    return bool(is_picture or types.is_string(kind) or types.is_large_string(kind))
