import os
from pathlib import Path

import pytest

from mnist_ray.cluster import environment


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have no variables of Ray's meanwhile."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name[:4] != "RAY_"})


def test_variables_that_ray_can_read_stay() -> None:
    given = {"RAY_worker_niceness": "5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
    os.environ |= given
    environment.prepare(verbose=False)
    assert given.items() <= os.environ.items()


def test_only_the_users_own_variables_are_told() -> None:
    os.environ |= {"RAY_ADDRESS": "local", "RAY_GCS_SERVER_PORT": "many"}
    environment.prepare(verbose=False)
    environment.prepare_local()
    assert environment.users_variables() == ["RAY_GCS_SERVER_PORT"]


def test_a_local_ray_has_its_token_in_a_variable_where_it_cannot_write_it_into_the_home(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    environment.prepare_local()
    assert "RAY_AUTH_TOKEN" not in os.environ
    os.environ["HOME"] = "/dev/null"
    environment.prepare_local()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
