import contextlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ray_fork import shim
from ray_fork.server import why_not
from tests.conftest import wait_for
from tests.ray_fork.conftest import Server, fork, has_ended, parent_of_worker, run_shim, script_in, serving

AN_ACTOR = "import ray\n@ray.remote\nclass Actor: pass"
A_THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
AN_ID = "import ray\nray.NodeID.from_random()"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that forks."""
    with serving(tmp_path_factory.mktemp("server"), "numpy.random", "pyarrow", "torch", actor=AN_ACTOR) as running:
        yield running


@pytest.fixture(scope="module")
def seen(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A worker's state."""
    return fork(tmp_path_factory.mktemp("worker"), env=server.environment)


def refusal(folder: Path, environment: dict[str, str], version: str = ray.__version__) -> str:
    """Return why a worker was started, but not forked; its Ray has a version."""
    script = script_in(folder, "print('as usual')", version)
    printed, complained = run_shim(folder, script, env=environment)
    assert printed == "as usual\n"
    assert complained.startswith("a worker is started as usual, not forked: ")
    return complained.removeprefix("a worker is started as usual, not forked: ").rstrip()


def send(
    connection: socket.socket, server: Server, content: bytes, size: int | None = None, files: Sequence[int] = (1, 1, 1)
) -> None:
    """Send like the shim."""
    connection.connect(str(server.address))
    head = (len(content) if size is None else size).to_bytes(4, "big")
    socket.send_fds(connection, [head], files)
    if content:  # else the server may already have answered and closed the connection
        connection.sendall(content)


def request_of(where: Path, server: Server, **changes: object) -> bytes:
    """Return a request for a worker that stays, with some changes."""
    script = script_in(where, "import signal; signal.pause()")
    return json.dumps({**shim.request([str(script)], server.environment), **changes}).encode()


def answer(where: Path, server: Server, *, num_files: int = 3, **changes: object) -> str:
    """Return a server's answer to a changed request of a script in a folder."""
    with socket.socket(socket.AF_UNIX) as connection:
        send(connection, server, request_of(where, server, **changes), files=[1] * num_files)
        return connection.recv(1000).decode()


def test_a_worker_is_a_child_of_the_server_and_starts_without_cuda_and_with_its_own_random_numbers(
    server: Server, seen: dict[str, Any], tmp_path: Path
) -> None:
    assert seen["parent"] == server.process.pid
    watching_the_raylet = 1
    assert (seen["threads"], seen["uses CUDA"], seen["leads a group"]) == (1 + watching_the_raylet, False, False)
    another = fork(tmp_path, env=server.environment)
    for generator in ("Python", "NumPy", "PyTorch", "Ray"):
        assert another[f"{generator}'s number"] != seen[f"{generator}'s number"], generator


def test_a_worker_inherits_all_from_the_process_that_asks_and_nothing_from_the_server(
    server: Server, tmp_path: Path
) -> None:
    elsewhere, most = tmp_path / "elsewhere", resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    elsewhere.mkdir()

    def be_unusual() -> None:
        os.nice(5)
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, most))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        Path("/proc/self/oom_score_adj").write_text("1000")

    environment = {**server.environment, "OF_THE_WORKER": "1", "OMP_NUM_THREADS": "3,1"}
    worker = fork(tmp_path, "some", "words", env=environment, cwd=elsewhere, preexec_fn=be_unusual)
    assert worker["environment"] == environment
    script = script_in(tmp_path, "")
    assert worker["argv"] == [str(script), str(tmp_path / "seen.json"), "some", "words"]
    assert (worker["name"], worker["folder"]) == ("__main__", str(elsewhere))
    assert worker["folder of imports"] == str(script.parent)
    names = ("stdin", "stdout", "stderr")
    inherited = {str(number): str(tmp_path / name) for number, name in enumerate(names)}
    assert worker["descriptors"] == {**inherited, "3": "anon_inode:[pidfd]"}, "the raylet's is the worker's own"
    assert worker["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 5
    assert (worker["leads a group"], worker["oom_score_adj"]) == (True, 1000)
    assert worker["open files"] == [500, most]
    assert worker["blocked signals"] == [signal.SIGINT]
    assert worker["threads of PyTorch"] == 3


@pytest.mark.parametrize("name", ["MKL_NUM_THREADS", "OMP_SCHEDULE", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "RAY_JOB_ID"])
def test_a_variable_that_a_library_has_read_must_have_the_servers_value(name: str) -> None:
    said = f"{name} differs from the fork server's value"
    assert why_not({"PATH": "/bin", name: "1"}, {"PATH": "/usr/bin", name: "2"}) == said
    assert why_not({name: "1"}, {}) == why_not({}, {name: "1"}) == said
    assert why_not({name: "1", "OMP_NUM_THREADS": "3"}, {name: "1"}) == ""


def test_a_worker_that_cannot_be_forked_as_asked_is_rejected(server: Server, tmp_path: Path) -> None:
    environment = {name: value for name, value in server.environment.items() if name != "PYTHONPATH"}
    assert refusal(tmp_path, environment) == "PYTHONPATH differs from the fork server's value"
    assert answer(tmp_path, server, folder=str(tmp_path / "gone")).startswith("FileNotFoundError")


def test_a_worker_of_another_ray_or_python_is_rejected_with_both_versions(server: Server, tmp_path: Path) -> None:
    python = shim.python_version()
    own = f"the fork server Python {python} and Ray {ray.__version__}"
    for version in ("2.0.0rc1", ""):
        said = refusal(tmp_path, server.environment, version)
        assert said == f"the worker has Python {python} and Ray {version}, {own}"
    said = answer(tmp_path, server, python="pypy 3.11.7")
    assert said == f"the worker has Python pypy 3.11.7 and Ray {ray.__version__}, {own}"


@pytest.mark.parametrize(
    ("source", "said"),
    [(A_THREAD, "the fork server has 2 threads"), (AN_ID, "two forks would draw the same ids")],
)
def test_a_module_that_makes_forks_unsafe_is_rejected(source: str, said: str, tmp_path: Path) -> None:
    with serving(tmp_path, module=source) as running:
        assert refusal(tmp_path, running.environment) == said


def test_a_worker_ends_with_its_raylet(server: Server, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as raylet:
        environment = {**server.environment, "RAY_RAYLET_PID": str(raylet.pid)}
        process = psutil.Process(int(answer(tmp_path, server, environment=environment)))
        assert not has_ended(process)
        raylet.kill()
        wait_for(lambda: not psutil.pid_exists(process.pid))  # not even a zombie is left


def test_a_server_that_was_replaced_while_it_was_silent_leaves_its_successors_socket(tmp_path: Path) -> None:
    with serving(tmp_path, "json") as silent, socket.socket(socket.AF_UNIX) as successor:
        os.rename(silent.address, f"{silent.address}.silent")  # as the shim does
        successor.bind(str(silent.address))
        silent.address.with_name("fork.lock").touch()
        assert silent.process.stdin
        silent.process.stdin.close()
        silent.process.wait()
        assert sorted(path.name for path in silent.address.parent.iterdir()) == ["fork", "fork.lock"]


def open_files(server: Server) -> set[str]:
    """Return a server's open files."""
    found = set()
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(link))
    return found


def test_no_malformed_request_ends_the_server_or_leaves_it_a_descriptor(server: Server, tmp_path: Path) -> None:
    before = open_files(server)
    for content, size in ((b"", 0), (b"{", 2**32 - 1), (b"\xff", 1), (b"[]", 2), (b"{}", 2), (b"[" * 10**6, 10**6)):
        with socket.socket(socket.AF_UNIX) as connection:
            send(connection, server, content, size)
        assert answer(tmp_path, server, python="another").startswith("the worker has Python another"), content[:2]
    for name in ("argv", "environment", "folder", "descriptors"):
        assert not answer(tmp_path, server, **{name: 5}).isdigit(), name
    for num_files in (1, 2):
        assert answer(tmp_path, server, num_files=num_files) == ""
    wait_for(lambda: open_files(server) == before)
    assert server.process.poll() is None


A_FORK_THAT = """\
import os, signal
real_fork = os.fork
def fork():
    return {outcome} if os.path.exists({flag!r}) else real_fork()
def fail():
    raise BlockingIOError(11, "too many processes")
def end(*, the_server):
    pid = real_fork()
    if (pid > 0) == the_server:
        os.kill(os.getpid(), signal.SIGKILL)
    return pid
os.fork = fork
"""


@contextlib.contextmanager
def forking_when(folder: Path, outcome: str) -> Iterator[tuple[Server, Path]]:
    """Run a server that has forked a worker; its next forks have another outcome as long as a file exists."""
    flag = folder / "flag"
    with serving(folder, module=A_FORK_THAT.format(outcome=outcome, flag=str(flag))) as running:
        parent_of_worker(folder, env=running.environment)
        flag.touch()
        yield running, flag


def test_a_kill_during_a_fork_costs_only_the_killed_process(tmp_path: Path) -> None:
    for name, is_server in (("server", True), ("fork", False)):
        (folder := tmp_path / name).mkdir()
        with forking_when(folder, f"end(the_server={is_server})") as (running, _):
            if is_server:
                assert parent_of_worker(folder, env=running.environment)
                assert running.process.wait(60) == -signal.SIGKILL
            else:
                said = "the fork server, or the process that it forked, has exited"
                assert refusal(folder, running.environment) == said


OF_ANOTHER_USER = """\
import os, socket, sys
address, request = sys.argv[1], sys.stdin.buffer.read()
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    try:
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [1] * 3)
        connection.sendall(request)
        print(connection.recv(100))
    except OSError:
        print(b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_request_of_another_user_is_not_answered(server: Server, tmp_path: Path) -> None:
    for path in (server.address, *server.address.parents[:-1]):
        path.chmod(path.stat().st_mode | 0o777)
    command, request = [sys.executable, "-c", OF_ANOTHER_USER, str(server.address)], request_of(tmp_path, server)
    assert subprocess.run(command, input=request, stdout=subprocess.PIPE, check=True).stdout == b"b''\n"


def test_a_worker_ends_with_pythons_exit_functions_and_without_those_of_libraries(
    server: Server, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    write = f"open({str(pid)!r}, 'w').write(str(os.getpid()))"
    waits = "libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.pause, None, None)"
    script = script_in(tmp_path, f"import atexit, ctypes, os\natexit.register(print, 'the end')\n{waits}\n{write}")
    run_shim(tmp_path, script, env=server.environment)
    wait_for(lambda: (tmp_path / "stdout").read_text() == "the end\n")
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), timeout_s=10)


def test_a_server_ends_with_its_owner_and_leaves_its_workers_but_no_file(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert stat.S_IMODE(running.address.stat().st_mode) == 0o600  # only this user may connect
        worker = psutil.Process(int(answer(tmp_path, running)))
        try:
            assert running.process.stdin is not None
            running.process.stdin.close()
            assert running.process.wait(60) == 0
            assert not running.address.parent.exists()
            assert not has_ended(worker)
        finally:
            worker.kill()
        wait_for(lambda: has_ended(worker))


@pytest.mark.long
def test_a_server_without_an_owner_ends_when_it_has_no_workers(tmp_path: Path) -> None:
    with serving(tmp_path, stdin=subprocess.DEVNULL) as running:
        assert running.process.wait(60) == 0
        assert not running.address.parent.exists()
