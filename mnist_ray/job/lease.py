"""Gives a run one owner at a time: the job that owns a run keeps renewing a file next to the run (filelock's lease).

The file of a job that was killed on this machine is taken over at once; any other, once it has not changed for 25 s.
Clocks are not compared. Object stores have no such file: there, two jobs with one run do not notice each other.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pyarrow.fs import LocalFileSystem

from mnist_ray.cluster.environment import remove_sessions, sessions_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.signals import end_with
from mnist_ray.storage import RunFolder, in_one_line

if TYPE_CHECKING:
    from filelock import OwnerRecord, SoftFileLease

RENEWED_EVERY_S = 2.0
EXPIRES_AFTER_S = 25.0  # without a change


@contextlib.contextmanager
def owned(run: RunFolder, waiting: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Own a run for the duration of a context. Raises UsageError as soon as another job renews the run's file.

    If this process is silent for too long and another job takes the run over, this process exits. ``waiting`` is called
    with a message while it is unclear whether an owner is alive. At the end, if nothing failed, the files of a killed
    owner's local Ray are removed.
    """
    if not isinstance(run.filesystem, LocalFileSystem):
        yield
        return
    from filelock import Timeout

    lease = _lease_of(run)
    before, renewed = lease.owner, _renewed_at(lease)
    by = f"process {before.pid} on {_host_of(before)}" if before else "an unknown process"

    def is_alive() -> bool:
        waiting(f"checking whether {by}, which owns this run, is still alive …")
        return _renewed_at(lease) > renewed

    with in_one_line(f"cannot write to {run.storage_path}"):
        try:
            lease.acquire(EXPIRES_AFTER_S + RENEWED_EVERY_S, poll_interval=0.2, cancel_check=is_alive)
        except Timeout as error:
            found = f"run {run.uri} is in use by another job: {by}"
            raise UsageError(f"{found}; if that has exited, delete {lease.lock_file}") from error
    try:
        yield
        if before and lease.owner and before.hostname == lease.owner.hostname:
            import psutil  # takes a while

            if not psutil.pid_exists(before.pid):
                remove_sessions(sessions_of(before.pid))
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def owner_of(run: RunFolder) -> str:
    """Return the host of the job that owns a run; empty if none does, or the owner was silent for too long."""
    if isinstance(run.filesystem, LocalFileSystem):
        lease = _lease_of(run)
        if lease.owner is not None and time.time() - _renewed_at(lease) < EXPIRES_AFTER_S:
            return _host_of(lease.owner)
    return ""


def remove_dead_owner(run: RunFolder) -> None:
    """Remove the file that a killed owner of a finished run has left, since no job will own the run again."""
    if isinstance(run.filesystem, LocalFileSystem) and (lease := _lease_of(run)).owner is not None:
        from filelock import Timeout

        with contextlib.suppress(Timeout, OSError):  # the owner is alive
            lease.acquire(0)
            lease.release()


def _lease_of(run: RunFolder) -> SoftFileLease:
    from filelock import SoftFileLease  # takes a while

    return SoftFileLease(
        f"{run.storage.path}/.{run.name}.owner",
        lease_duration=EXPIRES_AFTER_S,
        heartbeat_interval=RENEWED_EVERY_S,
        on_compromise=lambda lost: end_with(JobError(f"run {run.uri} was taken over by another job")),
        thread_local=False,  # its own thread renews it
    )


def _renewed_at(lease: SoftFileLease) -> float:
    """Return the time of a lease's last renewal, by the storage's clock; 0 if there is no lease."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(lease.lock_file).st_mtime
    return 0.0


def _host_of(owner: OwnerRecord) -> str:
    return owner.hostname.partition("?")[0]  # what follows names a container
