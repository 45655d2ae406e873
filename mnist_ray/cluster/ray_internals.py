"""Ray's private API, as far as there is no public way: each name with its module and the reason.

Names are looked up when they are first used, since some of the modules take seconds to import.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

NAMES = {
    "ray_constants": (
        "ray._private",
        "ENABLE_RAY_CLUSTER=False lets a local Ray listen on loopback only; its variable is read at import",
    ),
    "RayParams": (
        "ray._private.parameter",
        "setup_worker_path is what starts each worker: runtime_env's py_executable costs an import of Ray before it; "
        "no_monitor and include_log_monitor spare two processes; session_name tells where the logs are if it fails",
    ),
    "services": (
        "ray._private",
        "ConsolePopen starts Ray's processes, in the job's own session and process group, and so for its signals too",
    ),
    "utils": ("ray._private", "set_sigterm_handler puts a handler that exits at once in place of the job's own"),
    "Node": ("ray._private.node", "start_api_server starts a process also for no dashboard, and waits for it"),
    "ActorClassID": (
        "ray.actor",
        "a class that becomes an actor at import draws its id from Ray's generator, which forks must not share",
    ),
    "Config": ("ray._raylet", "reads Ray's settings again, which are read when it is loaded, before a fork"),
    "RAY_JOB_CONFIG_JSON_ENV_VAR": (
        "ray._private.runtime_env.constants",
        "the variable by which a submitted job knows its runtime environment",
    ),
    "maybe_enable_token_auth_if_token_available": (
        "ray._private.authentication.authentication_token_setup",
        "`ray start` asks for a token where there is one, and ray.init(address=...) does not show it by itself",
    ),
    "read_ray_address": (
        "ray._private.utils",
        "the address that `ray start` has left; ray.init(address='auto') also joins the local Ray of another job",
    ),
    "InnerGcsClient": (
        "ray._raylet",
        "sees in seconds whether a Ray answers at an address; ray.init tries for minutes",
    ),
    "get_default_ray_temp_dir": (
        "ray._common.utils",
        "where a local Ray keeps its files, which are to go with it",
    ),
    "global_worker": ("ray._private.worker", "knows this node's folder of files and logs, and kills actors by id"),
    "RayTrainError": ("ray.train.v2._internal.exceptions", "what Ray Train itself raises in a worker"),
    "WorkerHealthCheckFailedError": (
        "ray.train.v2._internal.exceptions",
        "a worker that does not answer; UserCallback.after_exception is handed it",
    ),
    "state": (
        "ray._private.state",
        "tells which actors there are, and which placement groups have lost theirs",
    ),
    "PlacementGroupTableData": ("ray.core.generated.gcs_pb2", "what the accessor returns, serialized"),
    "ControllerCallback": ("ray.train.v2._internal.execution.callback", "tells who looks after a run's workers"),
    "DatasetsCallback": ("ray.train.v2._internal.callbacks", "starts an actor also where there are no Ray Datasets"),
    "PlacementGroupCleanerCallback": (
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "starts an actor that the end of a run waits for, up to a second",
    ),
    "validation_manager": (
        "ray.train.v2._internal.execution.checkpoint",
        "looks for the last validation once a second, which is waited for at the end",
    ),
    "_TorchBackend": ("ray.train.torch.config", "what a TorchConfig's backend_cls is derived from"),
    "_set_torch_distributed_env_vars": ("ray.train.torch.config", "what _TorchBackend.on_start does first"),
    "_setup_torch_process_group": (
        "ray.train.torch.config",
        "joins the workers; with an init_method of ours it needs no open port",
    ),
}

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray's list of a run's checkpoints, in the run's folder; it is not written in one move."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    place = importlib.import_module(NAMES[name][0])
    return getattr(place, name) if hasattr(place, name) else importlib.import_module(f"{NAMES[name][0]}.{name}")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Let an attribute have another value meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
