import inspect

import pytest
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from mnist_ray.cluster import ray_internals
from mnist_ray.cluster.rendezvous import WorkerGroupConfig


@pytest.mark.parametrize("name", ray_internals.NAMES)
def test_ray_still_has_what_is_taken_from_its_private_parts(name: str) -> None:
    assert getattr(ray_internals, name) is not None


@pytest.mark.parametrize("name", ["RayTrainError", "WorkerHealthCheckFailedError"])
def test_what_is_caught_is_an_exception(name: str) -> None:
    assert issubclass(getattr(ray_internals, name), Exception)


def test_a_worker_that_does_not_answer_is_an_error_of_ray_train() -> None:
    assert issubclass(ray_internals.WorkerHealthCheckFailedError, ray_internals.RayTrainError)


def test_a_local_ray_can_be_told_to_listen_on_loopback_only() -> None:
    assert isinstance(ray_internals.ray_constants.ENABLE_RAY_CLUSTER, bool)


def test_a_local_ray_takes_the_parameters_that_make_it_small_and_fork() -> None:
    known = inspect.signature(ray_internals.RayParams.__init__).parameters
    assert {"no_monitor", "include_log_monitor", "session_name", "setup_worker_path"} <= known.keys()
    assert callable(ray_internals.Node.start_api_server)


def test_the_last_validation_can_be_looked_for_more_often() -> None:
    assert ray_internals.validation_manager.VALIDATION_TASK_POLL_INTERVAL_S == 1


def test_a_trainer_makes_the_callbacks_of_which_some_are_left_out() -> None:
    trainer = TorchTrainer(lambda: None, torch_config=WorkerGroupConfig(is_local=True))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert {ray_internals.DatasetsCallback, ray_internals.PlacementGroupCleanerCallback} <= kinds


def test_nothing_else_is_taken_from_ray() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ray_internals.no_such_name


def test_each_name_says_what_it_is_needed_for() -> None:
    assert all(module.startswith("ray.") and reason for module, reason in ray_internals.NAMES.values())


def test_rays_list_of_checkpoints_is_looked_for_where_ray_writes_it() -> None:
    assert ray_internals.SNAPSHOT_FILE == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
