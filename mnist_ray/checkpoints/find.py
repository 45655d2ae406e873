"""Finds a run's checkpoints and the best of them, with its workload; loads whole models, also as a run's start."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mnist_ray.checkpoints.checkpoint import load_weights
from mnist_ray.checkpoints.state_file import (
    MODEL,
    CheckpointMetrics,
    DamagedCheckpointError,
    read_metrics,
    read_state,
    tensors_of,
)
from mnist_ray.checkpoints.tensor_files import Rows, files_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.runs import find_run, untrusted_folders
from mnist_ray.schema import CONFIG_FILE, RESULT_FILE, STATE_FILE
from mnist_ray.settings import build, check_known, declared
from mnist_ray.storage import RunFolder, in_one_line, position_of, with_retries
from mnist_ray.workload import loading, user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed


@dataclass(frozen=True)
class Found:
    """A checkpoint with its workload."""

    checkpoint: RunFolder
    workload: Workload
    notes: tuple[str, ...]  # for the user

    def load_model(self) -> Any:
        """Return the checkpoint's model, in evaluation mode. Raises JobError if the checkpoint is damaged."""
        with user_code.alone:
            return load_model(self.checkpoint, self.workload)


def find(
    place: str | None,
    storage_path: str,
    reference: loading.Reference | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Found:
    """Return the checkpoint for a path, a URI or a run's name; for None, the checkpoint of the newest run.

    ``reference``: the workload's code, if it has moved. ``changes``: settings to override. Raises UsageError if there
    is no checkpoint, or the workload cannot be loaded or trusted; JobError if the checkpoint is damaged.
    """
    run, notes = find_run(place, storage_path), list[str]()
    with in_one_line(f"cannot read {run.uri}"):
        checkpoint = checkpoint_of(run)
    document = read_state(checkpoint)
    saved = document["workload"]
    source = f"the checkpoint of {saved['reference']}"
    workload_class = loading.load_again(saved["reference"], reference, source, untrusted_folders(run, storage_path))
    now = workload_class.source.reference
    if saved["reference"] == now and saved["sha256"] not in ("", workload_class.source.sha256):
        notes.append(f"the workload has changed since the checkpoint was made: {now}")
    check_known(saved["settings"], declared(workload_class.Settings), source)
    check_known(changes or (), declared(workload_class.Settings), "--set")
    settings: Any = build(workload_class.Settings, {**saved["settings"], **(changes or {})})
    workload = workload_class(settings, saved["metadata"])
    return Found(checkpoint, workload, tuple(notes))


def read_initial(workload: Workload, init_from: str, storage_path: str) -> tuple[bytes, str]:
    """Return the weights of ``--init-from`` as the content of INITIAL_FILE, and a line about them for the user.

    Code of the run that they come from is not loaded. Raises UsageError and JobError.
    """
    model = workload.create_model()
    with in_one_line("cannot read the weights of --init-from"):
        place = find_run(init_from, storage_path)
        place = place if place.info().is_file else checkpoint_of(place)
    weights = read_weights(place)
    lacking, own = load_fitting(model, weights), model.state_dict()
    if len(lacking) == len(own):
        names = " against ".join(shorten(", ".join(names), 100) for names in (weights, own))
        raise UsageError(f"--init-from {place.uri}: nothing fits the model by name and shape: {names}")
    fits = f"{place.uri}: {len(own) - len(lacking)} of the model's {len(own)} tensors"
    others = ", ".join(name + " (of another shape)" * (name in weights) for name in lacking)
    return save(weights), f"{fits}; not {shorten(others, 200)}" if others else fits


def checkpoint_of(run: RunFolder) -> RunFolder:
    """Return ``run`` if it is a checkpoint; else its result's checkpoint, else the best validated, else the last."""
    if run.exists(STATE_FILE):
        return run
    result = run.read_json(RESULT_FILE)
    if result is not None:
        chosen = run.inside(result["checkpoint"])
        if not chosen.exists(STATE_FILE):
            raise UsageError(f"run {run.uri} no longer has {chosen.name}; name one of its other checkpoints")
        return chosen
    if not run.checkpoint_names():
        if run.exists(CONFIG_FILE):
            raise UsageError(f"run {run.uri} has no checkpoint yet")
        raise UsageError(f"{run.uri} is neither a checkpoint nor a run with a checkpoint")
    return best_of(run)


def best_of(run: RunFolder) -> RunFolder:
    """Return the best checkpoint by validation; without validation, the last. Raises JobError if all are damaged."""
    for name, _ in checkpoints_of(run):
        return run.inside(name)
    raise JobError(f"{run.uri} has only damaged checkpoints; start another run")


def checkpoints_of(run: RunFolder) -> list[tuple[str, CheckpointMetrics]]:
    """Return the undamaged checkpoints and their metrics: the candidates, best first; then the others, newest first."""
    found = []
    for name in with_retries(run.checkpoint_names):
        with contextlib.suppress(DamagedCheckpointError, UsageError):
            found.append((name, read_metrics(run.inside(name))))
    candidates = [pair for pair in found if pair[1].is_candidate]
    others = [pair for pair in reversed(found) if pair not in candidates]
    return sorted(candidates, key=lambda pair: pair[1].score, reverse=True) + others


def drop_worse(run: RunFolder, num_best: int, *, keeps_last: bool = True) -> None:
    """Delete whole checkpoints except the ``num_best`` by validation and the last. Raises JobError, STORAGE_ERRORS."""
    whole = [name for name, _ in checkpoints_of(run)]
    last = sorted(whole, key=position_of)[-1:] if keeps_last else []
    for name in set(whole).difference(whole[:num_best], last):
        run.inside(name).delete()


def weights_digest(document: dict[str, Any]) -> str:
    """Return the digest of a checkpoint's weights from its state.json; it depends on the number of files."""
    digests = [document["sha256"][name] for name in files_of(document["sha256"], MODEL)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_model(folder: RunFolder, workload: Workload) -> nn.Module:
    """Return a checkpoint's whole model, in evaluation mode.

    Raises UsageError if there is no checkpoint, JobError if it is damaged, does not fit the model, or cannot be read.
    """
    weights = tensors_of(folder, read_state(folder), MODEL)
    with placed(workload, "create_model"):
        model = workload.create_model()
    load_weights(model, weights, folder)
    return model.eval()


def read_weights(location: RunFolder) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, or of a file, without running code in it. Raises UsageError and JobError."""
    if location.exists(STATE_FILE):
        return tensors_of(location, read_state(location), MODEL)
    with in_one_line(f"cannot read {location.uri}"):
        content = with_retries(functools.partial(location.storage.read_bytes, location.name)) or b""
    try:
        with warnings.catch_warnings():  # torch warns about strange files
            warnings.simplefilter("ignore")
            if location.name.endswith(".safetensors"):
                weights = load(content)
            else:
                weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return {name: Rows.of(tensor).copied().values for name, tensor in weights.items()}  # tied ones apart
    except Exception as error:  # torch's own message would advise running the code
        remedy = "write .safetensors, or torch.save(model.state_dict(), 'FILE.pt')"
        raise UsageError(f"{location.uri} has no weights that can be read: {remedy}") from error


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load the weights that fit a model by name and shape; return the names of the model's other tensors."""
    own = model.state_dict()
    lacking = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    model.load_state_dict({name: weights[name] for name in own.keys() - lacking}, strict=False)
    return lacking
