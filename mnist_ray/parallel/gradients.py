"""How the gradients of all ranks are added up: one interface in four forms.

A step's ``backward`` asks a form for its ``plan``, computes each micro-batch within ``accumulate``, and then calls
``finish``. After that, each rank has the gradient of the sum of the losses of all ranks; FSDP's ranks have their rows.
``reproducible.Chunks`` is the form whose bits do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_ray.data.batches import MicroBatch
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group

_NOTHING = contextlib.nullcontext()


class GradientSync:
    """Adds up at once when all gradients are computed: for any loss, and for parameters that change from call to call.

    All ranks must call the methods at the same steps.
    """

    factor = 1
    """What a rank's losses must be multiplied by: more than 1 if gradients are averaged over the ranks."""

    def __init__(self, model: nn.Module, group: Group, on_ready: Callable[[], None]) -> None:
        self.model, self.group = model, group
        self.called = model  # what a loss calls for a forward pass
        self._on_ready = on_ready  # called when this rank has its own gradients, and waits for those of others

    def plan(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[int | None, MicroBatch]]:
        """Yield each micro-batch with the number to seed by before it: before the first one, that of the rank."""
        for place, micro_batch in enumerate(micro_batches):
            yield None if place else self.group.rank, micro_batch

    def accumulate(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Return the context of a micro-batch's forward and backward pass."""
        return _NOTHING

    def collect(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums over a micro-batch in the form in which those of a step are added up."""
        return sums

    def finish(self) -> None:
        """Complete the gradients; give all ranks the buffers of rank 0, which checkpoints keep."""
        if self.group.world_size > 1:
            self._on_ready()
            add_over_ranks(self.model)
            self._share_buffers()

    def close(self) -> None:
        """Remove the hooks: another form of adding up follows."""

    def _share_buffers(self) -> None:
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)


class Bucketed(GradientSync):
    """DDP adds up some gradients while others are computed, if the loss calls DDP's module."""

    def __init__(
        self, model: nn.Module, group: Group, on_ready: Callable[[], None], *, has_unused_parameters: bool
    ) -> None:
        super().__init__(model, group, on_ready)
        self._is_last = True  # whether the step ends with this micro-batch
        devices = [group.device] if group.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, devices, find_unused_parameters=has_unused_parameters)
        self._ddp.register_forward_pre_hook(self._note_call)
        self.called = self._ddp
        if devices is None:
            shared_memory.use_if_possible(self._ddp)
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        self._noting = first.register_post_accumulate_grad_hook(self._note_ready)  # it is the last to be ready

    @contextlib.contextmanager
    def accumulate(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Let DDP add up only in the backward pass of the last micro-batch.

        Raises TrainingStoppedError if some parameters had no gradient in the last step.
        """
        self.factor, self._is_last = 1, micro_batch.ends_step
        try:
            with _NOTHING if micro_batch.ends_step else self._ddp.no_sync():
                yield
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            problem = "some parameters had no gradient in the last step"
            raise TrainingStoppedError(f"{problem}; set has_unused_parameters = True if that is intended") from error

    def finish(self) -> None:
        """Add up what DDP has not."""
        if self.factor == 1:
            super().finish()

    def close(self) -> None:
        """Remove the hook."""
        self._noting.remove()

    def _note_call(self, *_: Any) -> None:
        self.factor = self.group.world_size

    def _note_ready(self, _: Tensor) -> None:
        if self._is_last:
            self._on_ready()


class Sharded(GradientSync):
    """FSDP adds up; ``sharding`` has turned its averaging off."""

    def accumulate(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Let FSDP add up only in the backward pass of the last micro-batch."""
        self.model.set_requires_gradient_sync(micro_batch.ends_step)  # type: ignore[operator]
        return _NOTHING

    def finish(self) -> None:
        """Give all ranks the buffers of rank 0."""
        self._share_buffers()

    def close(self) -> None:
        """Raise TrainingStoppedError: FSDP notes at the start which gradients it adds up."""
        found = "--strategy fsdp: a callback has changed requires_grad during training"
        raise TrainingStoppedError(f"{found}; change it in on_start")


def add_over_ranks(model: nn.Module) -> None:
    """Add up the gradients over all ranks; a parameter without a gradient on all ranks keeps none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = gradients[0].new_tensor([float(p.grad is not None) for p in parameters])
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used])
    dist.all_reduce(flat)
    *sums, used = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, total, number in zip(parameters, sums, used.tolist(), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(total.view_as(parameter)) if number else None
