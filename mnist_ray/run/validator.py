"""Validation by all workers together."""

from __future__ import annotations

import time
from typing import Any

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group
from mnist_ray.run.life import Life
from mnist_ray.training.evaluation import batch_size_of, evaluate_together
from mnist_ray.training.metrics import score
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import VALIDATION


class Validator:
    """Evaluates the model on the validation split; each rank computes its part of it."""

    def __init__(self, job: Job, split: Split, config: TrainConfig, group: Group, life: Life) -> None:
        self._job, self._split, self._config, self._group, self._life = job, split, config, group, life
        self._batch_size: int | None = None  # the first validation finds it
        self.not_finite = 0, 0  # in the last validation: how many examples, and the first one's position

    def validate(self, state: TrainingState) -> dict[str, Any]:
        """Return the values of a validation for a checkpoint's metrics. All ranks must call this."""
        workload, start = self._job.workload, time.perf_counter()
        loader_workers = self._job.workers.loader_workers
        with state.watch.on(VALIDATION):
            if self._batch_size is None:
                self._batch_size = batch_size_of(workload, state.result, self._split, self._config, loader_workers)
            evaluation = evaluate_together(
                workload,
                state.result,
                self._split,
                self._config,
                self._group,
                num_loader_processes=loader_workers,
                on_batch=lambda num_done: self._life.show(),
                batch_size=self._batch_size,
            )
        self.not_finite = evaluation.not_finite
        values = evaluation.values(workload)
        of_metrics = {f"val_{name}": value for name, value in values.items()}
        seconds = time.perf_counter() - start
        rate = len(self._split) / seconds / self._group.world_size  # of one worker
        return {**of_metrics, "val_score": [*score(workload, values)], "val_s": seconds, "val_examples_per_s": rate}
