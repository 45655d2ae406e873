import os
from pathlib import Path

import pytest

from mnist_ray.cluster import environment


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove this process's RAY_ variables."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name[:4] != "RAY_"})


def test_the_users_variables_win_and_only_they_are_listed() -> None:
    given = {"RAY_ADDRESS": "local", "RAY_GCS_SERVER_PORT": "many", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
    os.environ |= given
    environment.prepare(verbose=False)
    environment.prepare_local()
    assert given.items() <= os.environ.items()
    assert environment.users_variables() == ["RAY_GCS_SERVER_PORT", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]


def test_a_local_ray_has_its_token_in_a_variable_if_the_home_cannot_be_written(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    environment.prepare_local()
    assert "RAY_AUTH_TOKEN" not in os.environ
    os.environ["HOME"] = "/dev/null"
    environment.prepare_local()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
