"""Blocks that are ranges of files: what JSON lines and tar files have in common."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mnist_ray.data.data import Blocks
from mnist_ray.data.files import CODECS, decompressed, files_at, identity_of, is_compressed, opened
from mnist_ray.data.index import Run, entries_of
from mnist_ray.errors import UsageError
from mnist_ray.storage import in_one_line

# Bytes of a block, at least; a file's last block may be smaller. By default, a worker holds 32 blocks in 512 MiB, and
# pictures and tokens are several times as large once they are decoded.
BLOCK_BYTES = 2**21
_BUFFER_BYTES = 2**20  # that a scan reads at once


class Range(NamedTuple):
    """Where a block is."""

    path: str
    version: str  # of the file
    start: int  # in bytes
    first: int  # the number of its first part, from 1 on
    run: Run


class Ranges(Blocks):
    """Blocks that are ranges of files; a compressed file is one block, since it cannot be read from the middle."""

    _ending: str  # of the files' names
    _part: str  # what messages call a part of a block

    def __init__(self, place: str | Path) -> None:
        """Find the files, and scan those that no index knows. Raises UsageError and JobError."""
        self._filesystem, paths = files_at(str(place), tuple(self._ending + end for end in ("", *CODECS)), self._ending)
        with in_one_line(f"{place} cannot be read"):
            entries = entries_of(self._filesystem, paths, self._ending[1:], self._scan)
        self._ranges = [
            Range(path, entry.version, start, first, run)
            for path, entry in entries.items()
            for start, first, run in _placed(entry.runs)
            if run.examples
        ]
        if not self._ranges:
            raise UsageError(f"{place} has no examples")
        self.sizes = [known.run.examples for known in self._ranges]
        names = (f"{path}, {self._part}s {first} to {first + run.parts - 1}" for path, _, _, first, run in self._ranges)
        self.block_names = [*names]
        self.identity = identity_of({path: f"{version} {len(runs)}" for path, (version, runs) in entries.items()})

    def _runs_of(self, file: Any, size: int, path: str) -> Iterator[Run]:
        """Yield the runs of a file's content of ``size`` bytes, reading it once. Raises UsageError."""
        raise NotImplementedError

    def _scan(self, path: str, handle: pa.NativeFile) -> list[Run]:
        if not is_compressed(path):
            runs = self._runs_of(io.BufferedReader(handle, _BUFFER_BYTES), handle.size(), path)
            return [run for run in runs if run.size]
        content = decompressed(handle, path)
        parts = [*self._runs_of(io.BytesIO(content), len(content), path)]
        return [Run(handle.size(), sum(run.parts for run in parts), sum(run.examples for run in parts))]

    def _content_of(self, block: int) -> bytes:
        """Return a block's bytes. Raises UsageError if the file has changed."""
        path, version, start, _, run = self._ranges[block]
        with opened(self._filesystem, path, version) as handle:
            return decompressed(handle, path) if is_compressed(path) else bytes(handle.read_at(run.size, start))

    def _check(self, block: int, num_parts: int) -> None:
        """Raise UsageError if a block has another number of parts than the index says."""
        if num_parts != self._ranges[block].run.parts:
            index = f".mnist_ray-{self._ending[1:]}.json beside the data, and ~/.cache/mnist_ray"
            raise UsageError(f"{self.block_names[block]} do not fit the index: delete {index}")


def _placed(runs: list[Run]) -> Iterator[tuple[int, int, Run]]:
    """Yield runs with their starts in bytes, and with the numbers of their first parts."""
    start, first = 0, 1
    for run in runs:
        yield start, first, run
        start, first = start + run.size, first + run.parts
