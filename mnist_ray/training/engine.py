"""Training and evaluation in plain PyTorch: nothing here knows of Ray."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.provenance import cpu_has_bf16
from mnist_ray.training import shared_memory
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import Evaluation, MetricSums
from mnist_ray.training.reproducible import Chunks
from mnist_ray.training.sampler import (
    ArrayBatches,
    Batch,
    ExampleBatches,
    ShardedBatchSampler,
    Slice,
    batch_loader,
    batches_of,
    to_device,
)
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.tensors import as_fp32, autocast, detached

EVALUATION_BATCH_SIZE = 100  # so few that the activations stay in the processor's cache
_REPORT_INTERVAL_S = 0.5


class TrainingDivergedError(Exception):
    """The loss is no finite number any more. Raised on every rank alike."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(epoch, step)
        self.epoch = epoch
        self.step = step

    def __str__(self) -> str:
        return f"loss or weights are not finite at step {self.step} of epoch {self.epoch}; try a lower --learning-rate"


class StopWantedError(Exception):
    """Training has stopped because it was asked to, with a checkpoint saved. Raised on every rank alike."""


@dataclass(frozen=True)
class Group:
    """This process among those that train together; ``torch.distributed`` joins them where there are several."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class TrainingState:
    """All that training changes; what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps done in the current epoch."""
    sums: MetricSums = field(default_factory=MetricSums)
    """Over the current epoch so far and all ranks."""
    epoch_s: float = 0.0
    """Seconds of training in the current epoch so far, without validation and checkpoints, by rank 0's clock."""
    finished_s: float = 0.0
    """Seconds spent so in the epochs before."""
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    """Scales the loss, so that fp16 can hold its gradients; of other precisions it does nothing."""
    average: AveragedModel | None = None
    """Holds a moving average of the model's weights, where that is what counts."""
    scores: list[float] = field(default_factory=list)
    """Of each finished epoch's validation, where the training waits for it; more is better."""
    callbacks: Sequence[Callback] = ()
    ends: bool = False
    """Whether a callback has ended the training, with the epochs that are finished."""
    last_epoch: float = math.inf
    """Where the training ends."""
    last_step: float = math.inf
    """Where an epoch ends."""

    @property
    def result(self) -> nn.Module:
        """What is evaluated and kept: the model, or its average."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged


@dataclass(frozen=True)
class Hooks:
    """What the caller of ``train`` does as it goes; each is called on every rank at the same steps."""

    progress: Callable[[Progress], None] = lambda progress: None
    checkpoint: Callable[[TrainingState, Progress], None] = lambda state, progress: None
    """Save ``state``; where an epoch has just ended, its step is 0 and ``progress`` the epoch's last.

    Where that waits for a validation, it notes the score in ``state`` first.
    """
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Whether to save now, besides the regular times; asked after ``progress``, and the same on every rank."""
    wants_stop: Callable[[], bool] = lambda: False
    """Whether to save now and stop; asked before ``progress``, and what rank 0 answers counts."""


def create_state(
    workload: Workload,
    config: TrainConfig,
    num_examples: int,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
) -> TrainingState:
    """Return the state before the first step, for ``num_examples`` to train on; the same on every rank."""
    torch.manual_seed(config.seed)
    model = with_fast_layout(workload.create_model().to(device))
    optimizer = workload.create_optimizer(model, config)
    num_epochs, num_steps = config.num_epochs, config.num_steps(num_examples)
    scheduler = workload.create_scheduler(optimizer, config, num_epochs * num_steps)
    scaler = GradScaler(device.type, enabled=config.precision == "fp16")
    average = None
    if config.ema_decay is not None:
        averaging = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=averaging)
    return TrainingState(
        model,
        optimizer,
        scheduler,
        scaler=scaler,
        average=average,
        callbacks=callbacks,
        last_epoch=num_epochs,
        last_step=num_steps,
    )


def with_fast_layout(model: nn.Module) -> nn.Module:
    """Return a model whose weights of four dimensions are channels-last, as convolutions are fastest."""
    if any(parameter.dim() == 5 for parameter in model.parameters()):  # of volumes, which have a layout of their own
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def train(
    workload: Workload,
    state: TrainingState,
    split: Split,
    config: TrainConfig,
    group: Group,
    hooks: Hooks,
    num_loader_processes: int = 0,
) -> None:
    """Train ``state`` from where it stands to the last epoch's end, on this rank's slices of ``split``.

    ``config.precision`` is resolved (see ``resolve_precision``). Raises TrainingDivergedError on every rank, before
    weights that are no finite numbers could get into a checkpoint; and StopWantedError.
    """
    assert config.precision != "auto"
    if config.compile:
        # Each shape by itself: the kernels for a batch do not depend on which came before it, as in a resumed run.
        state.model.compile(dynamic=False)
    model = state.model if config.reproducible else _distributed(state.model, group)
    model.train()
    for callback in state.callbacks:
        callback.on_start(state, group)
    epochs = _Epochs(workload, state, model, split, config, group, hooks, num_loader_processes)
    while not is_over(state, config):
        finished = epochs.train_next()
        state.finished_s += state.epoch_s
        state.epoch, state.step, state.sums, state.epoch_s = state.epoch + 1, 0, MetricSums(), 0.0
        for callback in state.callbacks:
            callback.on_epoch(state, finished)
        _check_weights(state, finished)
        hooks.checkpoint(state, finished)
        if epochs.window.stops and not is_over(state, config):
            raise StopWantedError


def is_over(state: TrainingState, config: TrainConfig) -> bool:
    """Tell whether all epochs are trained, or no more are wanted: validation has not been better for long enough."""
    scores, patience = state.scores, config.early_stop
    has_stalled = bool(scores) and patience is not None and len(scores) - best_epoch(scores) >= patience
    return state.epoch >= config.num_epochs or has_stalled or state.ends


def best_epoch(scores: Sequence[float]) -> int:
    """Return which epoch, counted from 1, has the best score, of several the first."""
    return scores.index(max(scores)) + 1


@dataclass(frozen=True)
class _Epochs:
    """What stays the same from epoch to epoch."""

    workload: Workload
    state: TrainingState
    model: nn.Module
    split: Split
    config: TrainConfig
    group: Group
    hooks: Hooks
    num_loader_processes: int

    def train_next(self) -> Progress:
        """Train to the end of the current epoch, reporting every half second; return its last progress."""
        state, config, hooks = self.state, self.config, self.hooks
        last_step = config.num_steps(len(self.split))
        window, progress = self.window, None
        window.restart_clock()
        for sums, global_size in self._reproducible_steps() if config.reproducible else self._steps():
            self._update()
            state.step += 1
            for callback in state.callbacks:
                callback.on_step(state)
            window.add(sums, global_size)
            checkpoint_due = state.step % config.checkpoint_every == 0
            if window.is_full(last_step - state.step) or checkpoint_due:
                progress = window.close(state, last_step)
                hooks.progress(progress)
                for callback in state.callbacks:
                    callback.on_progress(state, progress)
                if (hooks.wants_checkpoint() or checkpoint_due or window.stops) and state.step < last_step:
                    _check_weights(state, progress)
                    hooks.checkpoint(state, progress)
                    if window.stops:
                        raise StopWantedError
                    window.restart_clock()
        assert progress is not None, "an epoch has at least one step"
        return progress

    def _steps(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Leave each step's gradients in the model; yield the step's sums and the size of its global batch."""
        generator, seed = _generator(self.group.device), _seed(self.config.seed, self.state.epoch, self.group.rank)
        total: dict[str, Tensor] = {}
        for batch in self._batches():
            if not total:
                generator.manual_seed(seed + self.state.step)  # of augmentation and dropout: the same in a resumed run
            # DDP takes the mean of the ranks' gradients, with the last piece of each slice.
            weight = self.group.world_size / batch.global_size
            with _exchanging(self.model, batch.ends_step):
                sums = self._backward(batch, generator, weight)
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
            if batch.ends_step:
                yield total, batch.global_size
                total = {}

    def _reproducible_steps(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Do the same, with the same bits on any number of ranks."""
        generator, chunks = _generator(self.group.device), self._chunks
        seeds = {chunk: _seed(self.config.seed, self.state.epoch, chunk) for chunk in chunks.own}
        for chunk, batch in zip(itertools.cycle(chunks.own), self._batches(), strict=False):
            generator.manual_seed(seeds[chunk] + self.state.step)
            chunks.take(chunk, self._backward(batch, generator, 1 / batch.global_size))
            if batch.ends_step:
                yield chunks.give(), batch.global_size

    def _backward(self, batch: Batch, generator: torch.Generator, weight: float) -> dict[str, Tensor]:
        return backward(self.workload, self.model, batch, self.config, weight, generator, self.state.scaler)

    def _update(self) -> None:
        """Make an optimizer step of the gradients in the model, and one of the schedule."""
        state, largest_norm = self.state, self.config.clip_grad_norm
        if largest_norm is not None or state.callbacks:
            state.scaler.unscale_(state.optimizer)
        for callback in state.callbacks:
            callback.on_gradients(state)
        if largest_norm is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), largest_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.scheduler.step()
        if state.average is not None:
            state.average.update_parameters(state.model)

    @cached_property
    def window(self) -> _LoggingWindow:
        """The steps since the last progress."""
        return _LoggingWindow(self.workload, self.group, self.hooks.wants_stop, interval_steps=10)

    @cached_property
    def _examples(self) -> ArrayBatches | ExampleBatches:
        return batches_of(self.split, self.group.device)

    @cached_property
    def _chunks(self) -> Chunks:
        return Chunks(self.model, self.config.num_chunks, self.group.rank, self.group.world_size)

    def _batches(self) -> Iterator[Batch]:
        """Yield this rank's slices of what is left of the current epoch, on the device."""
        sampler = ShardedBatchSampler(
            len(self.split),
            self.config.batch_size,
            seed=self.config.seed,
            epoch=self.state.epoch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            first_step=self.state.step,
            num_chunks=self.config.chunks,
            piece_size=self.config.micro_batch_size,
        )
        if isinstance(self._examples, ExampleBatches):
            self._examples.seed = _seed(self.config.seed, self.state.epoch, 0)
        for batch in batch_loader(self._examples, sampler, self.num_loader_processes):
            yield to_device(batch, self.group.device)


def _seed(*numbers: int) -> int:
    """Return a seed that depends on all of some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator that a model's own layers draw from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _exchanging(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Return what keeps gradients on this rank meanwhile, unless they are to be exchanged."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def _check_weights(state: TrainingState, progress: Progress) -> None:
    """Raise TrainingDivergedError if a step, whose loss was finite, or a callback has made weights that are not."""
    if not all(weights.isfinite().all() for model in {state.model, state.result} for weights in model.parameters()):
        raise TrainingDivergedError(progress.epoch, progress.step)


def backward(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    config: TrainConfig,
    weight: float,
    generator: torch.Generator | None = None,
    scaler: GradScaler | None = None,
) -> dict[str, Tensor]:
    """Add to the model's gradients those of ``weight`` × the sum of a batch's losses, as ``scaler`` scales them.

    ``config.precision`` is resolved. Returns the sums of the loss and of what the workload measures, on the device.
    Weighed by the size of the global batch, the gradients of slices add up to those of its mean loss, also where slices
    are uneven or empty.
    """
    with autocast(next(model.parameters()).device, config.precision):
        outputs = as_fp32(model(workload.prepare(batch.inputs, generator)))
    loss_sum = workload.loss(outputs, batch.targets).sum()
    minimized = workload.training_loss(outputs, batch.targets, config)
    loss = (loss_sum if minimized is None else minimized.sum()) * weight
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return {"loss": loss_sum.detach(), **measured_sums(workload, outputs, batch.targets)}


def measured_sums(workload: Workload, outputs: Any, targets: Any) -> dict[str, Tensor]:
    """Return the sums of what a workload measures of a batch."""
    return {name: values.sum() for name, values in workload.measure(detached(outputs), targets).items()}


class _LoggingWindow:
    """The steps since the last progress: their figures stay on the device until the window is closed.

    Closing it is the only time at which ranks talk besides the gradients. Rank 0's clock decides for all ranks after
    how many steps the next one closes, so that every rank closes at the same step.
    """

    def __init__(self, workload: Workload, group: Group, wants_stop: Callable[[], bool], interval_steps: int) -> None:
        self._workload = workload
        self._group = group
        self._wants_stop = wants_stop
        self.stops = False
        """Whether rank 0 has been asked to stop, when the window was closed last."""
        self._reset(interval_steps)
        self.restart_clock()

    def _reset(self, interval_steps: int) -> None:
        self._interval_steps = interval_steps
        self._steps: list[dict[str, Tensor]] = []
        self._sizes: list[int] = []

    def restart_clock(self) -> None:
        """Leave out of the epoch's seconds what was done since the window opened."""
        self._start = time.perf_counter()

    def add(self, sums: dict[str, Tensor], global_size: int) -> None:
        self._steps.append(sums)
        self._sizes.append(global_size)

    def is_full(self, steps_left: int) -> bool:
        """Tell whether to close it: an epoch's last steps, too few for a window of their own, belong to this one."""
        return steps_left == 0 or (len(self._sizes) >= self._interval_steps and 2 * steps_left >= self._interval_steps)

    def close(self, state: TrainingState, last_step: int) -> Progress:
        """Reduce the window over all ranks into ``state`` and empty it. Raises TrainingDivergedError."""
        steps, interval_steps, elapsed_s = self._reduce()
        window = MetricSums()
        for offset, step in enumerate(steps):
            if not math.isfinite(step.sums["loss"]):
                raise TrainingDivergedError(state.epoch + 1, state.step - len(steps) + offset + 1)
            window += step
            state.sums += step  # one by one: its bits do not depend on when windows close
        state.epoch_s += elapsed_s
        self._reset(interval_steps)
        return Progress(
            state.epoch + 1,
            state.step,
            last_step,
            [step.sums["loss"] / step.num_examples for step in steps],
            window.values(self._workload),
            state.sums.values(self._workload),
            state.sums.num_examples,
            state.epoch_s,
        )

    def _reduce(self) -> tuple[list[MetricSums], int, float]:
        """Return the sums of each step over all ranks, the steps of the next window, and the seconds of this one."""
        names = list(self._steps[0])
        sums = torch.stack([step[name] for step in self._steps for name in names]).double()
        if sums.is_cuda:
            torch.cuda.synchronize()  # else the last steps' time would be the next window's
        now = time.perf_counter()
        elapsed_s, self._start = now - self._start, now
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        settled = [next_interval, self._wants_stop(), elapsed_s] if self._group.rank == 0 else [0, 0, 0]
        values = torch.cat([sums, sums.new_tensor(settled)])
        if self._group.world_size > 1:
            dist.all_reduce(values)
        of_steps = values[: -len(settled)].view(-1, len(names)).tolist()
        interval_steps, self.stops, elapsed_s = int(values[-3]), bool(values[-2]), float(values[-1])
        steps = [
            MetricSums(dict(zip(names, of_step, strict=True)), size)
            for of_step, size in zip(of_steps, self._sizes, strict=True)
        ]
        return steps, interval_steps, elapsed_s


def _distributed(model: nn.Module, group: Group) -> nn.Module:
    """Wrap a model so that gradients are averaged over the ranks; alone, it stays as it is."""
    if group.world_size == 1:
        return model
    if group.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[group.device])
    wrapped = DistributedDataParallel(model)
    shared_memory.use_where_possible(wrapped)
    return wrapped


def resolve_precision(precision: Precision, group: Group) -> Precision:
    """Return the precision for a setting that may be ``"auto"``, the same on every rank.

    Auto is bf16 where the ranks' processors or GPUs have it in hardware, else fp32.
    """
    if precision != "auto":
        return precision
    on_gpu = group.device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
    supported = torch.tensor(int(has_bf16), device=group.device)
    if group.world_size > 1:
        dist.all_reduce(supported, dist.ReduceOp.MIN)
    return "bf16" if supported.item() else "fp32"


def split_bounds(num_examples: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut ``num_examples`` into at most ``num_parts`` ranges of whole evaluation batches."""
    num_batches = math.ceil(num_examples / EVALUATION_BATCH_SIZE)
    num_parts = min(num_parts, num_batches)
    cuts = [num_batches * part // num_parts * EVALUATION_BATCH_SIZE for part in range(num_parts)] + [num_examples]
    return list(itertools.pairwise(cuts))


def evaluate_together(
    workload: Workload, model: nn.Module, split: Split, group: Group, num_loader_processes: int = 0
) -> Evaluation:
    """Evaluate a model as ``evaluate`` does, each rank on some of the examples; without columns.

    The result is the same on every rank, and for any number of them.
    """
    if group.world_size == 1:
        return evaluate(workload, model, split, num_loader_processes)
    for buffer in model.buffers():  # as of batch normalization: those of rank 0 are kept
        dist.broadcast(buffer, 0)
    bounds = split_bounds(len(split), group.world_size)
    start, stop = bounds[group.rank] if group.rank < len(bounds) else (0, 0)
    own = evaluate(workload, model, split.between(start, stop), num_loader_processes)
    batch_sums: list[Any] = [None] * group.world_size
    dist.all_gather_object(batch_sums, own.batch_sums)
    return Evaluation(tuple(itertools.chain(*batch_sums)), len(split), {})


@torch.inference_mode()
def evaluate(workload: Workload, model: nn.Module, split: Split, num_loader_processes: int = 0) -> Evaluation:
    """Evaluate a model on all examples of a part, in fp32 and fixed batches, where the model's weights are."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    starts = range(0, len(split), EVALUATION_BATCH_SIZE)
    slices = [Slice(np.arange(start, min(start + EVALUATION_BATCH_SIZE, len(split))), 0) for start in starts]
    batch_sums: list[dict[str, float]] = []
    columns: list[dict[str, np.ndarray]] = []
    for batch in batch_loader(batches_of(split, device), slices, num_loader_processes):
        batch = to_device(batch, device)
        outputs = as_fp32(model(workload.prepare(batch.inputs, None)))
        sums = {"loss": workload.loss(outputs, batch.targets).sum(), **measured_sums(workload, outputs, batch.targets)}
        batch_sums.append({name: value.item() for name, value in sums.items()})
        predictions = workload.predictions(outputs, batch.targets)
        columns.append({name: values.cpu().numpy() for name, values in predictions.items()})
    model.train(was_training)
    joined = {name: np.concatenate([part[name] for part in columns]) for name in (columns[0] if columns else {})}
    return Evaluation(tuple(batch_sums), len(split), joined)
