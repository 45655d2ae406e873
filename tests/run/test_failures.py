"""Runs that lose workers, nodes, checkpoints and storage."""

import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray
import torch
from ray._private.node import Node
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.report.run_files import read_csv
from mnist_ray.run import failures, fit, reporter
from mnist_ray.run.failures import describe
from mnist_ray.run.find import find
from mnist_ray.run.fit import EventQueue
from mnist_ray.storage import locate
from mnist_ray.training import checkpoint, engine
from mnist_ray.training.checkpoint import restore_newest
from mnist_ray.training.engine import create_state
from mnist_ray.training.events import WorkersLost
from mnist_ray.training.state import CodeFailedError
from mnist_ray.workload.data import Arrays, Split
from tests.conftest import LONGER, QUICK, as_flags, folder_at, mnist, run_and_act, run_and_act_twice, run_job, run_main


def weights(run: Path) -> str:
    """Return the digest of a finished run's last weights."""
    last = max(run.glob("checkpoint_epoch*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A cluster of a head without CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # Cluster, unlike `ray start`, never asks for a token
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()
    # An atexit handler of each node holds its client. From Python 3.13 on, multiprocessing clears these handlers in a
    # fork, where the end of a client without its threads would be that of the process.
    for node in gc.get_objects():
        if isinstance(node, Node) and node is not global_worker.node:
            node._gcs_client = None


@pytest.fixture
def nodes(head: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster of three raylets: a head without CPUs, two nodes with one each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    while len(head.worker_nodes) < 2:
        head.add_node(num_cpus=1)
    return head


def killing(class_name: str) -> Callable[[psutil.Process], None]:
    """Return what kills the newest actor of a class, of the Ray that this process is connected to."""

    def kill(job: psutil.Process) -> None:
        actors = ray._private.state.actors().values()  # type: ignore[attr-defined]
        alive = [actor["Pid"] for actor in actors if (actor["ActorClassName"], actor["State"]) == (class_name, "ALIVE")]
        psutil.Process(max(alive)).kill()

    return kill


def test_a_run_that_loses_a_node_goes_on_and_ends_with_the_same_weights(
    nodes: Cluster, undisturbed: Path, small_data: Path, tmp_path: Path
) -> None:
    def replace_a_node(job: psutil.Process) -> None:
        nodes.remove_node(nodes.list_all_nodes()[-1])
        nodes.add_node(num_cpus=1)

    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2})
    printed, _ = run_and_act(replace_a_node, "epoch 1/8  finished", *flags, address=nodes.address)
    assert "on 2 nodes" in printed or "2 × cpu" in printed
    assert printed.count("\nlost ") == 1
    assert "s of work lost" in printed
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_a_run_whose_queue_of_events_dies_ends_in_one_line_that_says_how_to_go_on(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_epochs": 500})
    _, complained = run_and_act(killing("EventQueue"), "epoch 1/500", *flags, address=ray_address, status=1)
    assert complained.startswith("error: Ray Train failed: ActorDiedError: The actor died unexpectedly")
    assert complained.endswith(f"to go on: python jobs/train.py --resume --run-name run --storage-path {tmp_path})\n")
    assert complained.count("\n") == 1


def test_a_training_that_ends_before_its_queue_of_events_has_started_loses_none(
    ray_address: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LateQueue(EventQueue):
        def __init__(self) -> None:
            time.sleep(8)  # a training of these data takes two
            super().__init__()

    monkeypatch.setattr(fit, "open_event_queue", lambda: ray.remote(num_cpus=0)(LateQueue).remote())
    run_main("train", *as_flags({**QUICK, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run"}))
    run = locate(str(tmp_path), "run")
    assert read_csv(run, "steps.csv")[-1]["step"] == "96"
    epochs = read_csv(run, "metrics.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(row["train_loss"] and row["val_loss"] for row in epochs)


def test_a_run_that_loses_a_worker_goes_on_and_ends_with_the_same_weights(
    ray_address: str, undisturbed: Path, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2})
    printed, _ = run_and_act(killing("RayTrainWorker"), "epoch 2/8  finished", *flags, address=ray_address)
    assert printed.count("\nlost ") == 1
    assert len(printed.splitlines()) < 60  # none of the hundreds that Ray says then
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_a_run_whose_driver_was_killed_is_resumed_and_ends_with_the_same_weights(
    ray_address: str, undisturbed: Path, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2})
    run_and_act(psutil.Process.kill, "epoch 3/8  finished", *flags, address=ray_address, status=-9)
    assert not (tmp_path / "run" / "result.json").exists()
    done = run_job("train.py", *flags, "--resume", address=ray_address)
    assert done.returncode == 0, done.stderr
    assert "going on in epoch" in done.stdout
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_steps_go_on_while_a_checkpoint_is_being_written_but_no_second_one_begins(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    first, second = (tmp_path / "run" / f"checkpoint_epoch-00{epoch}_step-000000" for epoch in (1, 2))
    written = first / "model.safetensors"
    seen: list[str] = []

    def block(job: psutil.Process) -> None:
        first.mkdir()
        os.mkfifo(written)  # whoever opens it for writing waits for a reader

    def let_go(job: psutil.Process) -> None:
        seen.extend(path.name for path in (first, second) if path.exists())
        written.read_bytes()

    flags = {**QUICK, "num_epochs": 3, "batch_size": 6, "validation_size": 0, "checkpoint_every": 10**6}
    flags |= {"data_dir": small_data, "storage_path": tmp_path, "run_name": "run", "num_workers": 2}
    acts = {"started": block, "epoch 2/3  finished": let_go}
    run_and_act_twice(acts, *as_flags(flags), address=ray_address)
    assert seen == [first.name]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["checkpoint"] == "checkpoint_epoch-003_step-000000"


def test_a_report_that_cannot_be_written_is_a_note_and_no_path(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({**QUICK, "num_epochs": 1, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run"})
    in_its_place = tmp_path / "run" / "report.html"
    printed, _ = run_and_act(lambda job: in_its_place.mkdir(), "started", *flags, address=ray_address)
    assert "note       no report: " in printed
    assert printed.splitlines()[-1] == f"result     {tmp_path / 'run' / 'result.json'}"


@pytest.mark.long
def test_a_reproducible_run_has_the_same_bits_killed_and_resumed_with_other_workers(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    values = {**LONGER, "num_epochs": 3, "data_dir": small_data, "storage_path": tmp_path}
    flags = [*as_flags(values), "--reproducible"]
    alone = run_job("train.py", *flags, "--run-name", "alone", "--num-workers", "1", address=ray_address)
    assert alone.returncode == 0, alone.stderr
    more = ["--run-name", "more", "--num-workers", "2"]
    run_and_act(psutil.Process.kill, "epoch 1/3  finished", *flags, *more, address=ray_address, status=-9)
    resumed = run_job("train.py", *flags, "--run-name", "more", "--num-workers", "1", "--resume", address=ray_address)
    assert resumed.returncode == 0, resumed.stderr
    digests = [re.findall("^weights    SHA-256 ([0-9a-f]{64})$", job.stdout, re.M) for job in (alone, resumed)]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]
    assert weights(tmp_path / "alone") == weights(tmp_path / "more")
    epochs, others = (read_csv(locate(str(tmp_path), name), "metrics.csv") for name in ("alone", "more"))
    assert len(epochs) == 3
    for epoch, other in zip(epochs, others, strict=True):  # of the one at the kill, nobody may have told the figures
        assert other["train_loss"] in ("", epoch["train_loss"])
        assert other["val_loss"] == epoch["val_loss"]


@pytest.mark.long
def test_an_elastic_run_goes_on_with_fewer_workers(nodes: Cluster, small_data: Path, tmp_path: Path) -> None:
    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run"})
    printed, _ = run_and_act(
        lambda job: nodes.remove_node(nodes.list_all_nodes()[-1]),
        "epoch 1/8  finished",
        *flags,
        "--num-workers",
        "2",
        "--min-workers",
        "1",
        address=nodes.address,
    )
    assert "started    2 × cpu" in printed
    assert "restarted  1 × cpu" in printed
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] > 0.8


def test_a_preempted_node_is_left_with_a_checkpoint_just_in_time(
    nodes: Cluster, small_data: Path, tmp_path: Path
) -> None:
    doomed = nodes.list_all_nodes()[-1]

    def announce(job: psutil.Process) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run(
            [*command, "--node-id", doomed.node_id, *reason, "--deadline-remaining-seconds", "3600"], check=True
        )

    flags = {**LONGER, "num_epochs": 30, "checkpoint_every": 1000, "num_workers": 2, "run_name": "run"}
    flags |= {"data_dir": small_data, "storage_path": tmp_path}
    printed, _ = run_and_act(announce, "epoch 1/30", *as_flags(flags), address=nodes.address)
    nodes.remove_node(doomed)
    assert printed.count("note        a worker's node is about to be taken away; saving a checkpoint\n") == 1
    assert "lost " not in printed


def test_the_newest_whole_checkpoint_is_restored_and_damaged_ones_are_named(tmp_path: Path) -> None:
    config = TrainConfig(precision="fp32")
    state = create_state(mnist(), config, 600, torch.device("cpu"))
    for step in (1, 2, 3, 4):
        folder = tmp_path / "run" / f"checkpoint_epoch-000_step-{step:06d}"
        folder.mkdir(parents=True)
        state.step = step
        checkpoint.snapshot(state, {"metrics": {"train_loss": 0.5}, "workload": mnist().identity}).write(
            folder_at(folder)
        )
    whole, corrupt, cut, empty = sorted((tmp_path / "run").iterdir())
    content = bytearray((corrupt / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (corrupt / "model.safetensors").write_bytes(content)
    text = (cut / "state.json").read_bytes()
    (cut / "state.json").write_bytes(text[: len(text) // 2])
    shutil.rmtree(empty)
    empty.mkdir()
    restored = create_state(mnist(), config, 600, torch.device("cpu"))
    found = restore_newest(locate(str(tmp_path), "run"), restored)
    assert restored.step == 1
    assert found.damaged == (empty.name, cut.name, corrupt.name)
    assert (found.name, found.metrics) == (whole.name, {"train_loss": 0.5})


def test_a_run_whose_list_of_checkpoints_was_cut_off_is_read_by_its_last_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    state = create_state(mnist(), TrainConfig(), 600, torch.device("cpu"))
    checkpoint.snapshot(state, {"workload": mnist().identity}).write(folder_at(saved))
    run = locate(str(tmp_path), "run")
    run.write_text("config.json", "{}")
    run.write_text("checkpoint_manager_snapshot.json", '{"checkpoint_results": [{"checkpoint_dir')
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        find(run.uri, "~/ray_results")
    for name in ("checkpoint_epoch-001_step-000000", "checkpoint_epoch-002_step-000000"):
        shutil.copytree(saved, run.inside(name).path)
    assert find(run.uri, "~/ray_results").checkpoint.path.endswith("/run/checkpoint_epoch-002_step-000000")
    run.write_text("result.json", "")
    found = find(run.uri, "~/ray_results")
    assert found.checkpoint.path.endswith("/run/checkpoint_epoch-002_step-000000")
    assert [note.partition("result.json is damaged: ")[2] for note in found.notes] == [
        "Expecting value: line 1 column 1 (char 0); going on without it"
    ]


def snapshot(*names: str) -> str:
    """Return what Ray itself writes of a run's checkpoints."""
    results = [
        _TrainingResultState(checkpoint_dir_name=name, metrics={"val_loss": 0.5, "val_score": 0.5}) for name in names
    ]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(names))),
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(names),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    text: str = state.model_dump_json()
    return text


FIRST, SECOND = "checkpoint_epoch-001_step-000000", "checkpoint_epoch-002_step-000000"


@pytest.mark.parametrize(
    "text",
    [
        "",
        snapshot(FIRST)[:40],
        "{}",
        "[]",
        "null",
        "\0",
        '{"checkpoint_results": null}',
        '{"checkpoint_results": [{}]}',
        snapshot("checkpoint_epoch-009_step-000000"),
        snapshot("checkpoint_old"),
        snapshot(FIRST).replace("0.5", '"x"'),
        snapshot(FIRST).replace('"val_score"', '"val_points"'),
    ],
)
def test_rays_list_of_checkpoints_is_dropped_where_it_is_damaged(text: str, tmp_path: Path) -> None:
    run = locate(str(tmp_path), "run")
    for name in (FIRST, "checkpoint_old"):
        (tmp_path / "run" / name).mkdir(parents=True)
    run.write_text("checkpoint_manager_snapshot.json", text)
    fit.drop_damaged_snapshot(run)
    assert not run.exists("checkpoint_manager_snapshot.json")


@pytest.mark.parametrize("names", [[], [FIRST], [SECOND, FIRST]])
def test_rays_list_of_checkpoints_is_kept_where_it_is_whole(names: list[str], tmp_path: Path) -> None:
    run = locate(str(tmp_path), "run")
    for name in (FIRST, SECOND):
        (tmp_path / "run" / name).mkdir(parents=True)
    run.write_text("checkpoint_manager_snapshot.json", snapshot(*names))
    fit.drop_damaged_snapshot(run)
    assert run.read_text("checkpoint_manager_snapshot.json") == snapshot(*names)


def test_a_resumed_run_passes_over_a_damaged_checkpoint(
    undisturbed: Path, ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "result.json").unlink()  # as if it had been killed before the evaluation
    last = max(run.glob("checkpoint_epoch*"))
    (last / "model.safetensors").write_bytes(b"something else")
    flags = as_flags({"storage_path": tmp_path, "run_name": "run"})
    done = run_job("train.py", *flags, "--resume", address=ray_address)
    assert done.returncode == 0, done.stderr
    assert f"note       {last.name} is damaged or was cut off; the one before it is used" in done.stdout
    assert weights(run) == weights(undisturbed)


def test_a_last_checkpoint_that_a_kill_kept_from_ray_is_validated_and_chosen(
    undisturbed: Path, ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "result.json").unlink()
    (run / "checkpoint_manager_snapshot.json").unlink()
    for path in sorted(run.glob("checkpoint_epoch*"))[:-1]:
        shutil.rmtree(path)
    flags = as_flags({"storage_path": tmp_path, "run_name": "run"})
    done = run_job("train.py", *flags, "--resume", address=ray_address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "validation after epoch 8" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["checkpoint"] == "checkpoint_epoch-008_step-000000"
    assert result["checkpoint_metrics"]["val_accuracy"] > 0.5
    assert weights(run) == weights(undisturbed)


def test_a_worker_that_hangs_ends_itself_with_its_stack_in_the_log() -> None:
    code = (
        "import time; from mnist_ray.cluster.environment import end_if_hung\n"
        "def hanging(): time.sleep(60)\n"
        "end_if_hung(0.5); hanging()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in hanging" in done.stderr


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({1: RayActorError(error_msg="The actor died unexpectedly")}, "worker 1 died"),
        ({2: RayActorError(error_msg="The actor died because its node has died.")}, "worker 2 was lost with its node"),
        (
            {0: WorkerHealthCheckFailedError("failed", RuntimeError())},
            "worker 0 does not answer",
        ),
        ({0: ValueError("bad value\nand more")}, "worker 0 failed: ValueError: bad value"),
        (
            {0: RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"), 1: RayActorError()},
            "worker 1 died",
        ),
        (
            {0: RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error")},
            "worker 0 has lost its connection to another, which has died or hangs",
        ),
    ],
)
def test_what_happened_to_workers_is_one_line(failures: dict[int, Exception], said: str) -> None:
    assert describe(failures) == said


def test_the_reason_of_a_controllers_failure_is_its_own_text_and_not_a_traceback() -> None:
    failed = RayTaskError("run", "Traceback (most recent call last):\n …", OSError(28, "No space left on device"))
    assert failures.reason_of(failed.as_instanceof_cause()) == (
        "Ray Train failed: OSError: [Errno 28] No space left on device"
    )


def train_on_a_worker(monkeypatch: pytest.MonkeyPatch, fail: Callable[[Any], None]) -> None:
    monkeypatch.setattr(reporter, "train_rank", fail)
    reporter.train_loop_per_worker({"spec": Mock(workload=mnist(), folders=[])})


def test_what_the_code_fails_with_is_one_line_with_its_place(
    few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: Any) -> None:
        engine.evaluate(mnist(), torch.nn.Linear(3, 10), Split(few_images))

    with pytest.raises(CodeFailedError, match=r"^RuntimeError: .*mat1 and mat2 .* \(engine\.py, line \d+\)$"):
        train_on_a_worker(monkeypatch, fail)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"),
        OSError("the link is down"),
        torch.distributed.DistBackendError("NCCL error"),
        RayActorError(),
    ],
)
def test_what_may_go_well_at_the_next_attempt_is_raised_as_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)) as raised:
        train_on_a_worker(monkeypatch, Mock(side_effect=error))
    assert raised.value is error


def test_code_that_fails_ends_a_run_and_other_failures_are_told() -> None:
    told = Mock()
    reporter = failures.FailureReporter(told)
    with pytest.raises(failures.TrainingStoppedError, match=r"^ValueError: bad \(model\.py, line 55\)$"):
        reporter.after_exception(None, {0: CodeFailedError("ValueError: bad (model.py, line 55)")})
    told.put.remote.assert_not_called()
    reporter.after_exception(None, {1: RayActorError(error_msg="The actor died unexpectedly")})
    told.put.remote.assert_called_once_with(WorkersLost("worker 1 died"))
