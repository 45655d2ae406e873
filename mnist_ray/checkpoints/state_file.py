"""A checkpoint's state.json, and how errors of reading a checkpoint are raised."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mnist_ray.checkpoints.tensor_files import files_of, read_tensors
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.schema import STATE_FILE
from mnist_ray.storage import RunFolder, in_one_line, with_retries

TRAINING_FILE = "training.pt"
MODEL, TRAINED, OPTIMIZER = "model", "trained", "optimizer"  # kinds of tensors, each in files of its own
FORMAT = 5
OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that say nothing about what is read or loaded."""


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
        """Whether the checkpoint was validated."""
        return "val_loss" in self.values

    @property
    def is_candidate(self) -> bool:
        """Whether it may be the best: not if it was validated only where a sweep compares trials, within an epoch."""
        return "val_score" in self.values

    @property
    def score(self) -> tuple[float, ...]:
        """A candidate's score, larger for a better model; empty for others."""
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


@contextlib.contextmanager
def reading(folder: RunFolder, place: str = "") -> Iterator[None]:
    """Raise an error of the storage in the block as a JobError, any that damage may cause as a DamagedCheckpointError.

    The digests are checked first. What another program has written with right digests may raise anything.
    """
    try:
        with in_one_line(f"cannot read the checkpoint {folder.uri}"):
            yield
    except (UsageError, JobError, *OF_THE_MACHINE):
        raise
    except Exception as error:
        problem = f"checkpoint {folder.uri} is damaged: {place}{first_line(error)}"
        raise DamagedCheckpointError(problem, fix="use another one") from error


def read_state(folder: RunFolder) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises UsageError and JobError."""
    with reading(folder, f"{STATE_FILE}: "):
        content = with_retries(functools.partial(folder.read_bytes, STATE_FILE))
        if content is None:
            raise UsageError(f"{folder.uri} is not a checkpoint: it has no {STATE_FILE}")
        document: dict[str, Any] = json.loads(content)
        if document["sha256"][STATE_FILE] != digest_of(document):
            raise ValueError("its digest is wrong")
        if document.get("format") != FORMAT:
            problem = f"checkpoint {folder.uri} has format {document.get('format')}"
            raise UsageError(problem, fix=f"this version reads {FORMAT}")
        return document


def read_metrics(folder: RunFolder) -> CheckpointMetrics:
    """Return a checkpoint's metrics. Raises like ``read_state``."""
    return CheckpointMetrics.of(read_state(folder).get("metrics", {}))


def tensors_of(
    folder: RunFolder, document: dict[str, Any], kind: str, own: Callable[[str], Tensor | None] = lambda key: None
) -> dict[str, Tensor]:
    """Return the tensors of a kind, such as MODEL, each like ``own(key)``. Raises JobError."""
    with reading(folder):
        digests = document["sha256"]
        return read_tensors(folder, {name: digests[name] for name in files_of(digests, kind)}, own)
