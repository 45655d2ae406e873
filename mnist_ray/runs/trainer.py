"""Ray Train's ``TorchTrainer`` as a run needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, ValidationConfig
from ray.train.torch import TorchTrainer

from mnist_ray import private
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.runs.worker import LoopSpec, train_loop_per_worker
from mnist_ray.training.events import ControllerStarted

_RESIZE_INTERVAL_S = 15.0  # how often an elastic run looks whether the cluster holds more workers
_VALIDATION_POLL_INTERVAL_S = 0.1


def create_trainer(
    spec: LoopSpec,
    plan: WorkerPlan,
    max_failures: int,
    validation_config: ValidationConfig | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """Return the trainer that runs ``spec`` on the planned workers and keeps the best and the last checkpoint."""
    is_validated = spec.validates_in_tasks or spec.validation is not None
    return _Trainer(
        train_loop_per_worker,
        train_loop_config={"spec": spec},
        torch_config=WorkerGroupConfig(is_local=plan.is_local),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers if plan.min_workers is None else (plan.min_workers, plan.num_workers),
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
            placement_strategy=plan.placement,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=spec.run.name,
            storage_path=spec.run.storage_path,
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,  # the best two, and Ray keeps the last besides: were that damaged, there is another
                checkpoint_score_attribute="val_score" if is_validated else None,
            ),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[*callbacks, _EndsSoon()],
        ),
        validation_config=validation_config,
    )


class _Trainer(TorchTrainer):
    """Without the actors that help where there is no need: each of them is a process, and is waited for."""

    def _create_default_callbacks(self) -> list[Any]:
        is_local = self.backend_config.is_local
        unneeded: tuple[type, ...] = (private.DatasetsCallback,)  # hands out Ray Datasets; there are none
        if is_local:  # what it cleans up behind a killed controller is gone with the job's own Ray
            unneeded += (private.PlacementGroupCleanerCallback,)
        callbacks = [some for some in super()._create_default_callbacks() if not isinstance(some, unneeded)]
        mailbox = self.train_loop_config["spec"].mailbox
        return callbacks if mailbox is None else [*callbacks, _TellsController(mailbox)]


class _TellsController(private.ControllerCallback):
    """Tells the driver who looks after the workers, so that it can ask whether that still answers."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: object) -> None:
        self._mailbox.put.remote(ControllerStarted(ray.get_runtime_context().current_actor))


class _EndsSoon(UserCallback):
    """Lets Ray Train's controller look for the last validation more often than once a second."""

    def after_report(self, run_context: object, metrics: object, checkpoint: object) -> None:
        private.validation_manager.VALIDATION_TASK_POLL_INTERVAL_S = _VALIDATION_POLL_INTERVAL_S
