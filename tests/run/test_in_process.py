"""Training in the job's own process, without Ray: ``--num-workers 0``."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from torch import nn

from mnist_ray import train
from mnist_ray.checkpoints.checkpoint import Snapshot
from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.errors import JobError, UsageError
from mnist_ray.mnist import MNIST
from mnist_ray.report import page
from mnist_ray.report.run_files import read_csv
from mnist_ray.run.worker import Worker
from mnist_ray.storage import RunFolder, position_of
from mnist_ray.training.metrics import score
from mnist_ray.training.state import TrainingState
from mnist_ray.workload import ACCURACY, Arrays, Blocks, Classification, Data, Metric
from tests.conftest import (
    CELL,
    QUICK,
    as_flags,
    callback_at,
    folder_at,
    run_and_act,
    run_job,
    run_main,
    run_text,
    weights,
)

HERE = {**QUICK, "num_workers": 0, "cpus_per_worker": 1, "precision": "fp32"}


@pytest.fixture
def here(small_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run named ``run`` in the test's folder."""
    return {**HERE, "data_dir": small_data, "storage_path": tmp_path, "run_name": "run"}


@pytest.fixture(scope="module")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("here")
    done = run_job("train.py", *as_flags({**HERE, "data_dir": small_data, "storage_path": storage, "run_name": "run"}))
    assert done.returncode == 0, done.stderr
    assert "workers    none: this process trains, without Ray\n" in done.stdout
    return storage / "run"


def test_its_weights_equal_those_of_one_worker_and_its_files_are_those_of_any_run(
    run: Path, ray_address: str, here: dict[str, Any], tmp_path: Path
) -> None:
    run_main("train", *as_flags({**here, "num_workers": 1}))
    assert weights(tmp_path / "run") == weights(run)
    assert {"result.json", "report.html", "predictions.parquet"} <= {file.name for file in run.iterdir()}
    assert [row["val_loss"] != "" for row in read_csv(folder_at(run), "metrics.csv")] == [True, True]
    assert read_csv(folder_at(run), "steps.csv")[-1]["step"] == "96"


def test_without_a_test_set_results_are_those_of_the_validation_set_and_nothing_claims_a_test(
    here: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(None, **here, no_test=True)
    said = capsys.readouterr().out
    assert "for validation, none to test\n" in said
    assert [*re.findall(r"^(test|validation)\b", said, re.MULTILINE)] == ["validation"]
    result = run.result
    assert not [name for name in result if "test" in name and name != "formats"]
    best = max(run.history, key=lambda row: row["val_accuracy"])
    assert (result["val_loss"], result["val_accuracy"]) == (best["val_loss"], best["val_accuracy"])
    assert len(run.predictions["index"]) == result["num_val_examples"] == 600
    assert run.metrics["accuracy"] == best["val_accuracy"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Confusion matrix of the validation set" in report
    assert not re.search(r"\btest(ed)? (set|accuracy|loss|on)\b", report)


def test_validations_within_an_epoch_are_recorded_compared_and_resumed(
    here: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**here, "validate_every": 20, "keep_checkpoints": "all"}
    whole = train(None, **settings)
    said = capsys.readouterr().out
    assert "2 epochs of 48 steps, validated every 20 steps, " in said
    assert [*re.findall(r"validation after epoch (\S+):", said)] == ["0.4167", "0.8333", "1", "1.417", "1.833", "2"]
    rows = read_csv(folder_at(tmp_path / "run"), "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0.41667", "0.83333", "1", "1.41667", "1.83333", "2"]
    assert [row["train_loss"] != "" for row in rows] == [False, False, True] * 2
    states = [read_state(run)["metrics"] for run in map(folder_at, sorted((tmp_path / "run").glob("checkpoint_*")))]
    best = max(states, key=lambda metrics: metrics["val_score"])
    assert (whole.result["checkpoint_metrics"], len(states)) == (best, 6)
    digest = weights(tmp_path / "run")
    for later in sorted((tmp_path / "run").glob("checkpoint_*"))[2:]:  # as after a kill in the second half of epoch 1
        shutil.rmtree(later)
    (tmp_path / "run" / "result.json").unlink()
    train(None, **here | {"resume": "yes"})
    assert "continuing in epoch 1 after step 40" in capsys.readouterr().out
    assert weights(tmp_path / "run") == digest
    again = read_csv(folder_at(tmp_path / "run"), "metrics.csv")
    assert [(row["epoch"], row["val_loss"]) for row in again] == [(row["epoch"], row["val_loss"]) for row in rows]


class Shifted(MNIST):
    """Its second validation set has the images of the first, moved to the right."""

    def load_data(self) -> Data:
        data = super().load_data()
        assert isinstance(data.train, Arrays)
        train, last = (Arrays(*data.train[part]) for part in (slice(-600), slice(-600, None)))
        moved = Arrays(np.roll(last.inputs, 4, axis=-1), last.targets)
        return dataclasses.replace(data, train=train, validation={"clean": last, "moved": moved})


class Unshifted(Shifted):
    """It has the first set only."""

    def load_data(self) -> Data:
        data = super().load_data()
        assert isinstance(data.validation, dict)
        return dataclasses.replace(data, validation=data.validation["clean"])


def test_the_first_of_several_validation_sets_chooses_and_all_are_reported_and_resumed(
    here: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**here, "validation_size": None, "keep_checkpoints": "all"}
    alone, whole = train(Unshifted, **settings | {"run_name": "alone"}), train(Shifted, **settings)
    said = capsys.readouterr().out
    assert "2,400 images to train on, 600 of clean for validation, 600 of moved, 1,100 to test" in said
    assert len(re.findall(r"^ +on moved: loss [\d.]+, accuracy [\d.]+%$", said, re.MULTILINE)) == 2
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    assert [row["val_loss"] for row in whole.history] == [row["val_loss"] for row in alone.history]
    moved = [row["val_moved_accuracy"] for row in whole.history]
    assert all(0.1 < of_moved < row["val_accuracy"] for of_moved, row in zip(moved, whole.history, strict=True))
    assert whole.result["checkpoint_metrics"]["val_moved_accuracy"] == moved[-1]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"<td>{moved[-1]:.2%}</td>" in report
    assert f"moved ends at {moved[-1]:.2%}" in report
    shutil.rmtree(tmp_path / "run" / "checkpoint_epoch-002_step-000000")  # as after a kill in epoch 2
    (tmp_path / "run" / "result.json").unlink()
    assert [row["val_moved_accuracy"] for row in train(Shifted, **settings | {"resume": "yes"}).history] == moved


def test_a_run_may_stop_early_within_an_epoch(here: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**here, "validate_every": 10, "early_stopping_patience": 1, "learning_rate": 1e-7, "limit": 0.2}
    stopped = train(None, **settings | {"batch_size": 10, "optimizer": "sgd", "ema_decay": 0.0})
    assert "note       training stopped after epoch 0." in capsys.readouterr().out
    assert stopped.result["checkpoint_metrics"]["epochs"] < 1


@pytest.mark.long
def test_interrupted_it_saves_and_resumes_to_the_same_weights(run: Path, here: dict[str, Any], tmp_path: Path) -> None:
    acts = {"started": lambda job: job.send_signal(2)}
    _, errors = run_and_act(acts, *as_flags(here), address="local", status=130)
    assert errors.startswith("interrupted; to resume: python jobs/train.py --resume --run-name run")
    assert list(tmp_path.glob("run/checkpoint_*"))
    done = run_job("train.py", "--resume", "--run-name", "run", "--storage-path", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(run)


@pytest.mark.parametrize(("is_slow", "chosen"), [(True, "fp32"), (False, "bf16")])
def test_a_resumed_run_keeps_its_precision_unless_the_processor_has_no_bf16(
    is_slow: bool,
    chosen: str,
    here: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stops = callback_at(tmp_path / f"halts_{chosen}.py", "wants_stop(self)", "return not os.path.exists('go')")
    settings = {**here, "callback": stops, "precision": "auto"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnist_ray.parallel.group.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("mnist_ray.run.worker.is_bf16_slow", lambda *given: is_slow)
    with pytest.raises(JobError, match="a callback has stopped the training"):
        train(None, **settings)
    (tmp_path / "go").touch()
    monkeypatch.setattr("mnist_ray.run.worker.is_bf16_slow", Mock(side_effect=AssertionError))
    if chosen == "bf16":
        monkeypatch.setattr("mnist_ray.parallel.group.cpu_has_bf16", lambda: False)
    run = train(None, **settings, resume=True)
    said = capsys.readouterr().out
    assert [*re.findall(r"^started .+, (fp32|bf16)\b", said, re.MULTILINE)] == [chosen, "fp32"]
    note = "the run has trained in bf16, and continues in fp32 (--precision auto)"
    assert (note in said) == (chosen == "bf16")
    assert run.folder.read_json("origin.json")["precision"] == "fp32"  # type: ignore[index]


def test_interrupted_in_the_last_step_it_ends_as_interrupted_and_no_step_has_a_time_limit(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *given, **options: pytest.fail("a limit is set"))
    interrupt = "if state.total_step == 96: os.kill(os.getpid(), signal.SIGINT)"
    callback = callback_at(tmp_path / "interrupts.py", "on_step(self, state)", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; to resume: train\(resume=True"):
        train(None, **here, callback=callback)
    assert (tmp_path / "run" / "checkpoint_epoch-002_step-000000").is_dir()


def test_results_that_json_cannot_hold_are_null(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MNIST, "summarize", lambda workload, means: {**means, "accuracy": math.nan})
    monkeypatch.setattr(MNIST, "details", lambda workload, columns: {"worst": [math.inf, 1.5]})
    for method in ("lines", "pictures"):
        monkeypatch.setattr(MNIST, method, lambda *given: [])
    found = train(None, **here, num_epochs=1)
    result = json.loads(found.folder.read_text("result.json") or "", parse_constant=pytest.fail)
    assert (result["test_accuracy"], result["worst"]) == (None, [None, 1.5])
    assert caplog.messages == []  # such as those of TensorBoard's writer


def test_a_kill_at_a_checkpoint_loses_no_row_of_the_steps(here: dict[str, Any], tmp_path: Path) -> None:
    read = f"rows = open({str(tmp_path / 'run' / 'steps.csv')!r}).read().splitlines()"
    note = f"open({str(tmp_path / 'seen')!r}, 'a').write(rows[-1].split(',')[0] + ' ')"
    callback = callback_at(tmp_path / "reads_steps.py", "on_checkpoint(self, state, progress)", read, note)
    train(None, **here, num_epochs=1, checkpoint_every=20, callback=callback)
    assert (tmp_path / "seen").read_text() == "20 40 48 "  # the steps of the checkpoints


def test_all_checkpoints_are_kept_if_asked(here: dict[str, Any], tmp_path: Path) -> None:
    train(None, **here, num_epochs=4, keep_checkpoints=None)
    kept = {position_of(name) for name in folder_at(tmp_path / "run").checkpoint_names()}
    assert kept >= {(epoch, 0) for epoch in (1, 2, 3, 4)}


@pytest.mark.parametrize("checkpoint_every", [20, 30, 1000])  # twice or once within the epoch, or only at its end
def test_storage_that_fails_is_one_line_with_the_way_on(
    checkpoint_every: int, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "write", Mock(side_effect=OSError(28, "No space left on device")))
    said = r"^the storage has failed: No space left on device.*; to resume: train\(resume=True, .*\)$"
    with pytest.raises(JobError, match=said):
        train(None, **here, num_epochs=1, checkpoint_every=checkpoint_every)


@pytest.mark.parametrize("ends", ["with the epoch", "by an interrupt"])
def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_end_before_it(
    ends: str, here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, goes_on = Snapshot.write, threading.Event()

    def step(worker: Worker, state: TrainingState) -> None:
        if state.step == 30:
            goes_on.set()
            if ends == "by an interrupt":
                signal.raise_signal(signal.SIGINT)

    def write_late(snapshot: Snapshot, folder: RunFolder, writers: Any) -> None:
        assert snapshot.document["step"] != 20 or goes_on.wait(20), "training stands still until this is written"
        time.sleep(0.05)
        write(snapshot, folder, writers)

    monkeypatch.setattr(Worker, "on_step", step)
    monkeypatch.setattr(Snapshot, "write", write_late)
    with pytest.raises(KeyboardInterrupt) if ends == "by an interrupt" else contextlib.nullcontext():
        train(None, **here, num_epochs=1, checkpoint_every=20)
    run = folder_at(tmp_path / "run")
    for name in run.checkpoint_names():
        assert read_state(run.inside(name))
    last = position_of(run.checkpoint_names()[-1])
    assert last == (1, 0) if ends == "with the epoch" else last >= (0, 30)


def test_a_job_saves_at_a_sigterm_that_the_users_code_would_ignore(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_data = MNIST.load_data

    def load_and_ignore(workload: MNIST) -> Data:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return load_data(workload)

    def step(worker: Worker, state: TrainingState) -> None:
        if state.step == 10:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mnist_ray.signals.SAME_WITHIN_S", 0)  # since the interrupt of another test
    monkeypatch.setattr(MNIST, "load_data", load_and_ignore)
    monkeypatch.setattr(Worker, "on_step", step)
    with pytest.raises(KeyboardInterrupt, match="to resume: "):
        train(None, **here, num_epochs=1)
    assert folder_at(tmp_path / "run").checkpoint_names()


def test_an_exception_of_the_users_code_is_raised_unchanged_also_if_it_cannot_read_a_file(
    here: dict[str, Any], tmp_path: Path
) -> None:
    callback = callback_at(tmp_path / "reads.py", "on_step(self, state)", 'open("/nowhere/at/all")')
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        train(None, **here, callback=callback)


def test_interrupted_while_the_report_is_written_a_run_is_finished_and_says_so(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice, write = list[str](), page.write
    monkeypatch.setattr("mnist_ray.run.evaluate.if_ended", advice.append)

    def write_interrupted(*given: Any, **options: Any) -> dict[str, bytes]:
        signal.raise_signal(signal.SIGTERM)
        return write(*given, **options)

    monkeypatch.setattr(page, "write", write_interrupted)
    said = f"the run is finished: {tmp_path}/run/result.json"
    with pytest.raises(KeyboardInterrupt, match=f"^interrupted; {re.escape(said)}$"):
        train(None, **here, num_epochs=1)
    assert advice[-1] == f"; {said}"
    assert capsys.readouterr().out.splitlines()[-1] == f"report     {tmp_path}/run/report.html"
    assert "finished: 1 of 1 epochs, tested on" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError(2, "gone"), r"\[Errno 2\] gone"), (UsageError("it has changed"), "it has changed")],
)
def test_blocks_that_are_lost_in_mid_run_are_one_line_with_the_way_on(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(40, dtype=np.float32)[:, None]
    whole = Arrays(rows, (rows[:, 0] > 20).astype(np.int64))

    class Lost(Classification):
        def load_data(self) -> Data:
            blocks: Any = type("Numbers", (Blocks,), {"sizes": (40, 40), "read": Mock(return_value=whole)})
            train = blocks()
            blocks.read.side_effect = [whole] * 9 + [error] * 99
            return Data(train, whole, metadata={"class_names": ["low", "high"]})

        def create_model(self) -> nn.Module:
            return nn.Linear(1, 2)

    monkeypatch.setattr("mnist_ray.storage._RETRIED_FOR_S", 0)
    settings: dict[str, Any] = {"num_workers": 0, "num_epochs": 20, "batch_size": 8, "num_streams": 1, "quiet": True}
    match = rf"^(train block \d cannot be read: )?{said}; to resume: train\(resume=True, .*\)$"
    with pytest.raises(JobError, match=match):
        train(Lost, **settings, storage_path=tmp_path, run_name="run")


@pytest.mark.processes
def test_a_class_without_a_file_is_trained(tmp_path: Path) -> None:
    done = run_text(CELL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 6"


@pytest.mark.parametrize("chooses", ["loss", "accuracy"])
def test_the_header_names_the_first_metric_which_may_be_the_loss_and_it_chooses_the_checkpoint(
    chooses: str, here: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Chosen(MNIST):
        metrics = (Metric("loss", "min"), ACCURACY) if chooses == "loss" else (ACCURACY,)

    low_loss, high_accuracy = {"loss": 0.1, "accuracy": 0.8}, {"loss": 0.2, "accuracy": 0.9}
    assert (score(Chosen(), low_loss) > score(Chosen(), high_accuracy)) == (chooses == "loss")
    run = train(Chosen, **here, num_epochs=1)
    assert [*run.metrics] == ["loss", "accuracy"]
    assert f", best by {chooses}\n" in capsys.readouterr().out
