"""A checkpoint's state.json, and the checks of all that is read from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mnist_ray.checkpoints.tensor_files import DamagedFileError, TensorFiles, files_of
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.storage import RunFolder, in_one_line, position_of, with_retries

STATE_FILE, TRAINING_FILE = "state.json", "training.pt"
MODEL, TRAINED, OPTIMIZER = "model", "trained", "optimizer"  # kinds of tensors, each in files of its own
FORMAT = 3
_FILE_NAME = re.compile(r"[\w-]+\.(safetensors|pt|json)", re.ASCII)


class DamagedCheckpointError(JobError):
    """A checkpoint was cut off because its job was killed, or has changed since it was written."""


@dataclass(frozen=True)
class CheckpointMetrics:
    """What is known about a checkpoint; state.json and Ray Tune get it as a flat dict."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    epochs: float = 0.0  # trained; not always a whole number
    is_over: bool = False  # whether the training ends here
    values: Mapping[str, Any] = field(default_factory=dict)  # of the epoch so far and of a validation, by column

    @property
    def is_validated(self) -> bool:
        """Whether the checkpoint was validated: at the end of an epoch, or of a trial's segment."""
        return "val_score" in self.values

    @property
    def score(self) -> tuple[float, ...]:
        """The validation's score, larger for a better model; empty without a validation."""
        return tuple(map(float, self.values.get("val_score", ())))

    def to_dict(self) -> dict[str, Any]:
        """Return the flat dict."""
        return {"epoch": self.epoch, "step": self.step, "epochs": self.epochs, "is_over": self.is_over, **self.values}

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> CheckpointMetrics:
        """Return the metrics in a flat dict, which may lack some or have more."""
        own = {name: flat[name] for name in ("epoch", "step", "epochs", "is_over") if name in flat}
        return cls(**own, values={name: value for name, value in flat.items() if name not in own})


def digest_of(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a state.json's content, whatever its formatting, without the entry for this digest."""
    document = {**document, "sha256": {name: value for name, value in document["sha256"].items() if name != STATE_FILE}}
    as_read = json.loads(json.dumps(document))  # turns keys into strings: numbers would be sorted differently
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_state(folder: RunFolder) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises UsageError and JobError."""
    content = read_file(folder, STATE_FILE)
    if content is None:
        raise UsageError(f"{folder.uri} is not a checkpoint: it has no {STATE_FILE}")
    try:
        document = json.loads(content)
        if document["sha256"][STATE_FILE] != digest_of(document):
            raise ValueError("its digest is wrong")
        if document.get("format") != FORMAT:
            found = f"checkpoint {folder.uri} has format {document.get('format')}"
            raise UsageError(f"{found}; this version reads {FORMAT}")
        if position_of(folder.name) not in ((), (document["epoch"], document["step"])):
            raise ValueError(f"it is of epoch {document['epoch']}, step {document['step']}")
        if wrong := [name for name in document["sha256"] if not _FILE_NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]} is not the name of one of its files")
        for name in ("config", "tensors", "metrics"):
            if not isinstance(document.get(name, {}), dict):
                raise TypeError(f"{name} is {json.dumps(document[name]):.40}")
        metrics = CheckpointMetrics.of(document.get("metrics", {}))
        if not all(isinstance(number, (int, float)) for number in (metrics.epoch, metrics.epochs, *metrics.score)):
            raise TypeError("the metrics are not numbers")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(folder, f"{STATE_FILE}: {first_line(error)}") from error
    return document


def workload_in(folder: RunFolder, document: dict[str, Any]) -> dict[str, Any]:
    """Return the entry about the workload in a checkpoint's state.json. Raises DamagedCheckpointError."""
    kinds, saved = {"reference": str, "sha256": str, "settings": dict, "metadata": dict}, document.get("workload")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), kind) for name, kind in kinds.items()):
        raise _damaged(folder, f"{STATE_FILE}: its workload is incomplete")
    return saved


def read_file(folder: RunFolder, name: str) -> bytes | None:
    """Return a file's content, or None if it does not exist. Raises JobError."""
    with in_one_line(f"cannot read the checkpoint {folder.uri}"):
        return with_retries(functools.partial(folder.read_bytes, name))


def tensors_of(folder: RunFolder, document: dict[str, Any], kind: str) -> TensorFiles:
    """Return the tensors of a kind, such as MODEL; reads only the files' headers. Call it within ``reading``."""
    digests = document["sha256"]
    files = TensorFiles(folder, {name: digests[name] for name in files_of(digests, kind)})
    if document.get("tensors", {}).get(kind, len(files.shapes)) != len(files.shapes):
        raise DamagedFileError(f"{kind}: some tensors are missing")
    return files


@contextlib.contextmanager
def reading(folder: RunFolder) -> Iterator[None]:
    """Turn errors of reading tensors into a DamagedCheckpointError or, if the storage fails, into a JobError."""
    try:
        with in_one_line(f"cannot read the checkpoint {folder.uri}"):
            yield
    except DamagedFileError as error:
        raise _damaged(folder, str(error)) from error


def decoded(folder: RunFolder, name: str, document: dict[str, Any], decode: Callable[[bytes], Any]) -> Any:
    """Return the decoded content of a checkpoint's file. Raises DamagedCheckpointError if it is damaged."""
    content = read_file(folder, name)
    if content is None or hashlib.sha256(content).hexdigest() != document["sha256"].get(name):
        raise _damaged(folder, f"{name}: it is missing" if content is None else f"{name}: its digest is wrong")
    try:
        return decode(content)
    except MemoryError:
        raise
    except Exception as error:  # a file that another program has written may raise anything
        raise _damaged(folder, f"{name}: {first_line(error)}") from error


def _damaged(folder: RunFolder, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {folder.uri} is damaged: {reason}; use another one")


def unpickled(content: bytes) -> Any:
    """Return what ``torch.save`` has written, without running code."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
