"""Loads the whole model of a checkpoint: for evaluations, predictions, exports, and as the start of another run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import psutil
from safetensors.torch import load
from torch import Tensor, nn

from mnist_ray.checkpoints.checkpoint import load_weights
from mnist_ray.checkpoints.state_file import MODEL, STATE_FILE, read_file, read_state, reading, tensors_of, unpickled
from mnist_ray.checkpoints.tensor_files import Rows, files_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import RunFolder
from mnist_ray.text import size_of
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
    document = read_state(folder)
    with reading(folder):
        files = tensors_of(folder, document, MODEL)
    if files.num_bytes > (free := psutil.virtual_memory().available):
        needed = f"the model of {folder.uri} needs {size_of(files.num_bytes)} of memory"
        raise JobError(f"{needed}, and {size_of(free)} are free here; use a larger machine")
    with placed(workload, "create_model"):
        model = workload.create_model()
    own = model.state_dict()
    is_sharded = len(files_of(document["sha256"], MODEL)) > 1
    with reading(folder):
        if is_sharded and files.shapes == {name: tuple(tensor.shape) for name, tensor in own.items()}:
            for name, tensor in own.items():  # one by one: a second copy of a sharded model may not fit into memory
                tensor.copy_(files.read(name))
        else:
            load_weights(model, files.read_all(), folder)
    return model.eval()


def read_weights(location: RunFolder) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, or of a file, without running code in it. Raises UsageError and JobError."""
    if location.exists(STATE_FILE):
        with reading(location):
            return tensors_of(location, read_state(location), MODEL).read_all()
    content = read_file(location.storage, location.name) or b""
    try:
        with warnings.catch_warnings():  # torch warns about strange files
            warnings.simplefilter("ignore")
            weights = load(content) if location.name.endswith(".safetensors") else unpickled(content)
        if (size := max((tensor.nbytes for tensor in weights.values()), default=0)) > len(content):
            raise ValueError(f"a tensor has {size:,} bytes")  # an expanded one: stored, it takes no room
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
