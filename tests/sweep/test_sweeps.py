"""Whole sweeps on a real Ray, on few images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import psutil
import pytest
import ray
import torch
from torch import nn

from mnist_ray.checkpoints.state_file import digest_of
from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.cluster.remote_data import share
from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.data.data import Split, Splits
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError
from mnist_ray.job.job import Job
from mnist_ray.job.job_data import load_splits
from mnist_ray.job.session import Session
from mnist_ray.mnist import MNIST
from mnist_ray.report.run_files import read_csv
from mnist_ray.run.life import STORAGE_LIMIT_S
from mnist_ray.settings import json_lines, values_of
from mnist_ray.storage import RunFolder, locate
from mnist_ray.sweep import search
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.sweep.trials import Sweep, TrialRecord, TrialTable
from mnist_ray.sweep.tune import SweepConsole, check_sweep, read_sweep, say_sweep
from mnist_ray.sweep.tune import tune as tune_sweep
from mnist_ray.workload import Arrays, Data, Regression, Workload, setting
from tests.conftest import ROOT, as_flags, callback_at, folder_at, mnist, run_main, write_data_set

QUICK: dict[str, Any] = {
    "precision": "fp32",
    "validation_size": 100,
    "sweep": ["batch_size=32,64", "learning_rate=log:5e-4:2e-2"],
    "scheduler": "none",
    "num_confirmed": 0,
}


@pytest.fixture(scope="module")
def data_dir(mnist_test: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images to train on, 100 to validate on, 200 to test."""
    train = Arrays(mnist_test.inputs[:700], mnist_test.targets[:700])
    test = Arrays(mnist_test.inputs[700:900], mnist_test.targets[700:900])
    return write_data_set(tmp_path_factory.mktemp("few"), train, test)


@pytest.fixture
def where(data_dir: Path, ray_address: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a quick sweep into ``tmp_path / "run"``."""
    return {**QUICK, "data_dir": str(data_dir), "storage_path": str(tmp_path), "run_name": "run"}


def rows(run: Path) -> list[dict[str, str]]:
    return read_csv(folder_at(run), "sweep.csv")


def rates(*learning_rates: float) -> dict[str, Any]:
    """Return settings of a sweep that tries these learning rates in this order, one at a time."""
    limits = {"num_trials": len(learning_rates), "max_concurrent_trials": 1}
    return {"search_algorithm": "grid", "sweep": [f"learning_rate={','.join(map(str, learning_rates))}"], **limits}


def tune(settings: dict[str, Any]) -> None:
    tune_sweep(read_sweep(settings))


def with_data(sweep: Sweep) -> tuple[Sweep, Splits]:
    """Return a sweep, as it runs on its data, and the data."""
    data = load_splits(sweep.job)
    return check_sweep(sweep, data), data


def resume(run: Path, **settings: Any) -> None:
    tune({"resume": True, "run_name": run.name, "storage_path": str(run.parent), **settings})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Skip the trainings after the sweep; holds their calls."""
    train_and_test = Mock(return_value=0.5)
    monkeypatch.setattr("mnist_ray.sweep.search.train_and_test", train_and_test)
    return train_and_test


FOLLOWED = """
from mnist_ray.trackers import Tracker
from mnist_ray.training.events import TrialEnded

class Followed(Tracker):
    follows_trials = True

    def log(self, event):
        if isinstance(event, TrialEnded):
            self.run.write_text(f"followed-{event.number}", repr((event.settings, event.state, event.has_failed)))
"""


@pytest.fixture(scope="module")
def finished_sweep(ray_address: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random trials of one worker and two epochs."""
    storage = tmp_path_factory.mktemp("sweeps")
    where = {"data_dir": str(data_dir), "storage_path": str(storage), "run_name": "four"}
    (storage / "followed.py").write_text(FOLLOWED)
    tune({**QUICK, **where, "num_trials": 4, "tracker": str(storage / "followed.py")})
    return storage / "four"


def test_a_sweep_leaves_its_files(finished_sweep: Path) -> None:
    trials = rows(finished_sweep)
    assert [(row["trial"], row["state"], row["epochs"]) for row in trials] == [
        (str(number), "done", "2.0") for number in (1, 2, 3, 4)
    ]
    best = max(trials, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    chosen = json.loads((finished_sweep / "best.json").read_text())
    assert (chosen["batch_size"], chosen["learning_rate"]) == (int(best["batch_size"]), float(best["learning_rate"]))
    assert json.loads((finished_sweep / "result.json").read_text())["test_accuracy"] > 0.4
    assert json.loads((finished_sweep / "config.json").read_text())["cpus_per_worker"] is None  # a trial's is 1
    assert (finished_sweep / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not (finished_sweep / "tune").exists()
    (kept,) = (finished_sweep / "trials").iterdir()
    assert kept.name == f"batch_size-{best['batch_size']}_learning_rate-{best['learning_rate']}_seed-0"
    assert len(list(kept.iterdir())) == 1


def test_trackers_that_follow_trials_get_each(finished_sweep: Path) -> None:
    for row in rows(finished_sweep):
        settings = {"batch_size": int(row["batch_size"]), "learning_rate": float(row["learning_rate"])}
        followed = (finished_sweep / f"followed-{row['trial']}").read_text()
        assert followed == repr(({**settings, "seed": 0}, "done", False))


def test_a_resumed_sweep_that_has_chosen_only_finishes_the_trainings(
    finished_sweep: Path, tmp_path: Path, trained: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_sweep, tmp_path / "chosen")
    (tmp_path / "chosen" / "result.json").unlink()  # as if it had been killed in the last training
    monkeypatch.setattr("mnist_ray.sweep.search.run_sweep", pytest.fail)
    before = (tmp_path / "chosen" / "best.json").read_text()
    resume(tmp_path / "chosen")
    assert [call.args[1].run.name for call in trained.call_args_list] == ["chosen"]
    assert (tmp_path / "chosen" / "best.json").read_text() == before


def test_a_confirmed_sweep_keeps_the_checkpoint_of_its_choice_and_the_reason_of_a_failure(
    trained: Mock, where: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune({**where, **rates(1e20, 3e-3, 2e-5), "num_epochs": 1, "num_confirmed": 2})
    said = capsys.readouterr().out
    failed, *done = rows(tmp_path / "run")
    assert said.count(" done, 1 failed") == len(done) + 1
    assert failed["state"] == "failed"
    assert "loss or weights are not finite at step 2 of epoch 1" in failed["reason"]
    assert {row["state"] for row in done} == {"done"}
    assert {(row["learning_rate"], row["seed"]) for row in done[:4]} == {
        (rate, seed) for rate in ("0.003", "2e-05") for seed in "01"
    }
    assert json.loads((tmp_path / "run" / "best.json").read_text())["learning_rate"] == 0.003
    assert [kept.name for kept in (tmp_path / "run" / "trials").iterdir()] == ["learning_rate-0.003_seed-0"]


def test_a_default_that_cannot_be_trained_is_a_note_and_the_best_is_trained(
    trained: Mock, where: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trained.side_effect = [TrainingStoppedError("loss or weights are not finite"), 0.5]
    tune({**where, **rates(3e-3), "num_epochs": 1})
    assert [call.args[1].run.name for call in trained.call_args_list] == ["default", "run"]
    *_, note, _, best, _, result = capsys.readouterr().out.splitlines()
    assert note == "note       the default cannot be trained: loss or weights are not finite"
    assert best == "best       learning rate 0.003"
    assert result == "best       50.00% on the test set with learning rate 0.003"


def test_nodes_that_are_missing_for_the_last_trainings_are_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnist_ray.run.fit.plan", Mock(side_effect=UsageError("the cluster cannot hold 2 workers")))
    session = Session(Mock(), Mock(), Mock(), Mock(), Mock(), Cluster(True, (), ""), Mock(), own_unused=None)
    with pytest.raises(JobError, match=r"^the cluster cannot hold 2 workers$"):
        search.train_and_test(session, Mock(), Mock(), None, is_last=True)


def test_trials_of_two_workers_start_from_given_weights_and_report_to_the_sweep(
    finished_sweep: Path, trained: Mock, where: dict[str, Any], tmp_path: Path
) -> None:
    same = {"sweep": ["batch_size=32"], "learning_rate": 1e-30, "init_from": str(finished_sweep)}
    tune({**where, **same, "num_trials": 1, "num_workers": 2, "num_epochs": 1})
    (trial,) = rows(tmp_path / "run")
    assert (trial["state"], trial["epochs"]) == ("done", "1.0")
    before = json.loads((finished_sweep / "result.json").read_text())["checkpoint_metrics"]
    assert float(trial["val_accuracy"]) == before["val_accuracy"]


ONE = {"num_workers": 1, "cpus_per_worker": 1}


@pytest.fixture(scope="module")
def halved(ray_address: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by halving of six random trials, with the workers of a trial also for the training at the end."""
    where = {"data_dir": str(data_dir), "storage_path": str(tmp_path_factory.mktemp("halved")), "run_name": "six"}
    halving = {"scheduler": "halving", "num_trials": 6, "num_confirmed": 1, **ONE}
    tune({**QUICK, **where, **halving, "sweep": ["learning_rate=log:5e-4:2e-2"], "batch_size": 50})
    return Path(where["storage_path"]) / "six"


def test_halving_trains_the_better_half_on_at_each_rung(halved: Path) -> None:
    reports = {row["trial"]: dict(pair.split(":") for pair in row["reports"].split()) for row in rows(halved)}
    search = [row for row in rows(halved) if row["seed"] == "0"]
    left = {row["trial"] for row in search}
    for rung, following, number in (("0.25", "0.5", 3), ("0.5", "1", 2), ("1", "2", 1)):
        reached = {trial for trial in left if rung in reports[trial]}
        assert reached == left
        least = sorted((float(reports[trial][rung]) for trial in left), reverse=True)[number - 1]
        left = {trial for trial in left if float(reports[trial][rung]) >= least or trial == "1"}
        assert {row["trial"] for row in search if following in reports[row["trial"]]} == left
    assert {row["trial"] for row in search if row["state"] == "done"} == left
    assert {row["state"] for row in search} == {"done", "stopped early"}


def test_what_a_trial_has_trained_in_segments_is_what_the_training_job_trains(halved: Path, tmp_path: Path) -> None:
    epochs = read_csv(folder_at(halved), "metrics.csv")
    assert [(row["epoch"], row["epoch_s"]) for row in epochs] == [("2", "")], "only a checkpoint tells of it"
    run_main("train", *as_flags({"config": halved / "best.json", "storage_path": tmp_path, "run_name": "again", **ONE}))
    again, swept = (json.loads((run / "result.json").read_text()) for run in (tmp_path / "again", halved))
    assert swept["weights_sha256"] == again["weights_sha256"]
    assert swept["test_accuracy"] == again["test_accuracy"]
    chosen = rows(halved)[0]["learning_rate"] == str(json.loads((halved / "best.json").read_text())["learning_rate"])
    assert (halved / "default" / "result.json").exists() is not chosen


def test_a_sweep_that_has_lost_trials_chooses_the_same_again(trained: Mock, halved: Path, tmp_path: Path) -> None:
    shutil.copytree(halved, tmp_path / "six")
    run, before = tmp_path / "six", rows(halved)
    for lost in ("best.json", "result.json"):
        (run / lost).unlink()
    (run / "sweep.csv").write_text("".join((run / "sweep.csv").read_text().splitlines(keepends=True)[:4]))
    resume(run)
    assert (run / "best.json").read_text() == (halved / "best.json").read_text()
    assert rows(run)[:3] == before[:3]
    assert sorted(row["reports"] for row in rows(run)) == sorted(row["reports"] for row in before)


def test_a_trial_whose_process_dies_is_lost_and_a_resumed_sweep_tries_it_again(
    trained: Mock, where: dict[str, Any], tmp_path: Path
) -> None:
    deadly = tmp_path / "deadly"
    deadly.touch()
    kill = f"if pathlib.Path({str(deadly)!r}).exists(): os.kill(os.getpid(), signal.SIGKILL)"
    callback = callback_at(tmp_path / "dying.py", "on_start(self, state, group)", kill)
    few = {"num_trials": 1, "num_epochs": 1, "max_failures": 1, "storage_path": str(tmp_path / "runs")}
    with pytest.raises(JobError, match=r"; to resume: tune\(resume=True, run_name='run'"):
        tune({**where, **few, "callback": str(callback)})
    assert [row["state"] for row in rows(tmp_path / "runs" / "run")] == ["lost"]
    deadly.unlink()
    resume(tmp_path / "runs" / "run")
    assert [row["state"] for row in rows(tmp_path / "runs" / "run")] == ["done"]


@pytest.mark.processes
def test_a_killed_sweep_resumes_without_repeating_finished_trials(
    trained: Mock, where: dict[str, Any], ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**where, "num_trials": 4, "max_concurrent_trials": 1} | {"sweep": "learning_rate=log:5e-4:2e-2"}
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "tune.py"), *as_flags(flags)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},  # in the shared Ray, a killed job's trial may keep its CPU
    )
    assert job.stdout
    lines = (line for line in job.stdout if line.startswith("trial "))
    for _ in range(2):
        next(lines)
    supervised = psutil.Process(job.pid).children()
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not psutil.wait_procs(supervised, timeout=30)[1], "it ends with its supervisor, a moment later"
    before = [row for row in rows(tmp_path / "run") if row["state"] == "done"]
    assert len(before) >= 2
    began_with = json.loads((tmp_path / "run" / "origin.json").read_text())["data"]
    assert began_with.keys() == {"training", "validation", "test"}

    with pytest.raises(UsageError, match="run run was started with --num-trials 4, not 6"):
        resume(tmp_path / "run", num_trials=6)
    resume(tmp_path / "run")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ") and ", seed " in line]
    after = rows(tmp_path / "run")
    assert after[: len(before)] == before
    assert (len(after), len(printed)) == (4, 4 - len(before))


def test_optuna_proposes(trained: Mock, where: dict[str, Any], tmp_path: Path) -> None:
    tune({**where, "search_algorithm": "optuna", "num_trials": 3, "num_epochs": 1})
    trials = rows(tmp_path / "run")
    assert [row["state"] for row in trials] == ["done"] * 3
    assert {row["batch_size"] for row in trials} <= {"32", "64"}


def test_every_trial_failing_ends_the_job_with_the_first_reason(where: dict[str, Any]) -> None:
    with pytest.raises(TrainingStoppedError, match=r"every trial failed; the first one: loss .*\(logs: \S+\)$"):
        tune({**where, "num_trials": 1, "sweep": ["learning_rate=1e19:1e20"]})


@pytest.mark.parametrize("failing", ["write_text", "delete"])
def test_storage_that_fails_while_a_trial_ends_is_one_line_and_the_sweep_goes_on_from_there(
    failing: str, trained: Mock, where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does = getattr(RunFolder, failing)

    def fail(folder: RunFolder, *given: Any) -> Any:
        ends_trial = "sweep.csv" in given and "done" in str(given)
        if ends_trial or (failing == "delete" and folder.name.startswith("learning_rate")):
            raise OSError(28, "No space left on device")
        return does(folder, *given)

    settings = {**where, **rates(2e-3, 3e-3), "num_epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, failing, fail)
        said = r"^the storage has failed: No space left on device.* \(logs: .*\); to resume: tune\(resume=True"
        with pytest.raises(JobError, match=said):
            tune(settings)
    resume(tmp_path / "run")
    assert [row["state"] for row in rows(tmp_path / "run")] == ["done"] * 2


def test_a_time_budget_stops_trials(
    trained: Mock, where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_s = [0]
    monkeypatch.setattr("ray.tune.stopper.timeout.time", Mock(time=lambda: time.time() + passed_s[0]))

    def let_time_pass(console: SweepConsole, table: TrialTable, ended: TrialRecord | None = None) -> None:
        passed_s[0] = 3600 * any(record.epochs for record in table.by_point.values())

    monkeypatch.setattr(SweepConsole, "show_table", let_time_pass)
    tune({**where, "num_trials": 2, "num_epochs": 1_000_000, "time_budget_s": 3000.0})
    trials = rows(tmp_path / "run")
    assert 0 < max(float(row["epochs"]) for row in trials) < 1_000_000
    assert {row["state"] for row in trials} == {"stopped early"}


@dataclass(frozen=True)
class Settings:
    noise: float = setting(1.0, "of the inputs", decides_data=True)
    width: int = setting(2, "of the network")


class Noisy(Regression):
    Settings = Settings

    def load_data(self) -> Data:
        inputs = np.random.default_rng(0).normal(scale=self.settings.noise, size=(600, 2)).astype(np.float32)
        return Data(Arrays(inputs, inputs[:, 0]), Arrays(inputs, inputs[:, 0]))

    def create_model(self) -> nn.Module:
        return nn.Linear(2, 1)


class Rigid(Noisy):
    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.01)


MOMENTUM, RATE = "momentum=0.5,0.9", "learning_rate=0.1,0.2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep": ["batch_size=60000"]}, "--sweep: batch size 60,000 is larger than the 55,000 images to train on"),
        ({"batch_size": 8, "learning_rate": 0.1}, "nothing to search: name settings of MNIST with --sweep"),
        ({"validation_size": 0}, "a sweep chooses by validation accuracy, but no examples are held out: leave"),
        ({"overfit_batches": 2}, "leave --validation-size 0 and --overfit-batches out"),
        ({"num_workers": 0}, "a sweep runs on Ray: leave --num-workers 0 out"),
        (
            {"sweep": ["lr_schedule=one-cycle,cosine", "warmup_steps=0,5"]},
            "--warmup-steps: one-cycle has its own warm-up",
        ),
        ({"sweep": ["compile=true,false"], "reproducible": True}, "--reproducible does not work with --compile"),
        ({"time_budget_s": 0.0}, "--time-budget-s must be a positive number"),
        ({"sweep": [MOMENTUM], "optimizer": "adam"}, "--momentum has no effect: no trial uses it; leave it out"),
        ({"sweep": [RATE], "optimizer": "adam", "momentum": 0.5}, "--momentum has no effect"),
        ({"sweep": ["num_chunks=4,8"]}, "--num-chunks has no effect"),
        ({"sweep": [RATE], "workload": Rigid}, "^--sweep learning_rate has no effect: Rigid's loss, optimizer and "),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path, ray_address: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tune({**settings, "storage_path": str(tmp_path)})
    assert not any(tmp_path.iterdir())
    read_sweep({"sweep": [MOMENTUM, "optimizer=adam,sgd"], "storage_path": str(tmp_path)})  # some trials use it


def test_a_sweep_whose_table_is_lost_says_what_to_do(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "lost")

    def read() -> Job:
        return read_sweep({"resume": True, "run_name": "lost", "storage_path": str(tmp_path)}).job

    run.write_text("sweep.json", '{"num_epochs": 1}')
    assert read().notes == ("run lost has no finished trial yet; starting from the beginning",)
    run.write_text("best.json", "{}")
    remedy = r"train the best with python jobs/train\.py --config .*/lost/best\.json$"
    with pytest.raises(JobError, match=r"/lost has best\.json, but no sweep\.csv; " + remedy):
        read()


def test_batch_sizes_are_at_most_the_examples_and_a_setting_that_decides_the_data_is_not_searched(
    tmp_path: Path,
) -> None:
    given = {"workload": Noisy, "storage_path": str(tmp_path)}
    sweep, data = with_data(read_sweep({**given, "sweep": ["batch_size=8,16"], "validation_size": 500}))
    assert (sweep.batch_sizes, len(data.train)) == ([8, 16], 100)
    sweep, _ = with_data(read_sweep({**given, "sweep": ["width=2,4"]}))
    assert list(sweep.space.spaces) == ["width"]
    sweep, _ = with_data(read_sweep({**given, "validation_size": 500}))
    assert sweep.batch_sizes == [16, 32, 64, 100]
    assert sweep.job.notes == ("batch size 100, not 256: there are only 100 examples to train on",)
    sweep, _ = with_data(read_sweep({**given, "validation_size": 200}))
    assert (sweep.batch_sizes, sweep.job.train.batch_size) == ([16, 32, 64, 128, 256], 32)
    sweep, _ = with_data(read_sweep({**given, "validation_size": 500}))
    (tmp_path / "sweep.json").write_text(json_lines({**values_of(sweep.config), **sweep.job.values}))
    again, _ = with_data(read_sweep({**given, "config": str(tmp_path / "sweep.json")}))
    assert (again.space, again.job.notes) == (sweep.space, ())
    with pytest.raises(UsageError, match="--sweep noise: load_data depends on it, and all trials have the same data"):
        with_data(read_sweep({**given, "sweep": ["width=2,4", "noise=1,2"]}))


EASY = """
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Easy(Classification):
    def load_data(self):
        targets = np.arange(40) % 2
        some = Arrays(np.float32(2 * targets[:, None] - 1), targets)
        return Data(some, some)

    def create_model(self):
        return nn.Linear(1, 2)
"""


def test_few_examples_decide_little_even_if_all_are_right(
    trained: Mock, write: Callable[..., Path], tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"sweep": ["learning_rate=0.5,1"], "batch_size": 4, "num_epochs": 2, "num_confirmed": 0}
    tune({"workload": str(write(EASY)), "storage_path": str(tmp_path / "runs"), "validation_size": 8, **quick})
    said = capsys.readouterr().out
    assert "100.00% validation accuracy" in said
    assert "on 8 examples of validation, configurations that differ by less than 11% may be as good" in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "random, 16 trials of 3 epochs, then the best 3 and the default with up to two more seeds: "),
        ({"num_trials": 3}, "random, 3 trials of 3 epochs, then the best 3 with up to two more seeds: "),
        ({"num_confirmed": 0}, "random, 16 trials of 3 epochs: "),
        ({"num_trials": 1}, "random, 1 trial of 3 epochs: "),
        ({"sweep": ["width=2,4"]}, "random, 2 trials of 3 epochs, then the best 2 with up to two more seeds: "),
    ],
)
def test_the_header_says_what_will_be_tried_and_confirmed(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    console = MagicMock()
    say_sweep(console, read_sweep({"workload": Noisy, "storage_path": str(tmp_path), **settings}), MagicMock())
    said = dict(call.args for call in console.say.call_args_list)
    assert said["search"].startswith(expected)


# --- a trial of one worker, which runs in this process


def try_one(
    reported: Callable[[dict[str, Any]], object],
    examples: Arrays,
    storage: Path,
    workload: Workload,
    output: OutputConfig,
    until_epoch: float = 2,
) -> None:
    plan, folder = WorkerPlan(1, 1, use_gpu=False, must_scale_up=False), locate(str(storage), "trials")
    job = Job(workload, TrainConfig(precision="fp32"), WorkerConfig(hang_timeout_s=60), output, folder, "")
    split = share(workload, Split(examples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.tune.report", reported)
        values = {"batch_size": 60, "learning_rate": 1e-3}
        config = {"values": values, "seed": 0, "until_epoch": until_epoch}
        run_trial(config, TrialSpec(job, split, split, plan, folder))


@pytest.mark.usefixtures("ray_address")
def test_a_trial_whose_code_ends_its_process_fails_and_one_that_tune_ends_just_ends(
    few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = Mock()
    with monkeypatch.context() as patch:
        patch.setattr(MNIST, "loss", Mock(side_effect=SystemExit(0)))
        try_one(reported, few_images, tmp_path / "code", mnist(), OutputConfig())
    assert reported.call_args.args[0]["reason"].startswith("SystemExit: sys.exit(0) (")
    names: dict[str, Any] = {}
    exec(compile("def report(metrics): raise SystemExit(0)", f"{ray.__path__[0]}/tune/ending.py", "exec"), names)
    with pytest.raises(SystemExit):
        try_one(names["report"], few_images, tmp_path / "tune", mnist(), OutputConfig())


def test_a_trial_killed_after_the_last_checkpoint_of_a_segment_reports_it_again(
    ray_address: str, few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, Any]] = []
    watch, unwatch = Mock(), Mock()
    monkeypatch.setattr("mnist_ray.run.life.SHOWN_EVERY_S", 0)
    monkeypatch.setattr("mnist_ray.run.life.end_if_hung", watch)
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", unwatch)
    for until_epoch in (0.5, 0.5, 2, 2):
        try_one(reported.append, few_images, tmp_path, mnist(), OutputConfig(), until_epoch)
    assert [metrics["epochs"] for metrics in reported] == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert (reported[1], reported[4]) == (reported[0], reported[3])
    assert watch.call_count >= 4 + 3 * 6  # where each run begins, and at each batch of the three validations
    assert {call.args for call in watch.call_args_list} == {(60,), (60 + STORAGE_LIMIT_S,)}  # the latter while it saves
    assert unwatch.call_count == 4  # also where there is nothing to train: Tune may keep the process for long


def test_a_trial_whose_checkpoint_is_further_than_its_segment_and_not_validated_validates(
    ray_address: str, few_images: Arrays, tmp_path: Path
) -> None:
    reported: list[dict[str, Any]] = []
    try_one(reported.append, few_images, tmp_path, mnist(), OutputConfig(), until_epoch=0.5)
    (state,) = tmp_path.glob("trials/*/checkpoint_epoch*/state.json")
    document = json.loads(state.read_text())
    document["metrics"] = {name: value for name, value in document["metrics"].items() if not name.startswith("val_")}
    document["sha256"][state.name] = digest_of(document)
    state.write_text(json.dumps(document))
    try_one(reported.append, few_images, tmp_path, mnist(), OutputConfig(), until_epoch=0.25)
    before, after = ({name: value for name, value in each.items() if not name.endswith("_s")} for each in reported)
    assert after == before
