"""Finding a run's checkpoint, and the workload that it is of."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

from mnist_ray.cluster.connect import quiet_ray
from mnist_ray.errors import JobError, UsageError, first_line, in_words
from mnist_ray.run.lookup import find_run
from mnist_ray.settings import build, check_known, names_of, values_of
from mnist_ray.storage import CONFIG_FILE, RESULT_FILE, STORAGE_ERRORS, RunFolder, position_of, untrusted_folders
from mnist_ray.training.checkpoint import STATE_FILE, load_model, read_state
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload


@dataclass(frozen=True)
class Found:
    """A checkpoint with the workload that it is of."""

    checkpoint: RunFolder
    document: Mapping[str, Any]  # its state.json
    workload: Workload
    notes: tuple[str, ...]  # what the user is to know

    @property
    def description(self) -> str:
        """What it was trained on, as people read it."""
        defaults = values_of(self.workload.Settings())
        own = values_of(self.workload.settings).items()
        chosen = [f", {in_words(name)} {value}" for name, value in own if value != defaults[name]]
        return type(self.workload).__name__ + "".join(chosen)

    def load_model(self) -> Any:
        """Return its model, in evaluation mode. Raises JobError if it is damaged."""
        return load_model(self.checkpoint, self.workload)


def find(
    given: str | None,
    storage_path: str,
    reference: loading.Reference | None = None,
    changes: Mapping[str, Any] | None = None,
    is_wanted: Callable[[RunFolder], bool] = lambda run: True,
) -> Found:
    """Return the checkpoint that a path, a URI or a run's name stands for; of None, that of the newest wanted run.

    ``reference``: where to load the workload's code from, if it has moved. ``changes``: settings to override. Raises
    UsageError if there is none, JobError if it is damaged.
    """
    quiet_ray()  # it tells of each list of checkpoints that it reads
    run, notes = find_run(given, storage_path, is_wanted), list[str]()
    try:
        checkpoint = _checkpoint_of(run, given, notes)
    except STORAGE_ERRORS as error:
        raise JobError(f"cannot read {run.uri}: {first_line(error)}") from error
    document = read_state(checkpoint)
    workload = _workload_of(document, reference, changes or {}, untrusted_folders(run, storage_path))
    if document["workload"]["sha256"] not in ("", workload.source.sha256):
        notes.append(f"the workload has changed since the checkpoint was made: {workload.source.reference}")
    return Found(checkpoint, document, workload, tuple(notes))


def _workload_of(
    document: dict[str, Any], reference: loading.Reference | None, changes: Mapping[str, Any], untrusted: Iterable[Path]
) -> Workload:
    """Return the workload of a checkpoint, whose state.json is ``document``.

    ``reference``: where to load the code from, if it has moved; ``changes``: settings to override. Raises UsageError if
    the code cannot be loaded, lies in one of the ``untrusted`` folders, or has no such settings any more.
    """
    saved = document["workload"]
    named = f"the checkpoint of {saved['reference']}"
    workload_class = loading.load_again(saved["reference"], reference, named, untrusted)
    settings_class = workload_class.Settings
    check_known(saved["settings"], names_of([settings_class]), named)
    return workload_class(build(settings_class, {**saved["settings"], **changes}), saved["metadata"])


def _checkpoint_of(run: RunFolder, given: str | None, notes: list[str]) -> RunFolder:
    """Return a folder's checkpoint: itself, or the run's choice; ``notes`` get what the user is to know of it.

    A finished run has chosen by its result; of an interrupted one it is the best so far by validation, else the last.
    """
    if run.exists(STATE_FILE):
        return run
    result = run.read_json(RESULT_FILE, notes.append)
    if result is not None:
        chosen = run.inside(result["checkpoint"])
        if not chosen.exists(STATE_FILE):
            raise UsageError(f"run {run.uri} has lost its checkpoint {chosen.name}")
        return chosen
    names = run.checkpoint_names()
    if not names and run.exists(CONFIG_FILE):
        raise UsageError(f"run {run.uri} has no checkpoint yet")
    if not names:
        raise UsageError(f"{given} is neither a checkpoint nor a run that holds one: {run.uri}")
    known = snapshot_of(run)
    if known is None or known.checkpoint is None:  # a kill has cut off Ray's list, or come before it
        return run.inside(names[-1])
    return folder_of(best_of(known)[0])


def snapshot_of(run: RunFolder) -> ray.train.Result | None:
    """Return what Ray's list of a run's checkpoints says; None if there is none, or it is damaged.

    Raises what the file system does.
    """
    try:
        result = ray.train.Result.from_path(run.path, storage_filesystem=run.filesystem)
        is_whole = all(position_of(folder_of(checkpoint).name) for checkpoint, _ in result.best_checkpoints)
        math.fsum(metrics["val_score"] for _, metrics in result.best_checkpoints if "val_loss" in metrics)
    except STORAGE_ERRORS:
        raise
    except Exception:  # Ray takes the list for what it has written; what is another can fail anywhere
        return None
    return result if is_whole else None


def best_of(result: ray.train.Result, damaged: Container[str] = ()) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint with the best validation, of two that tie the one of less loss, and its metrics.

    If none was validated, the last. ``damaged`` names checkpoints that Ray knows still, and are not to be taken.
    """
    whole = [pair for pair in result.best_checkpoints if folder_of(pair[0]).name not in damaged]
    validated = [pair for pair in whole if "val_loss" in pair[1]]
    if not validated:
        return result.checkpoint, result.metrics
    best: tuple[Checkpoint, dict[str, Any]] = max(validated, key=lambda pair: pair[1]["val_score"])
    return best


def folder_of(checkpoint: Checkpoint) -> RunFolder:
    """Return the folder of a checkpoint that Ray Train knows."""
    storage_path, name = posixpath.split(checkpoint.path.rstrip("/"))
    return RunFolder(name, storage_path, checkpoint.filesystem, posixpath.join(storage_path, name))
