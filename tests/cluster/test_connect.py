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
from typing import Any

import pytest
import ray

from mnist_ray.cluster import connect as connecting
from mnist_ray.cluster.connect import connect
from mnist_ray.cluster.session_files import removed_unless_failed
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError
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
    environment.prepare(verbose=False)
    from mnist_ray.cluster.connect import connect
    with connect(WorkerConfig(), meanwhile=lambda: print("meanwhile")) as cluster:
        print(cluster.log_folder, *cluster.notes)
        cluster.leave()
    with connect(WorkerConfig(), meanwhile=fail):
        print("not connected")

cli.run(main)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def run(
    temporary: Path, address: str = "local", code: str = JOB, *, under_uv: bool = False, **variables: str
) -> subprocess.CompletedProcess:
    """Run a job, by default one that connects, leaves, connects again and fails; Ray's files are in ``temporary``."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # Ray sets some itself
    environment = {**others, "RAY_ADDRESS": address, "RAY_TMPDIR": str(temporary), **variables}
    command = [sys.executable, "-c", code]
    if under_uv:  # a shell of this name, which runs a script of this name
        (temporary / "run").write_text(f"cd {ROOT}; '{sys.executable}' -c \"$1\"")
        command = ["uv", "run", code]
    return subprocess.run(
        command,
        executable="/bin/sh" if under_uv else None,
        cwd=temporary if under_uv else ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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
    environment.prepare(verbose=False)
    from mnist_ray.cluster.connect import connect
    with connect(WorkerConfig()):
        print(ray.get(Answering.remote().answer.remote()))

cli.run(main)
"""


@pytest.mark.parametrize(
    ("replaced", "value", "error"),
    [
        ("ray.util.client.ray.is_connected", True, "this job cannot use a Ray Client connection; run it on"),
        ("mnist_ray.extras.processes.dead_processes", ["raylet"], "the Ray that this process started has died"),
    ],
)
def test_a_connection_that_is_of_no_use_is_one_line(
    replaced: str, value: Any, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(replaced, lambda: value)
    with pytest.raises((UsageError, JobError), match=f"^{error}"), connect(WorkerConfig()):
        pass


@pytest.mark.processes
@pytest.mark.parametrize("cluster", ["token", "disabled"], indirect=True)
def test_a_token_is_sent_only_to_a_cluster_that_wants_it(cluster: tuple[str, Path], temporary: Path) -> None:
    address, home = cluster
    done = run(temporary, address, CALL, HOME=str(home))
    assert (done.stdout, done.stderr) == ("answered\n", "")


@pytest.mark.processes
@pytest.mark.parametrize("cluster", ["disabled"], indirect=True)
def test_a_cluster_whose_node_here_is_another_users_is_one_line(cluster: tuple[str, Path], temporary: Path) -> None:
    address, home = cluster
    done = run(temporary, address, f"import os; os.geteuid = lambda: 12345\n{CALL}", HOME=str(home))
    assert done.stderr == (
        f"error: the node of RAY_ADDRESS={address} on this machine belongs to another user, whose files you cannot "
        "write; use ray job submit\n"
    )


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
def test_workers_have_the_environment_that_uv_run_has_made_even_if_ray_is_imported_first(temporary: Path) -> None:
    done = run(temporary, code=f"import ray\n{CALL}", under_uv=True)
    assert (done.stdout, done.stderr) == ("answered\n", "")


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


def test_a_folder_whose_path_is_too_long_for_sockets_is_one_line_with_the_remedy(temporary: Path) -> None:
    folder = temporary / ("x" * 60)
    folder.mkdir()
    said = run(folder).stderr
    assert said.startswith("error: a local Ray cannot start: ")
    assert "; set RAY_TMPDIR to a folder with a shorter path (logs: " in said
    assert said.count("\n") == 1


def begin_session(folder: Path) -> Path:
    """Make a session's folder that is not empty, to which a link leads, as Ray makes one; return the session's logs."""
    session = folder / f"session_2_{os.getpid()}"
    (session / "logs").mkdir(parents=True)
    (folder / "session_latest").unlink(missing_ok=True)
    (folder / "session_latest").symlink_to(session)
    return session / "logs"


@pytest.mark.parametrize(
    ("ending", "is_kept"), [(None, False), (KeyboardInterrupt, False), (UsageError, False), (JobError, True)]
)
def test_a_session_is_removed_unless_something_failed(
    ending: type[BaseException] | None, is_kept: bool, tmp_path: Path
) -> None:
    with contextlib.suppress(KeyboardInterrupt, UsageError, JobError), removed_unless_failed(tmp_path):
        logs = begin_session(tmp_path)
        if ending:
            raise ending
    assert logs.is_dir() == is_kept
    assert bool(list(tmp_path.iterdir())) == is_kept


@pytest.mark.parametrize(
    ("log", "hint"),
    [
        ("raylet: Too many workers, failed to create a file. Try setting `ulimit -n <num_files>`", "raise .*ulimit -n"),
        ("thd.cc:157] pthread_create failed: Resource temporarily unavailable", "raise .*ulimit -u"),
        ("a warning", "$"),
    ],
)
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_limit_of_the_system_that_ends_ray_is_named(part: str, log: str, hint: str, tmp_path: Path) -> None:
    def fail() -> None:
        (begin_session(tmp_path) / f"{part}.err").write_text(log)
        raise JobError("its raylet has died")

    with pytest.raises(JobError, match=f"^its raylet has died.*{hint}"), removed_unless_failed(tmp_path):
        fail()


def test_only_the_session_of_the_block_is_removed(tmp_path: Path) -> None:
    another, earlier = tmp_path / "session_1_1", tmp_path / f"session_1_{os.getpid()}"
    another.mkdir()
    earlier.mkdir()
    with removed_unless_failed(tmp_path):
        begin_session(tmp_path)
        latest = tmp_path / "session_latest"
        latest.unlink()
        latest.symlink_to(another)  # it has started later
    assert {*tmp_path.iterdir()} == {latest, another, earlier}


def test_a_plain_job_joins_only_what_ray_address_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = "^no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1; unset it to start a local Ray$"
    with pytest.raises(JobError, match=said), connect(WorkerConfig(plain_ray=True)):
        pass


OTHERS = "other users of this machine can run code as you while this job runs: "
ALL = "anyone who can reach this machine's ports can run code as you while this job runs: "


@pytest.mark.parametrize(
    ("address", "mode", "has_tokens", "note"),
    [
        ("127.0.0.1", "token", True, None),
        ("127.0.0.1", "token", False, f"{OTHERS}Ray supports tokens only since 2.52"),
        ("192.0.2.7", "", False, f"{ALL}Ray supports tokens only since 2.52"),
        ("192.0.2.7", "", True, f"{ALL}set RAY_AUTH_MODE=token before Ray is imported"),
        ("192.0.2.7", "token", True, "this local Ray listens on all interfaces; only its token keeps others out"),
        ("192.0.2.7", "disabled", True, None),
    ],
)
def test_a_note_says_who_can_use_a_local_ray(
    address: str, mode: str, has_tokens: bool, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.setattr(connecting, "has_tokens", lambda: has_tokens)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert connecting.about_access() == ([note] if note else [])
