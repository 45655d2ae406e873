"""What a job needs of Ray, in both forms, default and plain. ``make test-ray`` runs it, also with other Rays."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from mnist_ray.ray_versions import is_at_least
from tests.conftest import QUICK, ROOT, Flags, Gate, as_flags, callback_at, run_and_act, run_job, wait_for, weights

pytestmark = pytest.mark.any_ray
_TIMEOUT_S = 300  # a plain start takes half a minute on two busy cores
SPAWNS = """\
import multiprocessing

from mnist_ray.mnist import MNIST


class Mine(MNIST):
    def load_data(self):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.map(abs, [1])
        return super().load_data()
"""
FORMS = {"default": [], "plain": ["--plain-ray"]}
TRIALS = ["--num-trials", "2", "--num-confirmed", "1", "--num-epochs", "1", "--sweep", "label_smoothing=0,0.1"]


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> list[str]:
    """The flags of a form."""
    return FORMS[request.param]


@pytest.fixture(scope="module")
def trained(form: list[str], small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers, in a form."""
    storage = tmp_path_factory.mktemp("storage")
    paths = {"data_dir": small_data, "storage_path": storage, "run_name": "run"}
    done = run_job("train.py", *as_flags({**QUICK, **paths, "num_workers": 2}), *form, timeout_s=_TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    return storage / "run"


def test_the_weights_are_those_of_a_training_without_ray(form: list[str], small_data: Path, tmp_path: Path) -> None:
    flags = as_flags({**QUICK, "data_dir": small_data, "storage_path": tmp_path, "num_chunks": 2})
    for name, workers in {"here": ["--num-workers", "0"], "ray": ["--num-workers", "2", *form]}.items():
        done = run_job("train.py", *flags, "--reproducible", "--run-name", name, *workers, timeout_s=_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "here") == weights(tmp_path / "ray")


def test_a_run_is_evaluated(trained: Path, form: list[str]) -> None:
    done = run_job("evaluate.py", str(trained), "--num-tasks", "2", *form, timeout_s=_TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = json.loads((trained / "result.json").read_text())["test_accuracy"]
    assert f"accuracy {accuracy:.2%}" in done.stdout


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_sweep_chooses(num_workers: str, form: list[str], small_data: Path, tmp_path: Path) -> None:
    flags = as_flags({**QUICK, "data_dir": small_data, "storage_path": tmp_path, "run_name": "sweep"})
    # Each segment and each further seed starts its workers: in the plain form, that takes most of a minute.
    once = ["--scheduler", "none", "--num-confirmed", "0"] if num_workers == "2" else []
    done = run_job("tune.py", *flags, *TRIALS, *once, "--num-workers", num_workers, *form, timeout_s=_TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    for said in (r"^best +[\d.]+% validation accuracy", r"^test +accuracy [\d.]+%"):
        assert re.search(said, done.stdout, re.MULTILINE)


def test_a_killed_worker_is_replaced(gate: Gate, form: list[str], trained: Path, tmp_path: Path) -> None:
    kill = f"os.mkdir({str(tmp_path / 'killed')!r}), os.kill(os.getpid(), signal.SIGKILL)"  # one worker, once
    once = ["try:", f"    (state.epoch, state.step) == (1, 30) and [{kill}]", "except FileExistsError:", "    pass"]
    callback = callback_at(tmp_path / "kills.py", "on_step(self, state)", *once)
    done = run_job("train.py", *gate.flags(callback=callback), *form, timeout_s=_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^lost +worker \d (died|has lost its connection)", done.stdout, re.MULTILINE)
    assert weights(gate.run) == weights(trained)


def test_a_killed_driver_is_resumed(gate: Gate, form: list[str], trained: Path) -> None:
    def kill(job: psutil.Process) -> None:
        job.suspend()  # otherwise this process, the supervisor, may end by itself once the driver is killed
        for process in [*job.children(), job]:
            process.kill()

    acts = {"started": gate.opened_after(kill)}
    run_and_act(acts, *gate.flags(), *form, address="local", status=-signal.SIGKILL)
    done = run_job("train.py", *gate.flags(), *form, "--resume", timeout_s=_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert weights(gate.run) == weights(trained)


@pytest.mark.skipif(not is_at_least("2.55"), reason="refuses min_workers: tests/job/test_rules.py")
def test_an_elastic_run_continues_with_fewer_workers(nodes: Cluster, form: list[str], gate: Gate) -> None:
    lose = gate.opened_after(lambda job: nodes.remove_node(nodes.list_all_nodes()[-1]))
    flags = gate.flags(min_workers=1)
    printed, _ = run_and_act({"epoch 1/2  finished": lose}, *flags, *form, address=nodes.address)
    assert "started    2 × cpu" in printed
    assert "restarted  1 × cpu" in printed
    assert json.loads((gate.run / "result.json").read_text())["test_accuracy"] > 0.8


@pytest.mark.skipif(not is_at_least("2.60"), reason="this Ray announces no preemption")
def test_a_checkpoint_is_saved_before_a_node_is_preempted(
    nodes: Cluster, form: list[str], quick: Flags, tmp_path: Path
) -> None:
    doomed = nodes.list_all_nodes()[-1]

    def announce(job: psutil.Process) -> None:
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(1000 * (time.time() + 3600))
        accepted, _ = GcsClient(address=nodes.address).drain_node(doomed.node_id, reason, "spot", deadline_ms)
        assert accepted

    def interrupt(job: psutil.Process) -> None:
        wait_for(lambda: [*tmp_path.glob("run/checkpoint_epoch*")], timeout_s=10)  # the epoch has half a minute to go
        job.send_signal(signal.SIGINT)

    callback = callback_at(tmp_path / "slow.py", "on_step(self, state)", "time.sleep(0.07)")
    flags = quick(num_epochs=99, batch_size=5, validation_size=0, num_workers=2, callback=callback)
    note = "note        a worker's node will be preempted"
    acts = {"epoch 1/99": announce, note: interrupt}
    printed, _ = run_and_act(acts, *flags, *form, address=nodes.address, status=130)
    assert printed.count(note) == 1
    assert "lost " not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_resume(number: int, gate: Gate, form: list[str]) -> None:
    def interrupt(job: psutil.Process) -> None:
        gate.open()
        job.send_signal(number)

    _, complained = run_and_act({"started": interrupt}, *gate.flags(), *form, address="local", status=130)
    assert re.fullmatch(r"interrupted; to resume: .*--resume --run-name run.*\n", complained)
    assert [*gate.run.glob("checkpoint_*")]


def test_nothing_is_imported_from_a_folder_that_others_can_write(
    form: list[str], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, imported = tmp_path / "open", tmp_path / "imported"
    place.mkdir()
    place.chmod(0o1777)
    for name in ("multiprocessing", "prometheus_client", "pyarrow", "pydantic", "starlette"):
        (place / f"{name}.py").write_text(f"open({str(imported)!r}, 'a').write({name!r})\nraise ImportError")
    (place / "mine.py").write_text(SPAWNS)
    monkeypatch.chdir(place)
    paths = {"data_dir": small_data, "storage_path": tmp_path, "workload": place / "mine.py"}
    done = run_job("train.py", *as_flags({**QUICK, **paths, "num_workers": 2, "num_epochs": 1}), *form, timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert not imported.exists(), imported.read_text()


def test_a_local_ray_listens_on_loopback_only(form: list[str], gate: Gate) -> None:
    listening: set[str] = set()

    def look(job: psutil.Process) -> None:
        for process in job.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found = process.net_connections("inet")
                listening.update(own.laddr.ip for own in found if own.status == psutil.CONN_LISTEN)
        gate.open()

    run_and_act({"started": look}, *gate.flags(), *form, address="local")
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


def test_a_call_trains_even_if_ray_was_imported_first(form: list[str], small_data: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "data_dir": str(small_data), "storage_path": str(tmp_path), "num_epochs": 1}
    code = f"import ray, mnist_ray\nprint(mnist_ray.train(plain_ray={bool(form)}, quiet=True, **{settings!r}))"
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert re.search(r"accuracy [\d.]+%.* on the test set\n$", done.stdout), done.stderr
    assert done.stderr == ""


def test_a_job_trains_on_a_ray_that_lacks_all_private_names(small_data: Path, tmp_path: Path, trained: Path) -> None:
    code = "from mnist_ray import cli, extras\nextras.works = lambda name: False\ncli.run(cli.train)"
    paths = {"data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2}
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", code, *as_flags({**QUICK, **paths})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^note +Ray \S+: without forked workers, ", done.stdout, re.MULTILINE)
    assert weights(tmp_path / "run") == weights(trained)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def dashboard() -> Iterator[tuple[str, Path]]:
    """The address of the dashboard of a ``ray start --head``, and the folder of Ray's logs."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        ports = ["--port=0", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
        command = ["start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *ports]
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert head.stdout is not None
        said = [*itertools.takewhile(lambda line: "will now block" not in line, head.stdout)]
        try:
            assert head.poll() is None, said
            yield f"http://127.0.0.1:{port}", Path(folder) / "ray" / "session_latest" / "logs"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            head.communicate()


def test_a_job_is_submitted(dashboard: tuple[str, Path], form: list[str], small_data: Path, tmp_path: Path) -> None:
    address, logs = dashboard
    paths = {"data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2, "num_epochs": 1}
    job = [sys.executable, "jobs/train.py", *as_flags({**QUICK, **paths}), *form]
    submit = ["--no-wait", "--submission-id", f"form-{len(form)}", "--working-dir", str(ROOT), "--", *job]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, *submit]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT_S, check=True)
    wait_for((tmp_path / "run" / "result.json").exists, timeout_s=_TIMEOUT_S)
    assert "on a Ray cluster of 1 node" in (logs / f"job-driver-form-{len(form)}.log").read_text()
