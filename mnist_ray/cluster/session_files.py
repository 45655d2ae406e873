"""The files of a local Ray: where they are, and when they are removed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mnist_ray.errors import JobError, UsageError, about_limit
from ray_fork.shim import own_folder

_VARIABLE = "RAY_TMPDIR"  # the folder in whose folder "ray" Ray keeps its sessions
_MAX_FOLDER = 39  # bytes: the paths of Ray's sockets are at most 107 long


def sessions_folder() -> Path:
    """Return the folder of this user's local Rays; set RAY_TMPDIR for them, unless the user has.

    By default, it is in a folder of this user's own: Ray lets everybody write to its sessions. Raises PermissionError.
    """
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = own_folder("mnist_ray")
    return Path(os.environ[_VARIABLE]).absolute() / "ray"


def about_folder() -> str:
    """Return advice if the path of the sessions' folder may be too long for sockets."""
    is_long = len(os.fsencode(os.environ[_VARIABLE])) > _MAX_FOLDER
    return f"; set {_VARIABLE} to a folder with a shorter path" if is_long else ""


def sessions_here(folder: Path) -> set[Path]:
    """Return the sessions in a folder that this process has started."""
    return {*folder.glob(f"session_*_{os.getpid()}")}


@contextlib.contextmanager
def removed_unless_failed(folder: Path) -> Iterator[None]:
    """Remove the files of the local Ray that is started in the block.

    They stay if something failed: logs are needed, and may tell a limit that was reached.
    """
    before, has_failed = sessions_here(folder), False
    try:
        yield
    except Exception as error:
        has_failed = not isinstance(error, UsageError)
        if isinstance(error, JobError):
            logs = [session / "logs" / "raylet.err" for session in sessions_here(folder) - before]
            limits = [about_limit(log.read_text(errors="replace")) for log in logs if log.exists()]
            error.hints += "".join(f"; {limit}" for limit in limits if limit)
        raise
    finally:
        for session in set() if has_failed else sessions_here(folder) - before:
            shutil.rmtree(session, ignore_errors=True)
            latest = folder / "session_latest"  # Ray makes this link, but never replaces a dangling one
            with contextlib.suppress(OSError):  # the link is missing, or another Ray has replaced it
                if os.readlink(latest) == str(session):
                    latest.unlink()
