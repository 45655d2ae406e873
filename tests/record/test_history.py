import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest

from mnist_ray.checkpoints.checkpoint import Snapshot
from mnist_ray.checkpoints.state_file import FORMAT, CheckpointMetrics
from mnist_ray.config import TrainConfig
from mnist_ray.record.history import History
from mnist_ray.report.run_files import merged, read_csv, read_numbers
from mnist_ray.schema import STEPS_FILE
from mnist_ray.storage import RunFolder, checkpoint_name
from mnist_ray.training.events import EpochFinished, Progress, Started, Validated
from mnist_ray.workload.figures import Figure, logged_figures
from tests.conftest import mnist


def finished(epoch: int) -> EpochFinished:
    window, so_far = {"loss": 0.1, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.9}
    return EpochFinished(
        Progress(epoch, 9, 9, [0.1], window, so_far, 100, epoch_s=2.0, learning_rate=0.01, total_step=9 * epoch)
    )


def validated(epoch: int, loss: float, accuracy: float) -> Validated:
    return Validated(epoch, {"loss": loss, "accuracy": accuracy}, 1.0, total_step=4)


def started(epoch: int) -> Started:
    return Started(1, ("host",), 1, "cpu", "fp32", epoch=epoch, step=0, total_step=9 * epoch, epochs=epoch)


def columns(run: RunFolder, *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in read_csv(run, "metrics.csv")]


def test_an_epoch_gets_one_row_in_any_order_of_its_events(run: RunFolder) -> None:
    history = History(run, mnist(), TrainConfig())
    for event in (started(0), finished(1), finished(2), validated(1, 0.25, 0.5), validated(2, 0.125, 0.75)):
        history.add(event)
    found = columns(run, "epoch", "train_loss", "val_accuracy", "examples_per_s")
    assert found == [("1", "0.5", "0.5", "50.0"), ("2", "0.5", "0.75", "50.0")]


def test_a_resumed_run_keeps_the_epochs_that_it_does_not_repeat(run: RunFolder) -> None:
    first = History(run, mnist(), TrainConfig())
    for event in (started(0), finished(1), validated(1, 0.25, 0.5), finished(2)):
        first.add(event)
    again = History(run, mnist(), TrainConfig())
    again.add(dataclasses.replace(started(1), num_workers=3))
    assert again.num_workers == 3
    assert list(again.rows) == [1]
    again.add(finished(2))
    assert columns(run, "epoch", "val_loss") == [("1", "0.25"), ("2", "")]


def test_a_run_whose_workload_has_other_metrics_now_is_resumed(run: RunFolder) -> None:
    run.write_text("metrics.csv", "epoch,train_loss,train_f1,epoch_s\n1,0.25,0.5,2.0\n")
    history = History(run, mnist(), TrainConfig())
    assert history.mean_rate() is None
    history.add(finished(2))
    assert columns(run, "train_loss", "train_accuracy") == [("0.25", ""), ("0.5", "0.9")]
    assert history.mean_rate() == History(run, mnist(), TrainConfig()).mean_rate() == 50.0


def test_epochs_that_a_killed_job_did_not_hear_of_are_filled_from_checkpoints(run: RunFolder) -> None:
    first = History(run, mnist(), TrainConfig())
    for event in (started(0), finished(1), validated(1, 0.25, 0.5), finished(2)):
        first.add(event)
    values: dict[str, Any] = {"train_loss": 8.0, "train_accuracy": 0.0, "examples_per_s": 5.0, "train_s": 2.0}
    values |= {"val_loss": 0.75, "val_accuracy": 0.25, "val_score": [0.25, -0.75], "val_s": 1.5}
    for epoch, step in ((2, 0), (3, 0), (3, 4), (4, 0)):
        metrics = CheckpointMetrics(epoch, step, values=values)
        document = {"format": FORMAT, "epoch": epoch, "step": step, "metrics": metrics.to_dict()}
        Snapshot({}, {}, document).write(run.inside(checkpoint_name(epoch, step)))
    again = History(run, mnist(), TrainConfig())
    again.add(started(3))
    names = ("epoch", "train_loss", "val_loss", "epoch_s", "examples_per_s")
    assert columns(run, *names) == [
        ("1", "0.5", "0.25", "2.0", "50.0"),
        ("2", "0.5", "0.75", "2.0", "50.0"),
        ("3", "8.0", "0.75", "", "5.0"),
    ]
    assert again.mean_rate() == 50.0


# --- steps.csv


def progress(step: int) -> Progress:
    window = {"loss": 1 / step, "accuracy": 0.5}
    return Progress(1, step, 1000, [0.1], window, window, 100, 2.0, learning_rate=0.01 / step, total_step=step)


def test_a_resumed_run_keeps_the_steps_that_it_does_not_repeat(run: RunFolder) -> None:
    first = History(run, mnist(), TrainConfig())
    for step in (2, 5, 9, 13):
        first.add(progress(step))
    first.write_steps()
    again = History(run, mnist(), TrainConfig())
    again.add(started(1))
    again.add(progress(11))
    again.write_steps()
    assert [row["step"] for row in read_csv(run, STEPS_FILE)] == ["2", "5", "9", "11"]


def test_a_long_run_has_few_rows_of_steps_with_right_means(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_ray.record.history.MAX_STEP_ROWS", 10)
    history = History(run, mnist(), TrainConfig())
    for step in range(2, 2002, 2):
        history.add(progress(step))
    history.write_steps()
    rows = read_numbers(run, STEPS_FILE)
    sizes = [row["step"] - before for before, row in zip([0, *(row["step"] for row in rows)], rows, strict=False)]
    assert len(rows) <= 10
    sums = [row["train_loss"] * size for row, size in zip(rows, sizes, strict=True)]
    assert sum(sums) == pytest.approx(sum(2 * 1 / step for step in range(2, 2002, 2)))
    assert all(row["learning_rate"] == pytest.approx(0.01 / row["step"]) for row in rows)
    assert rows[-1]["step"] == 2000


def test_figures_that_are_no_means_are_in_both_files_if_the_run_has_them(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    History(run, mnist(), TrainConfig()).add(finished(1))
    assert "gradient_norm" not in read_csv(run, "metrics.csv")[0]
    monkeypatch.setattr("mnist_ray.record.history.MAX_STEP_ROWS", 4)
    for first, last in ((1, 2), (3, 5)):  # resumed after two steps
        history = History(run, mnist(), TrainConfig(clip_grad_norm=0.5))
        for step in range(first, last + 1):
            others = {} if step == 4 else {"gradient_norm": 10.0 - step}  # a step without weight has none
            history.add(dataclasses.replace(progress(step), others=others))
        history.write_steps()
    history.add(finished(1))
    found = [(row["step"], row["gradient_norm"]) for row in read_csv(run, STEPS_FILE)]
    assert found == [("2", "9.0"), ("4", "7.0"), ("5", "5.0")]
    assert columns(run, "train_loss", "gradient_norm", "epoch_s") == [("0.5", "9.0", "2.0")]


def test_a_name_that_is_logged_late_begins_its_column_late_also_in_a_resumed_run(run: RunFolder) -> None:
    history = History(run, mnist(), TrainConfig())
    for step, logged in ((2, {}), (5, {"kl": 0.5}), (9, {"kl": 0.25})):
        history.add(replace(progress(step), others=logged, logged=logged))
    history.add(EpochFinished(replace(progress(9), logged={"kl": 0.375})))
    history.write_steps()
    assert [row["kl"] for row in read_csv(run, STEPS_FILE)] == ["", "0.5", "0.25"]
    again = History(run, mnist(), TrainConfig())
    again.add(started(1))
    again.add(replace(finished(2), last=replace(finished(2).last, logged={"kl": 0.125, "penalty": 2.0})))
    assert columns(run, "epoch", "kl", "penalty") == [("1", "0.375", ""), ("2", "0.125", "2.0")]


def test_a_figure_of_a_further_validation_set_has_the_form_of_the_longest_metric_that_its_name_ends_with() -> None:
    known = [*mnist().all_figures, Figure("val_top_accuracy", ("validation",), "mean", "number")]
    found = logged_figures(["val_far_accuracy", "val_far_top_accuracy", "val_far_loss", "mine"], known)
    assert [(figure.form, figure.at) for figure in found] == [
        ("fraction", ("validation",)),
        ("number", ("validation",)),
        ("number", ("validation",)),
        ("number", ("step", "epoch")),
    ]


def test_a_row_of_merged_steps_leaves_out_what_is_not_known() -> None:
    losses, scores = {3: 1.0, 4: 5.0, 9: 2.0}, {3: 0.5, 4: math.nan, 9: math.nan}
    rows = [{"step": step, "train_loss": losses[step], "train_f1": scores[step]} for step in losses]
    first, last = merged(rows, 2, [Figure(name, ("step",), "mean") for name in ("train_loss", "train_f1")])
    assert first == {"step": 4, "train_loss": 2.0, "train_f1": 0.5}
    assert last["train_loss"] == 2.0
    assert math.isnan(last["train_f1"])
