"""The ``TorchTrainer`` of a run, or of a sweep's trial."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from mnist_ray import extras
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.run.rendezvous import WorkerGroupConfig
from mnist_ray.run.reporter import train_loop_per_worker
from mnist_ray.run.worker import LoopSpec

_RESIZE_INTERVAL_S = 15.0  # between an elastic run's checks whether the cluster has room for more workers


def create_trainer(
    spec: LoopSpec, plan: WorkerPlan, folder: str, max_failures: int, callbacks: Sequence[UserCallback] = ()
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers.

    Ray Train is told no checkpoint; what it writes all the same goes to a private ``folder`` of this node.
    """
    # How often Train's controller checks its workers, and sees that they have ended; the default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
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
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
