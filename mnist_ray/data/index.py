"""Keeps where the blocks of files begin, so that each file is scanned only once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from mnist_ray.data import files
from mnist_ray.data.files import folder_of, version_of
from mnist_ray.errors import JobError
from mnist_ray.storage import RunFolder, is_foreign

_FORMAT = 1  # to be raised if files are cut into blocks in another way
_NUM_THREADS = 8  # that scan files


class Run(NamedTuple):
    """A part of a file that is a block."""

    size: int  # in bytes
    parts: int  # lines, or members of a tar file
    examples: int


class Entry(NamedTuple):
    """What an index knows of a file. The runs follow each other, from the file's start to its end."""

    version: str
    runs: list[Run]


def entries_of(
    filesystem: fs.FileSystem, paths: list[str], kind: str, scan: Callable[[str, pa.NativeFile], list[Run]]
) -> dict[str, Entry]:
    """Return the files' entries, by path, from the index of their ``kind``; several threads ``scan`` unknown files.

    The index is kept beside the data or, where that is not possible, in the user's cache. Raises what ``scan`` raises,
    and STORAGE_ERRORS.
    """
    folder, found, new = folder_of(paths), dict[str, Entry](), dict[str, Entry]()
    beside, in_cache = _homes(filesystem, folder, kind)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    of_data, of_cache = {} if is_local and is_foreign(beside.path) else _read(beside), _read(in_cache)

    def look(path: str) -> None:
        name = path[len(folder) :].lstrip("/")
        with filesystem.open_input_file(path) as handle:
            version = version_of(filesystem, path, handle)
            known = [index[name] for index in (of_data, of_cache) if name in index]
            fitting = [entry for entry in known if entry.version == version and _covers(entry.runs, handle.size())]
            if not fitting:
                new[name] = Entry(version, scan(path, handle))
            found[path] = fitting[0] if fitting else new[name]

    try:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            list(threads.map(look, paths))
    finally:  # if a file is damaged, the others need not be scanned again
        if new and not _write(beside, of_data | new):
            with contextlib.suppress(OSError):
                os.makedirs(in_cache.storage.path, mode=0o700, exist_ok=True)
            _write(in_cache, of_cache | new)
    return {path: found[path] for path in paths}


def _homes(filesystem: fs.FileSystem, folder: str, kind: str) -> tuple[RunFolder, RunFolder]:
    """Return where the index of a folder's files may be: a file in this folder, and one in the user's cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    cache = os.path.join(given if os.path.isabs(given) else os.path.expanduser("~/.cache"), "mnist_ray")
    digest = hashlib.sha256(f"{filesystem.type_name} {folder}".encode()).hexdigest()
    beside = RunFolder("", folder, filesystem, folder).inside(f".mnist_ray-{kind}.json")
    return beside, RunFolder("", cache, fs.LocalFileSystem(), cache).inside(f"{digest}-{kind}.json")


def _read(home: RunFolder) -> dict[str, Entry]:
    """Return the entries of an index, by file; none if there is no index, or if it is damaged or of another format."""
    with contextlib.suppress(AttributeError, JobError, KeyError, TypeError, ValueError):
        content = home.storage.read_json(home.name) or {}
        if content == _content(known := content["files"]):
            return {name: Entry(version, [Run(*run) for run in runs]) for name, (version, runs) in known.items()}
    return {}


def _content(entries: dict[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "checksum": zlib.crc32(json.dumps(entries).encode()), "files": entries}


def _covers(runs: list[Run], size: int) -> bool:
    """Return whether the runs may be those of a file of ``size`` bytes: anybody may have written the index."""
    if not all(type(number) is int and number >= 0 for run in runs for number in run):
        return False
    is_possible = all(
        run.examples <= run.parts <= max(run.size, files.MAX_BLOCK)
        and (run.size <= files.MAX_BLOCK or not run.examples)
        for run in runs
    )
    return is_possible and sum(run.size for run in runs) == size


def _write(home: RunFolder, entries: dict[str, Entry]) -> bool:
    return home.storage.write_if_possible(home.name, json.dumps(_content(entries)).encode())
