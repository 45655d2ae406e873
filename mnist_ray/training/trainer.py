"""The training loop in plain PyTorch, without Ray."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch, batch_loader, order_of, to_device
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.tensors import rows_here, with_fast_layout
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState, create_optimizers, has_stalled, is_over
from mnist_ray.training.step import Step, seed_of
from mnist_ray.training.stopwatch import CALLBACKS, COPIES, DATA, OPTIMIZER, Stopwatch
from mnist_ray.training.window import LoggingWindow
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import seeded_model

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
    other weights into the new model. Raises UsageError.
    """
    watch = Stopwatch(is_on_gpu=group.device.type == "cuda")
    if sharding.is_wanted(config, group.world_size):
        model, average = sharding.create_models(workload, config, group, load_initial)
    else:
        model = seeded_model(workload, config.seed)
        load_initial(model)
        model = with_fast_layout(model.to(group.device))
        average = None if config.ema_decay is None else copy.deepcopy(model)
    total_steps = config.total_steps(num_examples)
    optimizers, schedulers = create_optimizers(workload, model, config, total_steps)
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers.values()):
        # It takes views of the gradients, whose layout is that of the weights.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return TrainingState(
        model,
        optimizers,
        schedulers,
        scaler=GradScaler(group.device.type, enabled=config.precision == "fp16"),
        average=average,
        steps_per_epoch=config.steps_per_epoch(num_examples),
        total_steps=total_steps,
        watch=watch,
    )


class Trainer:
    """Trains ``state`` from its position to the end of the last epoch, on this rank's slices of ``split``.

    ``config.precision`` must not be ``auto``.
    """

    def __init__(
        self,
        workload: Workload,
        state: TrainingState,
        split: Split,
        config: TrainConfig,
        group: Group,
        callbacks: Sequence[Callback] = (),
        num_loader_processes: int = 0,
        read_ahead_mib: int = READ_AHEAD_MIB,
    ) -> None:
        assert config.precision != "auto"
        self.workload, self.state, self.config, self.group, self.callbacks = workload, state, config, group, callbacks
        self.num_loader_processes = num_loader_processes
        self.batches = Batches(split, group.device, workload.collate, workload.find_fault, read_ahead_mib)
        self.window = LoggingWindow(workload, state, config, group)

    def train(self) -> None:
        """Train. All ranks must call this.

        Raises TrainingDivergedError on every rank instead of saving weights that are not finite, and StopWantedError
        after a checkpoint if a callback wants to stop, or at ``state.last_step``.
        """
        self._start()
        state = self.state
        while not is_over(state, self.config):
            self.window.restart_clock()
            for micro_batches in state.watch.iterating(DATA, self._slices_of_epoch()):
                with self.step.on(micro_batches):
                    self.workload.training_step(self.step)
                self._end_step(micro_batches[0].global_size)
                progress = self._report_if_due()
                if progress is not None and progress.saves and state.step < state.epoch_steps:
                    self._save(progress)
                    if has_stalled(state, self.config):
                        return
                    if progress.stops:
                        raise StopWantedError
                    self.window.restart_clock()
            assert progress is not None  # an epoch's last step closes a window
            self._end_epoch(progress)
            if progress.stops and not is_over(state, self.config):
                raise StopWantedError

    def _start(self) -> None:
        state = self.state
        if self.config.compile:
            _prepare_compilation(state.model)
        self.batches.reader.read_to = state.read_to
        self.batches.read_ahead(self.config, state.total_step, self.group.rank, self.group.world_size)
        state.model.train()
        for callback in self.callbacks:
            callback.on_start(state, self.group)
        if self.group.world_size > 1 and not state.is_sharded:
            for tensor in (*state.model.parameters(), *state.model.buffers()):
                dist.broadcast(tensor.detach(), 0)  # a model may draw numbers that no seed makes the same
        self.step = Step(self.workload, state, self.config, self.group, self.callbacks)

    def _end_step(self, batch_size: int) -> None:
        """Move the EMA and the learning rates, and count the step."""
        state = self.state
        state.watch.turn(OPTIMIZER)
        for optimizer in [*state.optimizers.values()][:1]:  # the dry run may have none
            state.learning_rate = float(optimizer.param_groups[0]["lr"])
        if self.config.ema_decay is not None:
            move_average(state, self.config.ema_decay)
        for scheduler in state.schedulers.values():
            if not isinstance(scheduler, ReduceLROnPlateau):  # it is stepped at each validation
                scheduler.step()
        state.step += 1
        state.watch.turn(CALLBACKS)
        for callback in self.callbacks:
            callback.on_step(state)
        state.watch.end_start()
        self.step.take_logged()
        self.window.add(self.step.sums, batch_size, self.step.gradient_norm)

    def _report_if_due(self) -> Progress | None:
        """If the window is full or a checkpoint is due, report, and return what to do next, on all ranks alike."""
        if not self.window.is_due():
            return None
        progress = self.window.close(self.callbacks)
        for callback in self.callbacks:
            callback.on_progress(self.state, progress)
        wanted = [callback.wants_checkpoint() for callback in self.callbacks]  # asks all of them; all ranks must agree
        return replace(progress, saves=progress.saves or any(wanted))

    def _end_epoch(self, progress: Progress) -> None:
        self.state.watch.turn(CALLBACKS)
        self.state.finish_epoch()
        for callback in self.callbacks:
            callback.on_epoch(self.state, progress)
        self._save(progress)

    def _save(self, progress: Progress) -> None:
        """Let the callbacks validate and save: a run's ``Worker`` does. Raises TrainingDivergedError."""
        state = self.state
        weights = [rows_here(tensor) for tensor in {*state.model.parameters(), *state.result.parameters()}]
        is_finite = bool(torch.stack([rows.isfinite().all() for rows in weights]).all())  # a GPU is asked only once
        if state.is_sharded:
            is_finite = all(self.group.gathered(is_finite))
        if not is_finite or (state.scaler.is_enabled() and state.scaler.get_scale() < _MIN_LOSS_SCALE):
            raise TrainingDivergedError(progress.epoch, progress.step)
        for callback in self.callbacks:
            callback.on_checkpoint(state, progress)

    def _slices_of_epoch(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's slice of each remaining step of the epoch, as a list of micro-batches on the device.

        An epoch is a pass over the data or, with ``--num-steps``, a number of steps: it may end within a pass, or span
        several.
        """
        state, steps_per_pass = self.state, self.config.steps_per_pass(len(self.batches))
        first, last = state.total_step, state.total_step + state.epoch_steps - state.step
        while first < last:
            pass_number, first_step = divmod(first, steps_per_pass)
            yield from itertools.islice(self._slices_of_pass(pass_number, first_step), last - first)
            first += steps_per_pass - first_step

    def _slices_of_pass(self, pass_number: int, first_step: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's slices from ``first_step`` to the end of a pass over the data."""
        config, group, state, batches = self.config, self.group, self.state, self.batches
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
            order=order_of(batches.split, config, pass_number),
        )
        batches.seed = seed_of(config.seed, pass_number, 0)  # for an example's own random numbers, with its index
        micro_batches: list[MicroBatch] = []
        for micro_batch in batch_loader(batches, sampler, group.device, self.num_loader_processes):
            if group.device.type != "cpu":
                with state.watch.on(COPIES):
                    micro_batch = to_device(micro_batch, group.device)
            micro_batches.append(micro_batch)
            if micro_batch.ends_step:
                state.read_to = micro_batch.read_to
                yield micro_batches
                micro_batches = []


def _prepare_compilation(model: nn.Module) -> None:
    """Let a model be compiled for each shape of its inputs.

    A resumed run does not see earlier batches, so kernels must not depend on them. By default, PyTorch compiles only
    the first eight shapes, and runs others as they are; this fails instead.
    """
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.compile(dynamic=False)


@torch.no_grad()
def move_average(state: TrainingState, decay: float) -> None:
    """Move the EMA towards the weights; copy buffers and whole numbers. ``AveragedModel`` would wait for the GPU."""
    assert state.average is not None
    averages, weights = list[Tensor](), list[Tensor]()
    for average, weight in zip(state.average.parameters(), state.model.parameters(), strict=True):
        if average is weight:  # both models share what checkpoints leave out
            continue
        if weight.is_floating_point() or weight.is_complex():
            averages.append(rows_here(average))
            weights.append(rows_here(weight))
        else:
            rows_here(average).copy_(rows_here(weight))
    is_first = state.epoch == state.step == 0
    get_ema_multi_avg_fn(0.0 if is_first else decay)(averages, weights, 0)  # type: ignore[no-untyped-call]
    for buffer, value in zip(state.average.buffers(), state.model.buffers(), strict=True):
        buffer.copy_(value)
