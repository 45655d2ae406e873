"""Evaluates a model in plain PyTorch: alone, or each rank on some of the batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch, batch_loader, to_device
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request, split_bounds
from mnist_ray.errors import UsageError
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.metrics import WEIGHT, Evaluation, check_columns
from mnist_ray.training.step import check_per_example, forward, measured_of
from mnist_ray.workload.base import Workload

MAX_OUTPUT_BYTES = 2**26  # of outputs computed at a time, unless the workload sets the batch size
MAX_COLUMN_BYTES = 2**30  # of predictions that a process keeps in memory


def evaluate_together(
    workload: Workload,
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    group: Group,
    num_loader_processes: int = 0,
    on_batch: Callable[[int], object] = lambda num_done: None,
    batch_size: int | None = None,
) -> Evaluation:
    """Evaluate a model, each rank on some of the batches. Every rank returns what ``evaluate`` would, bit for bit."""
    size = batch_size or batch_size_of(workload, model, split, config, num_loader_processes)
    if group.world_size == 1:
        return evaluate(workload, model, split, config, num_loader_processes, on_batch, size)
    for buffer in model.buffers():  # running statistics of batch normalization may differ between ranks
        dist.broadcast(buffer, 0)
    bounds = split_bounds(len(split), group.world_size, size)
    start, stop = bounds[group.rank] if group.rank < len(bounds) else (0, 0)
    own_passes, *passes = (math.ceil((last - first) / size) for first, last in ((start, stop), *bounds))
    with sharding.resharded(model) as has_units:
        own = evaluate(workload, model, split.between(start, stop), config, num_loader_processes, on_batch, size)
        for _ in range(own_passes, max(passes) if has_units else 0):  # all ranks together gather the units
            evaluate(workload, model, split.between(0, 1), config, batch_size=size)
    return Evaluation.merge(group.gathered(own)[: len(bounds)])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; restore its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # in inference mode, a model could not train with the tensors that it caches
            yield
    finally:
        model.train(modes[model])  # calls the modules' own train(), if they have any
        for module, is_training in modes.items():
            module.training = is_training  # a callback may keep layers in evaluation mode


@contextlib.contextmanager
def _not_compiled(model: nn.Module) -> Iterator[None]:
    """Run a model without ``--compile``: it would be compiled for the shape of each batch."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def batch_size_of(
    workload: Workload, model: nn.Module, split: Split, config: TrainConfig, num_loader_processes: int = 0
) -> int:
    """Return how many examples an evaluation computes at a time: the same number for any part of the examples.

    Unless the workload sets the number, it is a divisor of the default, limited by the size of a micro-batch and by
    MAX_OUTPUT_BYTES of outputs, as estimated from the first example.
    """
    device = _device_of(model)
    size = workload.evaluation_batch_size(on_gpu=device.type == "cuda")
    is_own = type(workload).evaluation_batch_size is not Workload.evaluation_batch_size
    if is_own or workload.compares_examples or not len(split):
        return size
    batches = Batches(Split(split.examples, np.arange(1), split.origin), device, workload.collate)
    (first,) = batch_loader(batches, [Request(np.arange(1))], device, min(1, num_loader_processes))
    with evaluating(model), _not_compiled(model):
        outputs = forward(workload, model, to_device(first, device))
    num_bytes = sum(leaf.nbytes for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    limit = min(size, config.micro_batch_size or size, MAX_OUTPUT_BYTES // max(1, num_bytes))
    return next(number for number in range(max(1, limit), 0, -1) if size % number == 0)


def evaluate(
    workload: Workload,
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    num_loader_processes: int = 0,
    on_batch: Callable[[int], object] = lambda num_done: None,
    batch_size: int | None = None,
) -> Evaluation:
    """Evaluate a model on its device in fp32, in fixed batches.

    ``config`` is the training's. ``on_batch`` is called before each batch, with the number of examples that are done.
    Raises UsageError if the columns are too large.
    """
    device = _device_of(model)
    batch_size = batch_size or batch_size_of(workload, model, split, config, num_loader_processes)
    requests = [Request(np.arange(*bounds)) for bounds in split_bounds(len(split), len(split), batch_size)]
    sums: list[dict[str, Tensor]] = []  # these and the columns stay on the device, since each transfer waits for it
    columns: list[dict[str, Tensor]] = []
    losses: list[dict[str, Tensor]] = []
    is_finite: list[Tensor] = [torch.ones(0, dtype=torch.bool, device=device)]
    num_bytes = 0
    batches = Batches(split, device, workload.collate, workload.find_fault)
    loader = batch_loader(batches, requests, device, num_loader_processes)
    with evaluating(model):
        for request, loaded in zip(requests, loader, strict=True):
            on_batch(int(request.indices[0]))
            values, of_batch = _evaluated(workload, model, to_device(loaded, device))
            sums.append({name: each.sum() for name, each in values.items()})
            columns.append(of_batch)
            losses.append({name: values[name] for name in ("loss", WEIGHT) if name in values})
            is_finite.append(torch.stack([each.isfinite() for each in values.values()]).all(0))
            num_bytes += sum(values.nbytes for values in columns[-1].values())
            if num_bytes > MAX_COLUMN_BYTES:
                name, size = f"{type(workload).__name__}.predictions", f"{MAX_COLUMN_BYTES / 2**20:,.0f} MiB"
                raise UsageError(f"{name}: columns of {len(split):,} {workload.nouns} exceed {size}; make them smaller")
    by_name = {name: torch.stack([one[name].double() for one in sums]).tolist() for name in (sums or [{}])[0]}
    batch_sums = tuple(dict(zip(by_name, values, strict=True)) for values in zip(*by_name.values(), strict=True))
    check_columns(columns)
    return Evaluation(batch_sums, len(split), _joined(columns), _joined(losses), torch.cat(is_finite).cpu().numpy())


def _evaluated(workload: Workload, model: nn.Module, batch: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss, measures and weights of a batch, and the columns of its predictions, (N, ...) each."""
    outputs, targets = forward(workload, model, batch), batch.targets
    loss = workload.loss(outputs, targets)
    check_per_example(f"{type(workload).__name__}.loss", loss, batch.num_examples)
    values = {"loss": loss, **measured_of(workload, outputs, targets, batch.num_examples)}
    return values, workload.predictions(outputs, targets)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in (parts or [{}])[0]}
