"""This process's rank among those that train together, and the precision on which they agree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mnist_ray.config import Precision
from mnist_ray.provenance import cpu_has_bf16


@dataclass(frozen=True)
class Group:
    """This process's rank and device. With several ranks, ``torch.distributed`` is initialized."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def resolve_precision(precision: Precision, group: Group) -> Precision:
    """Turn ``auto`` into bf16 if the processors or GPUs of all ranks support it in hardware, else into fp32."""
    if precision != "auto":
        return precision
    on_gpu = group.device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
    supported = torch.tensor(int(has_bf16), device=group.device)
    if group.world_size > 1:
        dist.all_reduce(supported, dist.ReduceOp.MIN)
    return "bf16" if supported.item() else "fp32"
