"""The inputs of predictions at scale: pictures or texts in groups of files, or the rows of tables."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from mnist_ray.data.columns import REMEDY, arrays_of, check_kinds
from mnist_ray.data.files import files_at, folder_of
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.predictions.outputs import LinesFile, ParquetFile
from mnist_ray.predictions.predictor import PICTURES, Kind, Predictor, kind_of
from mnist_ray.storage import RunFolder
from mnist_ray.text import size_of
from mnist_ray.workload.base import Workload

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # by the end of a file's name
_PACKED = ("", *CODECS)
_ENDINGS: dict[str, tuple[str, ...]] = {  # of the files of each kind
    "pictures": PICTURES,
    "texts": (".txt",),
    "Parquet": (".parquet",),
    "JSON lines": tuple(f".jsonl{packed}" for packed in _PACKED),
    "CSV": tuple(f".csv{packed}" for packed in _PACKED),
}
_TABLES = ("Parquet", "JSON lines", "CSV")
_ADDED = ("prediction", "probability", "probabilities")  # the columns of predictions
_GROUP = 1000  # pictures or texts whose predictions one file has
_AT_ONCE = 256  # rows
_VALUES = (  # kinds of columns that are pictures or texts, not numbers
    *(pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string),
)
_DAMAGE = (pa.ArrowException, csv.Error, EOFError, FileNotFoundError, UsageError, ValueError)
_MAX_BYTES = 2**26  # of a picture, a text or a line
_FITS: dict[Kind, tuple[Callable[[Any], bool], ...]] = {  # values of the input's column; the first kind found is taken
    "pictures": (lambda value: isinstance(value, (bytes, dict)), lambda value: isinstance(value, (list, np.ndarray))),
    "texts": (lambda value: isinstance(value, str),),
    "arrays": (lambda value: isinstance(value, (list, np.ndarray)), lambda value: _may_be_number(value)),
}


class DamagedTableError(Exception):
    """A whole file cannot be read, or the rest of it."""


class Chunk(NamedTuple):
    """Some rows with their inputs."""

    rows: pa.Table | list[dict[str, Any]]  # a table for Parquet, pictures and texts
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

    def writer(self, stream: Any) -> contextlib.closing[ParquetFile | LinesFile]:
        """Return what writes a part's rows, in the input's format; for pictures and texts, in Parquet."""
        is_lines = self.kind in ("JSON lines", "CSV")
        return contextlib.closing(LinesFile(stream, is_csv=self.kind == "CSV") if is_lines else ParquetFile(stream))

    def chunks(self, part: str, files: Sequence[str], predictor: Predictor) -> Iterator[Chunk]:
        """Read a part, some rows at a time. Raises DamagedTableError, and STORAGE_ERRORS."""
        first = 1
        if self.kind not in _TABLES:
            for start in range(0, len(files), _AT_ONCE):
                some = files[start : start + _AT_ONCE]
                yield Chunk(pa.table({"file": some}), [self._input_in(file, predictor) for file in some], some)
            return
        for rows in self._undamaged(part):
            inputs = self._inputs_of(rows, predictor)
            yield Chunk(rows, inputs, [f"{part}, row {first + row}" for row in range(len(inputs))])
            first += len(inputs)

    def first_row(self) -> dict[str, Any]:
        """Return the first row of a table. Raises UsageError if no table has one that can be read."""
        for part in self.parts:
            with contextlib.suppress(DamagedTableError):
                for rows in self._undamaged(part):
                    for row in rows.slice(0, 1).to_pylist() if isinstance(rows, pa.Table) else rows:
                        if isinstance(row, dict):
                            return row
        raise UsageError(f"the {self.kind} files in {self.folder} have no rows that can be read")

    def num_predicted(self, folder: RunFolder, part: str) -> int:
        """Return how many rows a part's predictions have. Raises DamagedTableError, and STORAGE_ERRORS."""
        kind = self.kind if self.kind in _TABLES else "Parquet"
        written = dataclasses.replace(self, filesystem=folder.filesystem, folder=folder.path, kind=kind, columns=())
        if kind != "Parquet":
            return sum(map(len, written._undamaged(part)))
        with written._damage_named(part), folder.filesystem.open_input_file(posixpath.join(folder.path, part)) as file:
            return int(pq.read_metadata(file).num_rows)

    def _undamaged(self, part: str) -> Iterator[Any]:
        """Yield a table's rows, some at a time. Raises DamagedTableError, and STORAGE_ERRORS if the storage fails."""
        with self._damage_named(part):
            yield from self._tables(part) if self.kind == "Parquet" else _some(self._rows(part))

    @contextlib.contextmanager
    def _damage_named(self, part: str) -> Iterator[None]:
        try:
            yield
        except (*_DAMAGE, OSError) as error:
            if not isinstance(error, _DAMAGE):
                self._read_through(part)  # Arrow's decompression raises such an error, too
            raise DamagedTableError(f"the file cannot be read: {first_line(error)}") from error

    def _read_through(self, part: str) -> None:
        with self.filesystem.open_input_stream(posixpath.join(self.folder, part), compression=None) as stream:
            while stream.read(2**20):
                pass

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
        """Yield the rows of a Parquet file; first no rows, with the file's columns."""
        with self.filesystem.open_input_file(posixpath.join(self.folder, part)) as handle:
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

    def _rows(self, part: str) -> Iterator[Any]:
        """Yield the rows of JSON lines or CSV as dicts; a JobError for a row that is none."""
        path = posixpath.join(self.folder, part)
        with self.filesystem.open_input_stream(path, compression="detect") as stream:
            if self.kind == "JSON lines":
                yield from (_object(line) for line in _lines(io.BufferedReader(stream)) if not line.isspace())
                return
            csv.field_size_limit(_MAX_BYTES)
            # Strict: a stray quote would make one cell of all that follows.
            lines = csv.reader(_lines(io.TextIOWrapper(stream, "utf-8-sig", newline="")), strict=True)
            names = next(lines, [])
            if len({*names}) < len(names):
                raise UsageError(f"it has several columns {max(names, key=names.count)}")
            for cells in lines:
                wrong = f"has {len(cells)} cells, and the header {len(names)}"
                yield dict(zip(names, cells, strict=True)) if len(cells) == len(names) else JobError(wrong)

    def _inputs_of(self, rows: Any, predictor: Predictor) -> list[Any]:
        if len(rows) == 0:
            return []
        if not isinstance(rows, pa.Table):
            return [self._input_of(row, predictor) for row in rows]
        if any(is_kind(rows.schema.field(self.columns[0]).type) for is_kind in _VALUES):
            return [self._input_of(row, predictor) for row in rows.select(self.columns).to_pylist()]
        try:
            return [*arrays_of(rows, [*self.columns, self.columns[-1]]).inputs]
        except UsageError as error:
            if len(rows) == 1:
                return [JobError(str(error).removesuffix(f"; {REMEDY}"))]
            return [each for row in range(len(rows)) for each in self._inputs_of(rows.slice(row, 1), predictor)]

    def _input_of(self, row: Any, predictor: Predictor) -> Any:
        if isinstance(row, JobError):
            return row
        try:
            values = [row[name] for name in self.columns]
            if taken := [name for name in _ADDED if name in row]:
                return JobError(f"already has a column {taken[0]}")
            if self.kind == "CSV" and predictor.takes != "texts":
                values = [float(value) for value in values]
            return predictor.decode(values if len(values) > 1 else values[0])
        except KeyError as error:
            return JobError(f"has no column {error.args[0]}")
        except (TypeError, ValueError) as error:
            return JobError(f"holds no number: {error}")
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
    filesystem, paths = files_at(place, sum(_ENDINGS.values(), ()), "picture, text, Parquet, JSON lines or CSV")
    by_kind = {kind: [path for path in paths if path.lower().endswith(endings)] for kind, endings in _ENDINGS.items()}
    usable = [kind for kind, found in by_kind.items() if found and kind in (takes, *_TABLES)]
    if not usable:
        found = " and ".join(kind for kind, found in by_kind.items() if found) or "files of other kinds"
        raise UsageError(f"{name} takes {takes}, but {place} has only {found}; choose another run with --run")
    if len(usable) > 1:
        pattern = f"{place.rstrip('/')}/*{_ENDINGS[usable[0]][0]}"
        raise UsageError(f"{place} has {' and '.join(usable)}: choose by a pattern, such as '{pattern}'")
    (kind,) = usable
    folder = folder_of(by_kind[kind])
    files = [posixpath.relpath(path, folder) for path in by_kind[kind]]
    if kind not in _TABLES:
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
    if value is None or value == "":
        return True
    try:
        return not isinstance(value, bool) and bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


def _some(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while some := [*islice(rows, _AT_ONCE)]:
        yield some


def _lines(stream: Any) -> Iterator[Any]:
    """Yield a stream's lines. Raises ValueError for one that is too long to hold in memory."""
    while line := stream.readline(_MAX_BYTES + 1):
        if len(line) > _MAX_BYTES:
            raise ValueError(f"a line has more than {size_of(_MAX_BYTES)}")
        yield line


def _object(line: bytes) -> Any:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return JobError(f"no JSON: {error}")
    return row if isinstance(row, dict) else JobError(f"{type(row).__name__} instead of an object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dict. Raises ValueError if it has a name twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"several columns {max(names, key=names.count)}")
    return values
