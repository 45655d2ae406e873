"""A training step as a workload's ``training_step`` sees it, and a batch's path through the model.

The path, ``forward``, is the same in training, evaluation and prediction.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.readers import seed_generators
from mnist_ray.data.tensors import as_fp32, autocast, buffers_kept, detached, is_sharded, rows_here
from mnist_ray.errors import UsageError
from mnist_ray.parallel.gradients import Bucketed, GradientSync, Sharded
from mnist_ray.parallel.group import Group, of_all_ranks
from mnist_ray.parallel.reproducible import Chunks
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import COUNT, LOGGED, MINIMIZED, WEIGHT
from mnist_ray.training.state import TrainingState, parameters_of
from mnist_ray.training.stopwatch import CALLBACKS, COMPUTE, OPTIMIZER, WORKERS
from mnist_ray.workload import Classification, Regression, Workload

_NOTHING = contextlib.nullcontext()
_MINIMIZED = "minimized"  # the sum of a call's losses
Loss = Callable[[nn.Module, MicroBatch, "Step"], Tensor]
"""Returns the losses to minimize of a micro-batch, (N,)."""


def forward(
    workload: Workload,
    model: nn.Module,
    batch: MicroBatch,
    precision: Precision = "fp32",
    generator: torch.Generator | None = None,
) -> Any:
    """Return the model's outputs for a batch on its device, in fp32.

    ``precision`` is that of the model alone, and must not be ``auto``. ``generator`` is for augmentation in training.
    """
    inputs = workload.prepare(batch.inputs, generator)
    with autocast(model, precision):
        return as_fp32(model(inputs))


def check_per_example(place: str, values: Any, number: int) -> None:
    """Raise UsageError unless what ``place`` has returned is a number for each example, (number,)."""
    if not isinstance(values, Tensor) or values.shape != (number,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        remedy = 'use reduction="none", and 0 for examples that do not count, also in weights()'
        raise UsageError(f"{place} must be one number per example, ({number},) here, not {got}; {remedy}")


def measured_of(workload: Workload, outputs: Any, targets: Any, number: int) -> dict[str, Tensor]:
    """Return the workload's measures and, if it has any, the weights of each of the ``number`` examples, (number,).

    A negative weight is NaN. Raises UsageError unless each example has its values.
    """
    name = type(workload).__name__
    measured, example_weights = workload.measure(detached(outputs), targets), workload.weights(targets)
    if example_weights is not None and type(workload).measure in (Classification.measure, Regression.measure):
        measured = {key: values * example_weights for key, values in measured.items()}  # these ignore weights
    for key, values in measured.items():
        check_per_example(f"{name}.measure: {key}", values, number)
    if example_weights is not None:
        check_per_example(f"{name}.weights", example_weights, number)
        measured[WEIGHT] = torch.where(example_weights >= 0, example_weights, math.nan)
    return measured


class Step:
    """What a workload's ``training_step`` gets. All ranks must make the same calls."""

    def __init__(
        self,
        workload: Workload,
        state: TrainingState,
        config: TrainConfig,
        group: Group,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model, self.optimizers, self.config = state.model, state.optimizers, config
        self.generator = _generator(group.device)  # seeded for each ``backward``, as the global generators are
        self.sums: dict[str, Tensor] = {}  # over this rank's slice; with --reproducible, a number for each chunk
        self.gradient_norm: Tensor | None = None  # the largest of the step's updates, before clipping
        self._workload, self._state, self._group, self._callbacks = workload, state, group, callbacks
        self._name = type(workload).__name__
        in_optimizers = [p for each in state.optimizers.values() for p in parameters_of(each)]
        self._parameters = [*{*state.model.parameters(), *in_optimizers}]
        self._syncs: dict[str | None, tuple[list[bool], GradientSync]] = {}  # by optimizer, with what is trained
        self._sync = GradientSync(state.model, group, self._on_ready)  # of the last ``backward``
        self._micro_batches: Sequence[MicroBatch] = ()
        self._micro_batch: MicroBatch | None = None  # whose losses are computed now
        self._found: dict[str, Tensor] = {}  # sums over its examples
        self._reported: Tensor | None = None  # its losses that ``measure`` has reported, (N,)
        self._minimized = torch.zeros(())  # sum of the losses of the last ``backward``
        self._weight: Tensor | None = None  # the global batch's sum of example weights, if there are any
        if len(self.optimizers) > 1:
            self._check_flags("several optimizers")

    @contextlib.contextmanager
    def on(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Take a step on this rank's slice of a batch inside the block. Raises UsageError if it has no gradient."""
        self._micro_batches = micro_batches
        self.sums = {}
        self.gradient_norm = None
        yield
        if not self.sums:
            raise UsageError(f"{self._name}.training_step must call step.backward")
        self.sums.setdefault("loss", self.sums.pop(_MINIMIZED))  # of the first ``backward``
        _clear(self._parameters)

    def take_logged(self) -> None:
        """Add to the step's sums what was logged outside of losses."""
        for name, values in self._state.logged.items():
            self.sums = _added(self.sums, self._sync.collect(logged(name, torch.stack(values).sum(), len(values))))
        self._state.logged.clear()

    def backward(self, loss: Loss, name: str = "loss", *, optimizer: str | None = None) -> None:
        """Compute the gradient of the mean of ``loss`` over the global batch, in place of earlier gradients.

        ``loss(model, batch, step)`` returns the losses of a micro-batch, (N,). It is called for each micro-batch of
        this rank's slice, in the run's precision. With the name of an ``optimizer``, only its parameters are trained.
        Each ``backward`` in a step meets the same random numbers. The mean is logged by ``name``; of several with the
        same name in a step, the first counts.
        """
        own = self._parameters if optimizer is None else parameters_of(self._optimizer(optimizer))
        if self.sums:  # before a step's first gradient, there is none
            _clear(own)
        total: Mapping[str, Tensor] = {}
        with _NOTHING if optimizer is None else self._alone(optimizer):
            self._sync = sync = self._sync_for(optimizer)
            for seed_number, batch in sync.plan(self._micro_batches):
                if seed_number is not None:
                    self._seed(seed_number)
                self._micro_batch = batch
                self._found = {}
                self._reported = None
                with sync.accumulate(batch), buffers_kept(self.model) if batch.is_filler else _NOTHING:
                    losses = self._sum_of_losses(loss, name, batch)
                    # sync.factor is the world size where gradients are averaged over the ranks, and 1 where they are
                    # added up. So the result is the gradient of the global batch's mean loss, also of uneven slices.
                    factor = 0.0 if batch.is_filler else sync.factor / batch.global_size
                    self._state.scaler.scale(losses * factor).backward()  # type: ignore[no-untyped-call]
                if batch.is_filler:
                    self._found = {key: torch.zeros_like(value) for key, value in self._found.items()}
                total = _added(total, sync.collect(self._found))
            self._micro_batch = None
            sync.finish()
        self._state.watch.turn(COMPUTE)
        self._minimized, self._weight = total[_MINIMIZED], None
        self.sums = {**total, **self.sums}
        if WEIGHT in total:
            self._divide_by_weights(own, total[WEIGHT])

    def update(self, optimizer: str | None = None, closure: Callable[[], object] | None = None) -> None:
        """Clip the gradients, and let the optimizer step: the only one, or the one of that name.

        With a ``closure``, which calls ``backward``, the optimizer computes the gradients as often as it needs them.
        """
        stepping: Any = self._optimizer(optimizer)
        scaler = self._state.scaler
        if closure is None:
            scaler.unscale_(stepping)
            self._prepare(stepping)
            self._state.watch.turn(OPTIMIZER)
            scaler.step(stepping)
            scaler.update()
        else:
            self._check_flags("a closure in step.update")
            stepping.step(functools.partial(self._closed, closure, stepping))
        self._state.watch.turn(COMPUTE)
        if optimizer is not None:
            _clear(parameters_of(stepping))

    def log(self, name: str, values: Tensor | float) -> None:
        """Log a value for each example, (N,), inside of a loss; or a number, inside or outside of one.

        The mean over examples or, outside of a loss, over steps and ranks appears by its name in the run's tables,
        report and trackers.
        """
        batch, value = self._micro_batch, torch.as_tensor(values).detach()
        if batch is None:
            self._state.log(name, value)
        else:
            is_one = value.dim() == 0
            total = value * batch.num_examples if is_one else self._sum_of(value, f"log({name!r})")
            self._found |= logged(name, total, batch.num_examples)

    def mean(self) -> Tensor:
        """Return the mean over the global batch of the losses of the last ``backward``; all ranks must call this."""
        total = self._minimized.double().sum()[None]  # with --reproducible, over the chunks
        self._group.add_up(total)
        return total[0] / self._micro_batches[0].global_size if self._weight is None else self._by_weight(total[0])

    # --- for losses

    def forward(self, batch: MicroBatch) -> Any:
        """Return the model's outputs for a batch that ``prepare`` has prepared, in fp32."""
        with self.in_fp32():
            return forward(self._workload, self._sync.called, batch, self.config.precision, self.generator)

    def in_fp32(self) -> AbstractContextManager[object]:
        """Return a context that computes in fp32 within a loss, whatever the run's precision is."""
        if self.config.precision == "fp32":
            return _NOTHING
        return torch.autocast(self._group.device.type, enabled=False)

    def measure(self, outputs: Any, targets: Any) -> Tensor:
        """Report the workload's ``loss`` and ``measure`` of a micro-batch; return the losses, (N,).

        A loss that compares examples sees those of the global batch.
        """
        workload, batch = self._workload, self._micro_batch
        assert batch is not None, "measure() is for losses"
        with self.in_fp32():
            if not workload.compares_examples or self._group.world_size == 1:
                losses = workload.loss(outputs, targets)
                check_per_example(f"{self._name}.loss", losses, batch.num_examples)
            else:
                of_all = of_all_ranks(outputs, targets, self._group, batch.num_examples, is_filler=batch.is_filler)
                losses = workload.loss(*of_all[:2])
                check_per_example(f"{self._name}.loss", losses, batch.global_size)
                losses = losses[of_all[2]]
            measured = measured_of(workload, outputs, targets, batch.num_examples)
        self._found |= {name: values.sum() for name, values in measured.items()}
        self._reported = losses
        return losses

    # --- the parts of a step

    def _sum_of_losses(self, loss: Loss, name: str, batch: MicroBatch) -> Tensor:
        """Return the sum of a micro-batch's losses; add it to the sums. Raises UsageError if nothing can be learned."""
        own_name = getattr(loss, "__name__", name)
        with autocast(self.model, self.config.precision):
            losses = loss(self.model, batch, self)
            total = self._sum_of(losses, own_name)
        if not total.requires_grad:
            place = f"{self._name}.{own_name}"
            raise UsageError(f"{place} does not depend on the model's parameters: nothing would be learned")
        found, reported, minimized = self._found, self._reported, total.detach()
        if reported is None and (weights := self._workload.weights(batch.targets)) is not None:
            found[WEIGHT] = torch.where(weights >= 0, weights, math.nan).sum()
        is_reported = reported is losses or (reported is None and name == "loss")
        if is_reported:
            found["loss"] = minimized
        elif reported is not None:
            found["loss"] = reported.detach().sum()
        if name != "loss" or not is_reported:
            found |= logged(MINIMIZED if name == "loss" else name, minimized, found.get(WEIGHT, batch.num_examples))
        found[_MINIMIZED] = minimized
        return total

    def _sum_of(self, values: Tensor, place: str) -> Tensor:
        assert self._micro_batch is not None
        check_per_example(f"{self._name}.{place}", values, self._micro_batch.num_examples)
        return values.sum() if values.dtype == torch.float64 else values.float().sum()

    def _closed(self, closure: Callable[[], object], stepping: Optimizer) -> Tensor:
        closure()
        self._prepare(stepping)
        return self.mean()

    def _prepare(self, stepping: Optimizer) -> None:
        """Show the gradients to the callbacks, and clip them."""
        self._state.watch.turn(CALLBACKS)
        for callback in self._callbacks:
            callback.on_gradients(self._state)
        if self.config.clip_grad_norm is not None:
            norm: Any = nn.utils.clip_grad_norm_(parameters_of(stepping), self.config.clip_grad_norm)
            norm = norm.full_tensor() if is_sharded(norm) else norm
            known = self.gradient_norm
            self.gradient_norm = norm if known is None else torch.maximum(norm, known)
        self._state.watch.turn(COMPUTE)

    def _divide_by_weights(self, own: Iterable[Tensor], of_rank: Tensor) -> None:
        """Divide the gradients by the global batch's sum of example weights, instead of by its size.

        If a weight is negative, they are NaN, and closing the window raises an error.
        """
        weight = of_rank.clone()
        self._group.add_up(weight)
        self._weight = weight.sum()  # over the chunks
        gradients = [rows_here(p.grad) for p in own if p.grad is not None]
        torch._foreach_mul_(gradients, self._by_weight(self._micro_batches[0].global_size))

    def _by_weight(self, value: Tensor | int) -> Tensor:
        """Return a value divided by the batch's sum of weights: 0 if that is 0, since nothing can be learned."""
        assert self._weight is not None
        quotient = value / self._weight
        return torch.where(self._weight == 0, torch.zeros_like(quotient), quotient)

    def _on_ready(self) -> None:
        self._state.watch.turn(WORKERS)

    def _sync_for(self, optimizer: str | None) -> GradientSync:
        """Return the form that adds up the gradients of the parameters that are trained now."""
        trained = [parameter.requires_grad for parameter in self._parameters]
        known, sync = self._syncs.get(optimizer, ([], None))
        if sync is not None and known == trained:
            return sync
        if sync is not None:
            sync.close()
        if self.config.reproducible:
            sync = Chunks(self.model, self._group, self.config.num_chunks, self._on_ready)
        elif self._state.is_sharded:
            sync = Sharded(self.model, self._group, self._on_ready)
        elif self._group.world_size > 1 and optimizer is None:
            has_unused = self._workload.has_unused_parameters
            sync = Bucketed(self.model, self._group, self._on_ready, has_unused_parameters=has_unused)
        else:
            sync = GradientSync(self.model, self._group, self._on_ready)
        self._syncs[optimizer] = trained, sync
        return sync

    @contextlib.contextmanager
    def _alone(self, optimizer: str) -> Iterator[None]:
        """Inside the block, which computes a gradient, only the parameters of an optimizer require one."""
        own = {id(each) for each in parameters_of(self.optimizers[optimizer]) if each.requires_grad}
        trained = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(id(parameter) in own)
        try:
            yield
        finally:
            for parameter, is_trained in zip(self._parameters, trained, strict=True):
                parameter.requires_grad_(is_trained)

    def _optimizer(self, name: str | None) -> Optimizer:
        if name is None and len(self.optimizers) == 1:
            return next(iter(self.optimizers.values()))
        if name is None or name not in self.optimizers:
            found = "there are several optimizers" if name is None else f"there is no optimizer {name!r}"
            raise UsageError(f"{self._name}.training_step: {found}; name one of {', '.join(self.optimizers)}")
        return self.optimizers[name]

    def _check_flags(self, what: str) -> None:
        for flag, value in {"--precision": self.config.precision, "--strategy": self.config.strategy}.items():
            if value in ("fp16", "fsdp"):
                raise UsageError(f"{flag} {value} does not work with {what}")

    def _seed(self, number: int) -> None:
        """Seed augmentation and dropout by epoch, step, and the number of the rank or, with chunks, of the chunk."""
        seed = seed_of(self.config.seed, self._state.epoch, number) + self._state.step
        seed_generators(seed)
        self.generator.manual_seed(seed)


def logged(name: str, total: Tensor, count: Tensor | float) -> dict[str, Tensor]:
    """Return the sums by which a value is logged: the value's, and what it is divided by."""
    return {LOGGED + name: total, COUNT + name: torch.as_tensor(count, device=total.device)}


def _clear(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:  # model.zero_grad() would walk through all modules
        parameter.grad = None


def _added(total: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums with more added: a name that only one of them has counts as 0 in the other."""
    return {**total, **{name: total[name] + value if name in total else value for name, value in more.items()}}


@functools.lru_cache
def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _generator(device: torch.device) -> torch.Generator:
    """Return the device's default generator: of the augmentation in ``prepare``, and of layers such as dropout."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
