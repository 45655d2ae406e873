"""Gradients whose bits do not depend on the number of workers: ``--reproducible``.

The last bits of a sum depend on the order of its additions. Here each global batch is cut into a fixed number of
chunks. Each chunk's gradient is computed separately, on one thread, and the gradients are added up along a fixed tree
over the chunks. Each rank adds up the subtrees of its own chunks; then the ranks exchange and add up these sums.
The idea comes from EasyScale (https://arxiv.org/abs/2208.14228) and VirtualFlow (https://arxiv.org/abs/2009.09523).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.order import part_of
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel.gradients import GradientSync
from mnist_ray.parallel.group import Group
from mnist_ray.provenance import arithmetic


def check_arithmetic(group: Group) -> None:
    """Raise TrainingStoppedError, on every rank, if results could depend on which rank computes them."""
    (first_host, first), *others = group.gathered((socket.gethostname(), arithmetic()))
    for host, own in others:
        differing = [name for name, values in own.items() if values != first[name]]
        if differing:
            found = f"{first_host} and {host} differ in {' and '.join(differing)}"
            raise TrainingStoppedError(f"--reproducible needs machines that are alike: {found}")


class Subtree(NamedTuple):
    """The sum over 2^``level`` neighbouring chunks, starting at chunk ``number`` × 2^``level``."""

    level: int
    number: int
    vector: Tensor


def added_up(nodes: Iterable[Subtree]) -> list[Subtree]:
    """Add up neighbours that are the two halves of a subtree. ``nodes`` cover neighbouring chunks, in order.

    The bits of a sum do not depend on which rank does which addition.
    """
    grown: list[Subtree] = []
    for node in nodes:
        while node.number % 2 and grown and grown[-1][:2] == (node.level, node.number - 1):
            node = Subtree(node.level + 1, node.number // 2, grown.pop().vector + node.vector)
        grown.append(node)
    return grown


class Chunks(GradientSync):
    """Collects the gradients of this rank's chunks and turns them into the global batch's gradients.

    Every chunk of a step starts with the same buffers (such as the running statistics of batch normalization). The step
    changes them by the mean of the chunks' changes. Complex buffers must be constant.
    """

    def __init__(self, model: nn.Module, group: Group, num_chunks: int, on_ready: Callable[[], None]) -> None:
        super().__init__(model, group, on_ready)
        self._own, self._num_chunks = part_of(num_chunks, group.rank, group.world_size), num_chunks
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._dtype = functools.reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        self._nodes: list[Subtree] = []  # the sums over this rank's chunks
        self._chunk = self._num_filled = 0

    def plan(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[int | None, MicroBatch]]:
        """Keep the model's buffers as they are before the step; yield this rank's chunks with their numbers."""
        self._before = [buffer.clone() for buffer in self._buffers()]
        self._num_filled = min(self._num_chunks, micro_batches[0].global_size)  # over all ranks; others are fillers
        for chunk, micro_batch in zip(self._own, micro_batches, strict=True):
            self._chunk = chunk
            yield chunk, micro_batch

    @contextlib.contextmanager
    def accumulate(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Move the chunk's gradients out of the model, and restore the buffers."""
        yield
        self._nodes = added_up([*self._nodes, Subtree(0, self._chunk, self._flattened())])
        for parameter in self._parameters:
            parameter.grad = None
        for buffer, before in zip(self._buffers(), self._before, strict=True):
            buffer.copy_(before)

    def collect(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a chunk's sums with a number for each chunk, 0 for the others.

        So sums over the ranks are exact, and can be added up in one order.
        """
        of_chunks = {name: value.new_zeros(self._num_chunks, dtype=torch.float64) for name, value in sums.items()}
        for name, value in sums.items():
            of_chunks[name][self._chunk] = value
        return of_chunks

    def finish(self) -> None:
        """Put the global batch's gradients and buffers into the model."""
        if self.group.world_size > 1:
            self._on_ready()
        nodes = added_up(self._of_all_ranks())
        self._nodes = []
        total = functools.reduce(operator.add, (node.vector for node in nodes))
        tensors = [*self._parameters, *self._before]
        *values, used = total.split([*(tensor.numel() for tensor in tensors), len(self._parameters)])
        shaped = [value.view_as(tensor) for value, tensor in zip(values, tensors, strict=True)]
        number = len(self._parameters)
        for parameter, gradient, times in zip(self._parameters, shaped[:number], used.tolist(), strict=True):
            # In the parameter's layout. The optimizer skips a parameter that no chunk has used.
            parameter.grad = torch.empty_like(parameter).copy_(gradient) if times else None
        for buffer, before, change in zip(self._buffers(), self._before, shaped[number:], strict=True):
            mean = change.double() / self._num_filled
            buffer.copy_(torch.where(mean == 0, before, (before.double() + mean).to(before.dtype)))

    def _of_all_ranks(self) -> Iterator[Subtree]:
        """Yield the sums over the chunks of all ranks, in the ranks' order; each rank knows which sums others have."""
        own = {(node.level, node.number): node.vector for node in self._nodes}
        for rank in range(self.group.world_size):
            chunks = part_of(self._num_chunks, rank, self.group.world_size)
            for level, number, _ in added_up(Subtree(0, chunk, torch.empty(0)) for chunk in chunks):
                vector = own[level, number] if rank == self.group.rank else torch.empty_like(self._nodes[0].vector)
                if self.group.world_size > 1:
                    dist.broadcast(vector, rank)
                yield Subtree(level, number, vector)

    def _buffers(self) -> list[Tensor]:
        """Return the buffers: ``forward`` or a callback may have replaced them by others of the same shape."""
        return [buffer for buffer in self.model.buffers() if not buffer.is_complex()]

    def _flattened(self) -> Tensor:
        """Return one vector: the model's gradients, its buffers' changes since the step began, and what was used."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        pairs = zip(self._buffers(), self._before, strict=True)
        changes = [torch.where(new == old, 0.0, new.double() - old.double()) for new, old in pairs]  # ±inf may stay
        is_used = gradients[0].new_tensor([float(p.grad is not None) for p in self._parameters])
        return torch.cat([part.reshape(-1).to(self._dtype) for part in (*gradients, *changes, is_used)])
