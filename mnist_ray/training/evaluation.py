"""Evaluates a model in plain PyTorch: alone, or each rank on some of the batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, batch_loader, to_device
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request, split_bounds
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.metrics import WEIGHT, Evaluation, check_columns
from mnist_ray.training.step import check_per_example, forward, measured_of
from mnist_ray.workload.base import Workload


def evaluate_together(
    workload: Workload,
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    group: Group,
    num_loader_processes: int = 0,
    on_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Evaluate a model, each rank on some of the batches. Every rank returns what ``evaluate`` would, bit for bit."""
    if group.world_size == 1:
        return evaluate(workload, model, split, config, num_loader_processes, on_batch)
    for buffer in model.buffers():  # running statistics of batch normalization may differ between ranks
        dist.broadcast(buffer, 0)
    size = batch_size_of(workload, model, config)
    bounds = split_bounds(len(split), group.world_size, size)
    start, stop = bounds[group.rank] if group.rank < len(bounds) else (0, 0)
    with sharding.resharded(model) as has_units:
        own = evaluate(workload, model, split.take(slice(start, stop)), config, num_loader_processes, on_batch)
        num_passes = [math.ceil((last - first) / size) for first, last in bounds]
        for _ in range(math.ceil((stop - start) / size), max(num_passes) if has_units else 0):
            evaluate(workload, model, split.take(slice(1)), config)  # all ranks together gather the units
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


def batch_size_of(workload: Workload, model: nn.Module, config: TrainConfig) -> int:
    """Return how many examples an evaluation computes at a time.

    Unless the workload sets the number, it is a divisor of the default, at most the size of a micro-batch.
    """
    size = workload.evaluation_batch_size(on_gpu=_device_of(model).type == "cuda")
    is_own = type(workload).evaluation_batch_size is not Workload.evaluation_batch_size
    limit = size if is_own or workload.compares_examples else min(size, config.micro_batch_size or size)
    return next(number for number in range(limit, 0, -1) if size % number == 0)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def evaluate(
    workload: Workload,
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    num_loader_processes: int = 0,
    on_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Evaluate a model on its device in fp32, in fixed batches.

    ``config`` is the training's. ``on_batch`` is called before each batch.
    """
    device = _device_of(model)
    bounds = split_bounds(len(split), len(split), batch_size_of(workload, model, config))
    requests = [Request(np.arange(*ends)) for ends in bounds]
    sums: list[dict[str, Tensor]] = []  # these and the columns stay on the device, since each transfer waits for it
    columns: list[dict[str, Tensor]] = []
    losses: list[dict[str, Tensor]] = []
    batches = Batches(split, device, workload.collate, workload.find_fault)
    loader = batch_loader(batches, requests, device, num_loader_processes)
    with evaluating(model):
        for loaded in loader:
            on_batch()
            batch = to_device(loaded, device)
            outputs = forward(workload, model, batch)
            loss = workload.loss(outputs, batch.targets)
            check_per_example(f"{type(workload).__name__}.loss", loss, batch.num_examples)
            values = {"loss": loss, **measured_of(workload, outputs, batch.targets, batch.num_examples)}
            sums.append({name: each.sum() for name, each in values.items()})
            columns.append(workload.predictions(outputs, batch.targets))
            losses.append({name: values[name] for name in ("loss", WEIGHT) if name in values})
    by_name = {name: torch.stack([one[name].double() for one in sums]).tolist() for name in (sums or [{}])[0]}
    batch_sums = [{name: values[number] for name, values in by_name.items()} for number in range(len(sums))]
    check_columns(columns)
    return Evaluation(tuple(batch_sums), len(split), _joined(columns), _joined(losses))


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in (parts or [{}])[0]}
