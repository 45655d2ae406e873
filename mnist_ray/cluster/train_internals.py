"""The private API of Ray Train that the package needs, with a reason for each name.

It is separate from ``ray_internals``, because Ray Train takes seconds to import.
"""

from __future__ import annotations

# TorchConfig's backend_cls must derive from _TorchBackend, whose on_start calls the first function, and then the second
# to join the workers. If we call the second with our own init_method, it needs no open port.
from ray.train.torch.config import _set_torch_distributed_env_vars as _set_torch_distributed_env_vars
from ray.train.torch.config import _setup_torch_process_group as _setup_torch_process_group
from ray.train.torch.config import _TorchBackend as _TorchBackend

# Two callbacks to leave out. Each starts an actor: the first does so even without Ray Datasets, and the second delays a
# run's end by up to a second.
from ray.train.v2._internal.callbacks import DatasetsCallback as DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback as PlacementGroupCleanerCallback,
)

# UserCallback.after_exception gets these: Ray Train's own errors in a worker.
from ray.train.v2._internal.exceptions import RayTrainError as RayTrainError

# The base of a callback that is called in the process that controls the workers, also before it starts them; and two of
# the states of that process.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState as PreemptingState
from ray.train.v2._internal.execution.controller.state import RestartingState as RestartingState
