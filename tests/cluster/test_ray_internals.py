"""Changes of Ray that would otherwise go unnoticed. A missing name fails at its import."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray._private import ray_constants, services, utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from mnist_ray.cli import status_of
from mnist_ray.cluster import ray_internals, train_internals
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.storage import SNAPSHOT_FILE
from ray_fork import ray_internals as fork_internals
from ray_fork import starting
from tests.conftest import ROOT


def test_a_local_ray_can_be_small_and_fork_and_listen_on_loopback_only() -> None:
    known = inspect.signature(RayParams.__init__).parameters
    assert {"no_monitor", "include_log_monitor", "session_name", "setup_worker_path"} <= known.keys()
    assert callable(Node.start_api_server)
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)


def imported_from_ray(file: str) -> list[tuple[str, str]]:
    """Return the modules and names that a file imports from parts of Ray."""
    imports = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ImportFrom)]
    from_ray = [node for node in imports if node.module and node.module.startswith("ray.")]
    return [(node.module or "", each.name) for node in from_ray for each in node.names]


@pytest.mark.parametrize(
    ("own", "module", "name"),
    [
        (f"mnist_ray.cluster.{own}", module, name)
        for own in ("ray_internals", "train_internals")
        for module, name in imported_from_ray(f"mnist_ray/cluster/{own}.py")
    ],
)
def test_a_ray_without_a_name_that_is_imported_is_refused_in_one_line(
    own: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, own)
    monkeypatch.delattr(importlib.import_module(module), name)
    if f"{module}.{name}" in sys.modules:
        monkeypatch.setitem(sys.modules, f"{module}.{name}", None)

    def work() -> None:
        importlib.import_module(own)

    assert status_of(work) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: Ray {ray.__version__} does not work here: ")
    assert said.endswith("; pip install 'ray[train,tune]==2.60.*'\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (utils, "set_sigterm_handler", lambda: ray_internals.without_sigterm_handler().__enter__()),
        (utils, "read_ray_address", ray_internals.address_of_ray_start),
        (ray_constants, "ENABLE_RAY_CLUSTER", lambda: ray_internals.on_loopback().__enter__()),
        (services, "ConsolePopen", lambda: ray_internals.for_one_job(None, log_to_driver=False).__enter__()),
        (Node, "start_api_server", lambda: ray_internals.for_one_job(None, log_to_driver=False).__enter__()),
        (Node, "get_session_dir_path", ray_internals.session_folder),
        (Node, "dead_processes", ray_internals.dead_processes),
        (type(state), "actor_table", lambda: ray_internals.kill_actors("Nobody")),
        (type(state), "_connect_and_get_accessor", ray_internals.orphaned_placement_groups),
    ],
)
@pytest.mark.usefixtures("ray_address")
def test_a_ray_without_a_name_that_is_used_is_refused_in_one_line(
    owner: Any, name: str, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(owner, name)
    assert status_of(call) == 1
    assert capsys.readouterr().err.startswith(f"error: Ray {ray.__version__} does not work here: ")


def test_replaced_names_of_ray_are_restored() -> None:
    before = ray.actor.ActorClassID, utils.set_sigterm_handler
    with fork_internals.actor_ids_from_kernel(), ray_internals.without_sigterm_handler():
        ids = {ray.actor.ActorClassID.from_random() for _ in range(2)}
        assert utils.set_sigterm_handler != before[1]
    assert len(ids) == 2
    assert (ray.actor.ActorClassID, utils.set_sigterm_handler) == before


def test_ray_trains_names_mean_what_the_package_needs() -> None:
    assert issubclass(train_internals.WorkerHealthCheckFailedError, train_internals.RayTrainError)
    assert issubclass(train_internals.RayTrainError, Exception)


def test_a_trainer_creates_the_callbacks_that_are_left_out() -> None:
    trainer = TorchTrainer(lambda: None, torch_config=WorkerGroupConfig(is_local=True))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert {train_internals.DatasetsCallback, train_internals.PlacementGroupCleanerCallback} <= kinds


def test_ray_uses_the_names_of_the_file_and_variable_that_are_read() -> None:
    assert SNAPSHOT_FILE == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert starting.JOB_CONFIG_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR
