"""Changes of Ray that would otherwise go unnoticed. A missing name fails at its import."""

import inspect

import ray
from ray._private import ray_constants, utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from mnist_ray.cluster import ray_internals, train_internals
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.storage import SNAPSHOT_FILE
from ray_fork import ray_internals as fork_internals
from ray_fork import starting


def test_a_local_ray_can_be_small_and_fork_and_listen_on_loopback_only() -> None:
    known = inspect.signature(RayParams.__init__).parameters
    assert {"no_monitor", "include_log_monitor", "session_name", "setup_worker_path"} <= known.keys()
    assert callable(Node.start_api_server)
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)


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
    assert train_internals.validation_manager.VALIDATION_TASK_POLL_INTERVAL_S == 1


def test_a_trainer_creates_the_callbacks_that_are_left_out() -> None:
    trainer = TorchTrainer(lambda: None, torch_config=WorkerGroupConfig(is_local=True))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert {train_internals.DatasetsCallback, train_internals.PlacementGroupCleanerCallback} <= kinds


def test_ray_uses_the_names_of_the_file_and_variable_that_are_read() -> None:
    assert SNAPSHOT_FILE == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert starting.JOB_CONFIG_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR
