"""Ray Train's private API, as far as there is no public way: each name with the reason.

Apart from ``ray_internals``, since importing it takes seconds.
"""

from __future__ import annotations

# What a TorchConfig's backend_cls is derived from, what its on_start does first, and what joins the workers: with an
# init_method of ours it needs no open port.
from ray.train.torch.config import _set_torch_distributed_env_vars as _set_torch_distributed_env_vars
from ray.train.torch.config import _setup_torch_process_group as _setup_torch_process_group
from ray.train.torch.config import _TorchBackend as _TorchBackend

# Start an actor also if there are no Ray Datasets, and one that the end of a run waits for, up to a second.
from ray.train.v2._internal.callbacks import DatasetsCallback as DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback as PlacementGroupCleanerCallback,
)

# What Ray Train itself raises in a worker, and for one that does not answer: UserCallback.after_exception is handed it.
from ray.train.v2._internal.exceptions import RayTrainError as RayTrainError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerHealthCheckFailedError

# Tells which actor looks after the workers.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback

# Looks for the last validation once a second, which is waited for at the end.
from ray.train.v2._internal.execution.checkpoint import validation_manager as validation_manager
