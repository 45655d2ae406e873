"""Several models as one, whose outputs are averaged as their workload defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mnist_ray.data.tensors import as_fp32
from mnist_ray.workload.base import Workload


class Ensemble(nn.Module):
    """Calls each model; ``Workload.average`` makes one output of theirs."""

    def __init__(self, workload: Workload, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self._workload, self.models = workload, nn.ModuleList(models)

    def forward(self, inputs: Any) -> Any:
        """Return the averaged outputs for a batch of prepared inputs, in fp32."""
        return self._workload.average([as_fp32(model(inputs)) for model in self.models])
