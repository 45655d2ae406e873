import contextlib
import itertools
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray

from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.plan import Cluster
from mnist_ray.cluster.watch import RaySilentError
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError
from ray_fork.starting import Forking
from tests.conftest import ROOT

JOB = """\
import os, time
from pathlib import Path

from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError

def fail():
    while not [*Path(os.environ["RAY_TMPDIR"]).glob("ray/session_2*/logs/raylet.out")]:
        time.sleep(0.01)  # it is to fail while Ray starts
    raise JobError("it does not fit")

def main():
    with environment.prepared(WorkerConfig()) as forking:
        from mnist_ray.cluster.connection import Connection
        connection = Connection(WorkerConfig(), forking)
        with connection.opened(print, lambda: print("meanwhile")) as cluster:
            print(cluster.log_folder)
            connection.leave()
        with Connection(WorkerConfig(), forking).opened(print, fail):
            print("not connected")

cli.run(main)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def run(temporary: Path, address: str = "local", code: str = JOB, **variables: str) -> subprocess.CompletedProcess:
    """Run a job, by default one that connects, leaves, connects again and fails; Ray's files are in ``temporary``."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # Ray sets some itself
    environment = {**others, "RAY_ADDRESS": address, "RAY_TMPDIR": str(temporary), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
def test_an_address_where_no_ray_answers_ends_the_job_in_one_line(temporary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # which never answers
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = run(temporary, address=address)
    assert done.returncode == 1
    assert done.stderr == f"error: no Ray cluster answers at RAY_ADDRESS={address}; unset it to start a local Ray\n"


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """The address of a cluster without or with tokens, and its home folder, which has the token in either case."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        home = Path(folder)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 2)
        options = ["--head", "--block", "--port=0", f"--temp-dir={home / 'r'}", "--num-cpus=1"]  # 0: a free port
        options += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", "--ray-client-server-port=20001"]
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--dashboard-agent-listen-port=0"],
            env={**os.environ, "HOME": folder, "RAY_AUTH_MODE": request.param},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert head.stdout is not None
        said = "".join(itertools.takewhile(lambda line: "will now block" not in line, head.stdout))
        try:
            address = re.search(r"--address='(.*?)'", said)
            assert address, said
            yield address[1], home
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.communicate()


def opened(config: WorkerConfig) -> contextlib.AbstractContextManager[Cluster]:
    return Connection(config, Forking(False, (), None)).opened(print)


CALL = """\
import ray
from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import WorkerConfig

@ray.remote(num_cpus=0)
class Answering:
    def answer(self):
        return "answered"

def main():
    with environment.prepared(WorkerConfig()) as forking:
        from mnist_ray.cluster.connection import Connection
        with Connection(WorkerConfig(), forking).opened(print):
            print(ray.get(Answering.remote().answer.remote()))

cli.run(main)
"""


def test_a_connection_of_ray_client_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.client.ray.is_connected", lambda: True)
    with pytest.raises(UsageError, match="this job cannot use a connection of Ray Client; run"):
        opened(WorkerConfig()).__enter__()


@pytest.mark.processes
@pytest.mark.parametrize("cluster", ["token", "disabled"], indirect=True)
def test_a_token_is_sent_only_to_a_cluster_that_wants_it(cluster: tuple[str, Path], temporary: Path) -> None:
    address, home = cluster
    done = run(temporary, address, CALL, HOME=str(home))
    assert (done.stdout, done.stderr) == ("answered\n", "")


@pytest.mark.processes
@pytest.mark.parametrize("cluster", ["disabled"], indirect=True)
def test_a_cluster_of_other_versions_is_one_line_with_all_versions(cluster: tuple[str, Path], temporary: Path) -> None:
    address, home = cluster
    done = run(temporary, address, f"import ray; ray.__version__ = '2.1.0'\n{CALL}", HOME=str(home))
    python = platform.python_version()
    assert re.fullmatch(
        rf"error: cannot connect to the Ray cluster at {address}: Version mismatch: The cluster was started with: Ray: "
        rf"{ray.__version__} Python: {python} This process on node \S+ was started with: Ray: 2.1.0 Python: {python}; "
        "install the cluster's versions, or use ray job submit\n",
        done.stderr,
    )


@pytest.mark.long
def test_a_local_ray_leaves_only_the_logs_of_a_failure_and_an_error_of_meanwhile_is_raised(temporary: Path) -> None:
    left_by_dead_ray = temporary / "ray" / "ray_current_cluster"
    left_by_dead_ray.parent.mkdir()
    left_by_dead_ray.write_text("127.0.0.1:1")
    done = run(temporary, address="auto")
    assert done.stderr == "error: it does not fit\n"
    done_meanwhile, first = done.stdout.splitlines()
    (logs_of_first,) = first.split()
    (session,) = temporary.glob("ray/session_2*")
    assert done_meanwhile == "meanwhile"
    assert session != Path(logs_of_first).parent
    assert (session / "logs" / "raylet.out").exists()


def test_a_local_ray_that_cannot_start_is_one_line_that_names_the_logs(temporary: Path) -> None:
    done = run(temporary, RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION="0.0000001")
    assert done.returncode == 1
    (session,) = temporary.glob("ray/session_2*")
    assert done.stderr.startswith("error: a local Ray cannot start: Attempting to cap object store memory usage at ")
    assert done.stderr.endswith(f"(logs: {session}/logs)\n")
    assert done.stderr.count("\n") == 1


def test_a_plain_job_joins_only_what_ray_address_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", Mock())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = "^no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1; unset it to start a local Ray$"
    with pytest.raises(JobError, match=said), opened(WorkerConfig(plain_ray=True)):
        pass


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ray.exceptions.RayError("it is over"), r"Ray failed: RayError: it is over \(logs: /\S+\)"),
        (RaySilentError("its raylet has died"), "its raylet has died"),
        (SystemError("a result with an exception set"), "its raylet has died"),
    ],
)
def test_an_error_of_ray_is_one_line_also_if_a_signal_raises_it_in_rays_code(
    raised: Exception, seen: str, ray_address: str
) -> None:
    raised.__cause__ = RaySilentError("its raylet has died") if isinstance(raised, SystemError) else None
    with pytest.raises(JobError, match=f"^{seen}$"), opened(WorkerConfig()):
        raise raised
    assert ray.is_initialized(), "the caller's connection stays open"
