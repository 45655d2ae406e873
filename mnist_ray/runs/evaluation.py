"""Evaluation as Ray tasks, apart from training."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError, RayTaskError
from ray.train import Checkpoint
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.util.queue import Queue

from mnist_ray.config import LookupConfig, build
from mnist_ray.environment import for_evaluation
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.storage import CONFIG_FILE, RESULT_FILE, find_run
from mnist_ray.training import engine
from mnist_ray.training.checkpoint import STATE_FILE, checkpoint_names, fetch
from mnist_ray.training.events import Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.mnist.idx import Split


def evaluate(checkpoint: Checkpoint, split: Split | ray.ObjectRef, num_images: int, num_tasks: int = 1) -> Evaluation:
    """Evaluate a checkpoint on a split of ``num_images``, spread over tasks of one CPU each.

    Tasks get whole batches, and batches are the same for any number of tasks, so the result is too. Raises what a
    task raised, and JobError where its node or the storage has gone.
    """
    reference = split if isinstance(split, ray.ObjectRef) else ray.put(split)
    task = _evaluate_part.options(**process_options())
    parts = [task.remote(checkpoint, reference, *bounds) for bounds in part_bounds(num_images, num_tasks)]
    try:
        return Evaluation.merge(ray.get(parts))
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RayError):
            raise JobError(f"the evaluation was lost: {first_line(cause)}") from error
        raise cause from error  # the task's own exception, whose text is one line


def process_options() -> dict[str, Any]:
    """Return the options of tasks that evaluate, by which they share processes."""
    return {"runtime_env": {"env_vars": for_evaluation()}}


def start_process() -> None:
    """Let a process for the first validation start and import torch while the workers start, not beside training."""
    _import_engine.options(**process_options()).remote()


@ray.remote(num_cpus=0)
def _import_engine() -> None:
    importlib.import_module("mnist_ray.runs.evaluation")


def part_bounds(num_images: int, num_tasks: int) -> list[tuple[int, int]]:
    """Cut ``num_images`` into at most ``num_tasks`` ranges of whole evaluation batches."""
    size = engine.EVALUATION_BATCH_SIZE
    num_batches = math.ceil(num_images / size)
    num_parts = min(num_tasks, num_batches)
    cuts = [num_batches * part // num_parts * size for part in range(num_parts)] + [num_images]
    return list(itertools.pairwise(cuts))


@ray.remote(num_cpus=1)
def _evaluate_part(checkpoint: Checkpoint, split: Split, start: int, stop: int) -> Evaluation:
    return _evaluate_here(checkpoint, Split(split.images[start:stop], split.labels[start:stop]))


def validate(checkpoint: Checkpoint, split: ray.ObjectRef, events: Queue) -> dict[str, float]:
    """Evaluate an epoch's checkpoint on the held-out images; Ray Train runs this as a task beside the training."""
    start = time.perf_counter()
    result = _evaluate_here(checkpoint, ray.get(split))
    epoch = int(checkpoint.get_metadata()["epoch"])
    events.put(Validated(epoch, result.loss, result.accuracy, time.perf_counter() - start))
    return {"val_loss": result.loss, "val_accuracy": result.accuracy}


def _evaluate_here(checkpoint: Checkpoint, split: Split) -> Evaluation:
    torch.set_num_threads(1)  # so that neither tasks side by side nor a training get in each other's way
    model, _ = fetch(checkpoint.filesystem, checkpoint.path)
    return engine.evaluate(model.to(memory_format=torch.channels_last), split)  # type: ignore[call-overload]


def find_checkpoint(given: str | None, flags: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint that a path, a URI or a run's name stands for (see ``find_run``); a run's is its choice.

    A finished run has chosen by its result; of an interrupted one it is the best so far by validation accuracy,
    else the last. Raises UsageError where there is none.
    """
    run = find_run(given, build(LookupConfig, flags).storage_path)
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
    except CheckpointManagerInitializationError:  # a kill has cut off Ray's list of the checkpoints
        names = checkpoint_names(run)
        if not names:
            raise UsageError(f"run {run.uri} has no checkpoint yet") from None
        return Checkpoint(run.inside(names[-1]).path, filesystem=run.filesystem)
    except RuntimeError as error:
        if run.exists(CONFIG_FILE):
            raise UsageError(f"run {run.uri} has no checkpoint yet") from error
        raise UsageError(f"{given} is neither a checkpoint nor a run that holds one") from error
    if unfinished.checkpoint is None:
        raise UsageError(f"run {run.uri} has no checkpoint yet")
    return choose(unfinished)[0]


def choose(result: ray.train.Result) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint with the best validation accuracy and its metrics; the last where none was validated."""
    validated = [pair for pair in result.best_checkpoints if "val_accuracy" in pair[1]]
    if not validated:
        return result.checkpoint, result.metrics
    best: tuple[Checkpoint, dict[str, Any]] = max(validated, key=lambda pair: pair[1]["val_accuracy"])
    return best
