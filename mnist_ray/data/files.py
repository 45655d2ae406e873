"""Finds the files of data, and recognizes them when they are read."""

from __future__ import annotations

import contextlib
import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import pyarrow as pa
from pyarrow import fs

from mnist_ray.errors import UsageError
from mnist_ray.storage import in_one_line, locate, split_query


def files_at(place: str, endings: tuple[str, ...], kind: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the paths of the files at a path, a URI or a pattern with ``*``, sorted.

    In a folder, these are the files below it with one of some endings; ``kind``: what messages call them. What begins
    with ``.`` or ``_`` in a folder is passed over, such as what Spark has not finished. Raises UsageError
    and JobError.
    """
    base, query = split_query(place)
    above, star, _ = base.partition("*")
    parent = above[: above.rfind("/") + 1] if star else base
    folder = locate((parent or ".") + query, "", "the data in")
    pattern = glob.escape(folder.path + base[len(parent) :]).replace("[*]", "*")

    def is_wanted(path: str) -> bool:
        is_hidden = any(part.startswith((".", "_")) for part in path[len(folder.path) :].split("/"))
        return not is_hidden and (fnmatchcase(path, pattern) if star else path.lower().endswith(endings))

    with in_one_line(f"{place} cannot be read"):
        place_info = folder.info()
        paths = [place_info.path] if place_info.type == fs.FileType.File else []
        if place_info.type == fs.FileType.Directory:
            found = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
            paths = sorted(info.path for info in found if info.type == fs.FileType.File and is_wanted(info.path))
    if isinstance(folder.filesystem, fs.LocalFileSystem):  # a link may lead to a folder above
        paths = sorted({os.path.realpath(path): path for path in reversed(paths)}.values())
    if not paths:
        is_missing = place_info.type == fs.FileType.NotFound
        raise UsageError(f"{place} does not exist" if is_missing else f"{place} has no {kind} files")
    return folder.filesystem, paths


@contextlib.contextmanager
def opened(filesystem: fs.FileSystem, path: str, version: str) -> Iterator[pa.NativeFile]:
    """Open a file to read. Raises UsageError if it no longer has the ``version`` that it had."""
    with filesystem.open_input_file(path) as handle:
        if version_of(filesystem, path, handle) != version:
            raise UsageError(f"{path} has changed since the data were loaded")
        yield handle


def version_of(filesystem: fs.FileSystem, path: str, handle: pa.NativeFile) -> str:
    """Return a text that changes if the file does. An object store sent its ETag when it opened the file."""
    tag = handle.metadata().get("ETag") or filesystem.get_file_info(path).mtime_ns
    return f"{handle.size()} {tag!r}"


def folder_of(paths: Sequence[str]) -> str:
    """Return the innermost folder that holds all files."""
    return posixpath.commonpath([posixpath.dirname(path) for path in paths])


def identity_of(versions: dict[str, str]) -> str:
    """Return a text that changes if a file of ``versions``, by path, does; but not if their folder moves."""
    folder = folder_of(list(versions))
    return "\n".join(f"{path[len(folder) :]} {version}" for path, version in versions.items())
