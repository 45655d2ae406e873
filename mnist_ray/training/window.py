"""The window of steps between two reports."""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel.group import Group
from mnist_ray.training.cadence import Decision
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import COUNT, LOGGED, WEIGHT, MetricSums, TrainingDivergedError, check_logged
from mnist_ray.training.optimizers import names_of_rates
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import CALLBACKS, PARTS, WORKERS
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import GRADIENT_NORM


class LoggingWindow:
    """The steps since the last report. Their sums stay on the device until the window is closed."""

    def __init__(self, workload: Workload, group: Group) -> None:
        self._workload, self._group = workload, group
        self._sums: list[Mapping[str, Tensor]] = []  # of each step, on this rank
        self._sizes: list[int] = []  # of each step's global batch
        self._norms: list[Tensor] = []  # of the gradients, before clipping; all ranks have the same

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, sums: Mapping[str, Tensor], global_size: int, gradient_norm: Tensor | None) -> None:
        """Add a step: its sums on this rank, one number or a row of the chunks' each, and its global batch size."""
        self._sums.append(sums)
        self._sizes.append(global_size)
        if gradient_norm is not None:
            self._norms.append(gradient_norm)

    def close(self, state: TrainingState, decision: Decision) -> Progress:
        """Sum the window over all ranks, add it to ``state``, and empty it; all ranks must call this.

        Raises TrainingStoppedError for a wrong sum of weights, TrainingDivergedError if a loss is not finite.
        """
        state.watch.turn(WORKERS)
        sums, seconds = self._reduced(state)
        state.watch.turn(CALLBACKS)
        losses = self._losses(sums, state)
        num_examples = sum(self._sizes)
        state.epoch_s += decision.elapsed_s
        state.sums = state.sums.plus(sums, num_examples)
        window = MetricSums().plus(sums, num_examples)
        others = window.logged
        if self._norms:
            others[GRADIENT_NORM.name] = GRADIENT_NORM.join(torch.stack(self._norms).tolist())
        rates = state.learning_rates
        if len(rates) > 1:
            others |= dict(zip(names_of_rates(state.optimizers), rates, strict=False))
        self._sums, self._sizes, self._norms = [], [], []
        return Progress(
            epoch=state.epoch + 1,
            step=state.step,
            epoch_steps=state.epoch_steps,
            losses=losses,
            window=window.values(self._workload),
            so_far=state.sums.values(self._workload),
            num_examples=state.sums.num_examples,
            epoch_s=state.epoch_s,
            learning_rate=rates[0] if rates else math.nan,
            total_step=state.total_step,
            saves=decision.saves,
            stops=decision.stops,
            parts=seconds,
            others=others,
            logged=state.sums.logged,
        )

    def _reduced(self, state: TrainingState) -> tuple[dict[str, np.ndarray], list[list[float]]]:
        """Return the steps' sums over all ranks, (steps,) by name, and the seconds of each rank by part of its time."""
        names = [*dict.fromkeys(name for step in self._sums for name in step)]
        own = [name for name in names if not name.startswith((LOGGED, COUNT))]  # the same on all ranks
        logged = sorted({*names} - {*own})  # ranks may have logged other names
        sums = self._stacked(own, missing=math.nan)
        key = zlib.crc32("\n".join(logged).encode())
        ranks = sums.new_zeros(self._group.world_size, len(PARTS) + 1)  # each rank fills its row
        ranks[self._group.rank] = sums.new_tensor([*state.watch.taken(), key])
        if self._group.world_size > 1:
            whole = torch.cat([sums.view(-1), ranks.view(-1)])
            dist.all_reduce(whole)
            sums, ranks = whole[: sums.numel()].view_as(sums), whole[sums.numel() :].view_as(ranks)
        *seconds, keys = ranks.T.tolist()
        totals = _by_name(own, sums)
        if any(keys):
            totals |= self._logged(logged, is_same=len({*keys}) == 1)
        return totals, [list(row) for row in zip(*seconds, strict=True)]

    def _logged(self, names: list[str], *, is_same: bool) -> dict[str, np.ndarray]:
        """Return what was logged like ``_reduced``. Unless it ``is_same``, ranks have logged different names."""
        if not is_same:
            of_ranks: list[Any] = [names] * self._group.world_size
            dist.all_gather_object(of_ranks, names)
            names = sorted({name for of_rank in of_ranks for name in of_rank})
        check_logged(self._workload, [name.removeprefix(LOGGED) for name in names if name.startswith(LOGGED)])
        sums = self._stacked(names, missing=0.0)
        if self._group.world_size > 1:
            dist.all_reduce(sums)
        return _by_name(names, sums)

    def _stacked(self, names: Sequence[str], missing: float) -> Tensor:
        """Return the sums of each step, (steps, names) or, with --reproducible, (steps, names, chunks), in double."""
        nothing = torch.full_like(self._sums[0]["loss"], missing)
        rows = [step.get(name, nothing) for step in self._sums for name in names]
        return torch.stack(rows).double().unflatten(0, (len(self._sums), len(names)))

    def _losses(self, sums: Mapping[str, np.ndarray], state: TrainingState) -> list[float]:
        """Return each step's mean loss: NaN if it has no weight."""
        weights, first = sums.get(WEIGHT, np.array(self._sizes)), state.step - len(self._sizes) + 1
        for number, (weight, loss) in enumerate(zip(weights.tolist(), sums["loss"].tolist(), strict=True), first):
            if not weight >= 0:
                found = f"one in step {number} of epoch {state.epoch + 1} is negative or NaN"
                raise TrainingStoppedError(f"{type(self._workload).__name__}.weights: {found}; leave it out")
            if not math.isfinite(loss):
                raise TrainingDivergedError(state.epoch + 1, number)
        losses: list[float] = (sums["loss"] / np.where(weights > 0, weights, math.nan)).tolist()
        return losses


def _by_name(names: Sequence[str], sums: Tensor) -> dict[str, np.ndarray]:
    if sums.dim() > 2:
        sums = functools.reduce(operator.add, sums.unbind(2))  # chunk by chunk
    return dict(zip(names, sums.T.cpu().numpy(), strict=True))
