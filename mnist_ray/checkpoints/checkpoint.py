"""Checkpoints: a folder with tensors as safetensors, the rest of the training's state, and JSON that describes both.

model.safetensors      the model's weights; with --ema-decay, their EMA
trained.safetensors    with --ema-decay, the trained weights
optimizer.safetensors  the optimizer's tensors
training.pt            the rest of the state: position, sums, scores, optimizer, schedule, loss scale, callbacks
state.json             format, position, counts of tensors, metrics, config, workload, versions; SHA-256 of all files

With ``--strategy fsdp``, each worker writes its rows of the tensors into files of its own, such as
``model-00001-of-00004.safetensors``; any number of workers can read them. Loading runs no code: ``training.pt`` is read
with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mnist_ray.checkpoints.state_file import (
    FORMAT,
    MODEL,
    OF_THE_MACHINE,
    OPTIMIZER,
    TRAINED,
    TRAINING_FILE,
    CheckpointMetrics,
    DamagedCheckpointError,
    digest_of,
    read_state,
    reading,
    tensors_of,
)
from mnist_ray.checkpoints.tensor_files import Rows, check_held, content_of, file_name, read_checked
from mnist_ray.data.tensors import is_sharded, map_tensors
from mnist_ray.errors import TrainingStoppedError, UsageError, first_line
from mnist_ray.parallel.group import Group
from mnist_ray.schema import STATE_FILE
from mnist_ray.settings import json_lines
from mnist_ray.storage import RunFolder, in_one_line, with_retries
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import MetricSums
from mnist_ray.training.state import TrainingState, parameters_of

_COUNTERS = ("epoch", "step", "epoch_s", "finished_s", "scores", "validated_at", "bf16_is_slow", "ends", "read_to")
"""Fields of a TrainingState, stored unchanged."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training's state at one step, or a rank's part of it, to be written while training continues."""

    tensors: dict[str, dict[str, Rows]]  # of each file
    training: dict[str, Any] | None  # the content of training.pt; rank 0 has it
    document: dict[str, Any]  # the content of state.json, without the digests

    def write(self, folder: RunFolder, writers: dist.ProcessGroup | None = None) -> None:
        """Write this rank's files; on rank 0, write state.json last: a folder without it is no checkpoint.

        ``writers``: the group of all ranks, if the state is sharded. On rank 0, raises the error of any rank.
        """
        own: dict[str, str] | Exception
        try:
            own = self._write_part(folder)
        except Exception as error:  # rank 0, which waits for all, raises it
            own = error
        of_ranks: list[Any] = [own]
        if writers is not None:
            of_ranks = [None] * writers.size() if writers.rank() == 0 else []
            dist.gather_object(own, of_ranks or None, group=writers)
        digests: dict[str, str] = {}
        for of_rank in of_ranks:
            if isinstance(of_rank, Exception):
                raise of_rank
            digests |= of_rank
        if digests:
            document = {**self.document, "sha256": digests}
            digests[STATE_FILE] = digest_of(document)
            folder.write_files({STATE_FILE: [json_lines(document).encode()]})

    def _write_part(self, folder: RunFolder) -> dict[str, str]:
        """Write this rank's files; return their digests."""
        contents = {name: content_of(tensors) for name, tensors in self.tensors.items() if tensors}
        if self.training is not None:
            saved = io.BytesIO()
            torch.save(self.training, saved)
            contents[TRAINING_FILE] = [saved.getbuffer()]
        digests = {}
        for name, content in contents.items():
            digest = hashlib.sha256()
            for buffer in content:
                digest.update(buffer)
            digests[name] = digest.hexdigest()
        folder.write_files(contents)
        return digests


def snapshot(
    state: TrainingState, about: dict[str, Any], callbacks: Sequence[Callback] = (), group: Group | None = None
) -> Snapshot:
    """Copy ``state`` to main memory, with ``about`` (config, workload) for state.json.

    If the state is sharded, all ranks of ``group`` must call this. Raises TrainingStoppedError or UsageError if a
    checkpoint cannot hold the state.
    """
    rank, num_parts = (group.rank, group.world_size) if group and state.is_sharded else (0, 1)
    of_optimizers = dict[str, Tensor]()
    training: dict[str, Any] = {name: getattr(state, name) for name in _COUNTERS}
    training |= {"sums": dataclasses.asdict(state.sums), "scaler": state.scaler.state_dict()}
    training["optimizers"] = {
        name: _split_state(name, optimizer, of_optimizers) for name, optimizer in state.optimizers.items()
    }
    training["schedulers"] = {name: scheduler.state_dict() for name, scheduler in state.schedulers.items()}
    training["callbacks"] = [callback.state_dict() for callback in callbacks]
    for callback, values in zip(callbacks, training["callbacks"], strict=True):
        check_kept(values, f"{type(callback).__name__}.state_dict")
    check_kept(state.read_to, "the training stream's state_dict")
    trained = {} if state.average is None else state.model.state_dict()
    tensors = {}
    for kind, of_kind in ((MODEL, state.result.state_dict()), (TRAINED, trained), (OPTIMIZER, of_optimizers)):
        check_held(of_kind)
        rows = {key: Rows.of(tensor) for key, tensor in of_kind.items()}  # a collective: of all tensors on all ranks
        own = {key: each.copied() for key, each in rows.items() if rank == 0 or 0 < each.start < each.stop}
        tensors[file_name(kind, rank, num_parts)] = own  # rank 0 also writes the tensors that all ranks have
    document = copy.deepcopy({"format": FORMAT, "epoch": state.epoch, "step": state.step, **about})
    copied = map_tensors(lambda tensor: tensor.detach().cpu().clone(), training) if rank == 0 else None
    return Snapshot(tensors, copied, document)


def check_kept(values: object, what: str) -> None:
    """Raise UsageError if a checkpoint cannot hold these values, since it is read with ``weights_only``."""
    saved = io.BytesIO()
    try:
        torch.save(values, saved)
        torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    except Exception as error:  # torch's own message would advise running code
        raise UsageError(f"{what} has more than numbers, strings, lists, dicts and tensors") from error


def _split_state(name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an optimizer's state without its tensors; add those to ``tensors`` by their keys in a file."""
    saved = optimizer.state_dict()
    others: dict[Any, dict[str, Any]] = {}
    for number, values in saved["state"].items():
        large = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.dim() > 0}
        tensors |= {f"{_parameter_key(name, number)}.{key}": value for key, value in large.items()}
        others[number] = {key: value for key, value in values.items() if key not in large}
    for parameter, values in optimizer.state.items():
        leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()]
        kept = [value for value in values.values() if isinstance(value, Tensor) and is_sharded(value)]
        if is_sharded(parameter) and len(kept) < len(leaves):
            raise TrainingStoppedError(
                f"--strategy fsdp: {type(optimizer).__name__} keeps a worker's rows in a plain or nested tensor",
                fix="create them with torch.zeros_like(parameter), and keep them by parameter and name",
            )
    return {**saved, "state": others}


def _parameter_key(optimizer: str, number: int) -> str:
    """Return how the keys of tensors in the state of an optimizer's parameter begin."""
    return f"{optimizer}:{number:d}" if optimizer else f"{number:d}"


def read(folder: RunFolder, state: TrainingState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return state.json, and what this rank needs for ``load``: its own rows if the state is sharded, else everything.

    That is the content of training.pt, with the tensors of optimizers, and the weights. Raises UsageError if there is
    no checkpoint, JobError if it is damaged or cannot be read.
    """
    document = read_state(folder)
    parameters = {
        _parameter_key(name, number): parameter
        for name, optimizer in state.optimizers.items()
        for number, parameter in enumerate(parameters_of(optimizer))
    }
    with reading(folder):
        content = read_checked(folder, TRAINING_FILE, document["sha256"][TRAINING_FILE])
        saved: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        of_parameters = {
            _parameter_key(name, number): values
            for name, optimizer in saved["optimizers"].items()
            for number, values in optimizer["state"].items()
        }
        tensors = tensors_of(folder, document, OPTIMIZER, lambda key: parameters.get(key.partition(".")[0]))
        for name, tensor in tensors.items():
            parameter, _, key = name.partition(".")
            of_parameters[parameter][key] = tensor
        saved["sums"] = MetricSums(**saved["sums"])
        saved[MODEL] = tensors_of(folder, document, MODEL, state.result.state_dict().get)
        saved[TRAINED] = tensors_of(folder, document, TRAINED, state.model.state_dict().get)
    return document, saved


def load(saved: dict[str, Any], state: TrainingState, callbacks: Sequence[Callback], folder: RunFolder) -> None:
    """Put what was read from a checkpoint into a newly created ``state``.

    Raises TrainingStoppedError if it does not fit; ``state`` may then be half loaded.
    """
    load_weights(state.result, saved[MODEL], folder)
    try:
        if state.average is not None:
            state.model.load_state_dict(saved[TRAINED])
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
            state.schedulers[name].load_state_dict(saved["schedulers"][name])
        state.scaler.load_state_dict(saved["scaler"])
        for callback, values in zip(callbacks, saved["callbacks"], strict=False):
            callback.load_state_dict(values)
    except OF_THE_MACHINE:
        raise
    except Exception as error:  # the digest is right, so the file is whole: the code must have changed
        reason = f"the optimizer, schedule or callback: {type(error).__name__}: {first_line(error)}"
        raise TrainingStoppedError(f"checkpoint {folder.uri} does not fit {reason}", fix="restore the code") from error
    for name in ("sums", *_COUNTERS):
        setattr(state, name, saved[name])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], folder: RunFolder) -> None:
    """Load weights into a model. Raises TrainingStoppedError."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = f"checkpoint {folder.uri} does not fit the model: {str(error).splitlines()[-1].strip()}"
        fix = "restore the code and the settings (the run's origin.json has the commit)"
        raise TrainingStoppedError(problem, fix=fix) from error


def restore_newest(
    run: RunFolder, state: TrainingState, callbacks: Sequence[Callback] = (), group: Group | None = None
) -> tuple[CheckpointMetrics, tuple[str, ...]]:
    """Load the newest intact checkpoint in a run's folder into ``state``; if there is none, leave ``state`` unchanged.

    Returns its metrics, and the names of newer checkpoints that were skipped: damaged, or from another version.

    All ranks of ``group`` must call this, and all restore the same checkpoint: one that all can read, of those that
    rank 0 sees; the others wait until their storage shows it. Raises TrainingStoppedError if the checkpoint does not
    fit the model, JobError if the storage cannot be read.
    """
    group, skipped = group or Group(), list[str]()
    with in_one_line(f"cannot read {run.uri}"):
        seen: dict[str, bool] = {}  # by name, the newest last: whether the checkpoint was written to its end
        if group.rank == 0:
            seen = with_retries(lambda: {name: run.inside(name).exists(STATE_FILE) for name in run.checkpoint_names()})
        for name, is_whole in reversed(group.gathered(seen)[0].items()):
            found, folder = None, run.inside(name)
            with contextlib.suppress(DamagedCheckpointError, UsageError):
                if is_whole:
                    with_retries(functools.partial(_check_visible, folder))
                found = read(folder, state)
            if all(group.gathered(found is not None)) and found is not None:
                document, saved = found
                load(saved, state, callbacks, folder)
                return CheckpointMetrics.of(document.get("metrics", {})), tuple(skipped)
            skipped.append(name)
    return CheckpointMetrics(), tuple(skipped)


def _check_visible(folder: RunFolder) -> None:
    if not folder.exists(STATE_FILE):
        raise FileNotFoundError(f"{folder.uri}, which another node sees")
