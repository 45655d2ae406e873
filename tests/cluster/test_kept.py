import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import ray

from mnist_ray.cluster import kept
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.extras.uses import uses_of_ray
from tests.conftest import ROOT, callback_at, processes_in, wait_for


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[BaseException] | None]]:
    """The error with which each kept Ray was ended; here, no Ray is connected."""
    monkeypatch.setattr("ray.get_runtime_context", Mock())
    monkeypatch.setattr("mnist_ray.cluster.nodes.is_connected_to", lambda node_id: True)
    monkeypatch.setattr("mnist_ray.extras.processes.dead_processes", list)
    monkeypatch.setattr("mnist_ray.extras.uses.uses_of_ray", set)
    yield []
    kept.end()


def keep(ends: list[type[BaseException] | None], config: WorkerConfig) -> contextlib.ExitStack:
    resources = contextlib.ExitStack()
    resources.push(lambda kind, error, traceback: ends.append(kind))
    with kept.for_next_call():
        kept.keep(resources, config, verbose=False)
    return resources


def test_a_kept_ray_is_for_a_job_of_the_same_purpose(ends: list, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = keep(ends, WorkerConfig())
    with kept.for_next_call():
        kept.end_unless_fit(WorkerConfig(num_workers=1), verbose=False)
    assert kept.take(WorkerConfig(num_workers=1), verbose=False) is resources
    assert (kept.take(WorkerConfig(), verbose=False), ends) == (None, [])

    many = WorkerConfig(num_workers=2 * len(os.sched_getaffinity(0)))
    others = (many, WorkerConfig(plain_ray=True), WorkerConfig(fork_workers="no"))
    for config, verbose in (*((other, False) for other in others), (WorkerConfig(), True)):
        keep(ends, WorkerConfig())
        assert kept.take(config, verbose=verbose) is None
    assert ends == [None] * 4


def test_a_call_with_other_variables_gets_no_ray_whose_workers_have_the_old_ones(
    ends: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = keep(ends, WorkerConfig())
    with kept.for_next_call():
        monkeypatch.setenv("OF_THE_CALL", "2")
        assert kept.take(WorkerConfig(), verbose=False) is resources
        kept.keep(resources, WorkerConfig(), verbose=False)
    with kept.for_next_call():
        assert ends == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with kept.for_next_call():
        assert ends == [None]
        assert kept.take(WorkerConfig(), verbose=False) is None


def test_a_ray_that_the_callers_own_code_has_used_is_neither_ended_nor_taken(
    ends: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_RAY_KEEP_S", "0.01")
    looked: list[set[bytes]] = [set()]

    def uses() -> set[bytes]:
        looked.append(looked[-1] | {b"a function of the caller"})
        return looked[-2]

    monkeypatch.setattr("mnist_ray.extras.uses.uses_of_ray", uses)
    keep(ends, WorkerConfig())
    wait_for(lambda: len(looked) > 2)  # the minute, or what is set here, is over
    with kept.for_next_call():
        assert kept.take(WorkerConfig(num_workers=1), verbose=True) is None
    assert ends == []
    monkeypatch.setattr("mnist_ray.cluster.nodes.is_connected_to", lambda node_id: False)  # ray.shutdown()
    assert kept.take(WorkerConfig(), verbose=False) is None
    assert ends == [None]


def test_a_task_and_a_reference_are_uses_of_ray(ray_address: str) -> None:
    def own() -> int:
        return 1

    before = uses_of_ray()
    assert uses_of_ray() == before
    assert ray.get(ray.remote(num_cpus=0)(own).remote()) == 1
    called = uses_of_ray()
    held = ray.put(1)
    assert before < called < uses_of_ray(), held


def test_a_ray_that_the_user_has_shut_down_is_not_taken(ends: list, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(ends, WorkerConfig())
    monkeypatch.setattr("mnist_ray.cluster.nodes.is_connected_to", lambda node_id: False)
    assert kept.take(WorkerConfig(), verbose=False) is None
    assert ends == [None]


def test_a_kept_ray_ends_after_a_while(ends: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_RAY_KEEP_S", "0.01")
    keep(ends, WorkerConfig())
    wait_for(lambda: ends)
    assert kept.take(WorkerConfig(), verbose=False) is None


def test_a_dead_ray_is_ended_without_waiting_for_its_answer(ends: list, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(ends, WorkerConfig())
    monkeypatch.setattr("mnist_ray.extras.processes.dead_processes", lambda: ["raylet"])
    assert kept.take(WorkerConfig(), verbose=False) is None
    assert [kind.__name__ for kind in ends] == ["RaySilentError"]


def test_only_calls_from_python_keep_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kept.is_wanted()
    with kept.for_next_call():
        assert kept.is_wanted()
        assert not kept.is_wanted(plain=True)
    monkeypatch.setenv("MNIST_RAY_KEEP_S", "0")
    with kept.for_next_call():
        assert not kept.is_wanted()
    monkeypatch.setenv("MNIST_RAY_KEEP_S", "soon")
    with pytest.raises(UsageError, match="MNIST_RAY_KEEP_S=soon must be a number of seconds"), kept.for_next_call():
        pass


SCRIPT = """
import contextlib, sys
import ray
import mnist_ray
from mnist_ray.errors import JobError

def session():
    return ray._private.worker.global_worker.node.get_session_dir_path()

def train(**settings):
    settings = {"data_dir": sys.argv[1], "storage_path": sys.argv[2], "limit": 0.1, "num_epochs": 1, **settings}
    return mnist_ray.train(quiet=True, cpus_per_worker=1, **settings)

train()
first = session()
run = train()
assert session() == first
ray.shutdown()
with contextlib.suppress(JobError):
    train(callback=sys.argv[3])
print("after a failure:", ray.is_initialized())  # else Ray would end this process some seconds later
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
own = session()
mnist_ray.evaluate(run)
assert session() == own
"""


@pytest.mark.processes
def test_calls_share_a_ray_until_one_fails_or_the_process_ends(small_data: Path, tmp_path: Path) -> None:
    fails = callback_at(tmp_path / "fails.py", "on_step(self, state)", "os.kill(int(os.environ['RAY_RAYLET_PID']), 9)")
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, small_data, tmp_path / "runs", fails],
            env={**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": folder, "TMPDIR": folder, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "after a failure: False" in done.stdout
        sessions = {path.name for path in Path(folder).rglob("session_2*")}
        assert len(sessions) == 2, "the logs of the one that failed, and the user's own"
        assert not [path for path in Path(folder).iterdir() if path.name.startswith(("mnist_ray-", "ray_fork-"))]
        psutil.wait_procs(processes_in(Path(folder)), timeout=30)
        assert processes_in(Path(folder)) == []
