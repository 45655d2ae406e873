"""Gives a run one owner at a time, on any storage: a job that owns a run keeps renewing a file next to the run.

If jobs write the file at the same moment, the last one owns the run; the others notice within a second, while Ray is
still starting, and exit. The file of a dead owner is replaced. An owner on this machine is dead if its process is gone;
an owner on another machine is dead if the file no longer changes. Clocks are not compared: the time in the file only
makes it change.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mnist_ray.cluster.session_files import remove_sessions_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.signals import end_with
from mnist_ray.storage import STORAGE_ERRORS, RunFolder

RENEWED_EVERY_S = 5.0
EXPIRES_AFTER_S = 25.0  # without a change
CHECKED_AFTER_S = 1.0  # for another job that has written the file at the same moment
_LOOK_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Owner:
    """The process that owns a run."""

    host: str
    machine: str  # ids of the machine's boot and of its pid namespace; empty if unknown
    pid: int
    ticks: int  # of its machine's clock, from the boot to the process's start; independent of the time of day

    @property
    def is_here(self) -> bool:
        """Whether the owner's process, if alive, is visible to this process."""
        return self.machine == _machine() != ""

    @property
    def has_died(self) -> bool:
        """Whether the owner's process has died; valid only if the owner ``is_here``."""
        return ticks_at_start(self.pid) != self.ticks  # another process may have its id by now


def this_process() -> Owner:
    """Return this process as an owner."""
    return Owner(socket.gethostname(), _machine(), os.getpid(), ticks_at_start(os.getpid()))


def ticks_at_start(pid: int) -> int:
    """Return the clock ticks from the boot to a process's start; -1 if the process has exited, or without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return -1
    state, *numbers = text.rpartition(")")[2].split()  # after the program's name; see proc(5)
    return -1 if state == "Z" else int(numbers[18])


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def file_of(run: RunFolder) -> str:
    """Return the name of the owner's file, which is next to the run's folder."""
    return f".{run.name}.owner"


def owner_of(run: RunFolder) -> str:
    """Return the host of the job that owns a run; empty if none does, or the owner was silent for too long."""
    _, owner = _read(run)
    if owner is None or (owner.is_here and owner.has_died):
        return ""
    written_ns = run.storage.info(file_of(run)).mtime_ns or 0
    is_alive = owner.is_here or time.time() - written_ns / 1e9 < EXPIRES_AFTER_S
    return owner.host if is_alive else ""


@contextlib.contextmanager
def owned(run: RunFolder, waiting: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Own a run for the duration of a context. Raises UsageError if another job owns the run.

    If this process is silent for too long and another job takes the run over, this process exits. ``waiting`` is called
    with a message while it is unclear whether an owner on another machine is alive. At the end, if nothing failed,
    the files of a killed owner's local Ray are removed.
    """
    me, is_over = this_process(), threading.Event()
    renewing = threading.Thread(target=_renew, args=(run, me, is_over), daemon=True)
    killed = _wait_until_free(run, waiting)
    try:
        run.storage.write_text(file_of(run), _text_of(me))
        renewing.start()
        yield
        if killed is not None and ticks_at_start(killed.pid) == -1:  # no other process has its id
            remove_sessions_of(killed.pid)
    finally:
        is_over.set()
        if renewing.is_alive():
            renewing.join()  # else it could write the file after this deletes it
        with contextlib.suppress(JobError, *STORAGE_ERRORS):
            if _read(run)[1] == me:
                run.storage.delete_file(file_of(run))


def remove_dead_owner(run: RunFolder) -> None:
    """Remove what the killed owner of a finished run has left, since no job will own the run again."""
    with contextlib.suppress(JobError, *STORAGE_ERRORS):
        _, owner = _read(run)
        if owner is not None and owner.is_here and owner.has_died:
            run.storage.delete_file(file_of(run))


def _wait_until_free(run: RunFolder, waiting: Callable[[str], None]) -> Owner | None:
    """Wait until the owner, if any, has died or was silent for too long; return one that has died on this machine.

    Raises UsageError if it is alive.
    """
    first, since = _read(run)[0], time.monotonic()
    while True:
        text, owner = _read(run)
        if text is None:
            return None
        # This process may still own it if the storage failed when an earlier call ended.
        has_died = owner is not None and owner.is_here and (owner.has_died or owner == this_process())
        if has_died or (text == first and time.monotonic() - since > EXPIRES_AFTER_S):
            return owner if has_died else None
        if text != first or (owner and owner.is_here):
            by = f": process {owner.pid} on {'this machine' if owner.is_here else owner.host}" if owner else ""
            raise UsageError(f"run {run.uri} is in use by another job{by}")
        waiting(f"checking whether the job{f' on {owner.host}' if owner else ''} that owned this run is still alive …")
        time.sleep(_LOOK_INTERVAL_S)


def _text_of(owner: Owner) -> str:
    return json.dumps({**asdict(owner), "renewed": time.time()})


def _read(run: RunFolder) -> tuple[str | None, Owner | None]:
    """Return the file's text and its owner: both None if there is no file, the owner None if the file names none."""
    text: str | None = ""
    try:
        text = run.storage.read_text(file_of(run))
        lease = json.loads(text or "")
        return text, Owner(str(lease["host"]), str(lease["machine"]), int(lease["pid"]), int(lease["ticks"]))
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return text, None


def _renew(run: RunFolder, me: Owner, is_over: threading.Event) -> None:
    renewed, wait_s = time.time(), CHECKED_AFTER_S
    while not is_over.wait(wait_s):
        wait_s = RENEWED_EVERY_S
        with contextlib.suppress(JobError, *STORAGE_ERRORS):  # if the storage does not answer, try again later
            text, other = _read(run)
            was_silent = time.time() - renewed > EXPIRES_AFTER_S
            if other not in (None, me) or (text is None and was_silent):
                by = f"process {other.pid} on {other.host}" if other else "a job that has exited"
                end_with(JobError(f"run {run.uri} was taken over by {by}"))
                return
            run.storage.write_text(file_of(run), _text_of(me))
            renewed = time.time()
