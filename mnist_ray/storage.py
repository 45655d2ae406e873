"""A run's folder on any file system of pyarrow (local, NFS, S3, GCS, HDFS)."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import posixpath
import pwd
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow
from pyarrow import fs

from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.schema import CHECKPOINT_NAME, flaw_of
from mnist_ray.settings import path_of

T = TypeVar("T")

STORAGE_ERRORS = (OSError, pyarrow.ArrowException)  # raised by file systems
_RETRIED_FOR_S = 30.0
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.ELOOP)  # full, or links that lead elsewhere
_PROBE_BYTES = 2**20  # more than a checkpoint of MNIST, to notice a full disk


def with_retries(action: Callable[[], T]) -> T:
    """Call ``action``; if storage fails, retry every second for half a minute, as servers restart and links recover.

    Raises the last error; at once if a retry would fail too.
    """
    end = time.monotonic() + _RETRIED_FOR_S
    while True:
        try:
            return action()
        except STORAGE_ERRORS as error:
            is_lasting = isinstance(error, IsADirectoryError) or getattr(error, "errno", None) in _LASTING
            if is_lasting or time.monotonic() >= end:
                raise
            time.sleep(1)


@contextlib.contextmanager
def in_one_line(what_failed: str) -> Iterator[None]:
    """Raise a storage error as a JobError of one line."""
    try:
        yield
    except STORAGE_ERRORS as error:
        number = getattr(error, "errno", None)
        raise JobError(f"{what_failed}: {os.strerror(number) if number else first_line(error)}") from error


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run under a storage path."""

    name: str
    storage_path: str  # absolute path or URI
    filesystem: fs.FileSystem
    path: str  # the folder's path within `filesystem`

    @property
    def uri(self) -> str:
        """The folder's path or URI."""
        base, query = split_query(self.storage_path)
        return f"{base.rstrip('/')}/{self.name}{query}"

    @property
    def storage(self) -> RunFolder:
        """The parent folder."""
        return RunFolder("", self.storage_path, self.filesystem, posixpath.dirname(self.path))

    def inside(self, name: str) -> RunFolder:
        """Return a subfolder, or the location of a file."""
        return RunFolder(name, self.uri, self.filesystem, posixpath.join(self.path, name))

    def info(self, file_name: str = "") -> fs.FileInfo:
        """Return the type and times of the folder, or of a file in it. Raises STORAGE_ERRORS."""
        return self.filesystem.get_file_info(posixpath.join(self.path, file_name).rstrip("/"))

    def exists(self, file_name: str = "") -> bool:
        """Return whether the folder, or a file in it, exists. Raises STORAGE_ERRORS."""
        return bool(self.info(file_name).type != fs.FileType.NotFound)

    def subfolders(self) -> list[str]:
        """Return the sorted names of the subfolders; none if this folder does not exist. Raises STORAGE_ERRORS.

        Names that are not UTF-8 are left out: this package gives none, and pyarrow has no text for them.
        """
        found, names = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True)), list[str]()
        for info in found:
            with contextlib.suppress(UnicodeDecodeError):
                if info.type == fs.FileType.Directory:
                    names.append(info.base_name)
        return sorted(names)

    def checkpoint_names(self) -> list[str]:
        """Return the names of the folder's checkpoints, the newest last. Raises STORAGE_ERRORS."""
        names = [name for name in self.subfolders() if position_of(name)]
        return sorted(names, key=position_of)

    def read_bytes(self, file_name: str) -> bytes | None:
        """Return a file's content, or None if it does not exist. Raises STORAGE_ERRORS."""
        kind = self.info(file_name).type
        if kind == fs.FileType.NotFound:
            return None
        if kind == fs.FileType.Unknown:  # reading a FIFO may wait forever, reading a device may never end
            raise OSError("it is not a file")
        with self.filesystem.open_input_stream(posixpath.join(self.path, file_name)) as stream:
            return bytes(stream.read())

    def read_text(self, file_name: str) -> str | None:
        """Return a file's text; None if there is no file. Raises JobError."""
        with in_one_line(f"cannot read {self.inside(file_name).uri}"):
            content = self.read_bytes(file_name)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(file_name, error) from error

    def read_json(self, file_name: str) -> dict[str, Any] | None:
        """Return a file's JSON object; None if there is no file. Raises JobError if it is damaged."""
        text = self.read_text(file_name)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(file_name, error) from error
        if flaw := flaw_of(file_name, values):
            raise self.damaged(file_name, flaw)
        return dict(values)

    def require_json(self, file_name: str) -> dict[str, Any]:
        """Return a file's JSON object. Raises JobError if it does not exist or is damaged."""
        if (values := self.read_json(file_name)) is None:
            raise JobError(f"{self.inside(file_name).uri} does not exist; restore it")
        return values

    def damaged(self, file_name: str, reason: object) -> JobError:
        """Return the error to raise for a damaged file: since files are written atomically, somebody changed it."""
        said = first_line(reason) if isinstance(reason, BaseException) else reason
        return JobError(f"{self.inside(file_name).uri} is damaged: {said}; restore it, or delete it")

    def write_text(self, file_name: str, text: str) -> None:
        """Write text like ``write_bytes``. Characters that UTF-8 cannot encode (in broken file names) are escaped."""
        self.write_bytes(file_name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, file_name: str, content: bytes) -> None:
        """Write a file atomically, with retries. Raises JobError."""
        with in_one_line(f"cannot write {self.uri}/{file_name}"):
            with_retries(lambda: self._write(posixpath.join(self.path, file_name), content))

    def _write(self, target: str, content: bytes) -> None:
        self.create_folder_of(target)
        temporary = f"{target}.{uuid4().hex}.tmp"  # nobody can put a link there before
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(content)
            self.filesystem.move(temporary, target)
        except BaseException:  # an interrupt, too
            with contextlib.suppress(*STORAGE_ERRORS):
                self.filesystem.delete_file(temporary)
            raise

    def create_folder_of(self, target: str) -> None:
        """Create the folder of a file in this folder. Raises STORAGE_ERRORS, also if a link leads out of this one."""
        folder = posixpath.dirname(target)
        self.filesystem.create_dir(folder)
        if isinstance(self.filesystem, fs.LocalFileSystem) and self.path:
            below = posixpath.relpath(folder, self.path)
            if os.path.realpath(folder) != os.path.normpath(os.path.join(os.path.realpath(self.path), below)):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder)

    def check_writable(self) -> None:
        """Check that files can be written to the parent folder. Raises JobError."""
        name = f".probe-{uuid4().hex}"  # unique, as another job may probe at the same time
        with in_one_line(f"cannot write to {self.storage_path}"):
            self.storage._write(posixpath.join(self.storage.path, name), bytes(_PROBE_BYTES))
            self.storage.delete_file(name)

    def write_files(self, contents: Mapping[str, Sequence[Any]]) -> None:
        """Write files in the given order, with retries but not atomically. Raises STORAGE_ERRORS.

        A file's content is a sequence of bytes, or of buffers with them. No link leads it out of the outer folder.
        """

        def write() -> None:
            self.storage.create_folder_of(posixpath.join(self.path, "-"))
            for file_name, pieces in contents.items():
                if isinstance(self.filesystem, fs.LocalFileSystem) and os.path.islink(f"{self.path}/{file_name}"):
                    self.delete_file(file_name)
                with self.filesystem.open_output_stream(posixpath.join(self.path, file_name)) as stream:
                    for piece in pieces:
                        stream.write(piece)

        with_retries(write)

    def delete(self) -> None:
        """Delete the folder and its content, if it exists, with retries. Raises STORAGE_ERRORS."""
        with_retries(lambda: self.filesystem.delete_dir(self.path) if self.exists() else None)

    def delete_file(self, file_name: str) -> None:
        """Delete a file. Raises STORAGE_ERRORS."""
        self.filesystem.delete_file(posixpath.join(self.path, file_name))


def locate(storage_path: str, name: str, given_as: str = "--storage-path") -> RunFolder:
    """Return the folder ``name`` under a path or URI; it need not exist. Raises UsageError for an unusable path."""
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(?!//)", storage_path):
        start = scheme[0]  # the rest may be secret
        raise UsageError(f"{start}… is neither a folder nor a URI", fix=f"write {start}//… or ./{start}…")
    try:
        if "://" in storage_path:
            filesystem, path = fs.FileSystem.from_uri(storage_path)
        else:
            storage_path = str(path_of(storage_path, given_as).absolute())
            filesystem, path = fs.LocalFileSystem(), storage_path
        run = RunFolder(name, storage_path, filesystem, posixpath.join(path, name))
        run.exists()
    except (*STORAGE_ERRORS, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"{given_as} {storage_path} cannot be used: {first_line(error)}") from error
    return run


def split_query(path: str) -> tuple[str, str]:
    """Split a URI before its ``?``, where the file system's options begin. A file's name comes before the options."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return base, mark + query


def new_name(start: str) -> str:
    """Return a new run's name: ``start``, the time, and 32 random bits, since many jobs may start in one second."""
    return f"{start}_{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(4)}"


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"checkpoint_epoch-{epoch:03d}_step-{step:06d}"


def position_of(name: str) -> tuple[int, ...]:
    """Return the epoch and step in a checkpoint's name, to sort by; for any other name, ``()``, which sorts first."""
    found = CHECKPOINT_NAME.fullmatch(name)
    return tuple(map(int, found.groups())) if found else ()


def is_foreign(path: str | Path) -> bool:
    """Return whether a local file or folder may be another user's: it, its folder, or a link that leads there.

    Folders above are not asked: on a cluster, some belong to whoever has started Ray first.
    """
    whole = Path(path).absolute()
    for place in {whole, whole.parent, whole.resolve(), whole.resolve().parent}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.lstat(place).st_uid not in (0, os.geteuid()):
                return True
    return False


def others_can_write(folder: str | Path) -> bool:
    """Return whether other users may put files into a local folder: it is foreign or missing, or its mode lets them."""
    try:
        found = os.stat(folder)
    except OSError:
        return True
    is_open_to_group = bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)
    return bool(found.st_mode & stat.S_IWOTH) or is_open_to_group or is_foreign(folder)


def _is_own_group(group_id: int) -> bool:
    """Return whether a group is root's or, as many systems give each user one, has the user's name; and no others."""
    own = {"root"}
    with contextlib.suppress(KeyError):  # a container may know no names
        own.add(pwd.getpwuid(os.geteuid()).pw_name)
        group = grp.getgrgid(group_id)
        return group.gr_name in own and own.issuperset(group.gr_mem)
    return False


def write_file(path: Path, content: bytes) -> None:
    """Write a local file atomically. Raises JobError."""
    with in_one_line(f"cannot write {path}"):
        RunFolder("", "", fs.LocalFileSystem(), "")._write(str(path.absolute()), content)
