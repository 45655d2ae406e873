"""Finds the files of data, and recognizes them when they are read."""

from __future__ import annotations

import contextlib
import glob
import posixpath
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import pyarrow as pa
from pyarrow import fs

from mnist_ray.errors import UsageError
from mnist_ray.storage import in_one_line, locate, split_query


def files_at(place: str, endings: tuple[str, ...], kind: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the paths of the files at a path, a URI or a pattern with ``*``, sorted.

    In a folder, these are the files below it with one of some endings; ``kind``: what messages call them. Raises
    UsageError and JobError.
    """
    base, query = split_query(place)
    above, star, _ = base.partition("*")
    parent = above[: above.rfind("/") + 1] if star else base
    folder = locate((parent or ".") + query, "", "the data in")
    pattern = glob.escape(folder.path + base[len(parent) :]).replace("[*]", "*")

    def is_wanted(path: str) -> bool:
        return fnmatchcase(path, pattern) if star else path.endswith(endings)

    with in_one_line(f"{place} cannot be read"):
        infos = [folder.info()]
        if infos[0].type == fs.FileType.Directory:
            infos = folder.filesystem.get_file_info(fs.FileSelector(infos[0].path, recursive=True))
            infos = [info for info in infos if is_wanted(info.path)]
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
    if not paths:
        raise UsageError(f"{place} has no {kind} files")
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
