"""The ``TorchTrainer`` of a run, or of a sweep's trial."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from mnist_ray import extras
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.job.retention import NUM_KEPT
from mnist_ray.run.rendezvous import WorkerGroupConfig
from mnist_ray.run.reporter import train_loop_per_worker
from mnist_ray.run.worker import LoopSpec
from mnist_ray.storage import SNAPSHOT_FILE, RunFolder, with_retries

_RESIZE_INTERVAL_S = 15.0  # between an elastic run's checks whether the cluster has room for more workers
_FEW_STEPS = 100  # in an epoch


def drop_rays_list(run: RunFolder) -> None:
    """Remove Ray's list of a run's checkpoints, since a kill may have truncated it: workers need no list."""
    with_retries(lambda: run.delete_file(SNAPSHOT_FILE) if run.exists(SNAPSHOT_FILE) else None)


def create_trainer(
    spec: LoopSpec, plan: WorkerPlan, max_failures: int, callbacks: Sequence[UserCallback] = ()
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers."""
    # How often Train's controller checks its workers; the default is 2 s. It takes one checkpoint from them at each
    # check, so short epochs wait for it. On a cluster, each check asks many workers.
    has_short_epochs = spec.job.train.steps_per_epoch(len(spec.train)) < _FEW_STEPS
    interval_s = 0.05 if plan.is_local and has_short_epochs else 0.2
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(interval_s))
    trainer_class, callbacks = TorchTrainer, [*callbacks]
    if extras.is_on("trainer", plain=spec.job.workers.plain_ray):
        from mnist_ray.extras.trainer import Trainer

        trainer_class = Trainer
    if spec.event_queue is not None and extras.is_on("preemption", plain=spec.job.workers.plain_ray):
        from mnist_ray.extras.preemption import PreemptionCallback

        callbacks.append(PreemptionCallback(spec.event_queue))
    is_elastic, scaling = plan.min_workers is not None, dict[str, Any]()
    if is_elastic:
        scaling["elastic_resize_monitor_interval_s"] = _RESIZE_INTERVAL_S
    if plan.labels:
        scaling["label_selector"] = dict(plan.labels)
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(is_local=plan.is_local),
        scaling_config=ScalingConfig(
            num_workers=(plan.min_workers, plan.num_workers) if is_elastic else plan.num_workers,
            placement_strategy=plan.placement,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
            **scaling,
        ),
        run_config=RunConfig(
            name=spec.job.run.name,
            storage_path=spec.job.run.storage_path,
            checkpoint_config=CheckpointConfig(
                num_to_keep=NUM_KEPT,  # the best; Ray also keeps the last
                checkpoint_score_attribute=None if spec.validation is None else "val_score",
            ),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
