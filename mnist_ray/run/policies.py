"""What a worker does beside training: it validates, and saves while training continues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed

from mnist_ray.checkpoints.checkpoint import snapshot
from mnist_ray.checkpoints.find import drop_worse
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.sharding import is_wanted
from mnist_ray.process import Watchdog, in_thread
from mnist_ray.provenance import arithmetic, versions
from mnist_ray.storage import checkpoint_name, in_one_line
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate_together
from mnist_ray.training.metrics import score
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import STORAGE, VALIDATION


@dataclass(frozen=True)
class Validator:
    """Evaluates the model on the validation split; each rank computes its part of it."""

    job: Job
    split: Split
    config: TrainConfig
    group: Group
    watchdog: Watchdog

    def validate(self, state: TrainingState) -> tuple[dict[str, Any], list[str]]:
        """Return values for a checkpoint's metrics, and notes for the user. All ranks must call this."""
        workload, start = self.job.workload, time.perf_counter()
        with state.watch.on(VALIDATION):
            evaluation = evaluate_together(
                workload,
                state.result,
                self.split,
                self.config,
                self.group,
                num_loader_processes=self.job.workers.loader_workers,
                on_batch=lambda num_done: self.watchdog.heartbeat(),
            )
        metrics = evaluation.values(workload)
        seconds = time.perf_counter() - start
        values: dict[str, Any] = {f"val_{name}": value for name, value in metrics.items()}
        values["val_score"] = [*score(workload, metrics)]
        values["val_s"] = seconds
        values["val_examples_per_s"] = len(self.split) / seconds / self.group.world_size  # of one worker
        return values, [*evaluation.notes(self.split, workload.nouns)]


class Checkpointer:
    """Copies the state; a thread writes the copy into the run's folder, and then deletes checkpoints.

    The last one and the best ``keep_checkpoints`` by validation are kept; for None, all.
    """

    def __init__(self, job: Job, config: TrainConfig, group: Group, callbacks: Sequence[Callback]) -> None:
        self._job, self._config, self._group, self._callbacks = job, config, group, callbacks
        self._writing: Future[None] | None = None  # of the last checkpoint
        # The threads that write a sharded checkpoint need their own group: training continues on the other one.
        self._writers = torch.distributed.new_group(backend="gloo") if is_wanted(config, group.world_size) else None

    def save(self, state: TrainingState, metrics: CheckpointMetrics) -> None:
        """Wait for the previous checkpoint; save another: rank 0 or, if the state is sharded, each rank its part.

        All ranks must call this. Raises JobError if the previous one could not be written.
        """
        if self._group.rank > 0 and not state.is_sharded:
            for callback in self._callbacks:  # on every rank alike: it may communicate
                callback.state_dict()
            return
        self.wait(state)
        about = {"config": asdict(self._job.train), "workload": self._job.workload.identity}
        about |= {"metrics": metrics.to_dict(), "versions": versions()}
        if self._config.reproducible:
            about["arithmetic"] = arithmetic()
        copied = snapshot(state, about, self._callbacks, self._group)
        folder = self._job.run.inside(checkpoint_name(state.epoch, state.step))

        def write() -> None:
            with in_one_line("the storage has failed"):
                copied.write(folder, self._writers)
                if self._group.rank == 0 and self._config.keep_checkpoints is not None:
                    drop_worse(self._job.run, self._config.keep_checkpoints)

        self._writing = in_thread(write)

    def wait(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. Raises JobError if it could not be."""
        if self._writing is not None:
            with state.watch.on(STORAGE):
                self._writing.result()
