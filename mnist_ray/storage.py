"""A run's folder on any file system that pyarrow knows (local, NFS, S3, GCS, HDFS), and what its files must hold."""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow
from pyarrow import fs

from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.settings import path_of

T = TypeVar("T")
Warn = Callable[[str], None]

CONFIG_FILE, SWEEP_FILE, ORIGIN_FILE, RESULT_FILE = "config.json", "sweep.json", "origin.json", "result.json"
REPORT_FILE, TRIALS_FILE, WORKLOAD_FILE = "report.html", "sweep.csv", "workload.py"
TRACE_FILE, OPERATORS_FILE = "trace.json.gz", "operators.json"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"  # Ray's list of checkpoints; it is not written in one move
_CHECKPOINT_NAME = re.compile(r"checkpoint_epoch-(\d+)_step-(\d+)b*", re.ASCII)  # a b: it takes a damaged one's place

STORAGE_ERRORS = (OSError, pyarrow.ArrowException)  # what a file system raises
_RETRIED_FOR_S = 30.0
_PROBE_BYTES = 2**20  # more than a checkpoint has, so that a full disk is seen


class DamagedFileError(JobError):
    """A file of a run is not what was written: cut off by a kill, or changed since."""


def with_retries(action: Callable[[], T]) -> T:
    """Do something with storage; if it fails, again every second for half a minute: servers restart, links come back.

    Raises what it raises in the end; at once if a folder is in a file's place, which does not go away by itself.
    """
    end = time.monotonic() + _RETRIED_FOR_S
    while True:
        try:
            return action()
        except STORAGE_ERRORS as error:
            if isinstance(error, IsADirectoryError) or time.monotonic() >= end:
                raise
            time.sleep(1)


@contextlib.contextmanager
def _in_one_line(what_failed: str) -> Iterator[None]:
    try:
        yield
    except STORAGE_ERRORS as error:
        raise JobError(f"{what_failed}: {first_line(error)}") from error


def unless_damaged(read: Callable[[], T], warn: Warn) -> T | None:
    """Return what is read of a file that can be done without; if that is damaged, say so and return None."""
    try:
        return read()
    except DamagedFileError as error:
        warn(f"{error}; going on without it")
        return None


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run under a storage path."""

    name: str
    storage_path: str  # absolute path or URI, as Ray takes it
    filesystem: fs.FileSystem
    path: str  # the folder's path within `filesystem`

    @property
    def uri(self) -> str:
        """The folder as a person would type it."""
        base, query = split_query(self.storage_path)
        return f"{base.rstrip('/')}/{self.name}{query}"

    @property
    def storage(self) -> RunFolder:
        """The folder that it lies in."""
        return RunFolder("", self.storage_path, self.filesystem, posixpath.dirname(self.path))

    def inside(self, name: str) -> RunFolder:
        """Return a folder in it."""
        return RunFolder(name, self.uri, self.filesystem, posixpath.join(self.path, name))

    def exists(self, file_name: str = "") -> bool:
        """Tell whether the folder, or a file in it, is there."""
        return bool(self._info(file_name).type != fs.FileType.NotFound)

    def modified_ns(self, file_name: str) -> int:
        """Return when a file was last written, in nanoseconds since 1970; 0 if it is not there."""
        return self._info(file_name).mtime_ns or 0

    def _info(self, file_name: str) -> fs.FileInfo:
        return self.filesystem.get_file_info(posixpath.join(self.path, file_name).rstrip("/"))

    def subfolders(self) -> list[str]:
        """Return the names of the folders in it, sorted; none if it is not there."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def checkpoint_names(self) -> list[str]:
        """Return the folders of its checkpoints, the newest last."""
        names = [name for name in self.subfolders() if position_of(name)]
        return sorted(names, key=lambda name: (position_of(name), name))

    def read_bytes(self, file_name: str) -> bytes | None:
        """Return a file's content, or None if there is no such file. Raises what the file system does."""
        if not self.exists(file_name):
            return None
        with self.filesystem.open_input_stream(posixpath.join(self.path, file_name)) as stream:
            return bytes(stream.read())

    def read_text(self, file_name: str) -> str | None:
        """Return a file's text, or None if there is no such file. Raises DamagedFileError, JobError for storage."""
        with _in_one_line(f"cannot read {self.inside(file_name).uri}"):
            content = self.read_bytes(file_name)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(file_name, error) from error

    def read_json(self, file_name: str, warn: Warn = lambda note: None) -> dict[str, Any] | None:
        """Return the JSON object that a file holds; None if there is none, or if it is damaged: ``warn`` says so.

        Raises JobError if the storage cannot be used.
        """
        return unless_damaged(lambda: self._parsed(file_name), warn)

    def require_json(self, file_name: str) -> dict[str, Any]:
        """Return the JSON object of a file that must be there. Raises JobError."""
        try:
            values = self._parsed(file_name)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}; put it back, or start another run") from error
        if values is None:
            raise JobError(f"{self.inside(file_name).uri} is gone")
        return values

    def _parsed(self, file_name: str) -> dict[str, Any] | None:
        text = self.read_text(file_name)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(file_name, error) from error
        if not isinstance(values, dict):
            raise self.damaged(file_name, "it holds no JSON object")
        for key, is_right in _MUST_HOLD.get(file_name, {}).items():
            if not is_right(values.get(key)):
                raise self.damaged(file_name, f"{key} is {values[key]!r:.40}" if key in values else f"it has no {key}")
        return values

    def damaged(self, file_name: str, reason: object) -> DamagedFileError:
        """Return what is raised if a file is not what was written."""
        said = first_line(reason) if isinstance(reason, BaseException) else reason
        return DamagedFileError(f"{self.inside(file_name).uri} is damaged: {said}")

    def write_text(self, file_name: str, text: str) -> None:
        """Write text as ``write_bytes`` does. Characters that UTF-8 cannot encode, of broken names, are escaped."""
        self.write_bytes(file_name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, file_name: str, content: bytes) -> None:
        """Write a file in one move, so that it is never seen half-written, with retries. Raises JobError."""
        with _in_one_line(f"cannot write {self.uri}/{file_name}"):
            with_retries(lambda: self._write(posixpath.join(self.path, file_name), content))

    def append_text(self, file_name: str, text: str) -> None:
        """Add to a text file, once: after a failure, it is not known how much of the text is there. Raises JobError."""
        path = posixpath.join(self.path, file_name)
        with _in_one_line(f"cannot write {self.uri}/{file_name}"), self.filesystem.open_append_stream(path) as stream:
            stream.write(text.encode())

    def _write(self, target: str, content: bytes) -> None:
        try:
            self.filesystem.create_dir(posixpath.dirname(target))
            with self.filesystem.open_output_stream(target + ".tmp") as stream:
                stream.write(content)
            self.filesystem.move(target + ".tmp", target)
        except STORAGE_ERRORS:
            with contextlib.suppress(*STORAGE_ERRORS):
                self.filesystem.delete_file(target + ".tmp")
            raise

    def check_writable(self, *, retry: bool = False) -> None:
        """See whether files can be written beside it: at once, or with retries. Raises JobError."""
        with _in_one_line(f"cannot write to {self.storage_path}"):
            with_retries(self._probe) if retry else self._probe()

    def _probe(self) -> None:
        name = f".probe-{uuid4().hex}"  # of its own: another job may probe at the same time
        self._write(posixpath.join(self.storage.path, name), bytes(_PROBE_BYTES))
        self.storage.delete_file(name)

    def write_files(self, contents: Mapping[str, bytes]) -> None:
        """Write files into it, in their order, with retries. Raises what the file system does."""

        def write() -> None:
            self.filesystem.create_dir(self.path)
            for file_name, content in contents.items():
                with self.filesystem.open_output_stream(posixpath.join(self.path, file_name)) as stream:
                    stream.write(content)

        with_retries(write)

    def delete(self) -> None:
        """Remove it with all that it holds, if it is there, with retries. Raises what the file system does."""
        with_retries(lambda: self.filesystem.delete_dir(self.path) if self.exists() else None)

    def delete_file(self, file_name: str) -> None:
        """Remove a file that is there."""
        self.filesystem.delete_file(posixpath.join(self.path, file_name))


def locate(storage_path: str, name: str, given_as: str = "--storage-path") -> RunFolder:
    """Return the folder ``name`` under a path or URI, which need not exist. Raises UsageError for a bad one."""
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(?!//)", storage_path):
        start = scheme[0]  # no more of it, which may be a secret
        raise UsageError(f"{start}… is neither a folder nor a URI; write {start}//… or ./{start}…")
    try:
        if "://" in storage_path:
            filesystem, path = fs.FileSystem.from_uri(storage_path)
        else:
            storage_path = str(path_of(storage_path, given_as).absolute())
            filesystem, path = fs.LocalFileSystem(), storage_path
        run = RunFolder(name, storage_path, filesystem, posixpath.join(path, name))
        run.exists()
    except (*STORAGE_ERRORS, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise UsageError(f"{given_as} {storage_path} cannot be used: {first_line(error)}") from error
    return run


def split_query(path: str) -> tuple[str, str]:
    """Split a URI before its ``?``: options of the file system, which follow the name of whatever lies in it."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return base, mark + query


def untrusted_folders(run: RunFolder, storage_path: str) -> list[Path]:
    """Return the folders on this machine's disks where code may have come with a run, or lie in the storage of runs.

    ``run`` may be a checkpoint's folder, or one that a sweep has within its own.
    """
    outermost = run
    while outermost.storage.exists(CONFIG_FILE):
        outermost = outermost.storage
    own = [Path(outermost.path)] if isinstance(run.filesystem, fs.LocalFileSystem) else []
    return own if "://" in storage_path else [*own, path_of(storage_path, "--storage-path")]


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"checkpoint_epoch-{epoch:03d}_step-{step:06d}"


def position_of(name: str) -> tuple[int, ...]:
    """Return the epoch and step of a checkpoint's folder: positions sort, names do so only for a time.

    Of any other name, nothing, which is before all positions.
    """
    found = _CHECKPOINT_NAME.fullmatch(name)
    return tuple(map(int, found.groups())) if found else ()


def write_file(path: Path, content: bytes) -> None:
    """Write a file where the user wants it. Raises JobError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror}") from error


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _is_seconds(value: Any) -> bool:
    return isinstance(value, dict) and "total" in value and all(map(_is(int, float), value.values()))


_SETTINGS = {"workload": _is(str, NoneType), "num_epochs": _is(int)}
_MUST_HOLD: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    CONFIG_FILE: _SETTINGS,
    SWEEP_FILE: _SETTINGS,
    ORIGIN_FILE: {"versions": _is(dict), "metadata": _is(dict), "data": _is(dict, NoneType)},
    RESULT_FILE: {"checkpoint": lambda name: position_of(str(name)) != (), "seconds": _is_seconds},
    OPERATORS_FILE: {"steps": _is(int), "operators": _is(list)},
}
"""What a run's JSON files must hold, by key, if they are not damaged; they may hold more."""
