"""Finding a run by its name, its checkpoint, and its workload. Light: it runs before a wrong flag is answered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from mnist_ray.errors import JobError, UsageError, command, first_line
from mnist_ray.storage import CONFIG_FILE, STORAGE_ERRORS, RunFolder, locate, split_query, untrusted_folders
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload

_A_RUN = "the run in"
IsWanted = Callable[[RunFolder], bool]


def find_run(given: str | None, storage_path: str, is_wanted: IsWanted = lambda run: True) -> RunFolder:
    """Return the folder that a path, a URI or a run's name stands for, which need not exist.

    Of None, the newest run for which ``is_wanted`` holds. Raises UsageError if there is no run, or the URI is bad.
    """
    if given is None:
        try:
            return _newest_run(locate(storage_path, ""), is_wanted)
        except STORAGE_ERRORS as error:
            raise UsageError(f"--storage-path {storage_path} cannot be read: {first_line(error)}") from error
    if not given.strip():
        raise UsageError("the run's name is empty; leave it out for the newest")
    if "/" in given:
        base, query = split_query(given)
        parent, _, name = base.rstrip("/").rpartition("/")
        return locate((parent or "/") + query, name, _A_RUN)
    here = locate(".", given, _A_RUN)
    return here if here.exists() else locate(storage_path, given)


def _newest_run(storage: RunFolder, is_wanted: IsWanted) -> RunFolder:
    """Return the run with a checkpoint whose settings were written last, of those that are wanted."""
    runs = [locate(storage.storage_path, name) for name in storage.subfolders()]
    for run in sorted(runs, key=lambda run: run.modified_ns(CONFIG_FILE), reverse=True):
        if run.exists(CONFIG_FILE) and run.checkpoint_names() and is_wanted(run):
            return run
    raise UsageError(f"no run in {storage.storage_path} has a checkpoint to use; {command('train')} makes one")


def class_of(run: RunFolder, storage_path: str) -> type[Workload]:
    """Return the workload of a run, or of the run that a checkpoint lies in. Raises UsageError as ``load_again``."""
    untrusted = untrusted_folders(run, storage_path)
    for folder in (run, run.storage):
        with contextlib.suppress(JobError):  # the checkpoint says it too
            reference = (folder.read_json(CONFIG_FILE) or {}).get("workload")
            if reference is not None:
                return loading.load_again(reference, None, folder.inside(CONFIG_FILE).uri, untrusted)
    return loading.load(loading.DEFAULT)
