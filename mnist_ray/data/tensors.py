"""Functions for tensors in nested containers, such as a model's outputs, and for a model's precision and layout."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mnist_ray.config import Precision


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to each tensor in nested dicts, lists, tuples and dataclasses; keep other values."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: map_tensors(function, getattr(value, name)) for name in fields})
    if isinstance(value, dict):
        mapped = copy.copy(value)  # of the same class
        for key, item in value.items():  # a Counter's update would count the pairs
            mapped[key] = map_tensors(function, item)
        return mapped
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def as_fp32(outputs: Any) -> Any:
    """Return a model's outputs with floating-point tensors in fp32, for the loss."""
    return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs)


def detached(outputs: Any) -> Any:
    """Return a model's outputs without their autograd graph, which would occupy memory."""
    return map_tensors(Tensor.detach, outputs)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo the block's changes of a model's buffers, such as the running statistics of batch normalization."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context for a model's forward pass; ``precision`` must not be ``auto``.

    A weight that is used twice is cast once, and its copy is kept until the context ends, unless it is sharded.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    first = next(model.parameters(), torch.empty(0))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(first.device.type, dtype, cache_enabled=not is_sharded(first))


def with_fast_layout(model: nn.Module) -> nn.Module:
    """Return a model with channels-last weights, the fastest layout for convolutions of images."""
    if any(tensor.dim() == 5 for tensor in (*model.parameters(), *model.buffers())):  # PyTorch would raise
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, without importing that class, which takes a second."""
    return hasattr(tensor, "to_local")


def rows_here(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds: some of a ``DTensor``, otherwise all."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor
