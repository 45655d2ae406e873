"""The inputs of predictions at scale: pictures or texts in groups of files, or the rows of Parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from mnist_ray.data.columns import REMEDY, arrays_of, check_kinds
from mnist_ray.data.files import files_at, folder_of
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.predictions.predictor import PICTURES, Kind, Predictor, kind_of
from mnist_ray.storage import RunFolder
from mnist_ray.text import size_of
from mnist_ray.workload.base import Workload

# The endings of the files of each kind.
_ENDINGS: dict[str, tuple[str, ...]] = {"pictures": PICTURES, "texts": (".txt",), "Parquet": (".parquet",)}
_ADDED = ("prediction", "probability", "probabilities")  # the columns of predictions
_GROUP = 1000  # pictures or texts whose predictions one file has
_AT_ONCE = 256  # rows
_VALUES = (  # kinds of columns that are pictures or texts, not numbers
    *(pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string),
)
_DAMAGE = (pa.ArrowException, EOFError, FileNotFoundError, UsageError, ValueError)
_MAX_BYTES = 2**26  # of a picture or a text
_FITS: dict[Kind, tuple[Callable[[Any], bool], ...]] = {  # values of the input's column; the first kind found is taken
    "pictures": (lambda value: isinstance(value, (bytes, dict)), lambda value: isinstance(value, (list, np.ndarray))),
    "texts": (lambda value: isinstance(value, str),),
    "arrays": (lambda value: isinstance(value, (list, np.ndarray)), lambda value: _may_be_number(value)),
}


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
        first = 1
        if self.kind != "Parquet":
            for start in range(0, len(files), _AT_ONCE):
                some = files[start : start + _AT_ONCE]
                yield Chunk(pa.table({"file": some}), [self._input_in(file, predictor) for file in some], some)
            return
        for rows in self._tables(part):
            inputs = self._inputs_of(rows, predictor)
            yield Chunk(rows, inputs, [f"{part}, row {first + row}" for row in range(len(inputs))])
            first += len(inputs)

    def first_row(self) -> dict[str, Any]:
        """Return the first row of a table. Raises UsageError if no table has one that can be read."""
        for part in self.parts:
            with contextlib.suppress(DamagedTableError):
                for rows in self._tables(part):
                    for row in rows.slice(0, 1).to_pylist():
                        return dict(row)
        raise UsageError(f"the {self.kind} files in {self.folder} have no rows that can be read")

    def num_predicted(self, folder: RunFolder, part: str) -> int:
        """Return how many rows a part's predictions have. Raises DamagedTableError, and STORAGE_ERRORS."""
        written = dataclasses.replace(self, filesystem=folder.filesystem, folder=folder.path)
        with written._opened(part) as file:
            return int(pq.read_metadata(file).num_rows)

    @contextlib.contextmanager
    def _opened(self, part: str) -> Iterator[Any]:
        """Open a Parquet file. Raises DamagedTableError for it, and STORAGE_ERRORS if the storage fails."""
        path = posixpath.join(self.folder, part)
        try:
            with self.filesystem.open_input_file(path) as file:
                yield file
        except (*_DAMAGE, OSError) as error:
            if not isinstance(error, _DAMAGE):  # Arrow's decompression raises such an error, too
                with self.filesystem.open_input_stream(path, compression=None) as stream:
                    while stream.read(2**20):
                        pass
            raise DamagedTableError(f"the file cannot be read: {first_line(error)}") from error

    def _input_in(self, file: str, predictor: Predictor) -> Any:
        try:
            with self.filesystem.open_input_stream(posixpath.join(self.folder, file)) as stream:
                content = bytes(stream.read(_MAX_BYTES + 1))
            if len(content) > _MAX_BYTES:
                return JobError(f"has more than {size_of(_MAX_BYTES)}")
            return predictor.decode(content.decode("utf-8") if self.kind == "texts" else content)
        except (FileNotFoundError, PermissionError) as error:
            return JobError(f"cannot be read: {error.strerror or 'it does not exist'}")
        except UnicodeDecodeError:
            return JobError("no text in UTF-8")
        except JobError as error:
            return error

    def _tables(self, part: str) -> Iterator[pa.Table]:
        """Yield the rows of a Parquet file; first no rows, with the file's columns. Raises like ``_opened``."""
        with self._opened(part) as handle:
            # Otherwise, it would read a whole row group at once.
            file = pq.ParquetFile(handle, buffer_size=2**20, pre_buffer=False)
            check_kinds(file.schema_arrow)
            names = file.schema_arrow.names
            if missing := [name for name in self.columns if name not in names]:
                raise UsageError(f"it has no column {missing[0]}")
            if doubled := [name for name in names if names.count(name) > 1 or (self.columns and name in _ADDED)]:
                raise UsageError(f"it has several columns {doubled[0]}, or one that predictions add: rename it")
            yield pa.Table.from_batches([], file.schema_arrow)
            yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(_AT_ONCE))

    def _inputs_of(self, rows: pa.Table, predictor: Predictor) -> list[Any]:
        if len(rows) == 0:
            return []
        if any(is_kind(rows.schema.field(self.columns[0]).type) for is_kind in _VALUES):
            return [self._input_of(row, predictor) for row in rows.select(self.columns).to_pylist()]
        try:
            return [*arrays_of(rows, [*self.columns, self.columns[-1]]).inputs]
        except UsageError as error:
            if len(rows) == 1:
                return [JobError(str(error).removesuffix(f"; {REMEDY}"))]
            return [each for row in range(len(rows)) for each in self._inputs_of(rows.slice(row, 1), predictor)]

    def _input_of(self, row: dict[str, Any], predictor: Predictor) -> Any:
        values = [row[name] for name in self.columns]
        try:
            return predictor.decode(values if len(values) > 1 else values[0])
        except JobError as error:
            return error


def find_inputs(place: str, workload: Workload, columns: Sequence[str]) -> Inputs:
    """Find what a workload can take in a file, a folder or a pattern. Raises UsageError and JobError.

    ``columns``: those of a table that hold the input; if there are none, the workload's ``column_names`` or, without
    them, the only one that fits.
    """
    takes, name = kind_of(workload), type(workload).__name__
    known = tuple(workload.metadata.get("column_names", ()))
    if known and columns and sorted(columns) != sorted(known):
        raise UsageError(f"--column: {name} takes the columns {', '.join(known)}; name all of them, or none")
    filesystem, paths = files_at(place, sum(_ENDINGS.values(), ()), "picture, text or Parquet")
    by_kind = {kind: [path for path in paths if path.lower().endswith(endings)] for kind, endings in _ENDINGS.items()}
    usable = [kind for kind, found in by_kind.items() if found and kind in (takes, "Parquet")]
    if not usable:
        found = " and ".join(kind for kind, found in by_kind.items() if found)
        others = f"{found}; choose another run with --run" if found else "other files; rewrite tables as Parquet"
        raise UsageError(f"{name} takes {takes}, but {place} has only {others}")
    if len(usable) > 1:
        pattern = f"{place.rstrip('/')}/*{_ENDINGS[usable[0]][0]}"
        raise UsageError(f"{place} has {' and '.join(usable)}: choose by a pattern, such as '{pattern}'")
    (kind,) = usable
    folder = folder_of(by_kind[kind])
    files = [posixpath.relpath(path, folder) for path in by_kind[kind]]
    if kind != "Parquet":
        if columns:
            raise UsageError(f"--column is for tables, but {place} has {kind}")
        groups = [files[start : start + _GROUP] for start in range(0, len(files), _GROUP)]
        return Inputs(filesystem, folder, kind, (), {f"part-{n:05}.parquet": group for n, group in enumerate(groups)})
    inputs = Inputs(filesystem, folder, kind, (), {file: [file] for file in files})
    row = inputs.first_row()
    if taken := [each for each in _ADDED if each in row]:
        raise UsageError(f"{place} already has a column {taken[0]}: rename it")
    columns = known or tuple(columns)
    if unknown := [column for column in columns if column not in row]:
        raise UsageError(f"{place} has no column {unknown[0]}, only {', '.join(row)}")
    chosen = columns or (_column_of(row, takes, f"{place}: {name} takes {takes}"),)
    return Inputs(filesystem, folder, kind, chosen, inputs.parts)


def _column_of(row: dict[str, Any], takes: Kind, where: str) -> str:
    for fits in _FITS[takes]:
        found = [name for name, value in row.items() if fits(value)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{where}, and several columns fit ({', '.join(found)}): choose with --column")
    raise UsageError(f"{where}, and no column fits: {', '.join(f'{k} ({type(v).__name__})' for k, v in row.items())}")


def _may_be_number(value: Any) -> bool:
    """Return whether a column with this value in its first row may hold numbers; there, it may be missing."""
    if value is None:
        return True
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False
