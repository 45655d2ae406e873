"""Several models as one, whose outputs are averaged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, nn

from mnist_ray.data.tensors import as_fp32, map_tensors
from mnist_ray.workload.base import Workload


class Ensemble(nn.Module):
    """Calls each model with its own inputs; ``Workload.average`` makes one output of theirs."""

    def __init__(self, workload: Workload, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self._workload, self.models = workload, nn.ModuleList(models)

    def forward(self, inputs: Sequence[Any]) -> Any:
        """Return the averaged outputs for a batch, prepared for each model, in fp32."""
        return self._workload.average([as_fp32(model(own)) for model, own in zip(self.models, inputs, strict=True)])


def ensemble_of(members: Sequence[tuple[Workload, nn.Module]]) -> tuple[Workload, Ensemble]:
    """Return a workload that prepares a batch for each member, as its settings and metadata say, and the ensemble."""
    workloads, models = zip(*members, strict=True)

    def prepare(inputs: Any, generator: Generator | None) -> list[Any]:
        return [own.prepare(map_tensors(torch.clone, inputs), generator) for own in workloads]  # perhaps in place

    together = copy.copy(workloads[0])
    together.prepare = prepare  # type: ignore[method-assign]
    return together, Ensemble(together, models)
