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
from mnist_ray.storage import RunFolder, in_one_line, locate, split_query


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
        info = folder.info()
        paths = [info.path] if info.type == fs.FileType.File else []
        if info.type == fs.FileType.Directory:
            paths = sorted(path for path in _files_below(folder) if is_wanted(path))
    if not paths:
        is_missing = info.type == fs.FileType.NotFound
        raise UsageError(f"{place} does not exist" if is_missing else f"{place} has no {kind} files")
    return folder.filesystem, paths


def _files_below(folder: RunFolder) -> Iterator[str]:
    """Yield the paths of all files in a folder and below. Raises STORAGE_ERRORS."""
    if not isinstance(folder.filesystem, fs.LocalFileSystem):
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
        yield from (info.path for info in infos if info.type == fs.FileType.File)
        return

    def fail(error: OSError) -> None:
        raise error

    seen = set[tuple[int, int]]()  # folders: Arrow would follow a link to a folder above without end
    for place, folders, names in os.walk(folder.path, onerror=fail, followlinks=True):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        for path in (posixpath.join(place, name) for name in names):
            if not path.isascii() and os.fsencode(path).decode(errors="replace") != path:
                raise OSError(f"the name {path!a} is not UTF-8; rename the file")
            if os.path.isfile(path):
                yield path


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
