"""Finds a run's checkpoint and the checkpoint's workload, and reads the weights that a run starts from."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Container, Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import ray.train
from ray.train import Checkpoint
from safetensors.torch import save

from mnist_ray.cluster.connect import quiet_ray
from mnist_ray.errors import UsageError
from mnist_ray.run.job import Job
from mnist_ray.settings import build, check_known, names_of
from mnist_ray.storage import (
    RESULT_FILE,
    STORAGE_ERRORS,
    RunFolder,
    find_run,
    in_one_line,
    position_of,
    untrusted_folders,
)
from mnist_ray.training.checkpoint import STATE_FILE, load_fitting, load_model, read_state, read_weights
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload


@dataclass(frozen=True)
class Found:
    """A checkpoint with its workload."""

    checkpoint: RunFolder
    workload: Workload
    notes: tuple[str, ...]  # for the user

    def load_model(self) -> Any:
        """Return the checkpoint's model, in evaluation mode. Raises JobError if the checkpoint is damaged."""
        return load_model(self.checkpoint, self.workload)


def find(
    given: str | None,
    storage_path: str,
    reference: loading.Reference | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Found:
    """Return the checkpoint for a path, a URI or a run's name; for None, the checkpoint of the newest run.

    ``reference``: the workload's code, if it has moved. ``changes``: settings to override. Raises UsageError if there
    is no checkpoint, or the workload cannot be loaded or trusted; JobError if the checkpoint is damaged.
    """
    run, notes = find_run(given, storage_path), list[str]()
    with in_one_line(f"cannot read {run.uri}"):
        checkpoint = _checkpoint_of(run, notes)
    saved = read_state(checkpoint)["workload"]
    place = f"the checkpoint of {saved['reference']}"
    workload_class = loading.load_again(saved["reference"], reference, place, untrusted_folders(run, storage_path))
    if saved["sha256"] not in ("", workload_class.source.sha256):
        notes.append(f"the workload has changed since the checkpoint was made: {workload_class.source.reference}")
    check_known(saved["settings"], names_of([workload_class.Settings]), place)
    settings: Any = build(workload_class.Settings, {**saved["settings"], **(changes or {})})
    return Found(checkpoint, workload_class(settings, saved["metadata"]), tuple(notes))


def read_initial(job: Job) -> tuple[bytes, str]:
    """Return the weights of ``--init-from`` as the content of INITIAL_FILE, and a line about them for the user.

    No code of the run that they come from is loaded. Raises UsageError and JobError.
    """
    model = job.workload.create_model()
    with in_one_line("cannot read the weights of --init-from"):
        place = find_run(job.asked["init_from"], job.run.storage_path)
        place = place if place.info().is_file else _checkpoint_of(place, [])
    weights = read_weights(place)
    lacking, own = load_fitting(model, weights), model.state_dict()
    if len(lacking) == len(own):
        names = " against ".join(shorten(", ".join(names), 100) for names in (weights, own))
        raise UsageError(f"--init-from {place.uri}: nothing fits the model by name and shape: {names}")
    fits = f"{place.uri}: {len(own) - len(lacking)} of the model's {len(own)} tensors"
    others = ", ".join(name + " (of another shape)" * (name in weights) for name in lacking)
    return save(weights), f"{fits}; not {shorten(others, 200)}" if others else fits


def _checkpoint_of(run: RunFolder, notes: list[str]) -> RunFolder:
    """Return ``run`` if it is a checkpoint; else its result's checkpoint, else the best validated, else the last.

    Notes for the user are added to ``notes``.
    """
    quiet_ray()  # Ray logs each list of checkpoints that it reads
    if run.exists(STATE_FILE):
        return run
    result = run.read_json(RESULT_FILE, notes.append)
    if result is not None:
        chosen = run.inside(result["checkpoint"])
        if not chosen.exists(STATE_FILE):
            raise UsageError(f"run {run.uri} has lost its checkpoint {chosen.name}")
        return chosen
    names = run.checkpoint_names()
    if not names:
        raise UsageError(f"{run.uri} is neither a checkpoint nor a run with a checkpoint")
    known = snapshot_of(run)
    if known is None or known.checkpoint is None:  # the run was killed before or while Ray wrote its list
        return run.inside(names[-1])
    return folder_of(best_of(known)[0])


def snapshot_of(run: RunFolder) -> ray.train.Result | None:
    """Return Ray's list of a run's checkpoints; None if it is missing or damaged. Raises STORAGE_ERRORS."""
    try:
        result = ray.train.Result.from_path(run.path, storage_filesystem=run.filesystem)
        is_whole = all(position_of(folder_of(checkpoint).name) for checkpoint, _ in result.best_checkpoints)
        math.fsum(metrics["val_score"] for _, metrics in result.best_checkpoints if "val_loss" in metrics)
    except STORAGE_ERRORS:
        raise
    except Exception:  # Ray does not check the list: if it is damaged, reading can raise anything
        return None
    return result if is_whole else None


def best_of(result: ray.train.Result, damaged: Container[str] = ()) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint with the best validation, and its metrics. Ties go to the lower loss.

    Without validation, return the last checkpoint. ``damaged``: names of checkpoints in Ray's list to leave out.
    """
    whole = [pair for pair in result.best_checkpoints if folder_of(pair[0]).name not in damaged]
    validated = [pair for pair in whole if "val_loss" in pair[1]]
    if not validated:
        return result.checkpoint, result.metrics
    return max(validated, key=lambda pair: pair[1]["val_score"])


def folder_of(checkpoint: Checkpoint) -> RunFolder:
    """Return the folder of a checkpoint that Ray Train knows."""
    storage_path, name = posixpath.split(checkpoint.path.rstrip("/"))
    return RunFolder(name, storage_path, checkpoint.filesystem, posixpath.join(storage_path, name))
