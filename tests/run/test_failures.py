"""Runs that lose workers, nodes, checkpoints and storage; and the evaluation of checkpoints."""

import contextlib
import faulthandler
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock, call

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError, RayTaskError
from ray.train import PreemptionInfo, UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mnist_ray import process
from mnist_ray.checkpoints import checkpoint
from mnist_ray.checkpoints.checkpoint import restore_newest
from mnist_ray.checkpoints.find import best_of, drop_worse, find
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.cluster import nodes as ray_nodes
from mnist_ray.cluster.watch import MAX_SILENCE_S, RaySilentError
from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import ExampleError, JobError, TrainingStoppedError, UnreadableDataError, UsageError
from mnist_ray.job.session import ending_explained
from mnist_ray.parallel.group import Group
from mnist_ray.process import Watchdog
from mnist_ray.record.recorder import logs_named
from mnist_ray.run import failures, fit, ray_train, worker
from mnist_ray.run.evaluate import evaluate_here
from mnist_ray.run.failures import describe
from mnist_ray.run.ray_train import Preemption
from mnist_ray.run.worker import Checkpointer, LoopSpec, Worker
from mnist_ray.signals import InterruptFlag
from mnist_ray.storage import RunFolder, checkpoint_name
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.events import STOPPING, ControllerAlive, Event, Note, Outcome, Started, Validated, WorkersLost
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError
from mnist_ray.training.trainer import create_state
from tests.conftest import Flags, Gate, callback_at, mnist, run_and_act, run_main, wait_for, weights


@contextlib.contextmanager
def acting(act: Callable[[], None]) -> Iterator[None]:
    """Act in a thread while a job runs in the block. If that fails, interrupt the job, and raise the error."""

    def act_or_interrupt() -> None:
        try:
            act()
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)
            raise

    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(act_or_interrupt)
        try:
            yield
        finally:
            if (error := acted.exception()) is not None:
                raise error


def killing(class_name: str) -> Callable[..., None]:
    """Return a function that kills the newest actor of a class."""

    def alive() -> list[int]:
        actors = ray._private.state.actors().values()  # type: ignore[attr-defined]
        return [actor["Pid"] for actor in actors if (actor["ActorClassName"], actor["State"]) == (class_name, "ALIVE")]

    def kill(*job: psutil.Process) -> None:
        wait_for(alive)
        psutil.Process(max(alive())).kill()

    return kill


@pytest.mark.long
def test_a_run_that_loses_a_node_ends_with_the_same_weights(nodes: Cluster, finished_run: Path, gate: Gate) -> None:
    def replace_a_node(job: psutil.Process) -> None:
        nodes.remove_node(nodes.list_all_nodes()[-1])
        nodes.add_node(num_cpus=1)

    flags = gate.flags()
    acts = {"epoch 1/2  finished": gate.opened_after(replace_a_node)}
    printed, _ = run_and_act(acts, *flags, address=nodes.address)
    assert "started    2 × cpu" in printed
    assert printed.count("\nlost ") == 1
    assert "s of work lost" in printed
    assert len(printed.splitlines()) < 60  # none of the hundreds that Ray says then
    assert weights(gate.run) == weights(finished_run)


def test_a_run_whose_event_queue_dies_says_in_one_line_how_to_resume(finished_run: Path, gate: Gate) -> None:
    with acting(gate.opened_after(killing("EventQueue"))), pytest.raises(JobError) as raised:
        run_main("train", *gate.flags())
    complained = str(raised.value)
    assert complained.startswith("Ray Train failed: ActorDiedError: The actor died unexpectedly")
    assert f"to resume: python jobs/train.py --resume --run-name run --storage-path {gate.folder}" in complained
    assert "\n" not in complained
    run_main("train", *gate.flags(), "--resume")  # the CPUs of the workers are free again
    assert weights(gate.run) == weights(finished_run)


def queue_of(takes: list[list[Event]], over: threading.Event, before: Callable[[], None] = lambda: None) -> Any:
    """Return an event queue of which each take gives the next events; after the last ones, the training is ``over``."""

    def take() -> Any:
        if takes:  # not while the training's thread ends, which may take long
            before()
        events = takes.pop(0) if takes else []
        if not takes:
            over.set()
        return ray.put(events)

    return Mock(**{"take.remote": take})


@pytest.mark.parametrize("is_alive", [True, False])
@pytest.mark.usefixtures("ray_address")
def test_a_controller_is_silent_if_it_shows_no_life_but_not_if_the_driver_was_slow(
    is_alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, over, ended = [0.0], threading.Event(), Mock()
    monkeypatch.setattr(fit, "time", Mock(monotonic=lambda: now[0]))
    monkeypatch.setattr("ray.kill", ended)

    def be_slow(event: Event) -> None:
        now[0] += 100

    lost, alive = WorkersLost("a node is away"), ControllerAlive("its actor")
    life = list[Event]([alive] if is_alive else [])
    takes: list[list[Event]] = [[alive, lost], life, [lost], life, []]
    with contextlib.nullcontext() if is_alive else pytest.raises(RaySilentError, match="has not answered for 50 s"):
        assert fit.fit_and_listen(Mock(fit=over.wait), queue_of(takes, over), be_slow) == Outcome()
    assert ended.mock_calls == [] if is_alive else [call("its actor")]


@pytest.mark.usefixtures("ray_address")
def test_an_interrupted_run_waits_for_workers_that_train_and_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    noted, over, events = InterruptFlag(), threading.Event(), list[Event]()
    monkeypatch.setattr(fit, "defer_first_interrupt", lambda: contextlib.nullcontext(noted))
    monkeypatch.setattr("ray.kill", lambda actor: over.set())
    started, lost = Started(1, ("here",), 1, "cpu", "fp32", 0, 0, 0, 0), WorkersLost("worker 0 died")

    def note(event: Event) -> None:
        events.append(event)
        noted.is_set = True

    queue = queue_of([[started], [], [lost], [], [ControllerAlive("its actor")], []], threading.Event())
    with pytest.raises(KeyboardInterrupt):
        fit.fit_and_listen(Mock(fit=over.wait), queue, note)
    assert events == [started, STOPPING, lost]
    queue.request_stop.remote.assert_called_once()


@pytest.mark.usefixtures("ray_address")
def test_a_run_that_waits_for_workers_says_now_and_then_what_is_free(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def advance() -> None:
        now[0] += 10

    over, events = threading.Event(), list[Event]()
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "memory": 1e9, "GPU": 2.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"GPU": 1.0})
    takes: list[list[Event]] = [[]] * 50
    fit.fit_and_listen(Mock(fit=over.wait), queue_of(takes, over, advance), events.append)
    said = "waiting for the workers to start: 0 of 4 CPUs and 1 of 2 GPUs are unreserved"
    assert events == [Note(f"{said} (40 s)"), Note(f"{said} (350 s)")]


def test_a_training_that_ends_before_its_event_queue_has_started_loses_no_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    awaited = Mock()
    monkeypatch.setattr("ray.wait", awaited)
    sink = ray_train.QueueSink(Mock(**{"put.remote": lambda event: event}), rank=0)
    sink.send(Note("trained"))
    awaited.assert_not_called()
    sink.send(Outcome())
    awaited.assert_called_once_with([Note("trained"), Outcome()], num_returns=2)


@pytest.mark.usefixtures("ray_address")
def test_a_run_that_loses_a_worker_and_its_newest_checkpoint_ends_with_the_same_weights(
    finished_run: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = gate.run / "checkpoint_epoch-001_step-000020"

    def damage_and_kill() -> None:
        (newest / "model.safetensors").write_bytes(b"something else")
        killing("RayTrainWorker")()

    with acting(gate.opened_after(damage_and_kill)):
        run_main("train", *gate.flags())
    printed = capsys.readouterr().out
    assert printed.count("\nlost ") == 1
    assert f"note       {newest.name} is damaged or was cut off; using the one before it" in printed
    assert weights(gate.run) == weights(finished_run)


@pytest.mark.parametrize(
    "error", [RaySilentError("it is silent"), TrainingDivergedError(1, 2), UnreadableDataError("no such row")]
)
def test_an_error_gets_the_place_of_the_logs_and_stays_what_it_is(error: JobError) -> None:
    session: Any = Mock(cluster=Mock(log_folder="/logs"))
    with pytest.raises(JobError, match=r" \(logs: /logs\)$") as raised, logs_named(session):
        raise error
    assert raised.value is error


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_that_a_callback_stops_says_how_to_resume(num_workers: int, quick: Flags, tmp_path: Path) -> None:
    callback = callback_at(tmp_path / f"stops_{num_workers}.py", "wants_stop(self)", "return True")
    with pytest.raises(JobError, match=r"^a callback has stopped the training.*; to resume: python .*--resume"):
        run_main("train", *quick(num_workers=num_workers, callback=callback))
    assert len(list(tmp_path.glob("run/checkpoint_epoch*"))) == 1


@pytest.mark.processes
def test_a_run_resumed_after_a_kill_and_damage_ends_with_the_same_weights(
    ray_address: str, finished_run: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = gate.flags()
    run_and_act({"epoch 1/2  finished": gate.kill}, *flags, address=ray_address, status=-9)
    assert not (gate.run / "result.json").exists()
    last = max(gate.run.glob("checkpoint_epoch*"))
    (last / "model.safetensors").write_bytes(b"something else")
    run_main("train", *flags, "--resume")
    printed = capsys.readouterr().out
    assert f"note       {last.name} is damaged or was cut off; using the one before it" in printed
    assert "continuing in epoch" in printed
    assert weights(gate.run) == weights(finished_run)


def test_a_report_that_cannot_be_written_is_a_note(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist_ray.report.page.write", Mock(side_effect=OSError("no space")))
    run_main("train", *quick(num_epochs=1, num_workers=0))
    printed = capsys.readouterr().out
    assert "note       no report: OSError: no space" in printed
    assert printed.splitlines()[-1] == f"result     {tmp_path / 'run' / 'result.json'}"


@pytest.mark.long
def test_a_job_waits_for_a_node_for_longer_than_ray_may_be_silent(
    nodes: Cluster, finished_run: Path, gate: Gate
) -> None:
    nodes.remove_node(nodes.list_all_nodes()[-1])
    gate.open()

    def add_a_node(job: psutil.Process) -> None:
        time.sleep(MAX_SILENCE_S + 20)
        nodes.add_node(num_cpus=1)

    flags = [*gate.flags(), "--autoscaling"]
    acts = {"note       the cluster is too small now": add_a_node}
    printed, _ = run_and_act(acts, *flags, address=nodes.address)
    assert "started    2 × cpu" in printed
    assert weights(gate.run) == weights(finished_run)


def train_on_a_worker(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any], code_folder: Path | None = None, **values: Any
) -> tuple[Outcome, Sequence[Any]]:
    """Call the training function of a worker, which calls ``train``; return what it sends last, and its policies."""
    monkeypatch.setattr(ray_train, "train_worker", Mock(side_effect=train))
    monkeypatch.setattr("ray.wait", Mock())
    monkeypatch.setattr("ray.get_runtime_context", Mock())
    context = Mock(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    spec: Any = Mock(**{"is_local": False, "job": Mock(code_folders=[code_folder] * bool(code_folder)), **values})
    ray_train.train_loop_per_worker({"spec": spec})
    *_, outcome = [sent.args[0] for sent in spec.event_queue.put.remote.mock_calls]
    return outcome, ray_train.train_worker.call_args.args[-1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("is_local", "num_asked"), [(True, 0), (False, 3)])
def test_ray_is_asked_for_preempted_nodes_every_five_seconds_and_only_on_a_cluster(
    is_local: bool, num_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(return_value=None)
    monkeypatch.setattr("ray.train.get_preemption_info", asked)
    _, policies = train_on_a_worker(monkeypatch, Mock(), is_local=is_local)
    for policy in policies:
        for trained_s in range(1, 26):
            policy.on_progress(Mock(finished_s=0.5, epoch_s=trained_s / 2 - 0.5), Mock())
            assert not policy.wants_checkpoint()
    assert asked.call_count == num_asked


def test_a_checkpoint_is_saved_once_for_each_leaving_node(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, wanted = Preemption(Mock()), list[bool]()
    for number, nodes in enumerate(([], ["a"], ["a"], ["a", "b"], ["b"])):
        info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})
        monkeypatch.setattr("ray.train.get_preemption_info", Mock(return_value=info if nodes else None))
        policy.on_progress(Mock(finished_s=5 * number, epoch_s=1), Mock())
        wanted.append(policy.wants_checkpoint())
    assert wanted == [False, True, False, True, False]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of ``time.monotonic()``, in a list."""
    now = [0.0]
    for module in (process, fit, ray_nodes):
        monkeypatch.setattr(module, "time", Mock(monotonic=lambda: now[0], sleep=lambda seconds: time.sleep(0.01)))
    monkeypatch.setattr(fit, "_POLL_INTERVAL_S", 0)
    monkeypatch.setattr(fit, "_START_INTERVAL_S", 0)
    return now


@pytest.fixture
def limits(now: list[float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time limits that are set."""
    limits: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit_s, **options: limits.append(limit_s))
    return limits


def worker_of(watchdog: Watchdog, sink: Any = None) -> Worker:
    """Return the worker of a run with one."""
    state = create_state(mnist(), TrainConfig(), 600, Group())
    spec = LoopSpec(job=Mock(workload=mnist()), train=Mock())
    return Worker(spec, state, TrainConfig(), Group(), (), sink or Mock(), watchdog)


def test_a_hung_workers_time_limit_is_for_a_step_and_longer_for_the_storage(
    now: list[float], limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[float] = []
    monkeypatch.setattr(Checkpointer, "save", lambda *given: saved.append(limits[-1]))
    state = Mock(step=1, steps_per_epoch=10, epoch=0, scores=[], ends=False, epoch_s=0.1, finished_s=0)
    with Watchdog(600) as watchdog:
        training = worker_of(watchdog)
        for now[0] in (0, 0.01, 9, 20):
            training.on_step(Mock())
        assert limits == [600] * 3  # two steps within a hundredth of a second share one
        training.on_checkpoint(state, Mock(so_far={}, logged={}, examples_per_s=1.0))
    assert (saved, limits[-1]) == ([600 + worker.STORAGE_LIMIT_S], 600)
    limits.clear()
    with Watchdog(0) as watchdog:
        watchdog.heartbeat()
    assert limits == []


def test_each_part_of_a_workers_start_has_a_time_limit(
    few_images: Arrays, run: RunFolder, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SET_EVERY_S", -1)
    monkeypatch.setattr(Worker, "start", Mock(side_effect=StopWantedError))
    workers = WorkerConfig(num_workers=1, hang_timeout_s=600)
    job = Mock(workers=workers, run=run, train=TrainConfig(), workload=mnist(), callbacks=(), initial=None)
    with pytest.raises(StopWantedError):
        worker.train_worker(LoopSpec(job=job, train=Split(few_images)), Group(), Mock(), 1)
    assert limits == [600] * 3, "for the data, the model and the checkpoint"
    assert not torch.backends.cudnn.allow_tf32, "fp32 means fp32"


def test_a_metric_that_a_resumed_runs_checkpoint_does_not_have_is_reported_as_missing() -> None:
    sink, metrics = Mock(), {"epoch": 1, "val_loss": 0.5, "val_score": [-0.5, -0.5], "val_s": 1.0}
    worker_of(Watchdog(0), sink).start(CheckpointMetrics.of(metrics), ())
    (validated,) = [sent.args[0] for sent in sink.send.mock_calls if isinstance(sent.args[0], Validated)]
    assert validated.values["loss"] == 0.5
    assert math.isnan(validated.values["accuracy"])


def saved(run: RunFolder, epoch: int, **metrics: Any) -> RunFolder:
    """Write a checkpoint of a new model at an epoch's end; return its folder."""
    state, folder = create_state(mnist(), TrainConfig(), 600, Group()), run.inside(checkpoint_name(epoch, 0))
    state.epoch = epoch
    checkpoint.snapshot(state, {"workload": mnist().identity, "metrics": metrics}).write(folder)
    return folder


def test_the_newest_whole_checkpoint_is_restored_and_damaged_ones_are_named(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, corrupt, cut, empty = (Path(saved(run, epoch, train_loss=0.5).path) for epoch in (1, 2, 3, 4))
    content = bytearray((corrupt / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (corrupt / "model.safetensors").write_bytes(content)
    text = (cut / "state.json").read_bytes()
    (cut / "state.json").write_bytes(text[: len(text) // 2])
    shutil.rmtree(empty)
    empty.mkdir()
    restored = create_state(mnist(), TrainConfig(), 600, Group())
    listing = Mock(side_effect=[OSError("the link is down"), run.checkpoint_names()])
    monkeypatch.setattr("mnist_ray.storage.time.sleep", lambda seconds: None)
    monkeypatch.setattr(RunFolder, "checkpoint_names", lambda run: listing())
    metrics, skipped = restore_newest(run, restored)
    assert restored.epoch == 1
    assert skipped == (empty.name, cut.name, corrupt.name)
    assert metrics.values == {"train_loss": 0.5}


def test_all_ranks_restore_the_newest_checkpoint_that_rank_0_sees_and_all_can_read(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [saved(run, epoch).name for epoch in (1, 2, 3)]
    state = create_state(mnist(), TrainConfig(), 600, Group())
    Path(run.inside(names[2]).path, "state.json").unlink()
    of_rank_0 = dict(zip(names, [True, True, False], strict=True))  # the last one is cut off
    monkeypatch.setattr("mnist_ray.storage.time.sleep", lambda seconds: None)
    for other_can_read, expected in (([1], 2), ([0, 1], 1)):
        shown, others = iter([False, OSError("the link is down"), True, True]), iter([1, *other_can_read])
        monkeypatch.setattr(RunFolder, "exists", Mock(side_effect=shown))

        def gather(values: list[Any], own: Any, others: Iterator[int] = others) -> None:
            values[:] = [of_rank_0 if isinstance(own, dict) else bool(next(others)), own]

        monkeypatch.setattr("torch.distributed.all_gather_object", gather)
        restore_newest(run, state, (), Group(1, 2))
        assert state.epoch == expected


def test_the_best_two_checkpoints_and_the_last_are_kept_and_a_damaged_one_is_not_the_best(run: RunFolder) -> None:
    run.write_text("config.json", "{}")
    with pytest.raises(UsageError, match=r"run .*/run has no checkpoint yet"):
        find(run.uri, "~/ray_results")
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.6, 6: None}
    for epoch, score in scores.items():
        saved(run, epoch, **({} if score is None else {"val_score": [score, 0.0]}))
        if epoch == 4:
            drop_worse(run, 2)
            assert run.checkpoint_names() == [checkpoint_name(kept, 0) for kept in (2, 3, 4)]
    assert best_of(run).name == checkpoint_name(2, 0)
    run.inside(checkpoint_name(2, 0)).write_text("state.json", "")
    (Path(run.path) / checkpoint_name(7, 0)).mkdir()  # cut off by a kill
    assert best_of(run).name == checkpoint_name(3, 0)
    drop_worse(run, 2)
    assert run.checkpoint_names() == [checkpoint_name(kept, 0) for kept in (2, 3, 5, 6, 7)]
    assert find(run.uri, "~/ray_results").checkpoint.name == checkpoint_name(3, 0)


def test_a_worker_that_hangs_ends_itself_with_its_stack_in_the_log() -> None:
    code = (
        "import time; from mnist_ray.process import Watchdog\n"
        "def hanging(): time.sleep(60)\n"
        "with Watchdog(0.5): hanging()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in hanging" in done.stderr


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error")
OF_RAY = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. If the process was killed by the kernel OOM "
    "killer (verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation via "
    "--enable-resource-isolation to prevent node deaths by resource contention"
)
DIED = "worker 1 died: it hung, was killed (perhaps for lack of memory), lost its node, or called os._exit"
LOST_CONNECTION = "worker 0 has lost its connection to another worker, which has died or hangs"


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ({1: RayActorError(error_msg="The actor died unexpectedly")}, DIED),
        ({0: GLOO, 1: WorkerHealthCheckFailedError("failed", RayActorError(error_msg=OF_RAY))}, DIED),
        ({0: ValueError("bad value\nand more")}, "worker 0 failed: ValueError: bad value"),
        ({0: GLOO, 1: RayActorError()}, DIED),
        ({0: GLOO}, LOST_CONNECTION),
    ],
)
def test_each_failure_of_workers_is_one_line(failures: dict[int, Exception], line: str) -> None:
    assert describe(failures) == line


def test_the_reason_of_a_controllers_failure_is_its_own_text_and_not_a_traceback() -> None:
    failed = RayTaskError("run", "Traceback (most recent call last):\n …", OSError(28, "No space left on device"))
    said = "Ray Train failed: OSError: [Errno 28] No space left on device"
    assert str(failures.error_of(failed.as_instanceof_cause())) == said


def test_the_controllers_process_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, context = Mock(), Mock(current_actor="its actor")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    make, arguments = failures.FailureCallback(queue).__reduce__()  # as Ray sends it to the controller's process
    callback = make(*arguments)
    wait_for(lambda: call(ControllerAlive("its actor")) in queue.put.remote.mock_calls)
    assert type(pickle.loads(pickle.dumps(callback))) is UserCallback  # as the controller sends it to workers


def test_a_diverged_or_stopped_training_returns_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = train_on_a_worker(monkeypatch, Mock(side_effect=TrainingDivergedError(1, 8)))
    said = "loss or weights are not finite at step 8 of epoch 1; lower --learning-rate, scale inputs and targets, or "
    assert str(pickle.loads(pickle.dumps(outcome)).diverged) == f"{said}fix the data"
    assert train_on_a_worker(monkeypatch, Mock(side_effect=StopWantedError))[0] == Outcome(is_stopped=True)
    assert train_on_a_worker(monkeypatch, Mock())[0] == Outcome()


def cuda_error(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")
    error.error_code = code  # type: ignore[attr-defined]
    return error


class Stop(BaseException):
    """Of a user's library."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (Stop(), "Stop: "),
        (SystemExit(3), r"SystemExit: sys\.exit\(3\) "),
        (RuntimeError("cannot read /data/igloo/001.jpg"), "RuntimeError: cannot read /data/igloo"),  # not gloo's
        *[(cuda_error(code), "AcceleratorError: CUDA error: device-side assert triggered ") for code in (35, 209, 710)],
    ],
)
def test_code_that_fails_ends_the_run_in_one_line_with_its_place(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    with pytest.raises(TrainingStoppedError, match=rf"^{said}.*\(test_failures\.py, line \d+\)$"):
        train_on_a_worker(monkeypatch, fail, code_folder=Path(__file__).parent)


def test_a_failure_within_this_package_has_a_place_and_a_lack_of_memory_advice(
    few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        evaluate(mnist(), torch.nn.Linear(3, 10), Split(few_images), TrainConfig())

    with pytest.raises(TrainingStoppedError, match=r"^RuntimeError: .*mat1 and mat2 .* \(step\.py, line \d+\)$"):
        train_on_a_worker(monkeypatch, fail)
    lacking = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    advice = r"^CUDA out of memory. Tried to allocate 2.00 GiB; lower --micro-batch-size or --batch-size, or override"
    with pytest.raises(JobError, match=advice) as raised:
        train_on_a_worker(monkeypatch, Mock(side_effect=lacking))
    assert failures.may_pass(raised.value), "the memory of a dead worker may not be free yet"


@pytest.mark.parametrize(
    ("error", "is_resumable"), [(ExampleError("train example 7 cannot be read"), True), (ValueError(), False)]
)
def test_a_run_can_be_resumed_after_an_example_that_could_not_be_read(
    error: Exception, is_resumable: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_text("config.json", "{}")
    job: Any = Mock(run=run, resume_with="train.py --resume")
    with pytest.raises(TrainingStoppedError) as raised, ending_explained(job):
        train_on_a_worker(monkeypatch, Mock(side_effect=error))
    assert str(raised.value).endswith("; to resume: train.py --resume") == is_resumable


@pytest.mark.parametrize("method", ["create_model", "measure"])
def test_code_that_ends_an_evaluations_process_is_one_line(
    few_images: Arrays, run: RunFolder, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    workload, folder = mnist(), saved(run, 1)
    monkeypatch.setattr(workload, method, Mock(side_effect=SystemExit(3)))
    with pytest.raises(UsageError, match=r"^MNIST, (an evaluation|create_model): SystemExit: sys\.exit\(3\) \("):
        evaluate_here(folder, workload, Split(few_images), 0)


def test_data_that_cannot_be_read_for_a_test_are_no_wrong_usage(run: RunFolder) -> None:
    folder, unreadable = saved(run, 1), MagicMock()
    unreadable.__len__.return_value, unreadable.__getitem__.side_effect = 5, OSError(5, "Input/output error")
    with pytest.raises(JobError, match=r"^MNIST, an evaluation: OSError: .*Input/output error \("):
        evaluate_here(folder, mnist(), Split(unreadable), 0)
    unreadable.__getitem__.side_effect = ValueError("bad")
    with pytest.raises(JobError, match=r"^MNIST, an evaluation: test example 0 cannot be read: ValueError: bad"):
        evaluate_here(folder, mnist(), Split(unreadable, origin="test"), 0)


@pytest.mark.parametrize(
    "error",
    [
        *(GLOO, OSError("the link is down"), torch.distributed.DistBackendError("NCCL error"), RayActorError()),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        *(torch.AcceleratorError("CUDA error: unspecified launch failure"), RuntimeError("CUDA error: ECC error")),
        RuntimeError("DataLoader worker (pid(s) 15904) exited unexpectedly"),
    ],
)
def test_failures_that_may_pass_are_raised_unchanged(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)) as raised:
        train_on_a_worker(monkeypatch, Mock(side_effect=error))
    assert raised.value is error


def test_code_that_fails_ends_a_run_and_other_failures_are_reported() -> None:
    event_queue = Mock()
    reporter = failures.FailureCallback(event_queue)
    with pytest.raises(TrainingStoppedError, match=r"^ValueError: bad \(model\.py, line 55\)$"):
        reporter.after_exception(None, {0: TrainingStoppedError("ValueError: bad (model.py, line 55)")})
    event_queue.put.remote.assert_not_called()
    reporter.after_exception(None, {1: RayActorError(error_msg="The actor died unexpectedly")})
    event_queue.put.remote.assert_called_once_with(WorkersLost(DIED))


def test_a_test_computes_in_fp32_whatever_the_trainings_precision(few_images: Arrays, run: RunFolder) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        folder, config = run.inside(precision), {"precision": precision}
        state = create_state(mnist(), TrainConfig(), 600, Group())
        checkpoint.snapshot(state, {"workload": mnist().identity, "config": config}).write(folder)
        losses.append(evaluate_here(folder, mnist(), Split(few_images), 0).values(mnist())["loss"])
    assert losses == [losses[0]] * 2
