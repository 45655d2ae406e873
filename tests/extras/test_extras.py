"""The next Ray, simulated: names that it no longer has, and methods with other parameters."""

import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import node, ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from mnist_ray import extras, ray_versions
from mnist_ray.cli import status_of
from mnist_ray.extras import EXTRAS, is_on, listed, note, processes, small
from mnist_ray.run.ray_train import WorkerGroupConfig
from ray_fork import starting
from tests.conftest import ROOT, Flags, run_main, weights

NEEDS = sorted({(name, need) for name, extra in EXTRAS.items() for need in extra.needs})


@pytest.fixture(autouse=True)
def _tried_again() -> Iterator[None]:
    """Let extras be tried again with the changed Ray, and after the test."""
    extras.works.cache_clear()
    yield
    extras.works.cache_clear()


def remove(need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove a name of Ray. Classes in Cython cannot change: one is replaced by another that lacks the name."""
    owner, last = owner_of(need)
    if isinstance(owner, type) and owner.__module__ == "ray._raylet":
        monkeypatch.setattr(f"{need.partition(':')[0]}.{owner.__name__}", object)
    else:
        classes = owner.__mro__ if isinstance(owner, type) else (owner, type(owner))
        monkeypatch.delattr(next(place for place in classes if last in vars(place)), last)


def owner_of(need: str) -> tuple[Any, str]:
    """Return the object that has a name of Ray, and the name's last part."""
    module, _, path = need.partition("(")[0].partition(":")
    *parts, last = path.split(".")
    return functools.reduce(getattr, parts, importlib.import_module(module)), last


def test_all_extras_are_on_with_the_newest_ray_that_was_tried() -> None:
    assert listed(plain=False)["off"] == []
    assert note() == ""
    assert listed(plain=True)["on"] == []


@pytest.mark.parametrize(("name", "need"), NEEDS)
def test_an_extra_is_off_without_one_of_its_names(name: str, need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(need, monkeypatch)
    assert not is_on(name, plain=False)
    assert note().startswith(f"Ray {ray.__version__}: without ")


@pytest.mark.parametrize(("name", "need"), [pair for pair in NEEDS if "(" in pair[1] and "_raylet" not in pair[1]])
def test_an_extra_is_off_if_a_method_has_lost_a_parameter(
    name: str, need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, last = owner_of(need)
    monkeypatch.setattr(owner, last, lambda self, another=None: None)
    assert not is_on(name, plain=False)


@pytest.mark.parametrize("off", [*EXTRAS])
def test_an_extra_is_off_with_an_older_ray_than_its_tests_passed_with(
    off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_versions, "ray_version", lambda: "2.50.1")
    assert not is_on(off, plain=False)


def test_the_note_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.node.Node.start_api_server")
    monkeypatch.delattr("ray._private.parameter.RayParams.__init__")
    assert note() == (f"Ray {ray.__version__}: without forked workers, a small local Ray")


@pytest.mark.parametrize("without", ["trainer", "processes"])
def test_a_job_trains_the_same_without_an_extra(
    without: str, finished_run: Path, quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"mnist_ray.extras.{without}", None)  # its import would fail
    monkeypatch.setattr(extras, "_is_there", lambda need: need not in EXTRAS[without].needs)
    run_main("train", *quick(num_workers=2))
    assert weights(tmp_path / "run") == weights(finished_run)


def test_the_names_of_extras_are_looked_up_in_a_twentieth_of_a_second() -> None:
    """Imports nothing new: the modules are those that Ray itself has imported."""
    before = {*sys.modules}
    for name in EXTRAS:
        is_on(name, plain=False)
    assert {*sys.modules} == before


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
