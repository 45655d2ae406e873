"""Finds runs in the storage, and the folders whose code may come from somebody else."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from mnist_ray.errors import UsageError, first_line
from mnist_ray.schema import CONFIG_FILE, MEMBERS_FOLDER, RESULT_FILE
from mnist_ray.settings import path_of
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, locate, split_query
from mnist_ray.text import command


def find_run(place: str | None, storage_path: str) -> RunFolder:
    """Return the folder of a path, a URI or a run's name; it need not exist. For None, return the newest run.

    A name means a run in the storage or, if there is none, a folder here. Raises UsageError if there is no run,
    or the URI is wrong.
    """
    if place is None:
        try:
            return _newest_run(locate(storage_path, ""))
        except STORAGE_ERRORS as error:
            raise UsageError(f"--storage-path {storage_path} cannot be read: {first_line(error)}") from error
    if not place.strip():
        raise UsageError("the run's name is empty", fix="give a name, or remove the flag")
    place = os.path.abspath(place) if place in (".", "..") else place
    if "/" in place:
        base, query = split_query(place)
        parent, _, name = base.rstrip("/").rpartition("/")
        return locate((parent or ("/" if base.startswith("/") else ".")) + query, name, "the run in")
    run, here = locate(storage_path, place), locate(".", place, "the run in")
    return here if here.exists() and not run.exists() else run


def _newest_run(storage: RunFolder) -> RunFolder:
    """Return the run that was begun last, of those that have a checkpoint or, as a job of several runs, a result."""
    runs = []
    for run in (locate(storage.storage_path, name) for name in storage.subfolders()):
        with contextlib.suppress(PermissionError):  # another user's
            if run.exists(CONFIG_FILE) and (run.checkpoint_names() or run.exists(RESULT_FILE)):
                runs.append(run)
    if not runs:
        raise UsageError(f"no run in {storage.storage_path} has a checkpoint to use; {command('train')} makes one")
    return max(runs, key=lambda run: run.info(CONFIG_FILE).mtime_ns or 0)


def untrusted_folders(run: RunFolder, storage_path: str, *, is_run: bool = True) -> list[Path]:
    """Return the local folders whose code may come from somebody else: the run's, that around it, the storage path.

    ``run`` may also be the folder of a checkpoint, or of a run within a sweep or a job of several runs. If it may be
    another folder, as that of a settings file, the folder around it is left out.
    """
    outermost = run
    while (above := _run_around(outermost)) is not None:
        outermost = above
    is_local = isinstance(run.filesystem, fs.LocalFileSystem)
    own = [Path(outermost.path), *[Path(outermost.storage.path)] * is_run] if is_local else []
    return own if "://" in storage_path else [*own, path_of(storage_path, "--storage-path")]


def _run_around(run: RunFolder) -> RunFolder | None:
    """Return the run in whose folder this one is, if there is one."""
    above = run.storage
    if posixpath.basename(above.path) == MEMBERS_FOLDER:
        above = above.storage
    return above if above.exists(CONFIG_FILE) and above.path != run.path else None


def is_sweep(config: Mapping[str, Any]) -> bool:
    """Return whether the content of a run's config.json is that of a sweep."""
    return "num_trials" in config
