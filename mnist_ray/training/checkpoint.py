"""Checkpoints: a folder with weights and optimizer state as safetensors, and the rest as JSON. Nothing is pickled.

model.safetensors       the model's weights; with --ema-decay, their average
optimizer.safetensors   the tensors of the optimizer's state
trained.safetensors     with --ema-decay, the weights as they are trained
state.json              position, metrics, scheduler, config, workload, versions; SHA-256 of the others and itself
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.settings import build, check_known, json_lines, names_of
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, with_retries
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import MetricSums
from mnist_ray.training.state import TrainingState
from mnist_ray.workload import source
from mnist_ray.workload.base import Workload

STATE_FILE = "state.json"
_ENTRIES = {
    "epoch": int,
    "step": int,
    "sums": dict,
    "epoch_s": float,
    "finished_s": float,
    "optimizer": dict,
    "scheduler": dict,
    "sha256": dict,
    "workload": dict,
}
_MORE_ENTRIES = {
    "scaler": dict,
    "scores": list,
    "ends": bool,
    "callbacks": list,
    "metrics": dict,
}
_NO_WORKLOAD: dict[str, Any] = {"reference": "", "sha256": "", "settings": {}, "metadata": {}}
_MODEL, _OPTIMIZER, _TRAINED = "model.safetensors", "optimizer.safetensors", "trained.safetensors"


class DamagedCheckpointError(JobError):
    """A checkpoint is not what was written: cut off by a kill, or changed since."""


class OtherModelError(JobError):
    """A checkpoint does not fit the model or its optimizer: the workload makes another one now."""


@dataclass(frozen=True)
class Restored:
    """What was found in a run's folder to go on from."""

    name: str = ""
    """The checkpoint's folder; empty where there was none."""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was reported with it."""
    arithmetic: dict[str, Any] | None = None
    """What its bits depend on, of a reproducible run: that of the machine that wrote it."""
    damaged: tuple[str, ...] = ()
    """Newer ones that were passed over: a kill has cut them off, or something has changed them."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a training's state at one step, to be written while the training goes on."""

    tensors: dict[str, dict[str, Tensor]]
    """Of each file."""
    document: dict[str, Any]
    """What state.json says, but for the digests."""

    def write(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder."""
        digests = {}
        for name, tensors in self.tensors.items():
            content = save(tensors)
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        document = {**self.document, "sha256": digests}
        digests[STATE_FILE] = _digest(document)
        (folder / STATE_FILE).write_text(json_lines(document), encoding="utf-8")


def snapshot(state: TrainingState, about: dict[str, Any], callbacks: Sequence[Callback] = ()) -> Snapshot:
    """Return a copy of ``state``, with ``about`` (config, versions) for whoever reads it later."""
    optimizer = state.optimizer.state_dict()
    optimizer_tensors, optimizer_values = _separate_tensors(optimizer["state"])
    tensors = {_MODEL: _copied(state.result.state_dict()), _OPTIMIZER: _copied(optimizer_tensors)}
    if state.average is not None:
        tensors[_TRAINED] = _copied(state.model.state_dict())
    document = {
        "epoch": state.epoch,
        "step": state.step,
        "sums": dataclasses.asdict(state.sums),
        "epoch_s": state.epoch_s,
        "finished_s": state.finished_s,
        "optimizer": {"values": optimizer_values, "param_groups": optimizer["param_groups"]},
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "scores": state.scores,
        "ends": state.ends,
        "callbacks": [callback.state_dict() for callback in callbacks],
        **about,
    }
    return Snapshot(tensors, copy.deepcopy(document))


def _digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a state.json but for this digest itself, however it is written."""
    document = {**document, "sha256": {name: value for name, value in document["sha256"].items() if name != STATE_FILE}}
    as_read = json.loads(json.dumps(document))  # whose keys are texts: numbers would be sorted in another order
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def load_model(folder: Path, workload: Workload) -> nn.Module:
    """Return the checkpoint's model, in evaluation mode.

    Raises UsageError where there is none, JobError where it is damaged.
    """
    document = read_state(folder)
    model = workload.create_model()
    _load_weights(folder, document, _MODEL, model)
    return model.eval()


def fetch(filesystem: fs.FileSystem, path: str, workload: Workload) -> nn.Module:
    """Return a checkpoint's model, wherever it lies. Raises as ``load_model`` does, and JobError for storage."""
    with _fetched(filesystem, path) as folder:
        return load_model(folder, workload)


def fetch_state(filesystem: fs.FileSystem, path: str) -> dict[str, Any]:
    """Return a checkpoint's state.json, wherever it lies. Raises as ``fetch`` does."""
    with _fetched(filesystem, path) as folder:
        return read_state(folder)


def weights_sha256(checkpoint: RunFolder) -> str:
    """Return the digest of a checkpoint's weights. Raises JobError where it is not there."""
    document = checkpoint.read_json(STATE_FILE)
    if document is None:
        raise JobError(f"checkpoint {checkpoint.uri} is gone")
    return str(document["sha256"][_MODEL])


def workload_of(
    document: dict[str, Any], reference: str | None, changes: dict[str, Any], untrusted: Iterable[Path]
) -> Workload:
    """Return the workload of a checkpoint, of which ``document`` is the state.json.

    Its code comes from ``reference`` where that is given, else from where it was; ``changes`` are settings that take
    the place of its own. Raises UsageError where the code cannot be had, lies in one of the ``untrusted`` folders or
    has no such settings any more.
    """
    saved = document["workload"]
    named = f"the checkpoint of {saved['reference']}"
    workload_class = source.load_again(saved["reference"], reference, named, untrusted)
    settings_class = workload_class.Settings
    check_known(saved["settings"], names_of([settings_class]), named)
    return workload_class(build(settings_class, {**saved["settings"], **changes}), saved["metadata"])


@contextlib.contextmanager
def _fetched(filesystem: fs.FileSystem, path: str) -> Iterator[Path]:
    """Give a copy of a checkpoint on this machine's disk; errors about it name where it came from."""
    with tempfile.TemporaryDirectory() as local:
        try:
            with_retries(functools.partial(fs.copy_files, path, local, source_filesystem=filesystem))
            yield Path(local)
        except STORAGE_ERRORS as error:
            raise JobError(f"cannot read the checkpoint {path}: {first_line(error)}") from error
        except (UsageError, JobError) as error:
            raise type(error)(str(error).replace(local, path)) from error


def restore(folder: Path, state: TrainingState, callbacks: Sequence[Callback] = ()) -> None:
    """Put a checkpoint's content into a freshly created ``state``.

    Raises as ``load_model`` does, and OtherModelError; ``state`` is left as it was then.
    """
    document = read_state(folder)
    parts: list[Any] = [state.model, state.optimizer, state.scheduler]
    parts += [] if state.average is None else [state.average]
    before = copy.deepcopy([part.state_dict() for part in parts])
    try:
        _put(folder, document, state, callbacks)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        for part, values in zip(parts, before, strict=True):
            part.load_state_dict(values)
        if isinstance(error, (JobError, UsageError)):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        if STATE_FILE in document["sha256"]:  # what was written is there, so it is the code that does not take it
            raise OtherModelError(f"checkpoint {folder} is of another optimizer or schedule: {reason}") from error
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {reason}") from error


def _put(folder: Path, document: dict[str, Any], state: TrainingState, callbacks: Sequence[Callback]) -> None:
    epoch, step, epoch_s, finished_s = (document[name] for name in ("epoch", "step", "epoch_s", "finished_s"))
    if not (0 <= epoch <= state.last_epoch and 0 <= step < (state.last_step if epoch < state.last_epoch else 1)):
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: there is no step {step} after epoch {epoch}")
    sums = MetricSums() + MetricSums(**document["sums"])  # only numbers can be added
    if not all(map(math.isfinite, (epoch_s, finished_s, sums.num_examples and sums.sums["loss"]))):
        raise ValueError("a figure is no finite number")
    if state.scheduler.state_dict() and not document["scheduler"]:
        raise ValueError("it has no state of the scheduler")
    tensors = _read_tensors(folder, _OPTIMIZER, document)
    _load_weights(folder, document, _MODEL, state.result)
    if state.average is not None:
        _load_weights(folder, document, _TRAINED, state.model)
        state.average.n_averaged.fill_(1)  # else the next step would begin a new average
    per_parameter: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        per_parameter.setdefault(int(index), {})[name] = _with_layout_of(parameters[int(index)], tensor)
    for index, values in document["optimizer"]["values"].items():
        per_parameter.setdefault(int(index), {}).update(values)
    state.optimizer.load_state_dict({"state": per_parameter, "param_groups": document["optimizer"]["param_groups"]})
    state.scheduler.load_state_dict(document["scheduler"])
    state.scaler.load_state_dict(document.get("scaler", {}))
    state.scores, state.ends = [float(score) for score in document.get("scores", [])], document.get("ends", False)
    for callback, values in zip(callbacks, document.get("callbacks", []), strict=False):
        callback.load_state_dict(values)
    state.epoch, state.step, state.sums, state.epoch_s, state.finished_s = epoch, step, sums, epoch_s, finished_s


def restore_newest(run: RunFolder, state: TrainingState, callbacks: Sequence[Callback] = ()) -> Restored:
    """Put the newest whole checkpoint in a run's folder into ``state``; without one, leave it as it is.

    Raises OtherModelError where the checkpoint is of another model.
    """
    damaged: list[str] = []
    for name in reversed(run.checkpoint_names()):
        saved = run.inside(name)
        try:
            with _fetched(saved.filesystem, saved.path) as folder:
                restore(folder, state, callbacks)
                document = read_state(folder)
                return Restored(name, document.get("metrics", {}), document.get("arithmetic"), tuple(damaged))
        except (DamagedCheckpointError, UsageError):
            damaged.append(name)
    return Restored(damaged=tuple(damaged))


def _with_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Give a parameter's moment the parameter's strides: fused optimizers pair them up by memory position."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _separate_tensors(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]]]:
    """Split an optimizer's state per parameter into tensors, keyed ``index.name``, and JSON values."""
    tensors: dict[str, Tensor] = {}
    values: dict[int, dict[str, Any]] = {}
    for index, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(index, {})[name] = value
    return tensors, values


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in main memory, of which none share any: safetensors refuses a model's tied weights else."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json says. Raises as ``load_model`` does."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UsageError(f"{folder} is not a checkpoint: it has no {STATE_FILE}")
    try:
        document = json.loads(path.read_bytes())
        _check_state(document)
        return document
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {first_line(error)}") from error


def _check_state(document: Any) -> None:
    """Raise ValueError where a state.json is not what was written, as far as it can be told."""
    if not isinstance(document, dict):
        raise ValueError("it holds no JSON object")
    missing = _ENTRIES.keys() - document.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for name, kind in {**_ENTRIES, **_MORE_ENTRIES}.items():
        value = document.get(name, kind())
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} is {value!r:.40}")
    if any(type(document["workload"].get(name)) is not type(value) for name, value in _NO_WORKLOAD.items()):
        raise ValueError("it does not say which workload it is of")
    if STATE_FILE in document["sha256"] and document["sha256"][STATE_FILE] != _digest(document):
        raise ValueError("it is not what was written")


def _read_tensors(folder: Path, name: str, document: dict[str, Any]) -> dict[str, Tensor]:
    try:
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != document["sha256"].get(name):
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
        return load(content)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name}: {error}") from error


def _load_weights(folder: Path, document: dict[str, Any], name: str, model: nn.Module) -> None:
    weights = _read_tensors(folder, name, document)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise OtherModelError(f"checkpoint {folder} is of another model: {difference}") from error
