"""The private API of Ray Train that the package needs, each name with the reason.

Apart from ``ray_internals``, because it takes seconds to import.
"""

from __future__ import annotations

# TorchConfig's backend_cls must derive from the last. The others are the first thing that its on_start does, and how it
# joins the workers: called with our own init_method, that needs no open port.
from ray.train.torch.config import _set_torch_distributed_env_vars as _set_torch_distributed_env_vars
from ray.train.torch.config import _setup_torch_process_group as _setup_torch_process_group
from ray.train.torch.config import _TorchBackend as _TorchBackend

# Two callbacks to leave out. They start an actor each: one even without Ray Datasets, the other delays a run's end by
# up to a second.
from ray.train.v2._internal.callbacks import DatasetsCallback as DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback as PlacementGroupCleanerCallback,
)

# UserCallback.after_exception gets these: Ray Train's own errors in a worker, and the error for a silent worker.
from ray.train.v2._internal.exceptions import RayTrainError as RayTrainError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerHealthCheckFailedError

# Says which actor controls the workers.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback

# Polls the last validation once a second, which delays a run's end.
from ray.train.v2._internal.execution.checkpoint import validation_manager as validation_manager
