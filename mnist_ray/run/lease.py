"""One owner of a run at a time, on any storage: a file beside the run that its owner renews while it lives.

On a local disk or NFS, the file's exclusive creation decides between jobs that start at once. Object stores have none:
there a job writes the file, waits a second, and owns the run if the file is still its own. The file of an owner that
has died is replaced: on the same machine its process is looked for, elsewhere the file has to change every few seconds.
Clocks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pyarrow import fs

from mnist_ray.errors import JobError, UsageError
from mnist_ray.signals import end_with
from mnist_ray.storage import STORAGE_ERRORS, DamagedFileError, RunFolder

RENEWED_EVERY_S = 5.0
EXPIRES_AFTER_S = 25.0  # without a change
SETTLES_WITHIN_S = 1.0  # on an object store
_LOOK_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Owner:
    """What the job that owns a run says of itself."""

    host: str
    machine: str  # this boot of the machine, and its set of process ids: who has the same can see the process
    pid: int
    started: float  # when the process began, in seconds since 1970 of its machine
    renewed: int = 0  # how many times

    @property
    def is_here(self) -> bool:
        """Whether its process can be seen from here."""
        return self.machine == _machine() != ""

    @property
    def is_known_dead(self) -> bool:
        """Whether its process would be seen here, and is not there."""
        try:
            process = psutil.Process(self.pid) if self.is_here else None
            is_zombie = process and process.status() == psutil.STATUS_ZOMBIE  # it has died, and nobody asked how
            return bool(process and (is_zombie or abs(process.create_time() - self.started) > 1))
        except psutil.NoSuchProcess:
            return True

    def is_same(self, other: Owner) -> bool:
        """Whether both are the same process."""
        return replace(self, renewed=0) == replace(other, renewed=0)


_UNKNOWN = Owner("a machine that cannot be told", "", 0, 0.0)
"""Stands for a file that names no owner: one that does not change is replaced like that of a dead owner."""


def this_process() -> Owner:
    """Return what this process says of itself."""
    process = psutil.Process()
    return Owner(socket.gethostname(), _machine(), process.pid, process.create_time())


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def file_of(run: RunFolder) -> str:
    """Return the name of the file, which lies beside the run's folder."""
    return f".{run.name}.owner"


@contextlib.contextmanager
def owned(
    run: RunFolder,
    check_free: Callable[[], None] = lambda: None,
    waiting: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Own a run meanwhile. Raises UsageError if another job does, and what ``check_free`` raises once it is owned.

    If this process was not heard of for so long that another has taken the run over, it ends. ``waiting`` is given what
    is waited for: whether an owner on another machine lives.
    """
    owner, is_over = this_process(), threading.Event()
    _wait_until_free(run, waiting)
    _write_first(run, owner)
    try:
        check_free()
        threading.Thread(target=_renew, args=(run, owner, is_over), daemon=True).start()
        yield
    finally:
        is_over.set()
        with contextlib.suppress(JobError, *STORAGE_ERRORS):
            if _read(run)[1].is_same(owner):
                run.storage.delete_file(file_of(run))


def _wait_until_free(run: RunFolder, waiting: Callable[[str], None]) -> None:
    """Remove the file of a dead owner, or of one that is silent for long. Raises UsageError if the owner lives."""
    first, since = _read(run)[0], time.monotonic()
    while True:
        text, owner = _read(run)
        if text is None:
            return
        if owner.is_known_dead or (text == first and time.monotonic() - since > EXPIRES_AFTER_S):
            with contextlib.suppress(*STORAGE_ERRORS):  # another job may have done it
                run.storage.delete_file(file_of(run))
            return
        if owner.is_here or text != first:
            raise _in_use(run, owner)
        waiting(f"seeing whether the job on {owner.host} that had this run is alive …")
        time.sleep(_LOOK_INTERVAL_S)


def _write_first(run: RunFolder, owner: Owner) -> None:
    """Write the file. Raises UsageError if another job has done so at the same time."""
    if isinstance(run.filesystem, fs.LocalFileSystem):
        try:
            with open(f"{run.storage.path}/{file_of(run)}", "x", encoding="utf-8") as file:
                json.dump(asdict(owner), file)
        except FileExistsError:
            raise _in_use(run, _read(run)[1]) from None
    else:
        _write(run, owner)
        time.sleep(SETTLES_WITHIN_S)
        if not (other := _read(run)[1]).is_same(owner):
            raise _in_use(run, other)


def _in_use(run: RunFolder, owner: Owner) -> UsageError:
    where = "this machine" if owner.is_here else owner.host
    return UsageError(f"run {run.uri} is in use by another job: process {owner.pid} on {where}")


def _write(run: RunFolder, owner: Owner) -> None:
    run.storage.write_text(file_of(run), json.dumps(asdict(owner)))


def _read(run: RunFolder) -> tuple[str | None, Owner]:
    """Return what the file holds, None if there is none, and whom it names."""
    text: str | None = ""
    try:
        text = run.storage.read_text(file_of(run))
        owner = Owner(**json.loads(text or ""))
    except (DamagedFileError, ValueError, TypeError, RecursionError):
        return text, _UNKNOWN
    is_whole = [type(value) for value in vars(owner).values()] == [type(value) for value in vars(_UNKNOWN).values()]
    return text, owner if is_whole and 0 < owner.pid < 2**31 else _UNKNOWN


def _renew(run: RunFolder, owner: Owner, is_over: threading.Event) -> None:
    number = 0
    while not is_over.wait(RENEWED_EVERY_S):
        number += 1
        try:
            other = _read(run)[1]
            if other != _UNKNOWN and not other.is_same(owner):
                end_with(JobError(f"run {run.uri} was taken over by process {other.pid} on {other.host}"))
                return
            _write(run, replace(owner, renewed=number))
        except (JobError, *STORAGE_ERRORS):
            continue  # of storage; what else writes there will say so
