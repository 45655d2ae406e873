import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.runtime_env.context import RuntimeEnvContext

from ray_fork import shim, starting
from ray_fork.ray_internals import shim_in_local_ray
from ray_fork.shim import MODULES_VARIABLE, SOCKET_VARIABLE, node_address, variables_of
from ray_fork.starting import Forking, prepared_forking
from tests.conftest import ROOT, wait_for
from tests.ray_fork.conftest import ENVIRONMENT, end, parent_of_worker, run_shim

OF_JOB = {"RAY_JOB_ID": "07000000", "RAY_RAYLET_PID": str(os.getpid())}


def flag(**context: Any) -> str:
    """Return the flag by which Ray passes a worker's runtime environment."""
    return f"--serialized-runtime-env-context={RuntimeEnvContext(**context).serialize()}"


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ([], {}),
        (["--language=PYTHON", flag()], {}),
        ([flag(env_vars={"A": "1", "B": "two words"}), "--node-id=5"], {"A": "1", "B": "two words"}),
        # anything else is left to Ray
        ([flag(command_prefix=["source activate &&"])], None),
        ([flag(py_executable="/usr/bin/env python")], None),
        ([flag(env_vars={"PATH": "/opt:$PATH"})], None),
    ],
)
def test_a_runtime_environment_is_read_if_it_has_only_plain_variables(
    flags: list[str], variables: dict[str, str] | None, tmp_path: Path
) -> None:
    assert variables_of(["default_worker.py", *flags]) == variables
    python = tmp_path / "python"
    python.symlink_to(os.path.realpath(sys.executable))  # as in any venv
    assert variables_of(["default_worker.py", *flags, flag(py_executable=str(python))]) is None


def started(folder: Path, *flags: str, **variables: str) -> tuple[list[str], str]:
    """Return the command that a shim becomes in place of a worker, and its standard error."""
    for name in ("default_worker.py", "setup_worker.py"):
        (folder / name).write_text("import json, sys; print(json.dumps(sys.argv))")
    printed, complained = run_shim(folder, folder / "default_worker.py", *flags, env={**ENVIRONMENT, **variables})
    return json.loads(printed), complained


OF_RAY = ["--node-id=5", "--language=PYTHON"]


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ([], {SOCKET_VARIABLE: "/no/server"}, "the fork server does not answer: [Errno 2]"),
        (["--node-id=5"], {MODULES_VARIABLE: "json", "TMPDIR": "/no/folder", **OF_JOB}, "the fork server does not "),
        ([*OF_RAY, flag(env_vars={"A": "1"})], {}, "the fork server does not answer: "),
        ([*OF_RAY, flag(command_prefix=["true &&"])], {}, "its runtime environment contains more than environment "),
        (["--serialized-runtime-env-context={}"], {}, "Ray did not pass 'env_vars'\n"),
        (["--serialized-runtime-env-context=[]"], {}, "TypeError: "),
        (["--serialized-runtime-env-context={"], {}, "JSONDecodeError: "),
    ],
)
def test_a_worker_that_cannot_be_forked_is_started_as_ray_would_whatever_ray_passes(
    flags: list[str], variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    command, complained = started(tmp_path, *flags, **variables)
    setup = [str(tmp_path / "setup_worker.py")] if "--serialized" in "".join(flags) else []
    assert command == [*setup, str(tmp_path / "default_worker.py"), *flags]
    assert complained.startswith(f"a worker is started as usual, not forked: {said}")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process's folder for temporary files; servers that listen below it are killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        end(processes_of(Path(folder)))


def processes_of(temporary: Path) -> list[psutil.Process]:
    """Return the servers that listen below a folder, and their forks."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if f"{temporary}/" in " ".join(one.info["cmdline"] or ())]


def parents_of_workers(temporary: Path, count: int) -> set[int]:
    """Start several workers of a job on a cluster at once; return their parents."""
    variables = {MODULES_VARIABLE: "json", "TMPDIR": str(temporary), **OF_JOB}
    folders = [temporary / str(number) for number in range(count)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(count) as pool:
        return {*pool.map(lambda folder: parent_of_worker(folder, env={**ENVIRONMENT, **variables}), folders)}


def test_of_workers_that_start_at_once_one_starts_the_server_for_all(temporary: Path) -> None:
    (server,) = parents_of_workers(temporary, 4)
    wait_for(lambda: [one.pid for one in processes_of(temporary)] == [server])  # once the workers have ended


@pytest.mark.parametrize(
    "folder",
    [
        "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T",  # as on macOS
        "/tmp/r-" + 11 * "x",  # the longest that is used
        "/tmp/r-" + 12 * "x",
        "/tmp/r-" + 8 * "ü",  # sixteen bytes
    ],
)
def test_sockets_have_short_paths_whatever_tmpdir_and_the_users_id_are(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    of_job = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": "4194304"}
    for name, value in {SOCKET_VARIABLE: "of another", "TMPDIR": folder, "RAY_ADDRESS": "", **of_job}.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as at_the_end:
        if not os.path.exists(folder) and folder.startswith("/tmp/"):
            os.mkdir(folder)
            at_the_end.callback(shutil.rmtree, folder)
        session = "ray/session_2026-01-01_00-00-00_000000_4194304"
        paths = [f"{shim.own_folder('nine_char')}/{session}/sockets/plasma_store", node_address() + ".silent"]
        paths = [path.replace(f"-{os.geteuid()}/", "-4294967295/") for path in paths]
        with prepared_forking("json") as forking:
            assert forking.server
            paths.append(os.environ[SOCKET_VARIABLE] + ".silent")
    assert max(len(os.fsencode(path)) for path in paths) <= 107  # Linux has room for 108 bytes, the last of which is 0


# --- other users of the machine


def test_a_folder_for_sockets_that_others_may_change_or_have_made_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shim.own_folder("ray_fork"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        shim.own_folder("ray_fork")
    for name, value in {MODULES_VARIABLE: "numpy", **OF_JOB}.items():
        monkeypatch.setenv(name, value)
    folder.rmdir()
    (temporary / "own").mkdir(0o700)
    folder.symlink_to(temporary / "own")
    with pytest.raises(PermissionError, match="is not this user's alone"):
        shim.own_folder("ray_fork")


def test_a_lock_that_is_a_link_leaves_the_file_that_it_leads_to(temporary: Path) -> None:
    victim, address = temporary / "victim", temporary / "fork"
    victim.write_text("kept")
    Path(f"{address}.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        shim.start_server(str(address), {MODULES_VARIABLE: "", **ENVIRONMENT})
    assert victim.read_text() == "kept"


ANOTHER_USERS = """\
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o777)
    listener.listen()
    print("listens", flush=True)
    print(listener.accept()[0].recv(1000))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_server_of_another_user_gets_no_byte(temporary: Path) -> None:
    temporary.chmod(0o777)
    address = str(temporary / "fork")
    with subprocess.Popen([sys.executable, "-c", ANOTHER_USERS, address], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listens\n"
        with pytest.raises(PermissionError, match="belongs to another user"):
            shim.ask(address, ["worker.py"], {"SECRET": "1"})
        assert other.stdout.read() == "b''\n"


def test_a_silent_server_costs_one_worker_the_wait_and_the_others_none(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim, "TIMEOUT_S", 0.2)
    address = str(temporary / "fork")
    monkeypatch.setenv(SOCKET_VARIABLE, address)
    monkeypatch.delenv(MODULES_VARIABLE, raising=False)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        assert shim.fork(["worker.py"], ["worker.py"]) == "the fork server has not answered for 0 s"
        assert shim.fork(["worker.py"], ["worker.py"]).startswith("the fork server does not answer: [Errno 2]")


# --- how Ray is told to start it


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


def test_a_cluster_forks_workers_if_that_is_wanted_unless_the_job_has_a_python_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert starting.runtime_env_to_fork(FORKING)["env_vars"] == {MODULES_VARIABLE: "torch ray.tune"}
    assert starting.runtime_env_to_fork(replace(FORKING, is_wanted=False)) == {}
    for name in ("pip", "conda", "py_executable", "image_uri", "uv"):
        of_job(monkeypatch, working_dir="gcs://some.zip", **{name: "wine"})
        assert starting.runtime_env_to_fork(FORKING) == {}, name


@pytest.mark.parametrize("lacking", ["RayParams", "setup_worker_path"])
def test_workers_of_a_local_ray_without_the_setting_are_started_as_usual(
    lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray._private import parameter

    if lacking == "RayParams":
        monkeypatch.delattr(parameter, lacking)
    else:
        monkeypatch.setattr(parameter.RayParams, "__init__", lambda self, redis_address=None: None)
    before = dict(os.environ)
    with subprocess.Popen(["true"]) as server, shim_in_local_ray(replace(FORKING, server=server)):
        assert dict(os.environ) == before
    assert lacking in caplog.text


@pytest.fixture
def drivers_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    python = program(tmp_path / "it's a venv" / "bin" / "python")
    monkeypatch.setattr("sys.executable", str(python))
    return python


@pytest.fixture(name="shim")
def shim_of_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = program(tmp_path / "a package" / "shim.py")
    monkeypatch.setattr(starting, "SHIM", path)
    return path


RAYS_VERSION = Path(ray.__file__).with_name("_version.py").read_text()


def start_worker(folder: Path, site_packages: Path, version: str = RAYS_VERSION) -> list[str]:
    """Start a worker in a folder like a Ray in ``site_packages``; return the program that runs, and its arguments.

    This node's ``python3`` is ``path/python3`` in the folder.
    """
    python3 = program(folder / "path" / "python3")
    script = worker_in(site_packages, version)
    start = f"exec {starting.runtime_env_to_fork(FORKING)['py_executable']} {script} --flag='1 2'"
    variables = {"PATH": f"{python3.parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", start], cwd=folder, env=variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def worker_in(site_packages: Path, version: str = RAYS_VERSION) -> str:
    """Return the path of a worker's script in a Ray, of which there is only the file with the version."""
    path = site_packages / "ray" / "_version.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(version)
    return f"{site_packages}/ray/_private/workers/default_worker.py"


def test_the_shim_is_looked_for_in_the_working_directory_that_a_node_has(
    tmp_path: Path, drivers_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    of_job(monkeypatch, working_dir="gcs://some.zip", env_vars={"A": "1"})
    program(tmp_path / "ray_fork" / "shim.py")
    expected = [str(drivers_python), "-S", "-E", "ray_fork/shim.py"]
    assert start_worker(tmp_path, tmp_path)[:4] == expected


def test_the_shim_starts_workers_unless_a_nodes_ray_is_of_another_version_than_the_drivers_there(
    tmp_path: Path, drivers_python: Path, shim: Path
) -> None:
    packages = tmp_path / "nodes" / "lib" / "python3.11" / "site-packages"
    nodes_python = program(tmp_path / "nodes" / "bin" / "python")
    worker = [worker_in(packages), "--flag=1 2"]
    assert start_worker(tmp_path, packages) == [str(drivers_python), "-S", "-E", str(shim), *worker]
    assert start_worker(tmp_path, packages, 'version = "2.0.0"\n') == [str(nodes_python), *worker]


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
