"""A step's gradients, computed for each micro-batch and added up over micro-batches and ranks."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch, seed_generators
from mnist_ray.data.tensors import buffers_kept, rows_here
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.reproducible import Chunks
from mnist_ray.training import open_step
from mnist_ray.training.metrics import MINIMIZED, WEIGHT
from mnist_ray.training.parts import Parts, add_over_ranks
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import forward, per_example, sums_of
from mnist_ray.training.stopwatch import WORKERS
from mnist_ray.workload import Workload


class Gradients:
    """Computes a step's gradients.

    DDP averages them over the ranks. FSDP adds them up (``sharding`` turns its averaging off) and leaves each rank its
    rows. With ``--reproducible``, Chunks adds them up.
    """

    def __init__(self, workload: Workload, state: TrainingState, config: TrainConfig, group: Group) -> None:
        self._workload, self._state, self._config, self._group = workload, state, config, group
        self._is_sharded = state.is_sharded
        self._parts = state.optimizer if isinstance(state.optimizer, Parts) else None
        self._generator = _generator(group.device)
        self._ready_at: Any = None  # for the stopwatch: when this rank had its own gradients
        self._noting: RemovableHandle | None = None
        self.minimized: Tensor | None = None  # like the sums, of the last step's minimized loss if it is another one
        self.has_weight = True  # False if all example weights of the global batch are 0: there is nothing to learn
        self._of_model, groups = [*state.model.parameters()], state.optimizer.param_groups
        self._parameters = [*{*self._of_model, *itertools.chain(*(group["params"] for group in groups))}]
        self._prepare()
        if group.world_size > 1 and not self._is_sharded and not isinstance(self._model, DistributedDataParallel):
            for tensor in (*state.model.parameters(), *state.model.buffers()):  # of rank 0, as DDP does
                dist.broadcast(tensor.detach(), 0)

    def _prepare(self) -> None:
        """Prepare to add up the gradients of the parameters that are trained now."""
        self._trained = self._are_trained()
        if not any(self._trained):
            raise TrainingStoppedError("all parameters are frozen; keep some trainable, or end the training")
        state, config, group, has_unused = self._state, self._config, self._group, self._workload.has_unused_parameters
        self._chunks: Chunks | None = None
        if config.reproducible:
            self._chunks = Chunks(
                state.model,
                config.num_chunks,
                group.rank,
                group.world_size,
                has_unused_parameters=has_unused or self._parts is not None,
            )
        adds_up_itself = config.reproducible or self._is_sharded or self._parts is not None
        self._model = state.model if adds_up_itself else _distributed(state.model, group, has_unused)
        self._ranks_averaged = group.world_size if isinstance(self._model, DistributedDataParallel) else 1
        if self._noting is not None:
            self._noting.remove()
        if isinstance(self._model, DistributedDataParallel):
            first = next(parameter for parameter in self._of_model if parameter.requires_grad)
            self._noting = first.register_post_accumulate_grad_hook(self._note_ready)  # it is the last to be ready

    def compute(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Put the gradients into the model; return sums over this rank's slice: of the losses, measures and weights.

        Each is one number or, with ``--reproducible``, has one per chunk, 0 for chunks of other ranks. Raises
        TrainingStoppedError if all parameters are frozen or, with ``--strategy fsdp``, others than before.
        """
        if self._parts is None:
            self._follow_changes()
        with self._parts.alone() if self._parts else contextlib.nullcontext():
            chunks = self._chunks
            sums = self._of_slice(micro_batches) if chunks is None else self._of_chunks(micro_batches, chunks)
        self.minimized = sums.pop(MINIMIZED, None)
        if self._ready_at is not None:
            self._state.watch.turn(WORKERS, self._ready_at)
            self._ready_at = None
        if WEIGHT in sums:
            self.has_weight = self._divide_by_weights(sums[WEIGHT], micro_batches[0].global_size)
        return sums

    def clear(self) -> None:
        """Drop all gradients, also those of parameters that the optimizer or the model does not have."""
        for parameter in self._parameters:  # model.zero_grad() would walk through all modules
            parameter.grad = None

    def _note_ready(self, parameter: Tensor) -> None:
        self._ready_at = self._state.watch.now()

    def _divide_by_weights(self, own_sum: Tensor, global_size: int) -> bool:
        """Divide the gradients by the global batch's sum of example weights, instead of by its size.

        Returns, on all ranks alike, whether the sum differs from 0; to know that, this waits for a GPU. If it is 0, the
        step is skipped; if a weight is negative, it is NaN, and closing the window raises an error.
        """
        weight_sum = own_sum.clone()
        if self._group.world_size > 1:
            dist.all_reduce(weight_sum)
        weight_sum = weight_sum.sum()  # over the chunks
        gradients = [rows_here(p.grad) for p in self._state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, global_size / weight_sum)  # they are already divided by the size
        return bool(weight_sum != 0)

    def _follow_changes(self) -> None:
        """If a callback has frozen or unfrozen parameters, prepare for those that are trained now."""
        if self._trained == self._are_trained():
            return
        if self._is_sharded:
            found = "--strategy fsdp: a callback has changed requires_grad during training"
            raise TrainingStoppedError(f"{found}; change it in on_start")
        self._prepare()

    def _are_trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._of_model]

    def _of_slice(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        self._seed(self._group.rank)
        sums_itself = self._parts is not None and self._group.world_size > 1
        if self._is_sharded or sums_itself:
            for buffer in self._model.buffers():  # as DDP does: rank 0's are the ones that checkpoints keep
                dist.broadcast(buffer, 0)
        total: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            with self._accumulating(is_last=micro_batch.ends_step):
                sums = self._backward(micro_batch, self._ranks_averaged / micro_batch.global_size)
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
        if sums_itself:
            add_over_ranks(self._state.model)
        return total

    def _accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Add up gradients over the ranks only in the backward pass of a step's last micro-batch."""
        if self._is_sharded:
            self._model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        elif isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def _of_chunks(self, micro_batches: Sequence[MicroBatch], chunks: Chunks) -> dict[str, Tensor]:
        for chunk, micro_batch in zip(chunks.start_step(), micro_batches, strict=True):
            self._seed(chunk)
            chunks.collect(chunk, self._backward(micro_batch, 1 / micro_batch.global_size))
        if self._group.world_size > 1:
            self._ready_at = self._state.watch.now()
        return chunks.apply(min(self._config.num_chunks, micro_batches[0].global_size))

    def _seed(self, number: int) -> None:
        """Seed augmentation and dropout by epoch, step, and the number of the rank or, with chunks, of the chunk."""
        seed = seed_of(self._config.seed, self._state.epoch, number) + self._state.step
        seed_generators(seed)
        self._generator.manual_seed(seed)

    def _backward(self, micro_batch: MicroBatch, factor: float) -> dict[str, Tensor]:
        scaler, group = self._state.scaler, self._group
        try:
            with buffers_kept(self._model) if micro_batch.is_filler else contextlib.nullcontext():
                return backward(
                    self._workload,
                    self._model,
                    micro_batch,
                    self._config,
                    factor,
                    self._generator,
                    scaler,
                    group,
                    self._parts.part if self._parts else "",
                )
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            name = type(self._workload).__name__
            found = f"{name}: some parameters had no gradient in the last step"
            raise TrainingStoppedError(f"{found}; set has_unused_parameters = True if that is intended") from error


@functools.lru_cache
def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _generator(device: torch.device) -> torch.Generator:
    """Return the device's default generator: of the augmentation in ``prepare``, and of layers such as dropout."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def backward(
    workload: Workload,
    model: nn.Module,
    micro_batch: MicroBatch,
    config: TrainConfig,
    factor: float,
    generator: torch.Generator | None = None,
    scaler: GradScaler | None = None,
    group: Group | None = None,
    part: str = "",
) -> dict[str, Tensor]:
    """Add the gradients of ``factor`` × the sum of a micro-batch's losses to the model's, scaled by ``scaler``.

    With a factor of 1 / global batch size, the gradients of all slices add up to that of the global batch's mean loss,
    even if slices are uneven. DDP averages over the ranks instead, so its factor is world size / global batch size. A
    filler adds zeros. Returns the sums over the micro-batch, like ``sums_of``, with that of the minimized loss if it is
    not the reported one. In a ``group``, losses that compare examples see those of all ranks; with several optimizers,
    ``part`` is the name of one.
    """
    if open_step.is_open(workload):
        own = generator or torch.default_generator, group or Group(), part
        outputs, targets, loss_sum, minimized = open_step.forward_open(workload, model, micro_batch, config, *own)
    else:
        outputs, targets = forward(workload, model, micro_batch, config.precision, generator)
        loss_sum = per_example(workload, "loss", workload.loss(outputs, targets), micro_batch.num_examples).sum()
        minimized = workload.training_loss(outputs, targets, config)
        if minimized is not None:
            minimized = per_example(workload, "training_loss", minimized, micro_batch.num_examples).sum()
    loss = (loss_sum if minimized is None else minimized) * (0.0 if micro_batch.is_filler else factor)
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    sums = sums_of(workload, outputs, targets, loss_sum, micro_batch.num_examples)
    if minimized is not None:
        sums[MINIMIZED] = minimized.detach()
    return {name: torch.zeros_like(value) for name, value in sums.items()} if micro_batch.is_filler else sums


def _distributed(model: nn.Module, group: Group, has_unused_parameters: bool) -> nn.Module:
    """Wrap a model so that gradients are averaged over the ranks; with one rank, return it unchanged.

    A parameter without a gradient on all ranks keeps none, if ``has_unused_parameters``.
    """
    if group.world_size == 1:
        return model
    if group.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[group.device], find_unused_parameters=has_unused_parameters)
    wrapped = DistributedDataParallel(model, find_unused_parameters=has_unused_parameters)
    shared_memory.use_if_possible(wrapped)
    return wrapped
