"""The seconds in steps.csv, the line about the time, and the notes on what has slowed a training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Blocks, Split
from mnist_ray.job.job import Job, read_job
from mnist_ray.record.history import History, merged
from mnist_ray.record.time_spent import TimeSpent, notes_on, shares_of
from mnist_ray.report.run_files import read_csv
from mnist_ray.storage import RunFolder
from mnist_ray.training.events import TIMES, Progress, Saved, Started
from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload.user_code import SourceCode
from tests.conftest import mnist

HEALTHY = dict.fromkeys(PARTS, 0.0) | {"compute": 80.0, "workers": 8.0, "validation": 6.0, "data": 3.0, "start": 1.0}


def job(**settings: Any) -> Job:
    return read_job({"run_name": "none", "storage_path": "/nowhere", **settings})


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
    joined = merged([{"step": 2, "epoch": 0.5, "data_s": 1.5}, {"step": 3, "epoch": 1.0, "data_s": 0.375}], 1, TIMES)
    assert [row["data_s"] for row in joined] == [1.875]


def test_the_seconds_of_each_worker_are_added() -> None:
    times = TimeSpent()
    for parts in ([in_parts(1.0, 0.5), in_parts(2.0)], [in_parts(4.0)]):
        times.add(progress(1, *parts))
    times.add(Saved(1, {}, [in_parts(0.0, 1.0), in_parts(0.0, 1.0)]))
    assert [(seconds["data"], seconds["copies"]) for seconds in times.of_workers] == [(5.0, 1.5), (2.0, 1.0)]


def test_the_largest_shares_come_first_and_small_ones_are_left_out() -> None:
    other = HEALTHY | {"workers": 28.0, "compute": 60.0, "optimizer": 0.1}
    assert shares_of([HEALTHY, other]) == "compute 71%, other workers 18%, validation 6%, data 3%, first step 1%"


EXAMPLES = Split([(0, 0)])


class Stored(Blocks):
    sizes = (1,)


def notes(*workers: dict[str, float], split: Split = EXAMPLES, **settings: Any) -> list[str]:
    of_workers = [HEALTHY | seconds for seconds in workers]
    return notes_on(of_workers, [f"host{number}" for number in range(len(workers))], job(**settings), split)


def test_a_healthy_training_has_no_note() -> None:
    uneven = HEALTHY | {"compute": 86.0, "workers": 2.0}
    assert notes({}) == notes({}, uneven) == notes({"callbacks": 3.0, "checkpoints": 2.0}) == []
    tiny = {part: seconds / 200 for part, seconds in HEALTHY.items()} | {"data": 0.5}
    assert notes(tiny) == []


@pytest.mark.parametrize(
    ("workers", "more", "cause", "remedy"),
    [
        ([{"data": 150.0}], {}, "waiting for data took 61% of the time (150.0 s)", "--loader-workers 2"),
        ([{"data": 50.0}], {"loader_workers": 2}, "waiting for data took 34%", "more --loader-workers"),
        ([{"data": 50.0}], {"split": Split(Stored())}, "waiting for data took 34%", "Blocks.read or a transform"),
        ([{"storage": 50.0}], {}, "checkpoints took 34% of the time (50.0 s)", "the storage is slow"),
        ([{"checkpoints": 50.0}], {}, "checkpoints took 34% of the time (50.0 s)", "the state is large"),
        ([{"workers": 99.0}] * 4, {}, "all workers wait for gradients 52% of the time", "a larger --batch-size"),
        (
            [{"workers": 90.0}, {"compute": 170.0, "workers": 1.0}, {"workers": 92.0}],
            {},
            "the other workers wait 50% of the time for worker 1 on host1",
            "2.1 times as slow",
        ),
    ],
)
def test_what_has_slowed_a_training_is_one_note(
    workers: list[dict[str, float]], more: dict[str, Any], cause: str, remedy: str
) -> None:
    (note,) = notes(*workers, **more)
    assert note.startswith(cause)
    assert remedy in note


def test_a_slow_callback_is_named_only_if_there_is_one() -> None:
    slow = [HEALTHY | {"callbacks": 40.0}]
    with_callback = dataclasses.replace(job(), callbacks=(SourceCode("slow.py", "", ""),))
    (note,) = notes_on(slow, ["host"], with_callback, EXAMPLES)
    assert note.startswith("callbacks took 29% of the time (40.0 s)")
    assert notes_on(slow, ["host"], job(), EXAMPLES) == []


def test_workers_are_named_by_the_hosts_of_the_last_attempt() -> None:
    times = TimeSpent()
    times.add(Started(2, ("a", "b"), 1, "cpu", "fp32", epoch=0, step=0, total_step=0))
    assert times.hosts == ("a", "b")
