"""Finds a run by its name, and the run's workload. Imports neither torch nor Ray, to report wrong flags at once."""

from __future__ import annotations

import contextlib

from mnist_ray.errors import JobError, UsageError, command, first_line
from mnist_ray.storage import CONFIG_FILE, STORAGE_ERRORS, RunFolder, locate, split_query, untrusted_folders
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload

_A_RUN = "the run in"


def find_run(given: str | None, storage_path: str) -> RunFolder:
    """Return the folder of a path, a URI or a run's name; it need not exist. For None, return the newest run.

    A name is that of a run in the storage or, if there is none, of a folder here. Raises UsageError if there is no run,
    or the URI is wrong.
    """
    if given is None:
        try:
            return _newest_run(locate(storage_path, ""))
        except STORAGE_ERRORS as error:
            raise UsageError(f"--storage-path {storage_path} cannot be read: {first_line(error)}") from error
    if not given.strip():
        raise UsageError("the run's name is empty; give a name, or leave the flag out")
    if "/" in given:
        base, query = split_query(given)
        parent, _, name = base.rstrip("/").rpartition("/")
        return locate((parent or "/") + query, name, _A_RUN)
    run, here = locate(storage_path, given), locate(".", given, _A_RUN)
    return here if here.exists() and not run.exists() else run


def _newest_run(storage: RunFolder) -> RunFolder:
    """Return the run with a checkpoint whose settings were written last."""
    folders = [locate(storage.storage_path, name) for name in storage.subfolders()]
    runs = [run for run in folders if run.exists(CONFIG_FILE) and run.checkpoint_names()]
    if not runs:
        raise UsageError(f"no run in {storage.storage_path} has a checkpoint to use; {command('train')} makes one")
    return max(runs, key=lambda run: run.info(CONFIG_FILE).mtime_ns or 0)


def class_of(run: RunFolder, storage_path: str) -> type[Workload]:
    """Return the workload of a run, or of the run that contains a checkpoint. Raises UsageError like ``load_again``."""
    untrusted = untrusted_folders(run, storage_path)
    for folder in (run, run.storage):
        with contextlib.suppress(JobError):  # if the storage fails, reading the checkpoint reports it
            reference = (folder.read_json(CONFIG_FILE) or {}).get("workload")
            if reference is not None:
                return loading.load_again(reference, None, folder.inside(CONFIG_FILE).uri, untrusted)
    return loading.load(loading.DEFAULT)
