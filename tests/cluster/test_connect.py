import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

JOB = """\
import sys
from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError

def main():
    environment.prepare(verbose=False)
    from mnist_ray.cluster.connect import connect
    with connect(WorkerConfig()) as cluster:
        if sys.argv[1:] == ["leave"]:
            cluster.leave()
        if sys.argv[1:] == ["fail"]:
            raise JobError(f"no (logs: {cluster.log_folder})")

cli.run(main)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where something listens that never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def run(temporary: Path, *words: str, address: str = "local", **variables: str) -> subprocess.CompletedProcess:
    """Run a job that does nothing but connect, with Ray's files in a folder."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # Ray sets some itself
    environment = {**others, "RAY_ADDRESS": address, "RAY_TMPDIR": str(temporary), **variables}
    command = [sys.executable, "-c", JOB, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
def test_what_listens_but_is_no_ray_ends_the_job_in_one_line(silent: str, temporary: Path) -> None:
    done = run(temporary, address=silent)
    assert done.returncode == 1
    assert done.stderr == f"error: no Ray cluster answers at RAY_ADDRESS={silent}; unset it to start a local one\n"


def test_a_local_ray_leaves_no_files_also_where_one_was_started_here_that_is_gone(temporary: Path) -> None:
    left = temporary / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    left.write_text("127.0.0.1:1")
    done = run(temporary, "leave", address="auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(left.parent.glob("session*")) == []


def test_a_failed_job_leaves_the_logs_that_its_line_names(temporary: Path) -> None:
    done = run(temporary, "fail")
    (session,) = temporary.glob("ray/session_2*")
    assert done.stderr == f"error: no (logs: {session}/logs)\n"
    assert (session / "logs" / "raylet.out").exists()


def test_a_local_ray_that_cannot_start_is_one_line_that_names_the_logs_and_the_users_variables(temporary: Path) -> None:
    done = run(temporary, RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION="0.0000001")
    assert done.returncode == 1
    (session,) = temporary.glob("ray/session_2*")
    assert done.stderr.startswith("error: a local Ray cannot start: Attempting to cap object store memory usage at ")
    assert done.stderr.endswith(
        f"(logs: {session}/logs; set are RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION, RAY_TMPDIR)\n"
    )
    assert done.stderr.count("\n") == 1
