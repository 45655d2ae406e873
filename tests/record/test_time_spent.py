"""The seconds in steps.csv, the line about the time, and the notes on what has slowed a training."""

from __future__ import annotations

import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.record.history import History
from mnist_ray.record.time_spent import TimeSpent
from mnist_ray.report.run_files import merged, read_csv
from mnist_ray.storage import RunFolder
from mnist_ray.training.events import TIMES, Progress, Saved
from mnist_ray.training.stopwatch import PARTS
from tests.conftest import mnist

HEALTHY = dict.fromkeys(PARTS, 0.0) | {"compute": 80.0, "workers": 8.0, "validation": 6.0, "data": 3.0, "start": 1.0}


def in_parts(*seconds: float) -> list[float]:
    return [*seconds, *[0.0] * (len(PARTS) - len(seconds))]


def progress(epoch: int, *parts: list[float]) -> Progress:
    values = {"loss": 0.5}
    return Progress(
        epoch, 9, 9, [0.5], values, values, 100, epoch_s=2.0, learning_rate=0.01, total_step=9 * epoch, parts=parts
    )


def test_the_mean_seconds_of_a_worker_are_columns_of_steps_csv(run: RunFolder) -> None:
    history = History(run, mnist(), TrainConfig())
    for event in (
        progress(1, in_parts(1.0, 0.5), in_parts(2.0)),
        progress(1, in_parts(0.25), in_parts(0.5)),
        Saved(1, {}, [in_parts(0.0, 1.0), in_parts(0.0, 2.0)]),
        progress(2),
    ):
        history.add(event)
    history.write_steps()
    first, second = TIMES[:2]
    rows = [(row[first.name], row[second.name]) for row in read_csv(run, "steps.csv")]
    assert rows == [("1.5", "0.25"), ("0.375", "1.5"), ("", "")]
    joined = merged([{"step": 2, "epoch": 0.5, "data_s": 1.5}, {"step": 3, "epoch": 1.0, "data_s": 0.375}], 2, TIMES)
    assert [row["data_s"] for row in joined] == [1.875]


def spent(*workers: dict[str, float]) -> TimeSpent:
    times = TimeSpent()
    times.add(progress(1, *([(HEALTHY | seconds)[part] for part in PARTS] for seconds in workers)))
    return times


def test_the_largest_shares_come_first_and_small_ones_are_left_out() -> None:
    times = spent({}, {"workers": 28.0, "compute": 60.0, "optimizer": 0.1})
    assert times.shares == "compute 71%, other workers 18%, validation 6%, data 3%, first step 1%"


@pytest.mark.parametrize(
    "workers",
    [[{}], [{}, {"compute": 86.0, "workers": 2.0}], [{"callbacks": 3.0, "checkpoints": 2.0}]],
)
def test_a_healthy_training_has_no_note(workers: list[dict[str, float]]) -> None:
    assert spent(*workers).new_notes() == []


def test_a_short_training_has_no_note() -> None:
    times = TimeSpent()
    times.add(progress(1, in_parts(0.5, 0.1)))
    assert times.new_notes() == []


@pytest.mark.parametrize(
    ("workers", "cause", "remedy"),
    [
        ([{"data": 150.0}], "waiting for data took 61% of the time (150.0 s)", "--loader-workers"),
        ([{"storage": 50.0}], "checkpoints took 34% of the time (50.0 s)", "the storage is slow"),
        ([{"checkpoints": 50.0}], "checkpoints took 34% of the time (50.0 s)", "the state is large"),
        ([{"callbacks": 40.0}], "callbacks took 29% of the time (40.0 s)", "less often"),
    ],
)
def test_what_has_slowed_a_training_is_noted_once(workers: list[dict[str, float]], cause: str, remedy: str) -> None:
    times = spent(*workers)
    (note,) = times.new_notes()
    assert note.startswith(cause)
    assert remedy in note
    assert times.new_notes() == []
