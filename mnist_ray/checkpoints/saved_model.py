"""Loads the whole model of a checkpoint: for evaluations, predictions, exports, and as the start of another run."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from mnist_ray.checkpoints.checkpoint import load_weights
from mnist_ray.checkpoints.state_file import MODEL, STATE_FILE, read_state, tensors_of
from mnist_ray.checkpoints.tensor_files import Rows, files_of
from mnist_ray.errors import UsageError
from mnist_ray.storage import RunFolder, in_one_line, with_retries
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed


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
