"""Ray Train's private API, as far as there is no public way: each name with the reason.

Apart from ``ray_internals``, since importing it takes seconds.
"""

from __future__ import annotations

from ray.train.torch.config import (
    # What a TorchConfig's backend_cls is derived from; what its on_start does first; and what joins the workers, which
    # needs no open port with an init_method of ours.
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from ray.train.v2._internal.callbacks import DatasetsCallback  # starts an actor also if there are no Ray Datasets
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,  # starts an actor that the end of a run waits for, up to a second
)
from ray.train.v2._internal.exceptions import (
    RayTrainError,  # what Ray Train itself raises in a worker
    WorkerHealthCheckFailedError,  # a worker that does not answer; UserCallback.after_exception is handed it
)
from ray.train.v2._internal.execution.callback import ControllerCallback  # tells which actor looks after the workers
from ray.train.v2._internal.execution.checkpoint import (
    validation_manager,  # looks for the last validation once a second, which is waited for at the end
)

__all__ = [
    "ControllerCallback",
    "DatasetsCallback",
    "PlacementGroupCleanerCallback",
    "RayTrainError",
    "WorkerHealthCheckFailedError",
    "_TorchBackend",
    "_set_torch_distributed_env_vars",
    "_setup_torch_process_group",
    "validation_manager",
]
