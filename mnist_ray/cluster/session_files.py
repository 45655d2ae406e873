"""The files of a local Ray: their location and their removal."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mnist_ray.errors import JobError, UsageError, about_limit
from ray_fork.shim import own_folder

_VARIABLE = "RAY_TMPDIR"  # Ray keeps its sessions in this folder's subfolder "ray"
_MAX_FOLDER = 39  # bytes: the path of a socket may have 107


def sessions_folder() -> Path:
    """Return the folder for this user's local Rays; set RAY_TMPDIR to its parent unless the user has set it.

    By default, only this user can enter the parent: Ray lets everybody write to its sessions. Raises PermissionError.
    """
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = own_folder("mnist_ray")
    return Path(os.environ[_VARIABLE]).absolute() / "ray"


def about_folder() -> str:
    """Return advice if the path of the sessions folder may be too long for sockets."""
    is_long = len(os.fsencode(os.environ[_VARIABLE])) > _MAX_FOLDER
    return f"; set {_VARIABLE} to a folder with a shorter path" if is_long else ""


def sessions_here(folder: Path) -> set[Path]:
    """Return the sessions in ``folder`` that this process started."""
    return {*folder.glob(f"session_*_{os.getpid()}")}


def remove_sessions_of(pid: int) -> None:
    """Remove the files of the local Rays that a process had started before it was killed."""
    with contextlib.suppress(OSError):
        for session in sessions_folder().glob(f"session_*_{pid}"):
            shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def removed_unless_failed(folder: Path) -> Iterator[None]:
    """Remove the files of the local Ray that the block starts.

    Keep them if something failed: the logs are needed, and may name a limit that was reached.
    """
    before, has_failed = sessions_here(folder), False
    try:
        yield
    except Exception as error:
        has_failed = not isinstance(error, UsageError)
        if isinstance(error, JobError):
            sessions = sessions_here(folder) - before
            logs = [session / "logs" / f"{part}.err" for session in sessions for part in ("gcs_server", "raylet")]
            limits = {about_limit(log.read_text(errors="replace")): None for log in logs if log.exists()}
            error.hints += "".join(f"; {limit}" for limit in limits if limit)
        raise
    finally:
        for session in set() if has_failed else sessions_here(folder) - before:
            shutil.rmtree(session, ignore_errors=True)
            latest = folder / "session_latest"  # Ray creates this link, but never replaces a dangling one
            with contextlib.suppress(OSError):  # the link is missing, or another Ray has replaced it
                if os.readlink(latest) == str(session):
                    latest.unlink()
