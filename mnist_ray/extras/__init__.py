"""What Ray's private API adds: faster starts and earlier detection of failures. Everything else uses the public API.

An extra is on if Ray is at least the first version that passed its tests, and has the names that the extra uses, with
the same parameters. ``--plain-ray`` turns all extras off. ``load`` is the only way to an extra: it returns the extra's
module of this package, or None if the extra is off. Forked workers have no module here: ``ray_fork`` starts them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mnist_ray.ray_versions import is_at_least, ray_version

_NEED = re.compile(r"([\w.]+):([\w.]+)(?:\((.+)\))?")


@dataclass(frozen=True)
class Extra:
    """Something that Ray's private API makes possible."""

    gain: str
    since: str  # the first version of Ray with which its tests passed
    needs: tuple[str, ...]  # names in Ray: MODULE:NAME, or MODULE:NAME(PARAMETER,…) with the parameters that are used
    is_of_train: bool = False  # needs Ray Train, which takes seconds to import


EXTRAS = {
    "workers": Extra(
        "forked workers",
        "2.51",
        (
            "ray._private.parameter:RayParams.__init__(setup_worker_path)",
            "ray._raylet:Config.initialize(config_list)",
            "ray.actor:ActorClassID",
            "ray:NodeID.from_random",
        ),
    ),
    "small": Extra(
        "a small local Ray",
        "2.55",
        (
            "ray._private.node:Node.start_api_server(include_dashboard,raise_on_failure)",
            "ray._private.parameter:RayParams.__init__(no_monitor,include_log_monitor)",
            "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
            "ray._private.services:ConsolePopen(args,env)",
            "ray._private.services:RAY_PATH",
            "ray._private.utils:get_dashboard_dependency_error",
            "ray._raylet:Config.initialize(config_list)",
            "ray._raylet:METRICS_AGENT_PORT_NAME",
        ),
    ),
    "processes": Extra(
        "a watch over Ray's processes",
        "2.55",
        (
            "ray._private.node:Node.dead_processes",
            "ray._private.state:state._connect_and_get_accessor",
            "ray._private.worker:global_worker",
            "ray._raylet:GlobalStateAccessor.get_actor_info(actor_id)",
            "ray._raylet:GlobalStateAccessor.get_placement_group_table",
            "ray.core.generated.gcs_pb2:ActorTableData",
            "ray.core.generated.gcs_pb2:PlacementGroupTableData",
        ),
    ),
    "address": Extra(
        "a quick look at a cluster's address",
        "2.60",
        (
            "ray._common.usage.usage_lib:get_cluster_metadata(gcs_client)",
            "ray._common.utils:get_ray_address_file(temp_dir)",
            "ray._private.authentication.authentication_token_setup:AUTH_MODE_ENV_VAR",
            "ray._private.authentication.authentication_token_setup:maybe_enable_token_auth_if_token_available("
            "warn_if_disabled)",
            "ray._private.utils:check_version_info(cluster_metadata,this_process_address)",
            "ray._raylet:Config.initialize(config_list)",
            "ray._raylet:GcsClient",
            "ray._raylet:InnerGcsClient.standalone(gcs_address,cluster_id,timeout_ms)",
            "ray.exceptions:AuthenticationError",
        ),
    ),
    "trainer": Extra(
        "a trainer without unneeded actors",
        "2.55",
        (
            "ray.train.torch:TorchTrainer._create_default_callbacks",
            "ray.train.v2._internal.callbacks:DatasetsCallback",
            "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        ),
        is_of_train=True,
    ),
    "sweeps": Extra(
        "sweeps that lose no CPUs",
        "2.51",
        (
            "ray.air._internal.usage:tag_callbacks(callbacks)",
            "ray.air.execution.resources.placement_group:PlacementGroupResourceManager",
        ),
        is_of_train=True,
    ),
}


def load(name: str, *, plain: bool) -> ModuleType | None:
    """Return the module of an extra; None if the extra is off. With ``plain``, all are."""
    return importlib.import_module(f"{__name__}.{name}") if is_on(name, plain=plain) else None


def is_on(name: str, *, plain: bool) -> bool:
    """Return whether an extra is on; with ``plain``, none is."""
    return not plain and works(name)


@functools.cache
def works(name: str) -> bool:
    """Return whether this Ray has everything that an extra needs."""
    extra = EXTRAS[name]
    return is_at_least(extra.since) and all(map(_is_there, extra.needs))


def _is_there(need: str) -> bool:
    """Return whether this Ray has a name with the required parameters."""
    match = _NEED.fullmatch(need)
    assert match is not None
    module, name, parameters = match.groups("")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return {*filter(None, parameters.split(","))} <= {*(inspect.signature(found).parameters if parameters else ())}
    except (ImportError, AttributeError, ValueError):
        return False


def listed(*, plain: bool) -> dict[str, list[Extra]]:
    """Return the extras that are "on" and "off". Until Ray Train is imported, leave out the extras that need it."""
    known = {name: extra for name, extra in EXTRAS.items() if "ray.train" in sys.modules or not extra.is_of_train}
    on = [name for name in known if is_on(name, plain=plain)]
    return {"on": [known[name] for name in on], "off": [known[name] for name in known if name not in on]}


def note() -> str:
    """Return one line about the extras that do not work with this Ray; empty if all work."""
    missing = [extra.gain for extra in listed(plain=False)["off"]]
    return f"Ray {ray_version()}: without {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside the block, give an attribute of ``owner`` another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
