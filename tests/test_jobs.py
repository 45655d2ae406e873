"""Whole jobs on a real Ray, as a user runs them."""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from mnist_ray import cli
from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.plan import Cluster, Node
from mnist_ray.errors import JobError, UsageError
from mnist_ray.report.run_files import read_csv
from tests.conftest import ROOT, Flags, callback_at, folder_at, processes_in, run_and_act, run_job, run_main


def test_a_run_writes_its_files_and_learns(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert result["test_accuracy"] > 0.8
    assert result["num_test_examples"] == sum(map(sum, result["confusion_matrix"])) == 1100
    assert len(result["accuracy_per_class"]) == 10
    assert result["num_workers"] == 2
    seconds = result["seconds"]
    assert seconds.keys() == {"start", "data", "training", "validation", "saving", "evaluation", "total"}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2, abs=0.01)
    assert result["examples_per_s"] > 0
    assert result["versions"]["ray"] == ray.__version__
    rows = read_csv(folder_at(finished_run), "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_accuracy"]) > 0.8
    assert all(row.values() for row in rows)
    config = json.loads((finished_run / "config.json").read_text())
    assert (config["batch_size"], config["num_workers"], config["lr_schedule"]) == (50, 2, "one-cycle")
    state = json.loads((finished_run / result["checkpoint"] / "state.json").read_text())
    assert (state["epoch"], state["config"]["batch_size"]) == (2, 50)


def test_an_evaluation_on_a_gpu_that_is_missing_is_refused(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(is_local=True, nodes=(Node(2),), log_folder="")
    monkeypatch.setattr(Connection, "opened", lambda *given: contextlib.nullcontext(cluster))
    said = "^the cluster cannot hold 1 worker of 1 CPU and 1 GPU: it has 2 CPUs and 0 GPUs on 1 node; .*--use-gpu no$"
    with pytest.raises(UsageError, match=said):
        run_main("evaluate", str(finished_run), "--use-gpu", "yes")


@pytest.mark.parametrize("num_tasks", ["1", "3"])
def test_evaluation_is_the_same_for_any_number_of_tasks(
    finished_run: Path, num_tasks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("evaluate", str(finished_run), "--num-tasks", num_tasks)
    printed, result = capsys.readouterr().out, json.loads((finished_run / "result.json").read_text())
    assert re.search(
        rf"accuracy {result['test_accuracy']:.2%}.*, loss {result['test_loss']:.4f} on 1,100 images", printed
    )
    rows = [line.split() for line in printed.splitlines() if line.strip().endswith("%")]
    counts = [[0 if text == "·" else int(text) for text in row[1:-1]] for row in rows]
    assert counts == result["confusion_matrix"]


def test_a_finished_run_is_neither_overwritten_nor_resumed(finished_run: Path) -> None:
    before = (finished_run / "result.json").read_bytes()
    same = ["--storage-path", str(finished_run.parent), "--run-name", "two"]
    with pytest.raises(UsageError, match="two already exists; add --resume to continue it, or give another --run-"):
        run_main("train", *same)
    with pytest.raises(UsageError, match=f"run two is finished; its result is in {finished_run}/result.json$"):
        run_main("train", *same, "--resume")
    assert (finished_run / "result.json").read_bytes() == before


def test_a_run_that_was_killed_before_its_report_says_how_to_get_one(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(finished_run, killed, ignore=shutil.ignore_patterns("report.html"))
    same = ["--storage-path", str(tmp_path), "--run-name", "killed"]
    with pytest.raises(UsageError, match=f"/result.json; for its report: mnist-ray report {killed}$"):
        run_main("train", *same, "--resume")
    run_main("train", *same, "--resume", "auto")
    assert f"report     to write it: mnist-ray report {killed}\n" in capsys.readouterr().out
    run_main("report", str(killed))
    run_main("train", *same, "--resume", "auto")
    assert "to write it" not in capsys.readouterr().out


@pytest.mark.processes
def test_four_workers_run_on_two_cpus_and_nothing_listens_beyond_loopback(quick: Flags, tmp_path: Path) -> None:
    listening: dict[str, str] = {}

    def look(job: psutil.Process) -> None:
        for process in [job, *job.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # helpers may end meanwhile
                for connection in process.net_connections(kind="inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        listening[f"{process.name()} {connection.laddr.port}"] = connection.laddr.ip

    flags = quick(num_workers=4, num_epochs=1, batch_size=6)
    printed, complained = run_and_act({"started": look}, *flags, address="local")
    assert complained == ""
    assert sum(name.startswith("ray::RayTrainWo") for name in listening) >= 4
    assert set(listening.values()) <= {"127.0.0.1", "::ffff:127.0.0.1"}, listening
    lines = [line.split("  ")[0].strip() for line in printed.splitlines()]
    assert [label for label in lines if label][:8] == [
        "run", "data", "training", "settings", "results", "model", "workers", "started",
    ]  # fmt: skip
    assert "started    4 × cpu with 1 thread, fp32" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["num_workers"] == 4
    assert result["workers"].startswith("4 × cpu with 1 thread, fp32 (")


@pytest.mark.long  # Ray forwards what workers print with a delay, so the run must last
def test_verbose_shows_what_a_callback_prints_once_and_no_complaint_of_ray(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jobs that earlier tests ran in this process have set it; the job would inherit it and show no lines of workers.
    monkeypatch.delenv("RAY_DEDUP_LOGS_SKIP_REGEX", raising=False)
    printing = 'print("epoch", progress.epoch, "is over")'
    callback = callback_at(tmp_path / "prints.py", "on_epoch(self, state, progress)", printing)
    done = run_job("train.py", *quick(callback=callback, num_epochs=40), "--verbose")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert [shown.count(f"epoch {epoch} is over") for epoch in (1, 2)] == [1, 1]  # not the last ones
    assert "Reporting training result" in shown
    assert "no key: val_score" not in shown


@pytest.fixture
def ctrl_c() -> Callable[[psutil.Process], None]:
    """Interrupt a job. Children of this process would inherit an ignored SIGINT, as in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return lambda job: job.send_signal(signal.SIGINT)


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files of a job and its Ray; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        for name in ("RAY_TMPDIR", "TMPDIR"):
            monkeypatch.setenv(name, folder)
        yield Path(folder)


TO_RESUME = "to resume: python jobs/train.py --resume --run-name run --storage-path {storage}"
PHASES = {  # by the line that begins them: what the job says of the run
    "run ": "nothing is saved yet: start again",
    "results": "nothing is saved yet: start again",
    "started": TO_RESUME,
    "epoch 2/": TO_RESUME,
    "test ": "the run is finished: {storage}/run/result.json",
}
QUICK_CASES = [(signal.SIGHUP, os.killpg, "results"), (signal.SIGTERM, os.killpg, "started")]
LONG_CASES = [
    (number, send, when)
    for number, send in itertools.product((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), (os.kill, os.killpg))
    for when in PHASES
    if (number, send, when) not in QUICK_CASES
]


@pytest.mark.processes
@pytest.mark.usefixtures("ctrl_c")  # which this test's children would ignore otherwise
@pytest.mark.parametrize(
    ("number", "send", "when"), [*QUICK_CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_CASES)]
)
def test_a_signal_in_any_phase_ends_a_job_like_an_interrupt_and_leaves_no_process(
    number: signal.Signals, send: Callable[[int, int], None], when: str, quick: Flags, tmp_path: Path, own_folder: Path
) -> None:
    flags = quick() if when == "test " else quick(num_epochs=500)
    _, errors = run_and_act({when: lambda job: send(job.pid, number)}, *flags, address="local", status=130)
    assert errors == f"interrupted; {PHASES[when]}\n".format(storage=tmp_path)
    assert bool(list(tmp_path.glob("run/checkpoint_epoch-*"))) == (PHASES[when] != PHASES["results"])
    assert not list(tmp_path.glob(".*"))
    assert_nothing_left(own_folder)


def assert_nothing_left(folder: Path) -> None:
    """Check that a job and its Ray, with their temporary files in a folder, have left no process and no file."""
    psutil.wait_procs(processes_in(folder), timeout=30)
    assert processes_in(folder) == []
    assert not list(folder.glob("ray/*"))
    assert not [*folder.glob("mnist_ray-*"), *folder.glob("ray_fork-*")]


@pytest.mark.processes
def test_an_evaluation_ends_the_ray_that_it_has_started(own_folder: Path, finished_run: Path) -> None:
    assert run_job("evaluate.py", str(finished_run)).returncode == 0
    assert_nothing_left(own_folder)


FAILS_LATE = """
import time
from mnist_ray.mnist import MNIST
class Late(MNIST):
    def create_model(self):
        time.sleep(1.0)  # Ray starts meanwhile
        raise RuntimeError("no model")
"""


@pytest.mark.processes
def test_an_error_in_a_workload_ends_the_start_of_ray(own_folder: Path, quick: Flags, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(FAILS_LATE)
    printed, errors = run_and_act({}, *quick(workload=tmp_path / "late.py"), address="local", status=2)
    assert errors == "error: Late, create_model: RuntimeError: no model (late.py, line 7)\n"
    assert printed.splitlines()[-1].startswith("results"), "the error is the first line after the header"
    assert_nothing_left(own_folder)


@pytest.mark.processes
def test_a_run_is_in_use_until_it_is_interrupted_saves_its_steps_and_resumes(
    quick: Flags,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_address: str,
    ctrl_c: Callable[[psutil.Process], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    go = tmp_path_factory.mktemp("code") / "slow.py.go"  # until it exists, an epoch takes longer than the test
    slow = callback_at(
        go.with_suffix(""), "on_step(self, state)", "time.sleep(0 if os.path.exists(__file__ + '.go') else 0.1)"
    )
    flags = quick(num_workers=2, checkpoint_every=10**6, batch_size=2, limit=0.5, num_epochs=1, callback=slow)
    command = f"python jobs/train.py --resume --run-name run --storage-path {tmp_path}"

    def want_too_and_interrupt(job: psutil.Process) -> None:
        with pytest.raises(UsageError, match=r"run is in use by another job: process \d+ on .+/\.run\.owner$"):
            run_main("train", *command.split()[2:])
        ctrl_c(job)

    _, errors = run_and_act({"started": want_too_and_interrupt}, *flags, address=ray_address, status=130)
    assert errors == f"interrupted; to resume: {command}\n"
    (saved,) = (tmp_path / "run").glob("checkpoint_epoch*")
    step = int(saved.name.removeprefix("checkpoint_epoch-000_step-"))
    assert step > 0
    with pytest.raises(UsageError, match="run run was started with --batch-size 2, not 51"):
        run_main("train", *command.split()[2:], "--batch-size", "51")
    go.touch()
    run_main("train", *command.split()[2:])
    assert f"continuing in epoch 1 after step {step:,}" in capsys.readouterr().out
    assert [row["epoch"] for row in read_csv(folder_at(tmp_path / "run"), "metrics.csv")] == ["1"]


@pytest.mark.usefixtures("ray_address")
def test_a_loss_that_becomes_nan_ends_the_run_in_one_line(quick: Flags) -> None:
    said = r"^loss or weights are not finite at step 2 of epoch 1; lower --learning-rate.*$"
    with pytest.raises(JobError, match=said) as raised:
        run_main("train", *quick(learning_rate=1e20))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "8"], "unrecognized arguments: --batch 8"),
        (["--config", "/nowhere.json"], "cannot read the settings file /nowhere.json: No such file or directory"),
        (["--resume", "--run-name", "ghost"], "--resume: there is no run"),
        (["--reproducible", "--num-workers", "9"], "--reproducible: 9 workers cannot share the 8 chunks of a batch"),
        (["--init-from", "nowhere"], "--init-from nowhere: there is no such run, checkpoint or file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(
    flags: list[str], message: str, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("train", "--storage-path", str(tmp_path), *flags) == 2
    said = capsys.readouterr().err
    assert (message in said, said.count("\n")) == (True, 1), said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "address", "status", "message"),
    [
        (["--num-workers", "4000"], None, 2, "4,000 CPUs for the workers are too many for this machine's"),
        ([], "127.0.0.1:1", 1, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1; unset it to start a local Ray"),
        ([], "http://me:secret@127.0.0.1:8265", 2, "RAY_ADDRESS is not HOST:PORT; for a dashboard's address, use ray"),
    ],
)
def test_a_mistake_ends_a_process_with_one_line(
    flags: list[str], address: str | None, status: int, message: str, tmp_path: Path
) -> None:
    done = run_job("train.py", "--storage-path", str(tmp_path), *flags, address=address)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stdout


def status_of(job: str, *flags: str) -> int:
    """Run a job in this process; return its exit status."""
    try:
        return cli.status_of(functools.partial(run_main, job, *flags))
    except SystemExit as end:  # argparse found a mistake
        return int(end.code or 0)


@pytest.mark.long
def test_workers_that_die_at_once_end_a_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('default_worker.py' in word for word in sys.orig_argv):\n"
        "    print('no room', file=sys.stderr, flush=True)\n"
        "    os._exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--set", "fork_workers=no", "--storage-path", str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = r"error: Ray's worker processes do not start; a worker's last line: no room \(log: \S+/raylet\.err\)\n"
    assert re.fullmatch(said, done.stderr)


def test_json_is_the_only_thing_on_stdout(
    tmp_path: Path, small_data: Path, ray_address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "chatty.py"
    code.write_text(
        "import os\nfrom mnist_ray.mnist.problem import MNIST\nos.system('echo loaded')\nclass Chatty(MNIST): pass\n"
    )
    where = ["--storage-path", str(tmp_path), "--workload", str(code), "--json"]
    run_main("train", *where, "--data-dir", str(small_data), "--run-name", "run", "--num-workers", "0")
    said = capfd.readouterr()
    result = json.loads(said.out)
    assert result == {"run": str(tmp_path / "run"), **json.loads((tmp_path / "run" / "result.json").read_text())}
    assert result["format_version"] == 2
    assert ("loaded\n" in said.err, "\ntest       accuracy " in said.err) == (True, True)
    run_main("evaluate", "run", *where)
    assert json.loads(capfd.readouterr().out)["test_loss"] == result["test_loss"]
