"""JSON lines: files with a JSON object in each line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from mnist_ray.data import ranges
from mnist_ray.data.columns import REMEDY, arrays_of, check_number, of_rows
from mnist_ray.data.data import Arrays
from mnist_ray.data.index import Run
from mnist_ray.data.ranges import Ranges
from mnist_ray.errors import UsageError, first_line
from mnist_ray.storage import in_one_line
from mnist_ray.text import size_of

T = TypeVar("T")

_MAX_LINE = 2**26  # bytes
_TOO_MANY_LEVELS = 8  # of lists in lists
_AT_ONCE = 256  # objects that become arrays; Python's garbage collector would go through more of them several times


class JsonLines(Ranges):
    """The objects in files of JSON lines; each block is some MiB of whole lines.

    ``place``: a path or URI of a file, of a folder with ``.jsonl`` files, or with ``*``. ``columns``: the names of the
    inputs, then that of the targets; by default those of the first object. They hold numbers, or lists of equal
    lengths, of one type in all objects. Several columns of inputs hold a number each and become (columns,) float32.
    Instead, ``decode`` may turn an object, a dict, into (input, target); like ``Blocks.read``, it must not draw random
    numbers. Empty lines are passed over. Files that end in .gz, .bz2, .xz or .zst are one block each: write files of at
    most some tens of MiB. Raises UsageError if there are no such files or columns, or if a file is damaged.
    """

    _ending, _part = ".jsonl", "line"

    def __init__(
        self,
        place: str | Path,
        *,
        columns: Sequence[str] | None = None,
        decode: Callable[[dict[str, Any]], tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__(place)
        self._columns, self._decode = list(columns or ()), decode
        self._types: dict[str, pa.DataType] = {}  # of the columns, in all blocks
        if decode is None:
            with in_one_line(f"{place} cannot be read"):
                lines = self._lines(0)
            self._columns = self._columns or lines.together(lambda some: [*_object(next(iter(some)))])
            check_number(self._columns, str(place))
            self._types = {field.name: field.type for field in lines.together(self._table).schema}

    def read(self, block: int) -> Arrays | Sequence[tuple[Any, Any]]:
        """Read and decode a block. Raises UsageError if a line cannot be used, or the file has changed."""
        lines, decode = self._lines(block), self._decode
        if decode is None:
            return lines.together(self._arrays)
        row = self._row if self._columns else _object
        return lines.each(lambda line: decode(row(line)))

    def _runs_of(self, file: Any, size: int, path: str) -> Iterator[Run]:
        first = 1
        while content := file.read(ranges.BLOCK_BYTES):
            content += (rest := file.readline(_MAX_LINE + 1))
            lines = _Lines(content, path, first)
            first += lines.number
            if len(rest) > _MAX_LINE:
                raise UsageError(f"{path}, line {first - 1} has more than {size_of(_MAX_LINE)}")
            yield Run(len(content), lines.number, lines.checked())

    def _lines(self, block: int) -> _Lines:
        known = self._ranges[block]
        lines = _Lines(self._content_of(block), known.path, known.first)
        self._check(block, lines.number)
        return lines

    def _row(self, line: bytes) -> dict[str, Any]:
        """Return the columns of a line's object. Raises UsageError."""
        values = _object(line)
        if missing := [name for name in self._columns if name not in values]:
            raise UsageError(f"there is no column {missing[0]}, only {', '.join(values)}")
        return {name: values[name] for name in self._columns}

    def _arrays(self, lines: Iterable[bytes]) -> Arrays:
        """Return the columns of lines as arrays. Raises UsageError."""
        with np.errstate(over="ignore"):  # found below
            arrays = arrays_of(self._table(lines), self._columns)
        if not (np.isfinite(arrays.inputs).all() and np.isfinite(arrays.targets).all()):
            raise UsageError("a number is too large")
        return arrays

    def _table(self, lines: Iterable[bytes]) -> pa.Table:
        """Return the columns of lines, in the types that they have in the first block. Raises UsageError."""
        rows, tables = map(self._row, lines), list[pa.Table]()
        while some := [*islice(rows, _AT_ONCE)]:
            tables.append(pa.table({name: self._column(name, [row[name] for row in some]) for name in self._columns}))
        return pa.concat_tables(tables, promote_options="permissive")

    def _column(self, name: str, values: list[Any]) -> pa.Array:
        """Return a column's values. Raises UsageError."""
        if any(map(_is_nested, values)):
            raise UsageError(f"column {name} holds objects, or too many levels of lists; {REMEDY}")
        try:
            array = pa.array(values)
            if (kind := self._types.get(name, array.type)) != array.type:
                pa.array(values, kind)  # refuses texts, but would cut 2.5 to 2, which the cast refuses
                array = array.cast(kind)
            return array
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(f"column {name} cannot be read: {first_line(error)}; {REMEDY}") from error


class _Lines:
    """The lines of a block that are not empty."""

    def __init__(self, content: bytes, path: str, first: int) -> None:
        """``first``: the number of the first line."""
        self._content, self._path, self._first = content, path, first
        self.number = content.count(b"\n") + (not content.endswith(b"\n"))  # of all lines

    def __iter__(self) -> Iterator[bytes]:
        return (line for line in io.BytesIO(self._content) if not line.isspace())

    def each(self, function: Callable[[bytes], Any]) -> list[Any]:
        """Apply a function to each line. Raises UsageError with the line for which it fails."""
        return of_rows(function, self, self.place_of)

    def together(self, function: Callable[[Iterable[bytes]], T]) -> T:
        """Apply a function to all lines. Raises UsageError, if possible with a line for which it fails."""
        try:
            return function(self)
        except Exception as error:
            self.each(lambda line: function([line]))
            place = f"{self._path}, lines {self._first} to {self._first + self.number - 1}"
            raise UsageError(f"{place}: {first_line(error)}") from error

    def checked(self) -> int:
        """Return how many lines there are; of most foreign and cut files, the first or the last raises UsageError."""
        lines = [*self]
        of_rows(_object, lines[:1] + lines[-1:], lambda row: self.place_of(-row))
        return len(lines)

    def place_of(self, row: int) -> str:
        """Return the file and the number of a line."""
        return f"{self._path}, line {self._numbers[row]}"

    @cached_property
    def _numbers(self) -> list[int]:
        return [number for number, line in enumerate(io.BytesIO(self._content), self._first) if not line.isspace()]


def _object(line: bytes) -> dict[str, Any]:
    """Parse a line. Raises UsageError."""
    text = line.decode("utf-8").strip()
    try:
        values, end = _PARSER.raw_decode(text)  # decode would look for spaces, which takes as long as a short line
    except json.JSONDecodeError as error:  # whose text would name line 1
        raise UsageError(f"no JSON: {error.msg} at character {error.pos + 1}") from error
    if end < len(text):
        raise UsageError(f"no JSON: more follows at character {end + 1}")
    if not isinstance(values, dict):
        raise UsageError(f"{type(values).__name__} instead of an object")
    return values


def _is_nested(value: Any) -> bool:
    """Return whether a value is an object or has many levels of lists: thousands of them would crash Arrow."""
    for _ in range(_TOO_MANY_LEVELS):
        if not isinstance(value, list):
            return isinstance(value, dict)
        value = value[0] if value else None
    return True


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dict. Raises UsageError if it has a name twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"several columns {max(names, key=names.count)}")
    return values


def _refuse(name: str) -> None:
    raise UsageError(f"{name} is no JSON")


_PARSER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_refuse)
