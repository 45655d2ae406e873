"""Whole sweeps on a real Ray, on few images."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlflow
import pytest

from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.remote_data import share
from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.run.job import Job
from mnist_ray.storage import locate
from mnist_ray.sweep.options import Sweep, load_data, read_sweep
from mnist_ray.sweep.search import chosen_before
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.workload import source
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Arrays, Split
from tests.conftest import ROOT, as_flags, mnist, run_job, run_main, write_data_set
from tests.sweep.test_space import point
from tests.test_jobs import assert_one_line_error
from tests.training.test_debug import BROKEN

QUICK: dict[str, Any] = {
    "precision": "fp32",
    "validation_size": 600,
    "sweep": ["batch_size=32,64", "learning_rate=log:5e-4:2e-2"],
    "scheduler": "none",
    "num_confirmed": 0,
}


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def flags_of(values: dict[str, Any]) -> list[str]:
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    plain = as_flags({name: value for name, value in values.items() if name not in lists})
    return plain + [text for name in lists for text in (f"--{name.replace('_', '-')}", *map(str, lists[name]))]


def tune(values: dict[str, Any]) -> None:
    run_main("tune", *flags_of(values))


def propose_only(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr("mnist_ray.sweep.tuner.propose", lambda space, sweep, seed: list(points))


@pytest.fixture
def trials_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trainings after the sweep, where a test is about trials."""
    monkeypatch.setattr("mnist_ray.sweep.search.train_chosen", lambda *args: None)


@pytest.fixture(scope="module")
def finished_sweep(ray_address: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random trials of one worker and two epochs."""
    storage = tmp_path_factory.mktemp("sweeps")
    where = {"data_dir": str(small_data), "storage_path": str(storage), "run_name": "four"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(storage)  # where MLflow puts files
        tune({**QUICK, **where, "num_trials": 4, "mlflow": f"sqlite:///{storage}/mlflow.db"})
    return storage / "four"


def test_a_sweep_leaves_its_files(finished_sweep: Path) -> None:
    trials = rows(finished_sweep)
    assert [(row["trial"], row["state"], row["epochs"]) for row in trials] == [
        (str(number), "done", "2.0") for number in (1, 2, 3, 4)
    ]
    best = max(trials, key=lambda row: float(row["val_accuracy"]))
    chosen = json.loads((finished_sweep / "best.json").read_text())
    assert (chosen["batch_size"], chosen["learning_rate"]) == (int(best["batch_size"]), float(best["learning_rate"]))
    assert json.loads((finished_sweep / "result.json").read_text())["test_accuracy"] > 0.8
    assert json.loads((finished_sweep / "config.json").read_text())["cpus_per_worker"] is None  # a trial's is 1
    assert (finished_sweep / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not (finished_sweep / "tune").exists()


def test_mlflow_has_a_sweeps_trials_within_its_run(finished_sweep: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{finished_sweep.parent}/mlflow.db")
    runs = {run.info.run_name: run for run in mlflow.search_runs(experiment_names=["mnist_ray"], output_format="list")}
    sweep, trials = runs.pop("four"), rows(finished_sweep)
    assert set(runs) - {"default"} == {f"trial {row['trial']}" for row in trials}  # no default where it is the best
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {sweep.info.run_id}
    assert {run.info.status for run in [sweep, *runs.values()]} == {"FINISHED"}
    assert (sweep.data.params["num_trials"], sweep.data.params["num_epochs"]) == ("4", "2")
    for row in trials:
        trial = runs[f"trial {row['trial']}"].data
        assert (trial.params["learning_rate"], trial.tags["state"]) == (row["learning_rate"], "done")
        assert trial.metrics["val_accuracy"] == float(row["val_accuracy"])


def test_only_the_best_trials_checkpoint_is_kept(finished_sweep: Path) -> None:
    best = json.loads((finished_sweep / "best.json").read_text())
    folders = [path.name for path in (finished_sweep / "trials").iterdir()]
    assert folders == [f"batch_size-{best['batch_size']}_learning_rate-{best['learning_rate']!r}_seed-0"]
    assert len(list((finished_sweep / "trials" / folders[0]).iterdir())) == 1


def test_a_confirmed_sweep_keeps_the_best_checkpoint_of_the_configuration_that_it_chose(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose_only(monkeypatch, point(50, 3e-3), point(50, 2e-3))
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "sure"}
    tune({**QUICK, **where, "num_epochs": 1, "num_confirmed": 2})
    trials = rows(tmp_path / "sure")
    assert [row["state"] for row in trials] == ["done"] * 6
    rate = str(json.loads((tmp_path / "sure" / "best.json").read_text())["learning_rate"])
    best = max((row for row in trials if row["learning_rate"] == rate), key=lambda row: float(row["val_accuracy"]))
    (kept,) = (tmp_path / "sure" / "trials").iterdir()
    assert kept.name == f"batch_size-50_learning_rate-{rate}_seed-{best['seed']}"


def sweep_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    flags = ["--resume", "--run-name", folder.name, "--storage-path", str(folder.parent)]
    monkeypatch.setattr("sys.argv", ["jobs/tune.py", *flags])
    return read_sweep()


def test_a_sweep_that_has_chosen_tries_nothing_more_when_it_is_resumed(
    finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_sweep, tmp_path / "chosen")
    (tmp_path / "chosen" / "result.json").unlink()  # as if it had been killed in the last training
    sweep = sweep_of(tmp_path / "chosen", monkeypatch)
    table = chosen_before(sweep)
    assert table is not None
    assert len(table.by_point) == 4
    (tmp_path / "chosen" / "best.json").unlink()
    assert chosen_before(sweep) is None


def test_a_sweep_that_has_lost_its_trials_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = locate(str(tmp_path), "lost")
    run.write_text("sweep.json", '{"num_epochs": 1}')
    assert sweep_of(tmp_path / "lost", monkeypatch).job.notes == ("run lost has saved nothing: it begins anew",)
    run.write_text("sweep.csv", "trial\n1\n")
    with pytest.raises(JobError, match=r"sweep\.csv is damaged: .*; remove it, and the trials are run again"):
        sweep_of(tmp_path / "lost", monkeypatch)
    run.write_text("best.json", "{}")
    chosen = r"train what was chosen with python jobs/train\.py --config .*/lost/best\.json, or start another sweep"
    with pytest.raises(JobError, match=r"sweep\.csv is damaged: .*; " + chosen):
        sweep_of(tmp_path / "lost", monkeypatch)
    run.delete_file("sweep.csv")
    with pytest.raises(JobError, match=r"sweep\.csv has lost its trials; " + chosen):
        sweep_of(tmp_path / "lost", monkeypatch)
    run.write_text("sweep.json", "[]")
    with pytest.raises(JobError, match=r"sweep\.json is damaged: .*; put it back, or start another run"):
        sweep_of(tmp_path / "lost", monkeypatch)


def test_the_training_job_reproduces_the_best_trial(finished_sweep: Path, ray_address: str, tmp_path: Path) -> None:
    flags = ["--config", str(finished_sweep / "best.json"), "--storage-path", str(tmp_path), "--run-name", "again"]
    done = run_job("train.py", *flags, "--num-workers", "1", "--cpus-per-worker", "1", address=ray_address)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "again" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    best = max(rows(finished_sweep), key=lambda row: float(row["val_accuracy"]))
    assert float(last["val_accuracy"]) == float(best["val_accuracy"])
    assert float(last["train_loss"]) == pytest.approx(float(best["train_loss"]), rel=1e-9)


def test_a_trial_killed_after_its_last_checkpoint_reports_it_again(
    ray_address: str, few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, float]] = []
    watch = Mock()
    monkeypatch.setattr("ray.tune.report", reported.append)
    monkeypatch.setattr("mnist_ray.run.worker.end_if_hung", watch)
    plan, folder = WorkerPlan(1, 1, use_gpu=False, must_scale_up=False), locate(str(tmp_path), "trials")
    config, workers = TrainConfig(precision="fp32"), WorkerConfig(hang_timeout_s=60)
    job = Job(mnist(), config, workers, OutputConfig(), folder, "")
    part = Split(few_images)
    spec = TrialSpec(job, share(mnist(), part), share(mnist(), part), plan, folder)
    for _ in range(2):
        run_trial({"batch_size": 60, "learning_rate": 1e-3, "seed": 0}, spec)
    assert [metrics["epochs"] for metrics in reported] == [1.0, 2.0, 2.0]
    assert reported[2] == reported[1]
    assert watch.call_count > 2  # where each run begins, and as it goes
    assert {call.args for call in watch.call_args_list} == {(60,)}


def reported_by_a_trial(
    workload: Workload, output: OutputConfig, examples: Arrays, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Return what a trial of one worker reports, which is done in this process."""
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    plan, folder = WorkerPlan(1, 1, use_gpu=False, must_scale_up=False), locate(str(storage), "trials")
    job = Job(workload, TrainConfig(precision="fp32"), WorkerConfig(), output, folder, "")
    part = share(workload, Split(examples))
    run_trial({"batch_size": 60, "learning_rate": 1e-3, "seed": 0}, TrialSpec(job, part, part, plan, folder))
    return reported


def test_a_trial_is_profiled(
    ray_address: str, few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(reported_by_a_trial(mnist(), OutputConfig(profile=3), few_images, tmp_path, monkeypatch)) == 2
    (operators,) = tmp_path.rglob("operators.json")
    assert json.loads(operators.read_text())["steps"] == 3


def test_a_trial_names_the_line_of_its_first_anomaly(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_trial.py").write_text(BROKEN)
    workload = source.load(str(tmp_path / "broken_trial.py"))(metadata={"class_names": [0, 1]})
    examples, output = workload.load_data().train, OutputConfig(detect_anomaly=True)
    assert isinstance(examples, Arrays)
    (report,) = reported_by_a_trial(workload, output, examples, tmp_path, monkeypatch)
    assert "MulBackward0" in report["reason"]
    assert "broken_trial.py, line 16" in report["reason"]


def test_trials_of_two_workers_report_to_the_sweep(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "two"}
    tune({**QUICK, **where, "num_trials": 2, "num_workers": 2, "num_epochs": 1})
    trials = rows(tmp_path / "two")
    assert [(row["state"], row["epochs"]) for row in trials] == [("done", "1.0")] * 2
    assert all(0 < float(row["val_accuracy"]) <= 1 for row in trials)


def test_asha_stops_a_hopeless_trial_before_its_last_epoch(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [point(32, 3e-3), point(32, 2e-3), point(32, 10.0)]
    propose_only(monkeypatch, *points[:2])
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "asha"}
    tune({**QUICK, **where, "scheduler": "asha", "num_epochs": 4, "max_concurrent_trials": 1})
    # As if it had been interrupted before the third trial: the first two are what that one is compared with.
    (tmp_path / "asha" / "best.json").unlink()
    propose_only(monkeypatch, *points)
    run_main("tune", "--resume", "--run-name", "asha", "--storage-path", str(tmp_path))
    hopeless = next(row for row in rows(tmp_path / "asha") if row["learning_rate"] == "10.0")
    assert hopeless["state"] == "stopped early"
    assert float(hopeless["epochs"]) < 4
    assert sum(row["state"] == "done" for row in rows(tmp_path / "asha")) >= 1


def test_a_trial_that_fails_keeps_its_reason_and_the_sweep_goes_on(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [point(50, 1e20), point(50, 3e-3)]
    propose_only(monkeypatch, *points)
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "fail"}
    tune({**QUICK, **where, "num_epochs": 1, "max_concurrent_trials": 1})
    failed, done = rows(tmp_path / "fail")
    assert (failed["state"], done["state"]) == ("failed", "done")
    assert "loss or weights are not finite at step 2 of epoch 1" in failed["reason"]


DYING = """
import os, pathlib, signal
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Data, Regression

class Dying(Regression):
    def load_data(self):
        inputs = np.random.default_rng(0).random((400, 3), dtype=np.float32)
        data = Arrays(inputs, inputs.sum(1))
        return Data(data, data)

    def create_model(self):
        if pathlib.Path(__file__).with_name("deadly").exists() and "RAY_RAYLET_PID" in os.environ:  # not in the driver
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.Linear(3, 1)
"""


def test_a_trial_whose_process_dies_is_lost_and_tried_again_by_a_resumed_sweep(
    trials_only: None, ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "deadly").touch()
    flags = {**QUICK, "validation_size": 100, "num_trials": 1, "num_epochs": 1, "max_failures": 1}
    flags |= {"workload": tmp_path / "dying.py", "storage_path": tmp_path / "runs", "run_name": "lost"}
    with pytest.raises(JobError, match=r"; to try again those that were lost: python jobs/tune\.py --resume"):
        tune(flags)
    assert [row["state"] for row in rows(tmp_path / "runs" / "lost")] == ["lost"]
    (tmp_path / "deadly").unlink()
    run_main("tune", "--resume", "--run-name", "lost", "--storage-path", str(tmp_path / "runs"))
    assert [row["state"] for row in rows(tmp_path / "runs" / "lost")] == ["done"]


def test_a_killed_sweep_goes_on_without_repeating_finished_trials(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**QUICK, "data_dir": small_data, "storage_path": tmp_path, "run_name": "kill", "num_trials": 5}
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "tune.py"), *flags_of(flags), "--max-concurrent-trials", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ray_address},
    )
    assert job.stdout
    lines = (line for line in job.stdout if line.startswith("trial "))
    for _ in range(2):
        next(lines)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = [row for row in rows(tmp_path / "kill") if row["state"] == "done"]
    assert len(before) >= 2
    began_with = json.loads((tmp_path / "kill" / "origin.json").read_text())["data"]
    assert began_with.keys() == {"training", "validation", "test"}

    command = ["--resume", "--run-name", "kill", "--storage-path", str(tmp_path)]
    refused = run_job("tune.py", *command, "--num-trials", "6", address=ray_address)
    assert_one_line_error(refused, 2, "run kill was started with --num-trials 5, not 6")
    run_main("tune", *command)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ") and ", seed " in line]
    after = rows(tmp_path / "kill")
    assert after[: len(before)] == before
    assert (len(after), len(printed)) == (5, 5 - len(before))


def test_optuna_proposes(trials_only: None, ray_address: str, small_data: Path, tmp_path: Path) -> None:
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "optuna"}
    tune({**QUICK, **where, "search": "optuna", "num_trials": 3, "num_epochs": 1})
    trials = rows(tmp_path / "optuna")
    assert [row["state"] for row in trials] == ["done"] * 3
    assert {row["batch_size"] for row in trials} <= {"32", "64"}


def test_every_trial_failing_ends_the_job_with_the_first_reason(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    hopeless = {"num_trials": 1, "sweep": ["learning_rate=1e19:1e20"]}
    flags = {**QUICK, "data_dir": small_data, "storage_path": tmp_path, **hopeless}
    failed = run_job("tune.py", *flags_of(flags), address=ray_address)
    assert_one_line_error(failed, 1, "every trial failed; the first one: TrainingDivergedError: loss or weights")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep"], "argument --sweep: expected at least one argument"),
        (["--sweep", "batch_size=60000"], "--sweep: batch size 60,000 is larger than the 55,000 images to train on"),
        (["--sweep", "batch_size=8", "--batch-size", "9"], "--sweep searches batch_size: say once how"),
        (["--num-trials", "0"], "--num-trials must be at least 1, not 0"),
        (["--batch-size", "8", "--learning-rate", "0.1"], "nothing to search: name settings of MNIST by --sweep"),
        (["--validation-size", "0"], "a sweep chooses by validation accuracy"),
        (
            ["--search", "grid", "--num-trials", "2"],
            "--search grid needs a trial for each of the 5 choices of batch_size",
        ),
        (["--resume", "--run-name", "ghost"], "--resume: there is no run"),
        (["--time-budget-s", "0"], "--time-budget-s must be a positive number"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(flags: list[str], message: str, tmp_path: Path) -> None:
    done = run_job("tune.py", "--storage-path", str(tmp_path), *flags)
    assert_one_line_error(done, 2, message)
    assert not any(tmp_path.iterdir())


def test_fewer_images_than_the_defaults_batch_can_be_searched(
    few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BegunError(Exception):
        pass

    monkeypatch.setattr("mnist_ray.cluster.connect.connect", Mock(side_effect=BegunError))
    tiny = Arrays(few_images.inputs[:100], few_images.targets[:100])
    flags = {"data_dir": str(write_data_set(tmp_path / "tiny", tiny, tiny)), "storage_path": str(tmp_path)}
    with pytest.raises(BegunError):
        tune({**flags, "validation_size": 20, "sweep": ["batch_size=8,16"]})


def test_a_time_budget_ends_a_sweep_that_would_go_on(
    trials_only: None, ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    where = {"data_dir": str(small_data), "storage_path": str(tmp_path), "run_name": "budget"}
    with contextlib.suppress(JobError):  # where the machine was too slow to validate a trial in that time
        tune({**QUICK, **where, "num_trials": 2, "num_epochs": 1_000_000, "time_budget_s": 5.0})
    if (tmp_path / "budget" / "sweep.csv").exists():  # else it was too slow to start one
        assert all(float(row["epochs"]) < 1_000_000 for row in rows(tmp_path / "budget"))


NOISY = """
from dataclasses import dataclass

import numpy as np
from torch import nn

from mnist_ray.workload import Arrays, Classification, Data, setting


@dataclass(frozen=True)
class Settings:
    noise: float = setting(0.0, "of the inputs", decides_data=True)
    width: int = setting(2, "of the network")


class Noisy(Classification):
    Settings = Settings

    def load_data(self):
        inputs = np.random.default_rng(0).normal(self.settings.noise, size=(600, 2)).astype(np.float32)
        arrays = Arrays(inputs, (inputs[:, 0] > 0).astype(np.int64))
        return Data(arrays, arrays)

    def create_model(self):
        return nn.Sequential(nn.Linear(2, self.settings.width), nn.Linear(self.settings.width, 2))
"""


def test_a_setting_that_the_data_go_by_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "noisy.py"
    file.write_text(NOISY)
    monkeypatch.setattr("sys.argv", ["tune.py", "--workload", str(file), "--sweep", "width=2,4"])
    sweep, _ = load_data(read_sweep())
    assert list(sweep.space.spaces) == ["width"]
    monkeypatch.setattr("sys.argv", [*sys.argv, "noise=0,1"])
    with pytest.raises(UsageError, match=r"^--sweep noise: load_data goes by it, and all trials have the same data$"):
        load_data(read_sweep())
