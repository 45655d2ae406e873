"""One owner of a run at a time, on any storage: a lease, renewed while its owner lives.

Who wants a run puts a claim of its own beside it, and then looks at all claims: it holds the run where there is no
other. Of two that want it at the same time each sees the other; the one whose name sorts first waits for the other to
withdraw. That takes of the storage no more than that a file that was written is listed from then on, which local disks,
NFS and object stores all do. An owner that has died leaves its claim behind: on the same machine its process is looked
for, elsewhere its claim has to change every few seconds; clocks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
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

FOLDER = ".owners"
RENEWED_EVERY_S = 5.0
EXPIRES_AFTER_S = 25.0  # of watching a claim that does not change
_LOOK_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Claim:
    """What a job says of itself."""

    host: str
    machine: str
    """This boot of the machine, and its set of process ids: who has the same can see the process."""
    pid: int
    started: float
    """When the process began, in seconds since 1970 of its machine."""
    holds: bool = False
    """Whether it has the run, or only wants it."""
    renewed: int = 0
    """How many times."""

    @classmethod
    def own(cls) -> Claim:
        """Return that of this process."""
        process = psutil.Process()
        return cls(socket.gethostname(), _machine(), process.pid, process.create_time())

    @property
    def is_known_dead(self) -> bool:
        """Whether its process would be seen here, and is not there."""
        if self.machine != _machine() or not self.machine:
            return False
        try:
            process = psutil.Process(self.pid)
            is_zombie = process.status() == psutil.STATUS_ZOMBIE  # what has died, and nobody asked how
            return is_zombie or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


_NOBODY = Claim("a machine that cannot be told", "", 0, 0.0)
"""Stands for a file that holds no claim: one that does not change is removed like that of a dead owner."""


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


class _Claims:
    """The claims to one run, a file each; one is this process's own."""

    def __init__(self, run: RunFolder) -> None:
        self._folder = run.storage.inside(FOLDER)
        self._prefix = f"{run.name}~"
        self._name = f"{self._prefix}{secrets.token_hex(8)}"
        self._seen: dict[str, tuple[str, float, bool]] = {}
        """Each other's text, since when it is that, and whether it was another before."""

    def put(self, claim: Claim) -> None:
        """Write the own claim. Raises JobError."""
        self._folder.write_text(self._name, json.dumps(asdict(claim)))

    def withdraw(self) -> None:
        """Remove the own claim, as far as the storage lets, and on a disk the folder where it was the last."""
        with contextlib.suppress(*STORAGE_ERRORS):
            self._folder.delete_file(self._name)
            if isinstance(self._folder.filesystem, fs.LocalFileSystem):
                os.rmdir(self._folder.path)  # fails where another has put a claim meanwhile

    def others(self) -> dict[str, Claim]:
        """Return the others' claims, by their names, but those of the dead, which are removed."""
        alive = {}
        for name in self._folder.files():
            if not name.startswith(self._prefix) or name.endswith(".tmp") or name == self._name:
                continue
            try:
                text = self._folder.read_text(name)
            except DamagedFileError:
                text = ""
            except JobError:
                if self._folder.exists(name):
                    raise
                continue  # withdrawn just now
            if text is None:
                continue
            known = self._seen.get(name)
            if known is None or known[0] != text:
                self._seen[name] = text, time.monotonic(), known is not None
            claim = _parsed(text)
            silent_s = time.monotonic() - self._seen[name][1]
            if (claim is not None and claim.is_known_dead) or silent_s > EXPIRES_AFTER_S:
                with contextlib.suppress(*STORAGE_ERRORS):
                    self._folder.delete_file(name)
            else:
                alive[name] = claim or _NOBODY
        return alive

    def goes_before(self, name: str) -> bool:
        """Tell whether of two that want the run at once this one goes on."""
        return self._name < name

    def has_moved(self, name: str) -> bool:
        """Tell whether another's claim has changed since it was first seen: its owner lives."""
        return self._seen[name][2]


def _parsed(text: str) -> Claim | None:
    try:
        claim = Claim(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    is_whole = [type(value) for value in vars(claim).values()] == [type(value) for value in vars(_NOBODY).values()]
    return claim if is_whole and 0 < claim.pid < 2**31 else None


@contextlib.contextmanager
def owned(
    run: RunFolder,
    check_free: Callable[[], None] = lambda: None,
    waiting: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Own a run meanwhile. Raises UsageError where another job does, and what ``check_free`` raises once it is owned.

    Where this process was not heard of for so long that another has taken the run over, it ends. ``waiting`` is told
    what is waited for: whether an owner on another machine lives.
    """
    claims, claim, is_over = _Claims(run), Claim.own(), threading.Event()
    try:
        claims.put(claim)
        _acquire(run, claims, claim, waiting)
        claims.put(replace(claim, holds=True))
        check_free()
        threading.Thread(target=_renew, args=(run, claims, claim, is_over), daemon=True).start()
        yield
    finally:
        is_over.set()
        claims.withdraw()


def _acquire(run: RunFolder, claims: _Claims, claim: Claim, waiting: Callable[[str], None]) -> None:
    """Wait until there is no other claim. Raises UsageError where another job has the run, or goes first."""
    start, renewed = time.monotonic(), 0
    while others := claims.others():
        for name, other in others.items():
            is_here = other.machine == _machine() != ""
            if (is_here or claims.has_moved(name)) and (other.holds or not claims.goes_before(name)):
                where = "this machine" if is_here else other.host
                raise UsageError(f"run {run.uri} is in use by another job: process {other.pid} on {where}")
            if not is_here:
                waiting(f"seeing whether the job on {other.host} that had this run is alive …")
        time.sleep(_LOOK_INTERVAL_S)
        if time.monotonic() - start > (renewed + 1) * RENEWED_EVERY_S:  # others wait to see whether this one is alive
            renewed += 1
            claims.put(replace(claim, renewed=renewed))


def _renew(run: RunFolder, claims: _Claims, claim: Claim, is_over: threading.Event) -> None:
    number = 0
    while not is_over.wait(RENEWED_EVERY_S):
        number += 1
        try:
            holder = next((other for other in claims.others().values() if other.holds), None)
            if holder is not None:
                end_with(JobError(f"run {run.uri} was taken over by process {holder.pid} on {holder.host}"))
                return
            claims.put(replace(claim, holds=True, renewed=number))
        except (JobError, *STORAGE_ERRORS):
            continue  # of storage; what else writes there will say so
