"""The ranks that train together: what they tell each other, and the precision on which they agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
