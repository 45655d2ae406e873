"""Another Ray, simulated: an older one, and a newer one without names that extras use."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import node, ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from mnist_ray import extras, ray_versions
from mnist_ray.cli import status_of
from mnist_ray.extras import EXTRAS, is_on, note, processes, small
from mnist_ray.run.ray_train import WorkerGroupConfig
from ray_fork import starting
from tests.conftest import ROOT, Flags, run_main, weights


@pytest.fixture(autouse=True)
def _tried_again() -> Iterator[None]:
    """Let extras be tried again with the changed Ray, and after the test."""
    extras.works.cache_clear()
    yield
    extras.works.cache_clear()


def test_all_extras_are_on_with_the_newest_ray_that_was_tried_unless_a_job_is_plain() -> None:
    assert note() == ""
    assert all(is_on(name, plain=False) and not is_on(name, plain=True) for name in EXTRAS)


def test_extras_are_off_with_an_older_ray_than_their_tests_passed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_versions, "ray_version", lambda: "2.50.1")
    assert not any(is_on(name, plain=False) for name in EXTRAS)


def test_an_extra_whose_name_of_ray_is_missing_is_off_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(services, "ConsolePopen")
    monkeypatch.delattr(services, "RAY_PATH")
    monkeypatch.delitem(sys.modules, "mnist_ray.extras.small")
    assert extras.load("small", plain=False) is None
    assert note() == f"Ray {ray.__version__}: without a small local Ray"


@pytest.mark.parametrize("without", ["trainer", "processes"])
def test_a_job_trains_the_same_without_an_extra(
    without: str, finished_run: Path, quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"mnist_ray.extras.{without}", None)  # its import would fail
    run_main("train", *quick(num_workers=2))
    assert weights(tmp_path / "run") == weights(finished_run)


def test_no_module_outside_of_the_extras_imports_a_private_name() -> None:
    private = r"(from|import) +ray[.\w]*\._|from ray[.\w]* import .*\b_|ray\.core\.generated|_temp_dir|ray\._private"
    found = subprocess.run(
        ["grep", "-rnE", private, "--include=*.py", ROOT / "mnist_ray", ROOT / "jobs"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    assert [line for line in found if "/mnist_ray/extras/" not in line] == []
    assert found


def test_an_extra_that_fails_is_one_line_with_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "global_worker", object())
    assert status_of(lambda: len(processes.dead_processes())) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: Ray {ray.__version__} does not work here: ")
    assert said.endswith("; use --plain-ray\n")
    assert said.count("\n") == 1


def test_replaced_names_of_ray_are_restored() -> None:
    before = services.ConsolePopen, node.Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER
    with small.for_one_job(log_to_driver=False):
        assert (services.ConsolePopen, node.Node.start_api_server) != before[:2]
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert (services.ConsolePopen, node.Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER) == before


def test_a_start_that_fails_names_the_part_of_ray_that_died(tmp_path: Path) -> None:
    part = tmp_path / "gcs_server"
    part.write_text("#!/bin/sh\nexit 1")
    part.chmod(0o700)

    def fail() -> None:
        services.ConsolePopen([str(part)]).wait()
        raise TimeoutError("Timed out waiting for file")

    with pytest.raises(RuntimeError, match=r"^its gcs_server has died$"), small.for_one_job(log_to_driver=False):
        fail()


def test_rays_processes_end_if_its_start_is_interrupted() -> None:
    started = []

    def start_ray() -> None:
        started.append(services.ConsolePopen(["sleep", "1000"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), small.for_one_job(log_to_driver=False):
        start_ray()
    assert started[0].returncode is not None


def test_a_trainer_creates_the_callbacks_that_are_left_out() -> None:
    trainer = TorchTrainer(lambda: None, torch_config=WorkerGroupConfig(folder="/a/folder"))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert {DatasetsCallback, PlacementGroupCleanerCallback} <= kinds


def test_ray_uses_the_names_of_the_file_and_variable_that_are_read() -> None:
    assert starting.JOB_CONFIG_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR
