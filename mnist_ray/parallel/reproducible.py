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
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.gradients import GradientSync
from mnist_ray.parallel.group import Group
from mnist_ray.provenance import arithmetic


def check_arithmetic(group: Group) -> None:
    """Raise TrainingStoppedError, on every rank, if results could depend on which rank computes them."""
    (first_host, first), *others = group.gathered((socket.gethostname(), arithmetic()))
    for host, own in others:
        for name, values in own.items():
            if values != first[name]:
                raise TrainingStoppedError(
                    f"--reproducible needs machines with the same versions, processor and caches: "
                    f"{first_host} has {_but(first[name], values)}, {host} has {_but(values, first[name])}"
                )


def _but(values: Sequence[str], others: Sequence[str]) -> str:
    return " ".join(value for value in values if value not in others) or "nothing extra"


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
    changes them by the mean of the chunks' changes.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        num_chunks: int,
        on_ready: Callable[[], None],
        *,
        has_unused_parameters: bool = False,
    ) -> None:
        super().__init__(model, group, on_ready)
        self._own, self._num_chunks = part_of(num_chunks, group.rank, group.world_size), num_chunks
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._owners = [(part, name) for part in model.modules() for name, _ in part.named_buffers(recurse=False)]
        self._first = [_as_real(getattr(module, name)) for module, name in self._owners]
        self._dtype = functools.reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        self._has_unused = has_unused_parameters
        self._nodes: list[Subtree] = []
        self._chunk = self._num_filled = 0
        self._total: Callable[[Tensor], Tensor] | None = None  # set at the first step, when a row's length is known

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
        rows = torch.stack([node.vector for node in self._nodes])  # one per subtree
        self._total = self._total or self._connect(rows.shape[1])
        gradients, changes, used = self._unflattened(self._total(rows))
        self._nodes = []
        for parameter, gradient, is_used in zip(self._parameters, gradients, used, strict=True):
            # In the parameter's layout. The optimizer skips a parameter that no chunk has used.
            parameter.grad = torch.empty_like(parameter).copy_(gradient) if is_used else None
        for buffer, before, change in zip(self._buffers(), self._before, changes, strict=True):
            mean = change.double() / self._num_filled
            buffer.copy_(torch.where(mean == 0, before, (before.double() + mean).to(before.dtype)))

    def _buffers(self) -> list[Tensor]:
        """Return the buffers: ``forward`` or a callback may have replaced them by others of the same shape."""
        now = [_as_real(getattr(module, name)) for module, name in self._owners]
        return [new if new.shape == first.shape else first for new, first in zip(now, self._first, strict=True)]

    def _flattened(self) -> Tensor:
        """Return one vector: the model's gradients, its buffers' changes since the step began, and what was used."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        pairs = zip(self._buffers(), self._before, strict=True)
        changes = [torch.where(new == old, 0.0, new.double() - old.double()) for new, old in pairs]  # ±inf may stay
        is_used = [float(p.grad is not None) for p in self._parameters] if self._has_unused else []
        parts = (*gradients, *changes, gradients[0].new_tensor(is_used))
        return torch.cat([part.reshape(-1).to(self._dtype) for part in parts])

    def _unflattened(self, vector: Tensor) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        """Return a vector's gradients, shaped like the parameters; changes, like the buffers; and what was used."""
        tensors, number = [*self._parameters, *self._before], len(self._parameters)
        *values, used = torch.split(vector, [*(tensor.numel() for tensor in tensors), number * self._has_unused])
        shaped = [value.view_as(tensor) for value, tensor in zip(values, tensors, strict=True)]
        is_used = (used != 0).tolist() if self._has_unused else [True] * number
        return shaped[:number], shaped[number:], is_used

    def _connect(self, size: int) -> Callable[[Tensor], Tensor]:
        """Return a function from this rank's rows, of ``size`` numbers each, to the sum over all ranks' rows.

        All ranks must call this method, and then the function, at the same steps; all get the same sum.
        """
        none = torch.empty(0)
        of_ranks = [
            added_up(Subtree(0, chunk, none) for chunk in part_of(self._num_chunks, rank, self.group.world_size))
            for rank in range(self.group.world_size)
        ]
        known = [node[:2] for nodes in of_ranks for node in nodes]  # level and number of each row's subtree

        def total(rows: Tensor) -> Tensor:
            nodes = added_up(Subtree(*subtree, row) for subtree, row in zip(known, rows, strict=True))
            return functools.reduce(operator.add, (node.vector for node in nodes))

        if self.group.world_size == 1:
            return total
        num_rows = [len(nodes) for nodes in of_ranks]
        memory = shared_memory.open_together(num_rows, size) if self._dtype == torch.float32 else None
        if memory is None:
            return lambda rows: total(_gathered(rows, self.group.rank, num_rows))
        exchanged = shared_memory.Exchange(memory, self.group.rank, num_rows, size)
        return lambda rows: total(exchanged(rows))


def _gathered(rows: Tensor, rank: int, num_rows: Sequence[int]) -> Tensor:
    """Return the rows of all ranks, in the ranks' order, through the process group."""
    of_ranks = [rows.new_empty(number, rows.shape[1]) for number in num_rows]
    of_ranks[rank] = rows
    for other, part in enumerate(of_ranks):
        dist.broadcast(part, other)
    return torch.cat(of_ranks)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
