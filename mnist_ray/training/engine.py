"""The training loop in plain PyTorch, without Ray."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.batches import (
    ArrayBatches,
    ExampleBatches,
    MicroBatch,
    batch_loader,
    batches_of,
    checked,
    to_device,
)
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.stream_batches import StreamBatches
from mnist_ray.data.tensors import is_sharded, map_tensors, rows_here, with_fast_layout
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.storage import others_can_write
from mnist_ray.training import open_step
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.gradients import Gradients, seed_of
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState, is_over, learning_rates
from mnist_ray.training.stopwatch import CALLBACKS, COMPUTE, COPIES, DATA, OPTIMIZER, Stopwatch
from mnist_ray.training.window import LoggingWindow
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import GRADIENT_NORM, Figure

MAX_STEPS_UNSAVED = 1000  # without --checkpoint-every
_MIN_LOSS_SCALE = 1e-4  # of fp16: it halves with each step that is skipped because gradients are not finite


def create_state(
    workload: Workload,
    config: TrainConfig,
    num_examples: int,
    group: Group,
    load_initial: Callable[[nn.Module], object] = lambda model: None,
) -> TrainingState:
    """Return the state before the first step, for ``num_examples`` training examples.

    All ranks get the same state or, with ``--strategy fsdp``, their rows of it. ``load_initial`` may load
    other weights into the new model.
    """
    watch = Stopwatch(is_on_gpu=group.device.type == "cuda")
    model, average = _create_models(workload, config, group, load_initial)
    total_steps = config.total_steps(num_examples)
    created = workload.create_optimizer(model, config)
    optimizer, scheduler = open_step.with_schedule(workload, created, config, total_steps)
    if open_step.takes_closure(optimizer):
        # LBFGS takes views of the gradients, whose layout is that of the weights.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    scaler = GradScaler(group.device.type, enabled=config.precision == "fp16")
    return TrainingState(
        model,
        optimizer,
        scheduler,
        scaler=scaler,
        average=average,
        steps_per_epoch=config.steps_per_epoch(num_examples),
        total_steps=total_steps,
        watch=watch,
    )


def _create_models(
    workload: Workload, config: TrainConfig, group: Group, load_initial: Callable[[nn.Module], object]
) -> tuple[nn.Module, nn.Module | None]:
    """Return the model and, with ``--ema-decay``, a copy of it for the EMA."""
    if sharding.is_wanted(config, group.world_size):
        return sharding.create_models(workload, config, group, load_initial)
    model = sharding.create_model(workload, config)
    load_initial(model)
    model = with_fast_layout(model.to(group.device))
    return model, None if config.ema_decay is None else copy.deepcopy(model)


def _check_cache() -> None:
    """Raise TrainingStoppedError if others can write to the folder where PyTorch caches programs: it executes them."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # imports much of inductor

    folder = default_cache_dir()  # has precompiled headers, whatever TORCHINDUCTOR_CACHE_DIR is
    with contextlib.suppress(OSError):
        os.mkdir(folder, 0o700)
    if others_can_write(folder):
        raise TrainingStoppedError(
            f"--compile would execute programs from {folder}, where others can write: remove it, or set TMPDIR"
        )


def train(
    workload: Workload,
    state: TrainingState,
    split: Split,
    config: TrainConfig,
    group: Group,
    callbacks: Sequence[Callback] = (),
    num_loader_processes: int = 0,
    read_ahead_mib: int = READ_AHEAD_MIB,
) -> None:
    """Train ``state`` from its position to the end of the last epoch, on this rank's slices of ``split``.

    ``config.precision`` must not be ``auto``. Raises TrainingDivergedError on every rank instead of saving weights that
    are not finite, and StopWantedError after a checkpoint if a callback wants to stop, or at ``state.last_step``.
    """
    assert config.precision != "auto"
    if config.compile:
        # A resumed run does not see earlier batches, so kernels must not depend on them: compile for each shape. By
        # default, PyTorch compiles only the first eight shapes, and runs others as they are; this fails instead.
        _check_cache()
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        state.model.compile(dynamic=False)
    state.model.train()
    for callback in callbacks:
        callback.on_start(state, group)
    gradients = Gradients(workload, state, config, group)
    takes_closure = open_step.takes_closure(state.optimizer)
    looks_at_metric = isinstance(state.scheduler, ReduceLROnPlateau)  # stepped at each validation
    batches = batches_of(checked(split, workload.find_fault), group.device, workload.collate, read_ahead_mib)
    if isinstance(batches, StreamBatches):
        batches.read_to = state.read_to
    window, progress, watch = LoggingWindow(workload, group), None, state.watch
    while not is_over(state, config):
        window.restart_clock()
        watch.turn(DATA)
        for micro_batches in _steps(batches, state, config, group, num_loader_processes):
            watch.turn(COMPUTE)
            state.learning_rates = learning_rates(state.optimizer)
            if takes_closure:
                sums, others = _step_with_closure(gradients, micro_batches, state, config, callbacks, group)
            else:
                sums = gradients.compute(micro_batches)
                others = _update(state, config, callbacks) if gradients.has_weight else {}
            gradients.clear()
            if not looks_at_metric:
                state.scheduler.step()
            state.step += 1
            watch.turn(CALLBACKS)
            for callback in callbacks:
                callback.on_step(state)
            watch.end_start()
            window.add(sums, micro_batches[0].global_size, others)
            progress = _decide(window, state, config, callbacks)
            if progress is not None and progress.saves and state.step < state.epoch_steps:
                _save(state, progress, callbacks)
                if progress.stops:
                    raise StopWantedError
                window.restart_clock()
            watch.turn(DATA)
        watch.turn(CALLBACKS)
        assert progress is not None  # an epoch's last step closes a window
        state.finish_epoch()
        for callback in callbacks:
            callback.on_epoch(state, progress)
        _save(state, progress, callbacks)
        if progress.stops and not is_over(state, config):
            raise StopWantedError


def _steps(
    batches: ArrayBatches | ExampleBatches, state: TrainingState, config: TrainConfig, group: Group, num_processes: int
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's slice of each remaining step of the epoch, as a list of micro-batches on the device.

    An epoch is a pass over the data or, with ``--num-steps``, a number of steps: it may end within a pass, or span
    several.
    """
    pass_number, first_step = divmod(state.total_step, config.steps_per_pass(len(batches)))
    num_left = state.epoch_steps - state.step
    while num_left > 0:
        of_pass = _steps_of_pass(batches, state, config, group, num_processes, pass_number, first_step)
        for micro_batches in itertools.islice(of_pass, num_left):
            yield micro_batches
            num_left -= 1
        pass_number, first_step = pass_number + 1, 0


def _steps_of_pass(
    batches: ArrayBatches | ExampleBatches,
    state: TrainingState,
    config: TrainConfig,
    group: Group,
    num_processes: int,
    pass_number: int,
    first_step: int,
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's slices like ``_steps``, from ``first_step`` to the end of a pass over the data."""
    sampler = ShardedBatchSampler(
        len(batches),
        config.batch_size,
        seed=config.seed,
        pass_number=pass_number,
        rank=group.rank,
        world_size=group.world_size,
        first_step=first_step,
        num_chunks=config.reproducible_chunks,
        micro_batch_size=config.micro_batch_size,
        order=batches.order(config, pass_number, state.total_step, group.rank, group.world_size),
    )
    if isinstance(batches, ExampleBatches):
        batches.seed = seed_of(config.seed, pass_number, 0)  # for an example's own random numbers, with its index
    micro_batches: list[MicroBatch] = []
    for micro_batch in batch_loader(batches, sampler, group.device, num_processes):
        if group.device.type != "cpu":
            with state.watch.on(COPIES):
                micro_batch = to_device(micro_batch, group.device)
        micro_batches.append(micro_batch)
        if micro_batch.ends_step:
            state.read_to = micro_batch.read_to
            yield micro_batches
            micro_batches = []


def _update(state: TrainingState, config: TrainConfig, callbacks: Sequence[Callback]) -> dict[Figure, Tensor]:
    """Step the optimizer and the EMA with the model's gradients; return the step's figures."""
    state.watch.turn(CALLBACKS)
    state.scaler.unscale_(state.optimizer)
    for callback in callbacks:
        callback.on_gradients(state)
    state.watch.turn(OPTIMIZER)
    figures = _clip(state, config)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if config.ema_decay is not None:
        move_average(state, config.ema_decay)
    return figures


def _clip(state: TrainingState, config: TrainConfig) -> dict[Figure, Tensor]:
    """Clip the gradients of what the optimizer trains, if configured; return their norm before that."""
    if config.clip_grad_norm is None:
        return {}
    trained = itertools.chain(*(group["params"] for group in state.optimizer.param_groups))
    norm: Any = nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
    return {GRADIENT_NORM: norm.full_tensor() if is_sharded(norm) else norm}


def _step_with_closure(
    gradients: Gradients,
    micro_batches: list[MicroBatch],
    state: TrainingState,
    config: TrainConfig,
    callbacks: Sequence[Callback],
    group: Group,
) -> tuple[dict[str, Tensor], dict[Figure, Tensor]]:
    """Let an optimizer compute the gradients as often as it needs them; skip the step of a batch without weight.

    Returns the sums of the first time, and the largest of each figure.
    """
    figures: dict[Figure, Tensor] = {}

    def compute() -> tuple[dict[str, Tensor], Tensor | None]:
        gradients.clear()
        # ``prepare`` may change a batch in place, and the optimizer may need it again.
        sums = gradients.compute([map_tensors(torch.clone, micro_batch) for micro_batch in micro_batches])
        if not gradients.has_weight:
            raise _NoWeightError(sums)
        for callback in callbacks:
            callback.on_gradients(state)
        clipped = _clip(state, config)
        figures.update({name: torch.maximum(value, figures.get(name, value)) for name, value in clipped.items()})
        return sums, gradients.minimized

    try:
        sums = open_step.step_with_closure(state.optimizer, compute, micro_batches[0].global_size, group)
    except _NoWeightError as error:
        return error.sums, {}
    if config.ema_decay is not None:
        move_average(state, config.ema_decay)
    return sums, figures


class _NoWeightError(Exception):
    """All example weights of the global batch are 0: it has no gradient."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        super().__init__()
        self.sums = sums


@torch.no_grad()
def move_average(state: TrainingState, decay: float) -> None:
    """Move the EMA towards the weights; copy buffers and whole numbers. ``AveragedModel`` would wait for the GPU."""
    assert state.average is not None
    moved, copied = list[tuple[Tensor, Tensor]](), [*zip(state.average.buffers(), state.model.buffers(), strict=True)]
    both = (map(rows_here, model.parameters()) for model in (state.average, state.model))
    for pair in zip(*both, strict=True):
        if pair[0] is not pair[1]:  # both models share what checkpoints leave out
            (moved if pair[0].is_floating_point() or pair[0].is_complex() else copied).append(pair)
    is_first = state.epoch == state.step == 0
    get_ema_multi_avg_fn(0.0 if is_first else decay)(*map(list, zip(*moved, strict=True)), 0)  # type: ignore[no-untyped-call]
    for own, value in copied:
        own.copy_(value)


def _decide(
    window: LoggingWindow, state: TrainingState, config: TrainConfig, callbacks: Sequence[Callback]
) -> Progress | None:
    """If the window is full or a checkpoint is due, close it on all ranks, report it, and return what to do next."""
    is_last = state.total_step == state.last_step
    is_due = is_last or state.step % (config.checkpoint_every or MAX_STEPS_UNSAVED) == 0
    if not (is_due or window.is_full(steps_left=state.epoch_steps - state.step)):
        return None
    stop_wanted = is_last or any(callback.wants_stop() for callback in callbacks)
    save_wanted = state.pace.is_due(at_any_cost=is_due) if config.checkpoint_every is None else is_due
    progress = window.close(state, stop_wanted=stop_wanted, save_wanted=save_wanted)
    for callback in callbacks:
        callback.on_progress(state, progress)
    wanted = [callback.wants_checkpoint() for callback in callbacks]  # asks all of them; all ranks must agree
    return replace(progress, saves=progress.saves or any(wanted))


def _save(state: TrainingState, progress: Progress, callbacks: Sequence[Callback]) -> None:
    """Let the callbacks validate and save: a worker's ``Reporter`` does. Raises TrainingDivergedError."""
    weights = [rows_here(tensor) for tensor in {*state.model.parameters(), *state.result.parameters()}]
    is_finite = torch.stack([rows.isfinite().all() for rows in weights]).all().int()  # a GPU is asked only once
    if state.scaler.is_enabled() and state.scaler.get_scale() < _MIN_LOSS_SCALE:
        is_finite.zero_()
    if state.is_sharded:
        dist.all_reduce(is_finite, dist.ReduceOp.MIN)
    if not is_finite:
        raise TrainingDivergedError(progress.epoch, progress.step)
    for callback in callbacks:
        callback.on_checkpoint(state, progress)
