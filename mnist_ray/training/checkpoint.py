"""Checkpoints: a folder with weights as safetensors, the rest of the training's state, and JSON that describes both.

model.safetensors    the model's weights; with --ema-decay, their EMA
training.pt          the rest of the state: position, sums, scores, optimizer, schedule, loss scale, callbacks; with
                     --ema-decay, the trained weights
state.json           format, position, metrics, config, workload, versions; SHA-256 of the other files and of itself

Loading runs no code: ``training.pt`` is read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mnist_ray.errors import JobError, TrainingStoppedError, UsageError, first_line
from mnist_ray.settings import json_lines
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, in_one_line, with_retries
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import CheckpointMetrics, MetricSums
from mnist_ray.training.state import TrainingState, state_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.loading import placed
from mnist_ray.workload.tensors import map_tensors

T = TypeVar("T")
STATE_FILE, MODEL_FILE, TRAINING_FILE = "state.json", "model.safetensors", "training.pt"
FORMAT = 1
_COUNTERS = ("epoch", "step", "epoch_s", "finished_s", "scores", "ends")  # fields of a TrainingState, stored unchanged


class DamagedCheckpointError(JobError):
    """A checkpoint was cut off because its job was killed, or has changed since it was written."""


class OtherModelError(TrainingStoppedError):
    """A checkpoint does not fit the model or optimizer that the workload creates now."""


@dataclass(frozen=True)
class Restored:
    """The checkpoint from which a run resumes."""

    name: str = ""  # its folder; empty if there is no checkpoint
    metrics: CheckpointMetrics = dataclasses.field(default_factory=CheckpointMetrics)
    arithmetic: dict[str, Any] | None = None  # of the machine that wrote the checkpoint, with --reproducible
    damaged: tuple[str, ...] = ()  # newer checkpoints that were skipped: damaged, or from another version


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training's state at one step, to be written while training continues."""

    weights: dict[str, Tensor]
    training: dict[str, Any]  # the content of training.pt
    document: dict[str, Any]  # the content of state.json, without the digests

    def write(self, folder: RunFolder) -> None:
        """Write a checkpoint, state.json last: a folder without it is no checkpoint. Raises like ``write_files``."""
        training = io.BytesIO()
        torch.save(self.training, training)
        contents = {MODEL_FILE: save(self.weights), TRAINING_FILE: training.getvalue()}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        document = {**self.document, "sha256": digests}
        digests[STATE_FILE] = digest_of(document)
        try:
            folder.write_files({**contents, STATE_FILE: json_lines(document).encode()})
        except STORAGE_ERRORS:
            with contextlib.suppress(*STORAGE_ERRORS):  # a part of a checkpoint is of no use on a full disk
                folder.filesystem.delete_dir(folder.path)
            raise


def snapshot(state: TrainingState, about: dict[str, Any], callbacks: Sequence[Callback] = ()) -> Snapshot:
    """Copy ``state`` to main memory, with ``about`` (config, workload) for state.json."""
    training = {
        **{name: getattr(state, name) for name in _COUNTERS},
        "sums": dataclasses.asdict(state.sums),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "trained": None if state.average is None else state.model.state_dict(),
        "callbacks": [state_of(callback) for callback in callbacks],
    }
    document = {"format": FORMAT, "epoch": state.epoch, "step": state.step, **about}
    copied = map_tensors(lambda tensor: tensor.detach().cpu().clone(), training)
    return Snapshot(_copies(state.result.state_dict()), copied, copy.deepcopy(document))


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies in main memory that share nothing: safetensors would refuse tied weights."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }


def digest_of(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a state.json's content, whatever its formatting, without the entry for this digest."""
    document = {**document, "sha256": {name: value for name, value in document["sha256"].items() if name != STATE_FILE}}
    as_read = json.loads(json.dumps(document))  # turns keys into strings: numbers would be sorted differently
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def load_model(folder: RunFolder, workload: Workload) -> nn.Module:
    """Return a checkpoint's model, in evaluation mode.

    Raises UsageError if there is no checkpoint, JobError if it is damaged, does not fit the model, or cannot be read.
    """
    document = read_state(folder)
    with placed(workload, "create_model"):
        model = workload.create_model()
    _load_weights(model, _decoded(folder, MODEL_FILE, document, load), folder)
    return model.eval()


def read_weights(place: RunFolder) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, or those in a file, whose code is not run. Raises UsageError and JobError."""
    if place.exists(STATE_FILE):
        return _decoded(place, MODEL_FILE, read_state(place), load)
    content = _read(place.storage, place.name) or b""
    try:
        with warnings.catch_warnings():  # torch warns of strange files
            warnings.simplefilter("ignore")
            return _copies(load(content) if place.name.endswith(".safetensors") else _unpickled(content))
    except Exception as error:  # torch's own message would advise to run the code
        remedy = "write .safetensors, or torch.save(model.state_dict(), 'FILE.pt')"
        raise UsageError(f"{place.uri} has no weights that can be read: {remedy}") from error


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load the weights that fit a model by name and shape; return the names of those that the model does not get."""
    own = model.state_dict()
    lacking = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    model.load_state_dict({name: weights[name] for name in own.keys() - lacking}, strict=False)
    return lacking


def restore(folder: RunFolder, state: TrainingState, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Load a checkpoint into a newly created ``state``; return its state.json.

    Raises like ``load_model``. A damaged checkpoint leaves ``state`` intact; OtherModelError may leave it half loaded.
    """
    document = read_state(folder)
    weights = _decoded(folder, MODEL_FILE, document, load)
    training: dict[str, Any] = _decoded(folder, TRAINING_FILE, document, _unpickled)
    _load_weights(state.result, weights, folder)
    try:
        if state.average is not None:
            state.model.load_state_dict(training["trained"])
        state.optimizer.load_state_dict(training["optimizer"])
        state.scheduler.load_state_dict(training["scheduler"])
        state.scaler.load_state_dict(training["scaler"])
        for callback, values in zip(callbacks, training["callbacks"], strict=False):
            callback.load_state_dict(values)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the digest is right, so the file is whole: the code must have changed
        reason = f"the optimizer, schedule or callback: {type(error).__name__}: {first_line(error)}"
        raise OtherModelError(f"checkpoint {folder.uri} does not fit {reason}; restore the code") from error
    state.sums = MetricSums(**training["sums"])
    for name in _COUNTERS:
        setattr(state, name, training[name])
    return document


def restore_newest(run: RunFolder, state: TrainingState, callbacks: Sequence[Callback] = ()) -> Restored:
    """Load the newest intact checkpoint in a run's folder into ``state``; if there is none, leave ``state`` unchanged.

    Raises OtherModelError if the checkpoint does not fit the model, JobError if the storage cannot be read.
    """
    damaged: list[str] = []
    with in_one_line(f"cannot read {run.uri}"):
        names = with_retries(run.checkpoint_names)
    for name in reversed(names):
        try:
            document = restore(run.inside(name), state, callbacks)
            metrics = CheckpointMetrics.of(document.get("metrics", {}))
            return Restored(name, metrics, document.get("arithmetic"), tuple(damaged))
        except (DamagedCheckpointError, UsageError):
            damaged.append(name)
    return Restored(damaged=tuple(damaged))


def read_state(folder: RunFolder) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises like ``load_model``."""
    content = _read(folder, STATE_FILE)
    if content is None:
        raise UsageError(f"{folder.uri} is not a checkpoint: it has no {STATE_FILE}")
    try:
        document = json.loads(content)
        if document["sha256"][STATE_FILE] != digest_of(document):
            raise ValueError("its digest is wrong")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, STATE_FILE, first_line(error)) from error
    if document.get("format") != FORMAT:
        raise UsageError(f"checkpoint {folder.uri} has format {document.get('format')}; this version reads {FORMAT}")
    return document


def _read(folder: RunFolder, name: str) -> bytes | None:
    with in_one_line(f"cannot read the checkpoint {folder.uri}"):
        return with_retries(functools.partial(folder.read_bytes, name))


def _decoded(folder: RunFolder, name: str, document: dict[str, Any], decode: Callable[[bytes], T]) -> T:
    """Return the decoded content of a checkpoint's file. Raises DamagedCheckpointError if it is damaged."""
    content = _read(folder, name)
    if content is None or hashlib.sha256(content).hexdigest() != document["sha256"].get(name):
        raise _damaged(folder, name, "it is missing" if content is None else "its digest is wrong")
    try:
        return decode(content)
    except MemoryError:
        raise
    except Exception as error:  # a file that another program has written may raise anything
        raise _damaged(folder, name, first_line(error)) from error


def _damaged(folder: RunFolder, name: str, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {folder.uri} is damaged: {name}: {reason}; use another one")


def _unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _load_weights(model: nn.Module, weights: dict[str, Tensor], folder: RunFolder) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = f"{str(error).splitlines()[-1].strip()}; restore the code and the settings"
        raise OtherModelError(f"checkpoint {folder.uri} does not fit the model: {difference}") from error
