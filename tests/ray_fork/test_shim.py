import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.runtime_env.context import RuntimeEnvContext

from ray_fork.shim import MODULES_VARIABLE, SOCKET_VARIABLE, node_address, variables_of
from tests.conftest import wait_for
from tests.ray_fork.conftest import ENVIRONMENT, end, fork, run_shim

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


@pytest.mark.parametrize("flags", [[], ["--node-id=5"]])
def test_a_worker_is_started_without_a_server(flags: list[str], tmp_path: Path) -> None:
    command, said = started(tmp_path, *flags, **{SOCKET_VARIABLE: str(tmp_path / "none")})
    assert command == [str(tmp_path / "default_worker.py"), *flags]
    assert said.startswith("a worker is started as usual, not forked: the fork server does not answer: [Errno 2]")


@pytest.mark.parametrize("context", [{"env_vars": {"A": "1"}}, {"command_prefix": ["source activate &&"]}])
def test_a_worker_with_a_runtime_environment_is_started_by_rays_own_script(
    context: dict[str, Any], tmp_path: Path
) -> None:
    flags = ["--node-id=5", "--language=PYTHON", flag(**context)]
    command, said = started(tmp_path, *flags)
    assert command == [str(tmp_path / "setup_worker.py"), str(tmp_path / "default_worker.py"), *flags]
    assert said.startswith("a worker is started as usual, not forked: ")


@pytest.mark.parametrize(("answer", "said"), [(b"too cold", "too cold"), (b"", "the fork server has ended")])
def test_a_worker_is_started_if_the_server_refuses(answer: bytes, said: str, tmp_path: Path) -> None:
    def refuse() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as content:
            content.read(int.from_bytes(content.read(4), "big"))
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "fork"))
        listener.listen()
        threading.Thread(target=refuse, daemon=True).start()
        command, complained = started(tmp_path, **{SOCKET_VARIABLE: str(tmp_path / "fork")})
    assert command == [str(tmp_path / "default_worker.py")]
    assert complained == f"a worker is started as usual, not forked: {said}\n"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """The folder of a session's sockets; servers that listen there are killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        sockets = Path(folder, "session", "sockets")
        sockets.mkdir(parents=True)
        yield sockets
        end(processes_of(sockets))


def processes_of(sockets: Path) -> list[psutil.Process]:
    """Return the servers that listen in a folder, and their forks."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if f"{sockets}/" in " ".join(one.info["cmdline"] or ())]


def start_workers(sockets: Path, count: int) -> list[dict[str, Any]]:
    """Start several workers of a job on a cluster at once; return their states."""
    session, variables = sockets.parent, {MODULES_VARIABLE: "numpy torch", **OF_JOB}
    folders = [session / str(number) for number in range(count)]
    flags = [f"--temp-dir={session.parent}", f"--session-name={session.name}"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda folder: fork(folder, *flags, env={**ENVIRONMENT, **variables}), folders))


def test_of_workers_that_start_at_once_one_starts_the_server_for_all(sockets: Path) -> None:
    (server,) = {worker["parent"] for worker in start_workers(sockets, 4)}
    wait_for(lambda: [one.pid for one in processes_of(sockets)] == [server])  # once the workers have ended


def test_a_killed_servers_socket_is_replaced(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_JOB.items():
        monkeypatch.setenv(name, value)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(node_address([f"--temp-dir={sockets.parents[1]}", f"--session-name={sockets.parent.name}"]))
    (worker,) = start_workers(sockets, 1)
    assert worker["parent"] in [one.pid for one in processes_of(sockets)]
