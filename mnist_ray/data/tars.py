"""Tar files in WebDataset's form: the members of a sample follow each other, and have its key in their names."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from mnist_ray.data import files, ranges
from mnist_ray.data.columns import of_rows
from mnist_ray.data.index import Run
from mnist_ray.data.ranges import Ranges
from mnist_ray.errors import UsageError, first_line
from mnist_ray.storage import STORAGE_ERRORS
from mnist_ray.text import escaped, size_of

_MAX_HEADER = 2**20  # bytes


class Tars(Ranges):
    """The samples in tar files, as WebDataset writes them; each block is some MiB of whole samples.

    ``place``: a path or URI of a file, of a folder with ``.tar`` files, or with ``*``. A sample's members follow each
    other; their names are its key, a dot, and a field: ``train/0001.jpg`` and ``train/0001.cls``. ``decode`` turns
    a sample, ``{"__key__": "train/0001", "jpg": bytes, "cls": bytes}``, into (input, target); like ``Blocks.read``, it
    must not draw random numbers. Folders and members without a key or a field are passed over. Files that end in .gz,
    .bz2, .xz or .zst are one block each: write files of at most some tens of MiB. Raises UsageError if there are no
    such files, or if a file is damaged.
    """

    _ending, _part = ".tar", "member"

    def __init__(self, place: str | Path, decode: Callable[[dict[str, Any]], tuple[Any, Any]]) -> None:
        super().__init__(place)
        self._decode = decode

    def read(self, block: int) -> Sequence[tuple[Any, Any]]:
        """Read and decode a block. Raises UsageError if a sample cannot be used, or the file has changed."""
        content, path = self._content_of(block), self._ranges[block].path
        samples = [*_samples(io.BytesIO(content), len(content), path)]
        self._check(block, sum(map(len, samples)))

        def decoded(sample: list[_Member]) -> tuple[Any, Any]:
            fields = {member.field: content[member.start : member.stop] for member in sample}
            return self._decode({"__key__": sample[0].key, **fields})

        return of_rows(decoded, samples, lambda row: f"{path}, sample {_shown(samples[row][0].key)}")

    def _runs_of(self, file: Any, size: int, path: str) -> Iterator[Run]:
        keys = set[int]()  # hashes, which need less memory
        start = end = num_members = num_samples = 0
        for sample in _samples(_Headers(file), size, path, is_whole=True):
            key, first = sample[0].key, sample[0].first
            if hash(key) in keys:
                raise UsageError(f"{path}, sample {_shown(key)} comes again: a sample's members must be neighbours")
            if first - start >= ranges.BLOCK_BYTES:
                yield Run(end - start, num_members, num_samples)
                yield Run(first - end, 0, 0)
                start, num_members, num_samples = first, 0, 0
            end = _blocks(sample[-1].stop)
            if end - start > files.MAX_BLOCK:
                raise UsageError(f"{path}, sample {_shown(key)} has more than {size_of(files.MAX_BLOCK)}")
            num_members, num_samples = num_members + len(sample), num_samples + 1
            keys.add(hash(key))
        yield Run(end - start, num_members, num_samples)
        yield Run(size - end, 0, 0)


class _Member(NamedTuple):
    """A member that belongs to a sample."""

    key: str
    field: str
    first: int  # byte of its headers in the file
    start: int  # first byte of its content
    stop: int  # the byte after its content


def _samples(file: Any, size: int, path: str, *, is_whole: bool = False) -> Iterator[list[_Member]]:
    """Yield the members of each sample. Raises UsageError."""
    for key, members in groupby(_members(file, size, path, is_whole), lambda member: member.key):
        sample = [*members]
        fields = ["__key__", *(member.field for member in sample)]
        if len({*fields}) < len(fields):
            several = max(fields, key=fields.count)
            raise UsageError(f"{path}, sample {_shown(key)} has several members {_shown(several)}")
        yield sample


def _members(file: Any, size: int, path: str, is_whole: bool) -> Iterator[_Member]:
    """Yield the members of a tar file of ``size`` bytes, or of a part of it; reads only headers. Raises UsageError."""
    last, end = "its start", 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it would keep all of them
                last = f"member {_shown(info.name)}"
                if fault := _fault_of(info, size):
                    raise UsageError(f"{path}, {last} {fault}")
                end = _blocks(info.offset_data + info.size if info.isreg() else info.offset_data)
                folder, slash, name = info.name.rpartition("/")
                stem, _, field = name.partition(".")
                if info.isreg() and stem and field:
                    content = info.offset_data, info.offset_data + info.size
                    yield _Member(folder + slash + stem, field.lower(), info.offset, *content)
            file.seek(end)  # tar.offset may be after a wrong header, which tarfile takes for the end
            rest = file.read(_MAX_HEADER)
            if rest.strip(b"\0") or (is_whole and len(rest) < tarfile.BLOCKSIZE):
                raise tarfile.ReadError("neither a member nor the end follows")
    except (UsageError, *STORAGE_ERRORS):
        raise
    except Exception as error:  # damaged headers may raise anything
        raise UsageError(f"{path} is damaged or cut off after {last}: {first_line(error)}") from error


def _blocks(num_bytes: int) -> int:
    """Round up to whole blocks of a tar file."""
    return -(-num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _shown(name: str) -> str:
    return escaped(name, str.isprintable)


def _fault_of(info: tarfile.TarInfo, size: int) -> str:
    """Say why a member of a tar file of ``size`` bytes cannot be used; empty if it can. Nothing is ever extracted."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "has a name that leads out of the folder"
    if not info.isreg() and not info.isdir():
        return "is a link, a device or the like"
    if info.issparse():
        return "is sparse"
    if info.isreg() and not 0 <= info.size <= size - info.offset_data:
        return f"is cut off: it should have {info.size:,} bytes"
    return ""


class _Headers(io.BufferedReader):
    """Reads headers, but none that says that it is very long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header should have {size:,} bytes")
        return super().read(size)
