"""Finding a run's checkpoint, and the workload that it is of."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train import Checkpoint

from mnist_ray import private
from mnist_ray.errors import UsageError
from mnist_ray.settings import values_of
from mnist_ray.storage import CONFIG_FILE, RESULT_FILE, RunFolder, find_run
from mnist_ray.training.checkpoint import STATE_FILE, checkpoint_names, fetch, fetch_state, workload_of
from mnist_ray.wording import spoken
from mnist_ray.workload.interface import Workload


@dataclass(frozen=True)
class Found:
    """A checkpoint with the workload that it is of."""

    checkpoint: Checkpoint
    document: Mapping[str, Any]
    """Its state.json."""
    workload: Workload
    notes: tuple[str, ...]
    """What the user is to know."""

    @property
    def described(self) -> str:
        """What it was trained on, as people read it."""
        name = type(self.workload).__name__
        own = values_of(self.workload.settings)
        chosen = {key: value for key, value in own.items() if value != values_of(self.workload.Settings())[key]}
        return name + "".join(f", {spoken(key)} {value}" for key, value in chosen.items())

    def load_model(self) -> Any:
        """Return its model, in evaluation mode. Raises JobError where it is damaged."""
        return fetch(self.checkpoint.filesystem, self.checkpoint.path, self.workload)


def find(
    given: str | None,
    storage_path: str,
    reference: str | None = None,
    changes: Mapping[str, Any] | None = None,
    is_wanted: Callable[[RunFolder], bool] = lambda run: True,
) -> Found:
    """Return the checkpoint that a path, a URI or a run's name stands for; of None, that of the newest wanted run.

    ``reference`` is where the workload's code is, where not where it was; ``changes`` are settings that take the place
    of its own. Raises UsageError where there is none.
    """
    run = find_run(given, storage_path, is_wanted)
    checkpoint = _checkpoint_of(run, given)
    document = fetch_state(checkpoint.filesystem, checkpoint.path)
    workload = workload_of(document, reference, dict(changes or {}))
    assert workload.source is not None
    notes: tuple[str, ...] = ()
    if document["workload"]["sha256"] not in ("", workload.source.sha256):
        notes = (f"the workload has changed since the checkpoint was made: {workload.source.reference}",)
    return Found(checkpoint, document, workload, notes)


def _checkpoint_of(run: RunFolder, given: str | None) -> Checkpoint:
    """Return a folder's checkpoint: itself, or a run's choice.

    A finished run has chosen by its result; of an interrupted one it is the best so far by validation, else the last.
    """
    if run.exists(STATE_FILE):
        return Checkpoint(run.path, filesystem=run.filesystem)
    if (result := run.read_text(RESULT_FILE)) is not None:
        try:
            chosen = run.inside(json.loads(result)["checkpoint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"run {run.uri} has a damaged {RESULT_FILE}: {error}") from error
        if not chosen.exists(STATE_FILE):
            raise UsageError(f"run {run.uri} has lost its checkpoint {chosen.name}")
        return Checkpoint(chosen.path, filesystem=run.filesystem)
    try:
        unfinished = ray.train.Result.from_path(run.path, storage_filesystem=run.filesystem)
    except private.CheckpointManagerInitializationError:  # a kill has cut off Ray's list of the checkpoints
        names = checkpoint_names(run)
        if not names:
            raise UsageError(f"run {run.uri} has no checkpoint yet") from None
        return Checkpoint(run.inside(names[-1]).path, filesystem=run.filesystem)
    except RuntimeError as error:
        if run.exists(CONFIG_FILE):
            raise UsageError(f"run {run.uri} has no checkpoint yet") from error
        raise UsageError(f"{given} is neither a checkpoint nor a run that holds one: {run.uri}") from error
    if unfinished.checkpoint is None:
        raise UsageError(f"run {run.uri} has no checkpoint yet")
    return best_of(unfinished)[0]


def best_of(result: ray.train.Result, damaged: Container[str] = ()) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint with the best validation, of two that tie the one of less loss, and its metrics.

    Where none was validated, the last. ``damaged`` names checkpoints that Ray knows still, and are not to be taken.
    """
    whole = [pair for pair in result.best_checkpoints if pair[0].path.rsplit("/", 1)[-1] not in damaged]
    validated = [pair for pair in whole if "val_loss" in pair[1]]
    if not validated:
        return result.checkpoint, result.metrics
    best: tuple[Checkpoint, dict[str, Any]] = max(validated, key=lambda pair: _score(pair[1]))
    return best


def _score(metrics: Mapping[str, float]) -> float:
    """Return the score of a validation; runs from before there were scores chose by accuracy."""
    return metrics["val_score"] if "val_score" in metrics else metrics["val_accuracy"]
