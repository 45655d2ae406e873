import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_fork import starting
from ray_fork.shim import MODULES_VARIABLE
from ray_fork.starting import Forking
from tests.conftest import ROOT

FORKING = Forking(is_wanted=True, modules=("torch", "ray.tune"), server=None)


def of_job(monkeypatch: pytest.MonkeyPatch, **runtime_env: Any) -> None:
    """Make this process a job that was submitted with a runtime environment."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env}))


def program(path: Path) -> Path:
    """Write a program that prints how it was called, a word a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("""#!/bin/sh\nprintf '%s\\n' "$0" "$@"\n""")
    path.chmod(0o755)
    return path


def test_the_modules_are_in_a_variable_if_workers_are_forked() -> None:
    assert starting.runtime_env_to_fork(FORKING)["env_vars"] == {MODULES_VARIABLE: "torch ray.tune"}
    assert starting.runtime_env_to_fork(replace(FORKING, is_wanted=False)) == {}


@pytest.mark.parametrize("name", ["pip", "conda", "py_executable", "image_uri", "uv"])
def test_a_job_with_a_python_of_its_own_keeps_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_job(monkeypatch, working_dir="gcs://some.zip", **{name: "wine"})
    assert starting.runtime_env_to_fork(FORKING) == {}


@pytest.fixture
def drivers_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    python = program(tmp_path / "it's a venv" / "bin" / "python")
    monkeypatch.setattr("sys.executable", str(python))
    return python


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = program(tmp_path / "a package" / "shim.py")
    monkeypatch.setattr(starting, "SHIM", path)
    return path


def start_worker(folder: Path, site_packages: Path) -> list[str]:
    """Start a worker in a folder like a Ray in ``site_packages``; return the program that runs, and its arguments.

    This node's ``python3`` is ``path/python3`` in the folder.
    """
    python3 = program(folder / "path" / "python3")
    start = f"exec {starting.runtime_env_to_fork(FORKING)['py_executable']} {worker_in(site_packages)} --flag='1 2'"
    variables = {"PATH": f"{python3.parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", start], cwd=folder, env=variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def worker_in(site_packages: Path) -> str:
    return f"{site_packages}/ray/_private/workers/default_worker.py"


def test_workers_are_started_by_the_shim(tmp_path: Path, drivers_python: Path, shim: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    expected = [str(drivers_python), "-S", "-E", str(shim), worker_in(packages), "--flag=1 2"]
    assert start_worker(tmp_path, packages) == expected


def test_the_shim_is_looked_for_in_the_working_directory_that_a_node_has(
    tmp_path: Path, drivers_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    of_job(monkeypatch, working_dir="gcs://some.zip", env_vars={"A": "1"})
    program(tmp_path / "ray_fork" / "shim.py")
    expected = [str(drivers_python), "-S", "-E", "ray_fork/shim.py"]
    assert start_worker(tmp_path, tmp_path)[:4] == expected


@pytest.mark.parametrize(("missing", "lib"), [("drivers_python", "lib"), ("shim", "lib64")])
@pytest.mark.usefixtures("drivers_python", "shim")
def test_a_node_without_them_starts_workers_with_the_python_next_to_its_ray_or_else_of_its_path(
    missing: str, lib: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(missing).unlink()
    packages = tmp_path / "nodes" / lib / "python3.11" / "site"
    expected = [worker_in(packages), "--flag=1 2"]
    assert start_worker(tmp_path, packages) == [str(tmp_path / "path" / "python3"), *expected]
    python = program(tmp_path / "nodes" / "bin" / "python")
    assert start_worker(tmp_path, packages) == [str(python), *expected]
