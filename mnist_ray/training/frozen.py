"""What checkpoints leave out with ``keeps_frozen = False``: the parameters that ``create_model`` returns frozen."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mnist_ray.errors import TrainingStoppedError
from mnist_ray.workload.base import Workload

T = TypeVar("T")


@dataclass(frozen=True)
class LeftOut:
    """Parameters that a checkpoint does not hold, by their names in the ``state_dict``; a tied one has several."""

    names: tuple[str, ...] = ()
    sha256: str = ""  # of their names, types, shapes and bytes

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: Iterable[str]) -> LeftOut:
        """Return those of the ``tensors`` that have one of the names."""
        found = {name: tensors[name] for name in sorted(names) if name in tensors}
        digest = hashlib.sha256()
        for name, tensor in found.items():
            digest.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
            values: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(values.numpy())
        return cls(tuple(found), digest.hexdigest()) if found else cls()

    def kept(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return the others of the tensors: those that a checkpoint holds."""
        left_out = {*self.names}
        return {name: tensor for name, tensor in tensors.items() if name not in left_out}

    def completed(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, together with the model's own for those that it does not hold."""
        own = model.state_dict()
        return {**{name: own[name] for name in self.names}, **tensors}

    def copy_of(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model, for its EMA, that shares these parameters, since they never change."""
        names = {*self.names}
        shared: dict[int, Any] = {id(value): value for name, value in model.named_parameters() if name in names}
        return copy.deepcopy(model, shared)

    def check_frozen(self, model: nn.Module) -> None:
        """Raise TrainingStoppedError if one of the parameters is trained now: a checkpoint would lose it."""
        left_out = {*self.names}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in left_out and parameter.requires_grad:
                remedy = "leave it frozen, or set keeps_frozen = True"
                raise TrainingStoppedError(f"a callback has unfrozen {name}, which checkpoints leave out; {remedy}")


def left_out_of(workload: Workload, model: nn.Module) -> LeftOut:
    """Return what checkpoints of a new model leave out: nothing, unless the workload has ``keeps_frozen = False``."""
    if workload.keeps_frozen:
        return LeftOut()
    named = model.named_parameters(remove_duplicate=False)
    return LeftOut.of(model.state_dict(), [name for name, parameter in named if not parameter.requires_grad])
