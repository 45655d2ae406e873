"""Checkpoints: a folder with weights as safetensors, the rest of the training's state, and JSON that describes both.

model.safetensors    the model's weights; with --ema-decay, their average
training.pt          what a resumed training needs besides: position, optimizer, schedule, and weights that are averaged
state.json           format, position, metrics, config, workload, versions; SHA-256 of the others and itself

Nothing that is loaded can run code: ``training.pt`` is read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
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
from mnist_ray.workload.tensors import map_tensors

STATE_FILE = "state.json"
FORMAT = 1
_MODEL, _TRAINING = "model.safetensors", "training.pt"


class DamagedCheckpointError(JobError):
    """A checkpoint is not what was written: cut off by a kill, or changed since."""


class OtherModelError(JobError):
    """A checkpoint does not fit the model or its optimizer: the workload makes another one now."""


@dataclass(frozen=True)
class Restored:
    """What was found in a run's folder to go on from."""

    name: str = ""  # the checkpoint's folder; empty where there was none
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)  # what was reported with it
    arithmetic: dict[str, Any] | None = None
    """What its bits depend on, of a reproducible run: that of the machine that wrote it."""
    damaged: tuple[str, ...] = ()
    """Newer ones that were passed over: a kill has cut them off, or something has changed them."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a training's state at one step, to be written while the training goes on."""

    weights: dict[str, Tensor]
    training: dict[str, Any]  # what training.pt holds
    document: dict[str, Any]  # what state.json says, but for the digests

    def write(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder."""
        training = io.BytesIO()
        torch.save(self.training, training)
        contents = {_MODEL: save(self.weights), _TRAINING: training.getvalue()}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        document = {**self.document, "sha256": digests}
        digests[STATE_FILE] = digest_of(document)
        (folder / STATE_FILE).write_text(json_lines(document), encoding="utf-8")


def snapshot(state: TrainingState, about: dict[str, Any], callbacks: Sequence[Callback] = ()) -> Snapshot:
    """Return a copy of ``state`` in main memory, with ``about`` (config, workload) for whoever reads it later."""
    training = {
        "epoch": state.epoch,
        "step": state.step,
        "sums": dataclasses.asdict(state.sums),
        "epoch_s": state.epoch_s,
        "finished_s": state.finished_s,
        "scores": state.scores,
        "ends": state.ends,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "trained": None if state.average is None else state.model.state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
    }
    document = {"format": FORMAT, "epoch": state.epoch, "step": state.step, **about}
    # Contiguous, and sharing no memory: else safetensors refuses a model's tied weights.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.result.state_dict().items()
    }
    return Snapshot(
        weights, map_tensors(lambda tensor: tensor.detach().cpu().clone(), training), copy.deepcopy(document)
    )


def digest_of(document: dict[str, Any]) -> str:
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
    _load_weights(model, _read_weights(folder, document), folder)
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
    return str(checkpoint.require_json(STATE_FILE)["sha256"][_MODEL])


def workload_of(
    document: dict[str, Any], reference: source.Reference | None, changes: dict[str, Any], untrusted: Iterable[Path]
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

    Raises as ``load_model`` does, before ``state`` is changed, and OtherModelError.
    """
    document = read_state(folder)
    weights, content = _read_weights(folder, document), _read(folder, _TRAINING, document)
    training = _unpickled(folder, content)
    _load_weights(state.result, weights, folder)
    try:
        if state.average is not None:
            state.model.load_state_dict(training["trained"])
            state.average.n_averaged.fill_(1)  # else the next step would begin a new average
        state.optimizer.load_state_dict(training["optimizer"])
        state.scheduler.load_state_dict(training["scheduler"])
        state.scaler.load_state_dict(training["scaler"])
        for callback, values in zip(callbacks, training["callbacks"], strict=False):
            callback.load_state_dict(values)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # what was written is there, so it is the code that does not take it
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise OtherModelError(f"checkpoint {folder} is of another optimizer or schedule: {reason}") from error
    state.sums = MetricSums(**training["sums"])
    for name in ("epoch", "step", "epoch_s", "finished_s", "scores", "ends"):
        setattr(state, name, training[name])


def _unpickled(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        training: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return training
    except MemoryError:
        raise
    except Exception as error:  # what a file that is another raises may be anything
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {_TRAINING}: {first_line(error)}") from error


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


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json says. Raises as ``load_model`` does."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UsageError(f"{folder} is not a checkpoint: it has no {STATE_FILE}")
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document["sha256"][STATE_FILE] != digest_of(document):
            raise ValueError("it is not what was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {first_line(error)}") from error
    if document.get("format") != FORMAT:
        raise UsageError(f"checkpoint {folder} is of another version of mnist_ray: format {document.get('format')}")
    return document


def _read(folder: Path, name: str, document: dict[str, Any]) -> bytes:
    """Return a file's content. Raises DamagedCheckpointError if it is not what was written."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name}: {error}") from error
    if hashlib.sha256(content).hexdigest() != document["sha256"].get(name):
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
    return content


def _read_weights(folder: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    try:
        return load(_read(folder, _MODEL, document))
    except SafetensorError as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {_MODEL}: {error}") from error


def _load_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise OtherModelError(f"checkpoint {folder} is of another model: {difference}") from error
