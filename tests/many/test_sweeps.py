"""Whole sweeps on a real Ray, on few images."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
from torch import nn

from mnist_ray import evaluate, load_run, train
from mnist_ray import tune as tune_call
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError
from mnist_ray.many.jobs import check_data, read_sweep, run, say_header
from mnist_ray.many.table import Many
from mnist_ray.report.run_files import read_csv
from mnist_ray.settings import json_lines
from mnist_ray.storage import RunFolder
from mnist_ray.workload import Arrays, Data, Regression, Workload, setting
from tests.conftest import ROOT, as_flags, callback_at, folder_at, load_splits, write_data_set

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
    return read_csv(folder_at(run), "members.csv")


def states(run: Path) -> list[str]:
    return [row["state"] for row in rows(run)]


def rates(*learning_rates: float) -> dict[str, Any]:
    """Return settings of a sweep that tries these learning rates in this order, one at a time."""
    limits = {"num_trials": len(learning_rates), "max_concurrent_trials": 1}
    return {"search_algorithm": "grid", "sweep": [f"learning_rate={','.join(map(str, learning_rates))}"], **limits}


def tune(settings: dict[str, Any]) -> None:
    run(read_sweep(settings))


def resume(folder: Path, **settings: Any) -> None:
    tune({"resume": True, "run_name": folder.name, "storage_path": str(folder.parent), **settings})


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def finished_sweep(ray_address: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random trials of one worker and two epochs."""
    storage = tmp_path_factory.mktemp("sweeps")
    tune({**QUICK, "data_dir": str(data_dir), "storage_path": str(storage), "run_name": "four", "num_trials": 4})
    return storage / "four"


def test_the_best_trial_is_the_result(finished_sweep: Path) -> None:
    trials = rows(finished_sweep)
    assert [(row["member"], row["state"], row["epochs"]) for row in trials] == [
        (str(number), "done", "2.0") for number in (1, 2, 3, 4)
    ]
    best = max(trials, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    chosen = json.loads((finished_sweep / "best.json").read_text())
    assert (chosen["batch_size"], chosen["learning_rate"]) == (int(best["batch_size"]), float(best["learning_rate"]))
    assert (chosen["num_workers"], chosen["cpus_per_worker"]) == (1, 1)
    members = {folder.name: folder for folder in (finished_sweep / "members").iterdir()}
    assert [*sorted(members)] == sorted(row["run"] for row in trials)
    for name, folder in members.items():
        assert {"config.json", "metrics.csv", "steps.csv", "report.html"} <= {file.name for file in folder.iterdir()}
        assert len([*folder.glob("checkpoint*")]) == 1
        assert (folder / "result.json").exists() == (name == best["run"]), "the test set is touched once"
    found = load_run(finished_sweep)
    assert [run.name for run in found.members] == [best["run"]]
    assert found.checkpoint == found.members[0].checkpoint
    assert evaluate(found) == found.metrics == found.members[0].metrics
    assert len(found.predictions["label"]) == 200
    page = (finished_sweep / "report.html").read_text()
    assert "<h2>Trials by learning rate</h2>" in page
    assert "finished: 4 of 4 runs, tested on 200" in page


def test_a_sweep_that_has_chosen_only_tests(
    finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_sweep, tmp_path / "chosen")
    before = result_of(tmp_path / "chosen")
    for file in tmp_path.glob("chosen/**/result.json"):  # as if it had been killed in the test
        file.unlink()
    monkeypatch.setattr("mnist_ray.many.run.train_members", pytest.fail)
    resume(tmp_path / "chosen")
    after = result_of(tmp_path / "chosen")
    assert (after["test_loss"], after["checkpoint"]) == (before["test_loss"], before["checkpoint"])
    assert rows(tmp_path / "chosen") == rows(finished_sweep)


def test_a_confirmed_sweep_chooses_by_means_and_keeps_the_reason_of_a_failure(
    where: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune({**where, **rates(1e20, 3e-3, 2e-5), "num_epochs": 1, "num_confirmed": 2})
    said = capsys.readouterr().out
    failed, *done = rows(tmp_path / "run")
    assert said.count(" done, 1 failed") == len(done)
    assert failed["state"] == "failed"
    assert "loss or weights are not finite at step 2 of epoch 1" in failed["reason"]
    assert {row["state"] for row in done} == {"done"}
    assert {(row["learning_rate"], row["seed"]) for row in done[:4]} == {
        (rate, seed) for rate in ("0.003", "2e-05") for seed in "01"
    }
    assert result_of(tmp_path / "run")["members"] == ["members/learning_rate-0.003_seed-0"]
    assert "\nbest       " in said
    assert "\ndefault    " not in said, "it was not tried"
    assert "on 100 images of validation, configurations that differ by less than " in said


@pytest.fixture(scope="module")
def halved(ray_address: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by halving of six random trials."""
    where = {"data_dir": str(data_dir), "storage_path": str(tmp_path_factory.mktemp("halved")), "run_name": "six"}
    halving = {"scheduler": "halving", "num_trials": 6, "num_confirmed": 1}
    tune({**QUICK, **where, **halving, "sweep": ["learning_rate=log:5e-4:2e-2"], "batch_size": 50})
    return Path(where["storage_path"]) / "six"


def test_halving_trains_the_better_half_on_at_each_rung(halved: Path) -> None:
    reports = {row["member"]: dict(pair.split(":") for pair in row["reports"].split()) for row in rows(halved)}
    search = [row for row in rows(halved) if row["seed"] == "0"]
    left = {row["member"] for row in search}
    for rung, following, number in (("0.25", "0.5", 3), ("0.5", "1", 2), ("1", "2", 1)):
        reached = {trial for trial in left if rung in reports[trial]}
        assert reached == left
        least = sorted((float(reports[trial][rung]) for trial in left), reverse=True)[number - 1]
        left = {trial for trial in left if float(reports[trial][rung]) >= least or trial == "1"}
        assert {row["member"] for row in search if following in reports[row["member"]]} == left
    assert {row["member"] for row in search if row["state"] == "done"} == left
    assert {row["state"] for row in search} == {"done", "stopped early"}


def test_what_a_trial_has_trained_in_segments_is_what_the_training_job_trains(halved: Path, tmp_path: Path) -> None:
    again, swept = train(config=str(halved / "best.json"), storage_path=tmp_path), load_run(halved)
    assert swept.result["weights_sha256"] == again.result["weights_sha256"]
    assert swept.metrics == again.metrics
    figures = [name for name in again.history[0] if not name.endswith("_s")]
    assert [[row[name] for name in figures] for row in swept.members[0].history] == [
        [row[name] for name in figures] for row in again.history
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_trials_train_also_without_ray_and_with_several_workers_and_start_from_given_weights(
    num_workers: int, finished_sweep: Path, where: dict[str, Any], tmp_path: Path
) -> None:
    same = {"sweep": ["batch_size=32"], "learning_rate": 1e-30, "init_from": str(finished_sweep)}
    tune({**where, **same, "num_workers": num_workers, "scheduler": "halving"})
    (trial,) = rows(tmp_path / "run")
    assert (trial["state"], trial["epochs"]) == ("done", "2.0")
    before = result_of(finished_sweep)["checkpoint_metrics"]
    assert float(trial["val_accuracy"]) == before["val_accuracy"]
    assert [pair.split(":")[0] for pair in trial["reports"].split()] == ["0.263157895", "0.526315789", "1", "2"]


def test_each_configuration_of_a_sweep_over_folds_is_scored_by_their_mean_and_the_best_is_tested_on_all(
    where: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune({**where, **rates(3e-3, 2e-5), "num_epochs": 1, "folds": 2})
    found = load_run(tmp_path / "run")
    assert found.result["members"] == [f"members/learning_rate-0.003_seed-0_fold-{fold}" for fold in (1, 2)]
    assert found.result["num_test_examples"] == 700
    assert len(found.predictions["fold"]) == 700
    low, high = found.result["spread"]["test_loss"]["interval"]
    assert found.metrics["loss"] == pytest.approx(np.mean([run.metrics["loss"] for run in found.members]))
    assert low < found.metrics["loss"] < high
    said = capsys.readouterr().out
    mean = np.mean([float(row["val_accuracy"]) for row in rows(tmp_path / "run") if row["learning_rate"] == "0.003"])
    assert f"\nbest       {mean:.2%} validation accuracy, mean of 2 runs: learning rate 0.003\n" in said


def test_a_trial_whose_process_dies_is_lost_and_a_resumed_sweep_tries_it_again(
    where: dict[str, Any], tmp_path: Path
) -> None:
    deadly = tmp_path / "deadly"
    deadly.touch()
    kill = f"if pathlib.Path({str(deadly)!r}).exists(): os.kill(os.getpid(), signal.SIGKILL)"
    callback = callback_at(tmp_path / "dying.py", "on_start(self, state, group)", kill)
    few = {"num_trials": 1, "num_epochs": 1, "max_failures": 1, "storage_path": str(tmp_path / "runs")}
    with pytest.raises(JobError, match=r"; to resume: tune\(resume=True, run_name='run'"):
        tune({**where, **few, "callback": str(callback)})
    assert states(tmp_path / "runs" / "run") == ["lost"]
    deadly.unlink()
    resume(tmp_path / "runs" / "run")
    assert states(tmp_path / "runs" / "run") == ["done"]


@pytest.mark.processes
def test_a_killed_sweep_resumes_without_repeating_finished_trials(
    where: dict[str, Any], ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    with pytest.raises(UsageError, match="run run was started with --num-trials 4, not 6"):
        resume(tmp_path / "run", num_trials=6)
    resume(tmp_path / "run")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ") and ", seed " in line]
    after = rows(tmp_path / "run")
    assert after[: len(before)] == before
    assert (len(after), len(printed)) == (4, 4 - len(before))


def test_every_trial_failing_ends_the_job_with_the_first_reason(where: dict[str, Any], tmp_path: Path) -> None:
    stops = callback_at(tmp_path / "stops.py", "wants_stop(self)", "return True")
    failing: list[tuple[dict[str, Any], str]] = [
        ({"sweep": ["learning_rate=1e19:1e20"], "run_name": "diverges"}, "loss .*"),
        ({"callback": str(stops), "run_name": "stops"}, "a callback has stopped the training"),
    ]
    for settings, reason in failing:
        with pytest.raises(TrainingStoppedError, match=rf"every trial failed; the first one: {reason} \(logs: \S+\)$"):
            tune({**where, "num_trials": 1, "storage_path": str(tmp_path / "runs"), **settings})


@pytest.mark.parametrize("failing", ["write_text", "delete"])
def test_storage_that_fails_while_a_trial_ends_is_one_line_and_the_sweep_goes_on_from_there(
    failing: str, where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does = getattr(RunFolder, failing)

    def fail(folder: RunFolder, *given: Any) -> Any:
        ends_trial = "members.csv" in given and "done" in str(given)
        if ends_trial or (failing == "delete" and folder.name.startswith("checkpoint")):
            raise OSError(28, "No space left on device")
        return does(folder, *given)

    settings = {**where, **rates(2e-3, 3e-3)}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, failing, fail)
        said = r"^the storage has failed: No space left on device.* \(logs: .*\); to resume: tune\(resume=True"
        with pytest.raises(JobError, match=said):
            tune(settings)
    resume(tmp_path / "run")
    assert states(tmp_path / "run") == ["done"] * 2


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


MOMENTUM = "momentum=0.5,0.9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep": ["batch_size=60000"]}, "--sweep: batch size 60,000 is larger than the 55,000 images to train on"),
        ({"batch_size": 8, "learning_rate": 0.1}, "nothing to search: name settings of MNIST with --sweep"),
        ({"validation_size": 0}, "a sweep chooses by validation accuracy, but no examples are held out: leave"),
        (
            {"sweep": ["lr_schedule=one-cycle,cosine", "warmup_steps=0,5"]},
            "warmup_steps: one-cycle has a warm-up of its own",
        ),
        ({"sweep": ["compile=true,false"], "reproducible": True}, "--reproducible does not work with --compile"),
        (
            {"sweep": [MOMENTUM], "optimizer": "adam"},
            "--set momentum has no effect: adam does not use it",
        ),
        ({"sweep": ["learning_rate=0.1,0.2"], "optimizer": "adam", "momentum": 0.5}, "--set momentum has no effect"),
        ({"sweep": ["num_chunks=4,8"]}, "--set num_chunks has no effect"),
        ({"num_seeds": 3, "num_confirmed": 2}, "--num-confirmed has no effect"),
        ({"num_workers": 0, "max_concurrent_trials": 2}, "--max-concurrent-trials has no effect with --num-workers 0"),
    ],
)
def test_a_wrong_setting_is_rejected_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path, ray_address: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tune({**settings, "storage_path": str(tmp_path)})
    assert not any(tmp_path.iterdir())
    read_sweep({"sweep": [MOMENTUM, "optimizer=adam,sgd"], "storage_path": str(tmp_path)})  # some trials use it


def with_data(tmp_path: Path, **settings: Any) -> Many:
    """Return a sweep of `Noisy`, as it runs on its data."""
    many = read_sweep({"workload": Noisy, "storage_path": str(tmp_path), **settings})
    return check_data(many, load_splits(many.job))


def test_batch_sizes_are_at_most_the_examples_and_a_setting_that_decides_the_data_is_not_searched(
    tmp_path: Path,
) -> None:
    assert with_data(tmp_path, validation_size=200).batch_sizes == [16, 32, 64, 128, 256]
    many = with_data(tmp_path, validation_size=500)
    assert many.batch_sizes == [16, 32, 64, 100]
    assert many.job.notes == ("batch size 100, not 256: there are only 100 examples to train on",)
    (tmp_path / "config.json").write_text(json_lines(many.values))
    again = with_data(tmp_path, config=str(tmp_path / "config.json"))
    assert (again.space, again.job.notes) == (many.space, ())
    with pytest.raises(UsageError, match="--sweep noise: load_data depends on it, and all trials have the same data"):
        with_data(tmp_path, sweep=["width=2,4", "noise=1,2"])


def test_the_header_has_what_is_searched_and_the_runs_of_each_configuration(tmp_path: Path) -> None:
    console = MagicMock()
    settings: dict[str, Any] = {"sweep": ["width=2,4"], "num_seeds": 3, "folds": 2}
    say_header(console, read_sweep({"workload": Noisy, "storage_path": str(tmp_path), **settings}), MagicMock())
    said = dict(call.args for call in console.say.call_args_list)
    assert said["search"] == "random, 2 trials of 3 epochs: width=2,4; scheduler halving"
    assert said["runs"] == "6 of each configuration: 3 seeds and 2 folds"


def test_every_workload_may_be_swept_over_its_own_settings(tmp_path: Path, ray_address: str) -> None:
    found = tune_call(Noisy, sweep={"width": [2, 4]}, num_epochs=1, storage_path=str(tmp_path), num_workers=0)
    assert isinstance(found.workload, Workload)
    assert found.workload.settings.width == found.best["width"]
