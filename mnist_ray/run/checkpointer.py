"""Saving of checkpoints while training continues."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict

import torch.distributed

from mnist_ray.checkpoints.checkpoint import snapshot
from mnist_ray.checkpoints.find import drop_worse
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.config import TrainConfig
from mnist_ray.job.job import Job
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.sharding import is_wanted
from mnist_ray.process import in_thread
from mnist_ray.provenance import arithmetic, versions
from mnist_ray.run.life import STORAGE_LIMIT_S, Life
from mnist_ray.storage import checkpoint_name, in_one_line
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import STORAGE


class Checkpointer:
    """Copies the state; a thread writes the copy into the run's folder, and then deletes checkpoints.

    The last one and the best ``--keep-checkpoints`` by validation are kept; for None, all.
    """

    def __init__(self, job: Job, config: TrainConfig, group: Group, callbacks: Sequence[Callback]) -> None:
        self._job, self._config, self._group, self._callbacks = job, config, group, callbacks
        self._writing: Future[None] | None = None  # of the last checkpoint
        # The threads that write a sharded checkpoint need their own group: training continues on the other one.
        self._writers = torch.distributed.new_group(backend="gloo") if is_wanted(config, group.world_size) else None

    def save(self, state: TrainingState, metrics: CheckpointMetrics, life: Life) -> None:
        """Wait for the previous checkpoint; save another: rank 0 or, if the state is sharded, each rank its part.

        All ranks must call this. Raises JobError if the previous one could not be written.
        """
        if self._group.rank > 0 and not state.is_sharded:
            for callback in self._callbacks:  # on every rank alike: it may communicate
                callback.state_dict()
            return
        self.wait(state)
        with state.watch.on(STORAGE):
            state.pace.wait()
        life.show()  # a callback's state_dict may hang
        about = {"config": asdict(self._job.train), "workload": self._job.workload.identity}
        about |= {"metrics": metrics.to_dict(), "versions": versions()}
        if self._config.reproducible:
            about["arithmetic"] = arithmetic()
        copied = snapshot(state, about, self._callbacks, self._group)
        folder = self._job.run.inside(checkpoint_name(state.epoch, state.step))
        life.show(STORAGE_LIMIT_S)

        def write() -> None:
            with in_one_line("the storage has failed"), state.pace.writing():
                copied.write(folder, self._writers)
                if self._group.rank == 0 and self._config.keep_checkpoints is not None:
                    drop_worse(self._job.run, self._config.keep_checkpoints)

        self._writing = in_thread(write)

    def wait(self, state: TrainingState) -> None:
        """Wait until the last checkpoint is written. Raises JobError if it could not be."""
        if self._writing is not None:
            with state.watch.on(STORAGE):
                self._writing.result()
