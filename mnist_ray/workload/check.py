"""One batch goes through a workload before anything is started: what does not fit is said in one line."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.errors import UsageError, count, first_line
from mnist_ray.provenance import cpu_has_bf16
from mnist_ray.workload.base import Workload
from mnist_ray.workload.source import placed
from mnist_ray.workload.tensors import as_fp32, autocast, detached

NUM_EXAMPLES = 16  # of the batch that is tried


def check_batch(workload: Workload, inputs: Any, targets: Any, config: TrainConfig) -> dict[str, Any] | None:
    """Let a batch, on the CPU, go through all that training and evaluation do with it, once.

    Returns the shape of one example as the model takes it, and its dtype; None where that is no tensor. Raises
    UsageError with the place in the user's file.
    """
    name, number = type(workload).__name__, len(targets)
    with placed(workload, "create_model"):
        torch.manual_seed(config.seed)
        model = workload.create_model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}.create_model returned {type(model).__name__}, not a torch.nn.Module")
    generator = torch.default_generator.manual_seed(config.seed)
    with placed(workload, "prepare"):
        prepared = [workload.prepare(inputs, generator_or_none) for generator_or_none in (generator, None)]
    is_lazy = any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters())
    if is_lazy:
        raise UsageError(f"{name}.create_model: a lazy layer has no shape yet; call the model once on an example there")
    with placed(workload, "the model"):
        model.train()
        with _autocast(config):
            outputs = as_fp32(model(prepared[0]))
    with placed(workload, "check_outputs"):
        workload.check_outputs(outputs, targets)
    with placed(workload, "loss"):
        losses = workload.loss(outputs, targets)
    _check_numbers(f"{name}.loss", losses, number)
    with placed(workload, "training_loss"):
        minimized = workload.training_loss(outputs, targets, config)
    if minimized is not None:
        _check_numbers(f"{name}.training_loss", minimized, number)
    if not losses.isfinite().all():
        raise UsageError(f"{name}.loss is not finite on the first {number} examples, with the initial weights")
    _check_metrics(workload, detached(outputs), targets)
    _check_gradients(workload, model, losses if minimized is None else minimized)
    with placed(workload, "predictions"):
        model.eval()
        with torch.no_grad():
            columns = workload.predictions(as_fp32(model(prepared[1])), targets)
    _check_dict(f"{name}.predictions", columns)
    for key, values in columns.items():
        _check_numbers(f"{name}.predictions: {key}", values, number)
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            found = f"{name}: the model's state_dict holds {key}, of type {type(value).__name__}"
            raise UsageError(f"{found}; a checkpoint keeps tensors: make it a buffer, or a setting")
    _check_optimizer(workload, model, config)
    if not isinstance(prepared[1], Tensor):
        return None
    return {"shape": list(prepared[1].shape[1:]), "dtype": str(prepared[1].dtype).removeprefix("torch.")}


def _check_metrics(workload: Workload, outputs: Any, targets: Any) -> None:
    """Let a workload measure a batch, and summarize that."""
    name, number = type(workload).__name__, len(targets)
    with placed(workload, "measure"):
        measured = workload.measure(outputs, targets)
    _check_dict(f"{name}.measure", measured)
    for key, values in measured.items():
        _check_numbers(f"{name}.measure: {key}", values, number)
    with placed(workload, "summarize"):
        summary = workload.summarize({key: float(values.double().mean()) for key, values in measured.items()})
    _check_dict(f"{name}.summarize", summary)
    if sorted(summary) != sorted(metric.name for metric in workload.metrics):
        named = f"{name}.metrics names {', '.join(metric.name for metric in workload.metrics) or 'none'}"
        raise UsageError(f"{name}.summarize returns {', '.join(summary) or 'nothing'}, but {named}")


def _check_optimizer(workload: Workload, model: nn.Module, config: TrainConfig) -> None:
    """Let a workload's own optimizer and schedule make a step; the usual ones would take PyTorch most of a second."""
    methods = ("create_optimizer", "create_scheduler")
    if all(getattr(type(workload), method) is getattr(Workload, method) for method in methods):
        return
    with placed(workload, "create_optimizer"):
        optimizer = workload.create_optimizer(model, config)
    with placed(workload, "create_scheduler"):
        scheduler = workload.create_scheduler(optimizer, config, total_steps=10)
    with placed(workload, "a step of the optimizer, and one of the schedule, without a metric, after it"):
        optimizer.step()
        scheduler.step()
    for method, state in zip(methods, (optimizer.state_dict(), scheduler.state_dict()), strict=True):
        try:
            saved = io.BytesIO()
            torch.save(state, saved)
            torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
        except Exception as error:  # what pickling a user's object raises may be anything
            place = f"{type(workload).__name__}.{method}"
            raise UsageError(
                f"{place}: a checkpoint holds tensors, numbers and texts, but not its state: {first_line(error)}"
            ) from error


def _autocast(config: TrainConfig) -> torch.autocast:
    """Return the context of a forward pass in the precision that the training will use on this machine."""
    usual: Precision = "bf16" if cpu_has_bf16() else "fp32"
    return autocast(torch.device("cpu"), usual if config.precision == "auto" else config.precision)


def check_smallest(workload: Workload, inputs: Any, number: int, batch_size: int, config: TrainConfig) -> None:
    """Let as few examples as a rank's slice may have go through a new model: batch normalization may want more.

    Raises UsageError.
    """
    model = workload.create_model().train()
    try:
        with _autocast(config):
            model(workload.prepare(inputs, torch.default_generator))
    except ValueError as error:
        raise UsageError(
            f"{type(workload).__name__}: an epoch's last batch leaves a worker {count(number, 'example')}, too few "
            f"for the model ({first_line(error)}); choose another --batch-size than {batch_size}"
        ) from error


def _check_gradients(workload: Workload, model: nn.Module, losses: Tensor) -> None:
    name = type(workload).__name__
    if not losses.requires_grad:
        raise UsageError(f"{name}.loss does not depend on the model's parameters: nothing would be learned")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    idle = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle:
        these = (
            f"parameter {idle[0]} takes" if len(idle) == 1 else f"parameters {idle[0]} and {len(idle) - 1} more take"
        )
        raise UsageError(f"{name}: {these} no part in the loss; leave out what is not used, or freeze it")


def _check_dict(place: str, value: object) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{place} returned {type(value).__name__}, not a dict")


def _check_numbers(place: str, values: object, number: int) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != (number,):
        got = f"{tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"{place} is to be one number per example, ({number},) here, not {got}")
