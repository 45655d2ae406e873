"""A step's gradients: of each micro-batch, added up over micro-batches and ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.tensors import rows_here
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.reproducible import Chunks
from mnist_ray.training.metrics import WEIGHT
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import forward, sums_of
from mnist_ray.training.stopwatch import WORKERS
from mnist_ray.workload import Workload


class Gradients:
    """Computes a step's gradients.

    DDP averages them over the ranks, FSDP adds them up and leaves each rank its rows; with ``--reproducible``, Chunks
    adds them up.
    """

    def __init__(self, workload: Workload, state: TrainingState, config: TrainConfig, group: Group) -> None:
        self._workload, self._state, self._config, self._group = workload, state, config, group
        self._chunks: Chunks | None = None
        if config.reproducible:
            self._chunks = Chunks(state.model, config.num_chunks, group.rank, group.world_size)
        self._is_sharded = state.is_sharded
        adds_up_itself = config.reproducible or self._is_sharded
        self._model = state.model if adds_up_itself else _distributed(state.model, group)
        self._num_averaged = group.world_size if isinstance(self._model, DistributedDataParallel) else 1
        self._trained = [parameter.requires_grad for parameter in state.model.parameters()]
        self._generator = _generator(group.device)
        self._ready_at: Any = None  # when this rank had its gradients, and began to wait for those of other ranks
        self.have_weight = True  # False if the weights of the whole global batch are 0: there is nothing to learn
        if isinstance(self._model, DistributedDataParallel):
            first = next(parameter for parameter in state.model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._note_ready)  # a backward pass ends with the first layers

    def compute(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Put the gradients into the model; return this rank's part of the sums over the global batch, or its chunks.

        Raises TrainingStoppedError, at an epoch's start, if other parameters than at first are trained.
        """
        if self._state.step == 0:
            self._check_trained()
        sums = self._of_slice(micro_batches) if self._chunks is None else self._of_chunks(micro_batches, self._chunks)
        if self._ready_at is not None:
            self._state.watch.turn(WORKERS, self._ready_at)
            self._ready_at = None
        if WEIGHT in sums:
            self.have_weight = self._divide_by(sums[WEIGHT], micro_batches[0].global_size)
        return sums

    def _note_ready(self, parameter: Tensor) -> None:
        self._ready_at = self._state.watch.now()

    def _divide_by(self, weight: Tensor, global_size: int) -> bool:
        """Divide the gradients by the ``weight`` of the global batch, of which this rank has a part.

        Returns whether it differs from 0, on all ranks alike; to know that, this waits for a GPU.
        """
        weight = weight.clone()
        if self._group.world_size > 1:
            dist.all_reduce(weight)
        weight = weight.sum()  # over the chunks
        gradients = [rows_here(p.grad) for p in self._state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, global_size / weight)  # they are divided by the size already
        return bool(weight != 0)

    def _check_trained(self) -> None:
        """Raise TrainingStoppedError if other parameters than at first are trained: their gradients would be wrong."""
        must_be_same = self._model is not self._state.model or self._chunks is not None
        if must_be_same and self._trained != [parameter.requires_grad for parameter in self._state.model.parameters()]:
            raise TrainingStoppedError("a callback has changed requires_grad in mid-training; change it in on_start")

    def _of_slice(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        self._seed(self._group.rank)
        if self._is_sharded:
            for buffer in self._model.buffers():  # as DDP does: rank 0's are the ones that checkpoints keep
                dist.broadcast(buffer, 0)
        total: dict[str, Tensor] = {}
        for batch in micro_batches:
            with self._accumulating(is_last=batch.ends_step):
                sums = self._backward(batch, self._num_averaged / batch.global_size)
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
        return total

    def _accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Let the backward pass of a step's last micro-batch add up over the ranks what has accumulated on each."""
        if self._is_sharded:
            self._model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        elif isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def _of_chunks(self, micro_batches: Sequence[MicroBatch], chunks: Chunks) -> dict[str, Tensor]:
        for chunk, batch in zip(chunks.start_step(), micro_batches, strict=True):
            self._seed(chunk)
            chunks.collect(chunk, self._backward(batch, 1 / batch.global_size))
        if self._group.world_size > 1:
            self._ready_at = self._state.watch.now()
        return chunks.apply()

    def _seed(self, number: int) -> None:
        """Seed augmentation and dropout by epoch, step, and the number of the rank or, if there are any, the chunk."""
        for generator in {torch.default_generator, self._generator}:
            generator.manual_seed(seed_of(self._config.seed, self._state.epoch, number) + self._state.step)

    def _backward(self, batch: MicroBatch, weight: float) -> dict[str, Tensor]:
        scaler = self._state.scaler
        return backward(self._workload, self._model, batch, self._config, weight, self._generator, scaler)


@functools.lru_cache
def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator of random numbers for layers such as dropout."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def backward(
    workload: Workload,
    model: nn.Module,
    batch: MicroBatch,
    config: TrainConfig,
    weight: float,
    generator: torch.Generator | None = None,
    scaler: GradScaler | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of ``weight`` × the sum of a batch's losses to the model's, scaled by ``scaler``.

    Returns the sums of the loss and of the workload's measures, on the device. With a weight of 1 / global batch size,
    the gradients of slices add up to those of the global batch's mean loss, even if slices are uneven. DDP averages
    over the ranks, so with DDP the weight is multiplied by the world size. A filler adds zeros.
    """
    outputs, targets = forward(workload, model, batch, config.precision, generator)
    loss_sum = workload.loss(outputs, targets).sum()
    minimized = workload.training_loss(outputs, targets, config)
    loss = (loss_sum if minimized is None else minimized.sum()) * (0.0 if batch.is_filler else weight)
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    sums = sums_of(workload, outputs, targets, loss_sum)
    return {name: torch.zeros_like(value) for name, value in sums.items()} if batch.is_filler else sums


def _distributed(model: nn.Module, group: Group) -> nn.Module:
    """Wrap a model so that gradients are averaged over the ranks; with one rank, return it unchanged."""
    if group.world_size == 1:
        return model
    if group.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[group.device])
    wrapped = DistributedDataParallel(model)
    shared_memory.use_if_possible(wrapped)
    return wrapped
