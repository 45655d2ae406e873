"""The ranks that train together: what they tell each other, and the precision on which they agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from mnist_ray.config import Precision
from mnist_ray.provenance import cpu_has_bf16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """This process's rank and device. With several ranks, ``torch.distributed`` is initialized.

    All ranks must call a method at the same time.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gathered(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the ranks' order; they are pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)


def resolve_precision(precision: Precision, group: Group) -> Precision:
    """Turn ``auto`` into bf16 if the processors or GPUs of all ranks support it in hardware, else into fp32."""
    if precision != "auto":
        return precision
    on_gpu = group.device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
    return "bf16" if all(group.gathered(has_bf16)) else "fp32"


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, from those of this rank; ``sizes`` are their numbers by rank.

    In the backward pass, each rank gets the sum of what all ranks' losses send back to its rows. So the gradients are
    those of one process, also for a number that the model returns, such as a temperature: the ranks' parts add up.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank, ctx.shape = sizes, rank, own.shape
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: sizes[rank]] = own[: sizes[rank]]
        data = padded.view(torch.uint8)  # as bytes: gloo does not know all types
        of_ranks = [torch.empty_like(data) for _ in sizes]
        dist.all_gather(of_ranks, data)
        return torch.cat([rows.view(own.dtype)[:size] for rows, size in zip(of_ranks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        start = sum(ctx.sizes[: ctx.rank])
        own = whole.new_zeros(ctx.shape)  # a filler, which no rank's losses see, keeps zeros
        own[: ctx.sizes[ctx.rank]] = whole[start : start + ctx.sizes[ctx.rank]]
        return own, None, None


def of_all_ranks(outputs: Any, targets: Any, group: Group, num_own: int, *, is_filler: bool) -> tuple[Any, Any, slice]:
    """Return outputs and targets of the global batch, and the rows of this rank's slice of ``num_own`` examples.

    For losses that compare examples. A filler, whose loss does not count, has the first row. Tensors without a row for
    each example, such as a temperature, stay as they are. All ranks must call this.
    """
    leaves, form = pytree.tree_flatten((outputs, targets))
    fits = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == num_own for leaf in leaves]
    sizes = [0] * group.world_size
    sizes[group.rank] = 0 if is_filler else num_own
    # A temperature of shape (1,) fits a slice of one example, so a tensor has rows only if it fits on every rank.
    found = torch.tensor([*sizes, *fits], device=group.device)
    dist.all_reduce(found)
    sizes, fitting = found[: group.world_size].tolist(), found[group.world_size :].tolist()
    whole = [
        _Gathered.apply(leaf, sizes, group.rank) if number == group.world_size else leaf  # type: ignore[no-untyped-call]
        for leaf, number in zip(leaves, fitting, strict=True)
    ]
    start = sum(sizes[: group.rank])
    own = slice(0, 1) if is_filler else slice(start, start + num_own)
    return *pytree.tree_unflatten(whole, form), own
