"""Sends one batch through a workload while Ray starts, and reports an error in one line."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import re
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree

from mnist_ray.checkpoints.checkpoint import check_kept, snapshot
from mnist_ray.checkpoints.tensor_files import check_held
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch
from mnist_ray.data.data import Split
from mnist_ray.data.readers import ItemReader
from mnist_ray.data.sampler import Request
from mnist_ray.data.tensors import detached, map_tensors
from mnist_ray.errors import UsageError, with_place
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.settings import values_of
from mnist_ray.text import count
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import LOGGED, WEIGHT, check_columns, check_logged
from mnist_ray.training.optimizers import create_optimizers
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import Loss, Step, forward
from mnist_ray.workload import Classification, Regression, Workload
from mnist_ray.workload.calls import check_numbers, picture_of, placed, seeded_model
from mnist_ray.workload.figures import NOT_PREDICTED
from mnist_ray.workload.user_code import check_members

NUM_EXAMPLES = 16  # in that batch, or fewer if they are slow
_NUM_REREAD = 8  # examples of the validation set; a transform may leave half of them as they are
_MAX_S = 1.0  # for all passes together
_NUM_PASSES = 6  # of that batch, if a backward pass counts as two
_OF_OPTIMIZER = {
    "optimizer",
    "learning_rate",
    "beta1",
    "beta2",
    "momentum",
    "weight_decay",
    "lr_schedule",
    "warmup_steps",
}


def try_batch(
    workload: Workload,
    train: Split,
    config: TrainConfig,
    batch_sizes: Sequence[int],
    part: Fraction,
    num_workers: int = 1,
) -> set[str] | None:
    """Send a batch through a workload, and the smallest micro-batch of each batch size. Raises UsageError.

    ``part``: the smallest part of a batch that a worker gets or, with --reproducible, computes at a time. Returns the
    settings that the workload's own loss, optimizer and schedule do not use; None if all are the usual ones.
    """

    def first(number: int) -> MicroBatch:
        with placed(workload, "an example"):
            return batches[Request(np.arange(number), number)]

    _check_callbacks(workload)
    with placed(workload, "an example"):
        batches = Batches(train, torch.device("cpu"), workload.collate)
        inputs, _ = train[0]
    picture_of(workload, inputs)
    model = new_model(workload, config)
    one = first(1)
    max_number = int(_MAX_S / _NUM_PASSES / _seconds_of(workload, model, one))
    number, is_slow = min(max(2, max_number), NUM_EXAMPLES, len(train)), max_number < 2
    with placed(workload, "an example"):
        last = batches[Request(np.arange(len(train) - number, len(train)), number)]
    others = [] if is_slow else [first((number + 1) // 2), one, last]
    unused = check_batch(workload, model, first(number), others, config, len(train), num_workers)
    for size in () if is_slow else batch_sizes:
        shares = [batch * part for batch in (size, len(train) % size or size)]
        numbers = [math.ceil(math.ceil(share) / (config.micro_batch_size or size)) for share in shares]
        smallest = max(1, min(int(share) // number for share, number in zip(shares, numbers, strict=True)))
        if smallest < NUM_EXAMPLES:
            check_smallest(workload, model, first(smallest), size, config)
    return unused


def note_of_transforms(workload: Workload, validation: Split) -> str:
    """Return a note if the validation set is held out from a ``Dataset`` whose examples change from read to read."""
    batches = Batches(validation, torch.device("cpu"), workload.collate)
    if validation.origin != "train" or not len(validation) or not isinstance(batches.reader, ItemReader):
        return ""
    few = Request(np.arange(min(_NUM_REREAD, len(validation))))
    read = list[list[Tensor]]()
    for seed in (0, 1):  # of the random numbers that examples draw
        batches.seed = seed
        with placed(workload, "an example for validation"):
            leaves = pytree.tree_leaves(batches[few])
        read.append([leaf.nan_to_num() for leaf in leaves if isinstance(leaf, Tensor)])
    if len(read[0]) == len(read[1]) and all(map(torch.equal, *read)):
        return ""
    found = "the validation set is held out from a Dataset whose examples change from read to read"
    return f"{found}: validation gets them, too; pass random transforms as Data(train_transform=…)"


def new_model(workload: Workload, config: TrainConfig) -> nn.Module:
    """Return a new model. Raises UsageError if it cannot be trained or saved."""
    with placed(workload, "create_model"):
        model = seeded_model(workload, config.seed)
    _check_model(type(workload).__name__, model)
    return model


def _seconds_of(workload: Workload, model: nn.Module, one: MicroBatch) -> float:
    """Return the seconds of an example's forward pass. If it fails, the checks report why."""
    times = []
    for _ in range(2):  # the first pass also warms up
        start = time.perf_counter()
        with contextlib.suppress(Exception, SystemExit), torch.no_grad():
            forward(workload, model.eval(), one)
        times.append(time.perf_counter() - start)
    return min(times)


def check_batch(
    workload: Workload,
    model: nn.Module,
    batch: MicroBatch,
    others: Sequence[MicroBatch],
    config: TrainConfig,
    num_examples: int,
    num_workers: int = 1,
) -> set[str] | None:
    """Call each method that training and evaluation will call, on a new ``model``.

    ``others``: two batches with the first examples of ``batch``, and one with other examples; none if that takes long.
    The run has ``num_examples`` to train on. Returns like ``try_batch``. Raises UsageError with the file name and line
    number of the user's code.
    """
    name, number, precision = type(workload).__name__, batch.global_size, resolve_precision(config.precision, Group())
    if workload.compares_examples and (config.reproducible or config.micro_batch_size):
        flag = "--reproducible" if config.reproducible else "--micro-batch-size"
        raise UsageError(f"{flag} cuts batches into parts, but {name}'s loss compares the examples of a batch")
    generator = torch.default_generator.manual_seed(config.seed)
    before = {key: value.detach().clone() for key, value in model.named_parameters() if config.reproducible}
    if sharding.is_wanted(config, num_workers):
        sharding.units_of(workload, model)
    with _forward_placed(workload, model, batch):
        outputs = forward(workload, model.train(), batch, precision, generator)
    targets = batch.targets
    for key, value in before.items():
        if not torch.equal(value, model.get_parameter(key)):
            found = f"{name}: the forward pass changes the parameter {key}, once per chunk with --reproducible"
            raise UsageError(f"{found}; make it a buffer, or change it in a callback")
    _check_containers(name, outputs, of_all_ranks=workload.compares_examples)
    with placed(workload, "check_outputs"):
        workload.check_outputs(outputs, targets)
    _check_loss(workload, outputs, targets, number)
    model.eval()
    evaluated, columns = _evaluated(workload, model, batch, "predictions")
    _check_dict(f"{name}.predictions", columns)
    if taken := {*NOT_PREDICTED} & columns.keys():
        raise UsageError(f"{name}.predictions: the column {min(taken)} has another meaning; choose another name")
    for key, values in columns.items():
        if not isinstance(values, Tensor) or values.shape[:1] != (number,):
            raise UsageError(f"{name}.predictions: {key} must be a tensor with {number} examples here, (N, ...)")
    _check_metrics(workload, detached(outputs), targets, columns, number)
    if others:
        *fewer, last = others
        of_last = f"predictions for the last {number} examples"
        with placed(workload, of_last):
            check_columns([columns, _evaluated(workload, model, last, of_last)[-1]])
        for few in () if workload.compares_examples else fewer:
            _check_independence(workload, model, evaluated, targets, few)
        if workload.compares_examples:
            _check_rows(name, evaluated, number, forward(workload, model, fewer[0]), fewer[0].num_examples)
        _check_reloaded(workload, model, batch, evaluated, config)
    return _check_step(workload, model, batch, config, config.total_steps(num_examples))


@contextlib.contextmanager
def _forward_placed(workload: Workload, model: nn.Module, batch: MicroBatch) -> Iterator[None]:
    """Turn an error of a forward pass into one line: its place and, if dtypes do not match, what to do."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        methods = (frame.f_code.co_name for frame in frames if frame.f_locals.get("self") is workload)
        if method := next(methods, ""):  # such as prepare
            with placed(workload, method):
                raise
        try:
            with placed(workload, "the model" + _layer_in(model, error)):
                raise
        except UsageError as in_one_line:
            raise UsageError(f"{in_one_line}{_remedy(workload, batch, str(in_one_line))}") from error


def _layer_in(model: nn.Module, error: BaseException) -> str:
    """Return the innermost layer of a model that has raised an error: ``, in layers.3 (Linear)``; empty if unknown."""
    names = {id(layer): name for name, layer in model.named_modules() if name}
    seen = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    layers = [layer for layer in seen if id(layer) in names]
    return f", in {names[id(layers[-1])]} ({type(layers[-1]).__name__})" if layers else ""


def _remedy(workload: Workload, batch: MicroBatch, message: str) -> str:
    """Return what to do about an error of the model if it is about dtypes, else nothing."""
    if not re.search("dtype|scalar type|bias type|not implemented for", message):
        return ""
    prepared = workload.prepare(batch.inputs, None)
    if isinstance(prepared, Tensor) and prepared.dtype != torch.float32:
        return "; return inputs.float() from prepare"
    if "Double" in message:
        return "; make all floats in the inputs float32, for example in prepare"
    if re.search("BFloat16|Half", message):
        return "; create one of the tensors with the other's new_zeros(…), or use --precision fp32"
    return ""


def _evaluated(workload: Workload, model: nn.Module, batch: MicroBatch, what: str) -> tuple[Any, dict[str, Tensor]]:
    """Evaluate a batch; return outputs and columns of predictions, which an error calls ``what``."""
    with torch.no_grad():
        with _forward_placed(workload, model, batch):
            outputs = forward(workload, model, batch)
        with placed(workload, what):
            return outputs, workload.predictions(outputs, batch.targets)


def check_smallest(workload: Workload, model: nn.Module, few: MicroBatch, batch_size: int, config: TrainConfig) -> None:
    """Try a model on as few examples as a rank may get: batch normalization may need more. Raises UsageError."""
    precision = resolve_precision(config.precision, Group())
    try:
        outputs = forward(workload, model.train(), few, precision, torch.default_generator)
        workload.loss(outputs, few.targets).sum()
    except Exception as error:  # of batch normalization, or of a model that squeezes a batch of one
        few_left = f"a worker computes only {count(few.global_size, 'example')} of some batches at a time"
        remedy = f"choose a --batch-size other than {batch_size}"
        remedy += ", or a larger --micro-batch-size" if config.micro_batch_size else ""
        reason = f"{few_left}, too few for the model ({with_place(error, workload.source.folder)}); {remedy}"
        raise UsageError(f"{type(workload).__name__}: {reason}") from error


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}.create_model returned {type(model).__name__}, not a torch.nn.Module")
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise UsageError(f"{name}.create_model: a lazy layer has no shape yet; first call the model on an example")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            found = f"{name}: the model's state_dict holds {key}, of type {type(value).__name__}"
            raise UsageError(f"{found}; a checkpoint keeps only tensors: use a buffer or a setting")
    check_held(model.state_dict())
    if odd := [key for key, value in model.named_parameters() if not value.isfinite().all()]:
        raise UsageError(
            f"{name}: the parameter {odd[0]} is not finite at the start; if it is a mask, make it a buffer"
        )


def _check_containers(name: str, outputs: Any, *, of_all_ranks: bool) -> None:
    """Raise UsageError if a model returns tensors in an object into which neither this package nor PyTorch looks."""
    for leaf in pytree.tree_leaves(outputs):
        is_seen = isinstance(leaf, Tensor) or (is_dataclass(leaf) and not of_all_ranks)
        if not is_seen and any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values()):
            found = f"{name}: the model returns tensors in a {type(leaf).__name__}, where they are not found"
            raise UsageError(f"{found}; return tensors, or dicts, lists and tuples of them")


def _check_loss(workload: Workload, outputs: Any, targets: Any, number: int) -> None:
    """Raise UsageError unless the loss and the weights of a batch of ``number`` examples fit them."""
    name = type(workload).__name__
    with placed(workload, "loss"):
        losses = workload.loss(outputs, targets)
    check_numbers(f"{name}.loss", losses, number, '; use reduction="none", average other dimensions')
    with placed(workload, "weights"):
        weights = workload.weights(targets)
    if weights is not None:
        check_numbers(f"{name}.weights", weights, number)
        if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise UsageError(f"{name}.weights must be finite numbers from 0, not all of them 0")
        if type(workload).loss in (Classification.loss, Regression.loss):
            remedy = "return super().loss(outputs, targets) * self.weights(targets)"
            raise UsageError(f"{name} has weights, so it needs a loss of its own that multiplies by them: {remedy}")
    if not losses.isfinite().all():
        raise UsageError(f"{name}.loss is not finite on the first {number} examples with the initial weights")


def _check_independence(workload: Workload, model: nn.Module, outputs: Any, targets: Any, fewer: MicroBatch) -> None:
    """Raise UsageError if an example's loss or measure changes when others leave the batch.

    What changes on every call passes. ``outputs`` and ``targets`` are those of the whole batch. The model must be in
    evaluation mode.
    """
    are_close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-5, equal_nan=True)
    name = type(workload).__name__

    def values(outputs: Any, targets: Any) -> dict[str, Tensor]:
        measured = workload.measure(detached(outputs), targets)
        return {"loss": workload.loss(outputs, targets), **{key: each.double() for key, each in measured.items()}}

    def alone() -> dict[str, Tensor]:
        return values(forward(workload, model, fewer), fewer.targets)

    with placed(workload, f"an evaluation of {count(fewer.global_size, 'example')}"), torch.no_grad():
        first, among = alone(), values(outputs, targets)
        changed = [key for key, own in first.items() if not are_close(own, among[key][: fewer.global_size])]
        again = alone() if changed else first
        changed = [key for key in changed if are_close(first[key], again[key])]
    if "loss" in changed:
        raise UsageError(
            f"{name}: an example's loss changes if other examples leave the batch, so it depends on the number of "
            "workers; mask the padding, or set compares_examples = True if intended"
        )
    if changed:
        raise UsageError(
            f"{name}.measure: {changed[0]} of an example changes if other examples leave the batch, so its mean over "
            "batches is not that over all examples; compute it in summarize_predictions"
        )


def _check_rows(name: str, outputs: Any, number: int, of_fewer: Any, fewer: int) -> None:
    """Raise UsageError unless each output has a row per example, or is the same for any batch, like a temperature.

    One that always has as many rows is no temperature: a slice could have that number of examples, too.
    """
    for leaf, few in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(of_fewer), strict=False):
        if not isinstance(leaf, Tensor):
            continue
        is_same = leaf.shape == few.shape and torch.equal(leaf, few)
        if is_same and leaf.dim() and len(leaf) > 1:
            found = f"{name}: the model returns a tensor of {len(leaf)} rows for each batch, as if they were examples"
            raise UsageError(f"{found}; with compares_examples, return it as (1, …)")
        if not is_same and (leaf.shape[:1], few.shape) != ((number,), (fewer, *leaf.shape[1:])):
            found = f"{name}: an output is {tuple(leaf.shape)} for {number} examples and {tuple(few.shape)} for {fewer}"
            raise UsageError(f"{found}; with compares_examples, return a row per example, such as its views (N, 2, …)")


def _check_reloaded(workload: Workload, model: nn.Module, batch: MicroBatch, outputs: Any, config: TrainConfig) -> None:
    """Raise UsageError if another new model with the same weights computes something else than ``outputs``.

    Models whose outputs change on every call pass. The model must be in evaluation mode.
    """
    with placed(workload, "create_model"):
        again = seeded_model(workload, config.seed + 1).eval()  # an evaluation has another seed, too
    with placed(workload, "a checkpoint's weights in another new model"), torch.no_grad():
        again.load_state_dict(model.state_dict())
        first = workload.loss(outputs, batch.targets)
        reloaded = workload.loss(forward(workload, again, batch), batch.targets)
        is_same = torch.allclose(first, reloaded, rtol=1e-3, atol=1e-5)
        if not is_same and torch.equal(first, workload.loss(forward(workload, model, batch), batch.targets)):
            found = f"{type(workload).__name__}: another new model computes something else with the same state_dict"
            raise UsageError(f"{found}; make random tensors buffers, and keep layers in an nn.ModuleList")


def _check_metrics(workload: Workload, outputs: Any, targets: Any, columns: dict[str, Tensor], number: int) -> None:
    name = type(workload).__name__
    with placed(workload, "measure"):
        measured = workload.measure(outputs, targets)
    _check_dict(f"{name}.measure", measured)
    if taken := {"loss", WEIGHT} & measured.keys():
        raise UsageError(f"{name}.measure: the {min(taken)} is already measured; choose another name")
    for key, values in measured.items():
        check_numbers(f"{name}.measure: {key}", values, number)
    with placed(workload, "summarize"):
        summary = workload.summarize({key: float(values.double().mean()) for key, values in measured.items()})
    _check_dict(f"{name}.summarize", summary)
    with placed(workload, "summarize_predictions"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few examples may lack some class
        arrays = {key: values.numpy() for key, values in columns.items()}
        of_all = workload.summarize_predictions(arrays)
    with placed(workload, "details or lines"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        json.dumps(workload.details(arrays))
        workload.lines(arrays)
    _check_dict(f"{name}.summarize_predictions", of_all)
    for key, value in {**summary, **of_all}.items():
        try:
            float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name}: metric {key} is {value!r:.40}, not a number") from error
    names = [metric.name for metric in workload.all_metrics[1:]]  # without the loss
    if sorted([*summary, *of_all]) != sorted(names):
        methods = f"{name}.summarize" + (f" and {name}.summarize_predictions return" if of_all else " returns")
        named = f"{name}.metrics names {', '.join(names) or 'none'}"
        raise UsageError(f"{methods} {', '.join([*summary, *of_all]) or 'nothing'}, but {named}")


def _check_callbacks(workload: Workload) -> None:
    """Raise UsageError unless the workload's own callbacks are objects whose methods can be called."""
    with placed(workload, "callbacks"):
        found = copy.deepcopy([*workload.callbacks])
    for callback in found:
        if not isinstance(callback, Callback):
            raise UsageError(f"{type(workload).__name__}.callbacks must hold Callback objects, not {callback!r:.40}")
        check_members(type(callback), Callback)


class _TrialStep(Step):
    """A step that counts the gradients; the default optimizers do not step, since they import for most of a second."""

    num_gradients = 0
    has_optimizers = False

    def backward(self, loss: Loss, name: str = "loss", *, optimizer: str | None = None) -> None:
        self.num_gradients += 1
        super().backward(loss, name, optimizer=optimizer)

    def update(self, optimizer: str | None = None, closure: Any = None) -> None:
        if self.has_optimizers:
            super().update(optimizer, closure)


def _check_step(
    workload: Workload, model: nn.Module, batch: MicroBatch, config: TrainConfig, total_steps: int
) -> set[str] | None:
    """Take a step; return the settings that the workload's step, optimizers and schedules do not use.

    Returns None if they use all.
    """
    own, name = type(workload), type(workload).__name__
    precision = resolve_precision(config.precision, Group())
    for_step, used_by_step = _recorded(dataclasses.replace(config, precision=precision, reproducible=False))
    for_optimizers, used = _recorded(config)
    state, has_optimizers = TrainingState(model, {}, {}), False
    if (own.create_optimizer, own.create_scheduler) != (Workload.create_optimizer, Workload.create_scheduler):
        has_optimizers = True
        state.optimizers, state.schedulers = create_optimizers(workload, model, for_optimizers, total_steps)
    step = _TrialStep(workload, state, for_step, Group())
    step.has_optimizers = has_optimizers
    trained, before = dict[str, bool](), map_tensors(torch.clone, batch)  # whether a gradient is sparse

    def note(key: str, parameter: Tensor) -> None:
        trained[key] = parameter.grad is not None and parameter.grad.is_sparse

    noting = [
        parameter.register_post_accumulate_grad_hook(functools.partial(note, key))
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    model.train()
    try:
        with placed(workload, "training_step"):
            with step.on([batch]):
                workload.training_step(step)
            step.take_logged()
            check_logged(workload, [key.removeprefix(LOGGED) for key in step.sums if key.startswith(LOGGED)])
    except UsageError as error:
        if "'closure'" not in str(error):
            raise
        remedy = "override training_step: step.update(closure=lambda: step.backward(self.batch_loss))"
        raise UsageError(f"{error}; {remedy}") from error
    finally:
        for hook in noting:
            hook.remove()
    changed = [not torch.equal(*pair) for pair in zip(*map(_tensors_in, (before, batch)), strict=True)]
    if any(changed) and step.num_gradients > 1:
        found = f"{name}: a batch is changed in place, but training_step computes several gradients from it"
        raise UsageError(f"{found}; make new tensors, also in prepare")
    _check_trained(workload, model, trained)
    for scheduler in state.schedulers.values():
        _check_schedule(workload, scheduler)
    if has_optimizers:
        content = "tensors, numbers and strings, as torch.optim returns them"
        with placed(workload, f"a checkpoint of the state_dict of optimizer and schedule ({content})"):
            check_kept(snapshot(state, {}).training)
    unused = _OF_OPTIMIZER - used if has_optimizers else config.unused
    unused = unused | ({"label_smoothing"} - used_by_step)
    return None if not has_optimizers and unused == config.unused else unused


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _check_trained(workload: Workload, model: nn.Module, trained: Mapping[str, bool]) -> None:
    """Raise UsageError if the gradient of a parameter is sparse or, unexpectedly, missing."""
    name = type(workload).__name__
    if sparse := [key for key, is_sparse in trained.items() if is_sparse]:
        raise UsageError(f"{name}: the gradient of {sparse[0]} is sparse; create its layer without sparse=True")
    idle = [key for key, parameter in model.named_parameters() if parameter.requires_grad and key not in trained]
    if idle and not workload.has_unused_parameters:
        found = f"parameters {idle[0]} and {len(idle) - 1} more are" if len(idle) > 1 else f"parameter {idle[0]} is"
        remedy = "remove or freeze them; if other steps use them, set has_unused_parameters = True"
        raise UsageError(f"{name}: {found} not part of the loss; {remedy}")


def _check_schedule(workload: Workload, scheduler: Any) -> None:
    """Step a schedule. Raises UsageError."""
    monitor = workload.monitor
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != monitor.mode:
        found = f"{type(workload).__name__}: ReduceLROnPlateau has mode={scheduler.mode!r}"
        raise UsageError(f"{found}, but looks at {monitor.name}; create it with mode={monitor.mode!r}")
    with placed(workload, "scheduler.step()"):
        scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))


def _recorded(config: TrainConfig) -> tuple[TrainConfig, set[str]]:
    """Return a copy of the config, and a set that records which of the copy's settings are read."""
    used = set[str]()

    class Recording(TrainConfig):
        def __getattribute__(self, name: str) -> Any:
            used.add(name)
            return super().__getattribute__(name)

    return Recording(**values_of(config)), used


def _check_dict(place: str, value: object) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{place} returned {type(value).__name__}, not a dict")
