"""Training and evaluation in plain PyTorch: nothing here knows of Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.training import shared_memory
from mnist_ray.training.metrics import Evaluation, MetricSums, Progress
from mnist_ray.training.sharding import Batch, BatchDataset, ShardedBatchSampler, epoch_loader, num_steps
from mnist_ray.workload.mnist.idx import NUM_CLASSES, Split
from mnist_ray.workload.mnist.network import create_model

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
    """Seconds spent in the current epoch so far, validation and checkpoints not included."""
    finished_s: float = 0.0
    """Seconds spent so in the epochs before."""


@dataclass(frozen=True)
class Hooks:
    """What the caller of ``train`` does as it goes; each is called on every rank at the same steps."""

    progress: Callable[[Progress], None] = lambda progress: None
    checkpoint: Callable[[TrainingState, Progress], None] = lambda state, progress: None
    """Save ``state``; where an epoch has just ended, its step is 0 and ``progress`` the epoch's last."""
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Whether to save now, besides the regular times; asked after ``progress``, and the same on every rank."""


def create_state(config: TrainConfig, num_images: int, device: torch.device) -> TrainingState:
    """Return the state before the first step, for ``num_images`` to train on; the same on every rank."""
    torch.manual_seed(config.seed)
    model = create_model().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )
    return TrainingState(model, optimizer, _create_scheduler(config, optimizer, num_images))


def _create_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, num_images: int) -> LRScheduler:
    if config.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    total_steps = config.num_epochs * num_steps(num_images, config.batch_size)
    # One-cycle: https://arxiv.org/abs/1708.07120. Adam's betas stay as configured.
    return OneCycleLR(optimizer, config.learning_rate, total_steps, cycle_momentum=False)


def train(state: TrainingState, split: Split, config: TrainConfig, group: Group, hooks: Hooks) -> None:
    """Train ``state`` from where it stands to the last epoch's end, on this rank's part of ``split``.

    ``config.precision`` is resolved (see ``resolve_precision``). Raises TrainingDivergedError on every rank, before
    weights that are no finite numbers could get into a checkpoint.
    """
    assert config.precision != "auto"
    dataset = BatchDataset(split, group.device)
    model = _distributed(state.model, group)
    model.train()
    autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
    while state.epoch < config.num_epochs:
        finished = _train_epoch(state, model, dataset, config, group, hooks, autocast_dtype)
        _check_weights(state)
        state.finished_s += state.epoch_s
        state.epoch, state.step, state.sums, state.epoch_s = state.epoch + 1, 0, MetricSums(), 0.0
        hooks.checkpoint(state, finished)


def _train_epoch(
    state: TrainingState,
    model: nn.Module,
    dataset: BatchDataset,
    config: TrainConfig,
    group: Group,
    hooks: Hooks,
    autocast_dtype: torch.dtype | None,
) -> Progress:
    """Train to the end of the current epoch, reporting every half second; return its last progress."""
    sampler = ShardedBatchSampler(
        len(dataset),
        config.batch_size,
        seed=config.seed,
        epoch=state.epoch,
        rank=group.rank,
        world_size=group.world_size,
        first_step=state.step,
    )
    last_step = num_steps(len(dataset), config.batch_size)
    window = _Window(group, interval_steps=10)
    generator = _generator(group.device)
    seed = int(np.random.SeedSequence((config.seed, state.epoch, group.rank)).generate_state(1)[0])
    progress = None
    for batch in epoch_loader(dataset, sampler):
        generator.manual_seed(seed + state.step)  # of dropout: the same in a run that goes on as in one without a break
        loss_sum, num_correct = train_step(model, batch, state.optimizer, group, autocast_dtype)
        state.scheduler.step()
        state.step += 1
        window.add(loss_sum, num_correct, batch.global_size)
        checkpoint_due = state.step % config.checkpoint_every == 0
        if window.is_full or checkpoint_due or state.step == last_step:
            progress = window.close(state, last_step)
            hooks.progress(progress)
            if (hooks.wants_checkpoint() or checkpoint_due) and state.step < last_step:
                _check_weights(state)
                hooks.checkpoint(state, progress)
                window.restart_clock()
    assert progress is not None, "an epoch has at least one step"
    return progress


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator that a model's own layers draw from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _check_weights(state: TrainingState) -> None:
    """Raise TrainingDivergedError where the last step, whose loss was finite, has led to weights that are not."""
    if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
        raise TrainingDivergedError(state.epoch + 1, state.step)


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    group: Group,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Make one optimizer step; return this rank's sum of losses and number of correct images, on the device.

    Each rank's loss is its sum of losses × world size / global batch size. DDP takes the mean of the ranks'
    gradients, so the step follows the true mean over the global batch, also where slices are uneven or empty.
    """
    with torch.autocast(group.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        logits = model(to_input(batch.images))
    labels = batch.labels.long()
    loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
    optimizer.zero_grad()
    (loss_sum * (group.world_size / batch.global_size)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss_sum.detach(), (logits.detach().argmax(1) == labels).sum()


def to_input(images: Tensor) -> Tensor:
    """Turn images (N, 28, 28) uint8 into the model's input (N, 1, 28, 28) in [0, 1], as ``ToTensor`` does."""
    return images.unsqueeze(1).float().div_(255)


class _Window:
    """The steps since the last progress: their figures stay on the device until the window is closed.

    Closing it is the only time at which ranks talk besides the gradients. Rank 0's clock decides for all ranks after
    how many steps the next one closes, so that every rank closes at the same step.
    """

    def __init__(self, group: Group, interval_steps: int) -> None:
        self._group = group
        self._reset(interval_steps)

    def _reset(self, interval_steps: int) -> None:
        self._interval_steps = interval_steps
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._sizes: list[int] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the epoch's seconds what was done since the window opened."""
        self._start = time.perf_counter()

    def add(self, loss_sum: Tensor, num_correct: Tensor, global_size: int) -> None:
        self._losses.append(loss_sum)
        self._correct.append(num_correct)
        self._sizes.append(global_size)

    @property
    def is_full(self) -> bool:
        return len(self._sizes) >= self._interval_steps

    def close(self, state: TrainingState, last_step: int) -> Progress:
        """Reduce the window over all ranks into ``state`` and empty it. Raises TrainingDivergedError."""
        *loss_sums, num_correct, interval_steps = self._reduce()
        for offset, loss_sum in enumerate(loss_sums):
            if not math.isfinite(loss_sum):
                raise TrainingDivergedError(state.epoch + 1, state.step - len(loss_sums) + offset + 1)
        sums = MetricSums(math.fsum(loss_sums), int(num_correct), sum(self._sizes))
        state.sums += sums
        state.epoch_s += time.perf_counter() - self._start
        losses = [loss_sum / size for loss_sum, size in zip(loss_sums, self._sizes, strict=True)]
        self._reset(int(interval_steps))
        return Progress(state.epoch + 1, state.step, last_step, losses, sums, state.sums, state.epoch_s)

    def _reduce(self) -> list[float]:
        """Return the loss sum of each step, the number of correct images, and the steps of the next window."""
        elapsed_s = time.perf_counter() - self._start
        next_interval = max(1, round(len(self._sizes) * _REPORT_INTERVAL_S / max(elapsed_s, 1e-3)))
        correct = torch.stack(self._correct).sum().double()
        proposed = correct.new_tensor(next_interval if self._group.rank == 0 else 0)
        values = torch.cat([torch.stack(self._losses).double(), torch.stack([correct, proposed])])
        if self._group.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()


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
    """Return ``"fp32"`` or ``"bf16"`` for a setting that may be ``"auto"``, the same on every rank.

    Auto is bf16 on CPUs with bf16 instructions, where it was measured to be faster on this network; on a GPU it was
    not measured, and stays fp32.
    """
    if precision != "auto":
        return precision
    supported = torch.tensor(int(group.device.type == "cpu" and cpu_has_bf16()), device=group.device)
    if group.world_size > 1:
        dist.all_reduce(supported, dist.ReduceOp.MIN)
    return "bf16" if supported.item() else "fp32"


def cpu_has_bf16() -> bool:
    """Tell whether the processor computes in bf16, by Linux's list of its features; elsewhere assume not."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            features = set(file.read().split())
    except OSError:
        return False
    return bool(features & {"avx512_bf16", "amx_bf16"})


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Evaluate a model on all images of a split, in fp32 and fixed batches, where the model's weights are."""
    device = next(model.parameters()).device
    dataset = BatchDataset(split, device)
    was_training = model.training
    model.eval()
    losses: list[float] = []
    best: list[Tensor] = []  # (probability, class) of each image, a batch at a time
    for start in range(0, len(dataset), EVALUATION_BATCH_SIZE):
        labels = dataset.labels[start : start + EVALUATION_BATCH_SIZE].long()
        logits = model(to_input(dataset.images[start : start + EVALUATION_BATCH_SIZE]))
        losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
        best.append(torch.stack(logits.softmax(1).max(1)).cpu())
    model.train(was_training)
    probabilities, predictions = torch.cat(best, dim=1).numpy()
    pairs = np.bincount(split.labels.astype(int) * NUM_CLASSES + predictions.astype(int), minlength=NUM_CLASSES**2)
    confusion = pairs.reshape(NUM_CLASSES, NUM_CLASSES)
    return Evaluation(tuple(losses), confusion, predictions.astype(np.uint8), probabilities)
