"""What a job of many runs trains next: made-up jobs, whose members reach scores without training."""

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest

from mnist_ray.many.jobs import read_sweep
from mnist_ray.many.points import Configuration, Point
from mnist_ray.many.rungs import FAILING, Segment, climb, find_best, rungs_of, score_at, segments, still_racing
from mnist_ray.many.table import Many
from mnist_ray.report.run_files import DONE, FAILED, LOST, RUNNING, WAITING
from tests.many.conftest import point


def sweep_of(storage: Path, **settings: Any) -> Many:
    return read_sweep({"storage_path": str(storage), "run_name": "made-up", **settings})


class MadeUp:
    """A job whose members reach what only the configuration, the seed, the fold and the epoch decide."""

    def __init__(self, many: Many, failing: int | None = None) -> None:
        self.many, self.table = many, many.table()
        self.failing = None if failing is None else many.points(many.configurations[failing])[0]
        self.trained: list[tuple[Point, float, float]] = []  # of each segment: its point, where it starts and ends

    def segments(self) -> list[Segment]:
        return segments(self.many, self.table)

    def run(self, num_slots: int, max_segments: float = math.inf) -> "MadeUp":
        """Run the job until it is over, or until it is killed after ``max_segments``."""
        now, running = 0.0, dict[Point, tuple[float, Segment]]()  # with the time when a segment ends
        while len(self.trained) < max_segments:
            free = [segment for segment in self.segments() if segment.point not in running]
            for segment in free[: num_slots - len(running)]:
                seconds = segment.until_epoch - self.table.start(segment.point).epochs
                running[segment.point] = now + seconds, segment
            if not running:
                break
            ended = min(running, key=lambda some: running[some][0])
            now, segment = running.pop(ended)
            self.end(segment)
        self.seconds = now
        return self

    def end(self, segment: Segment) -> None:
        member = self.table.by_point[segment.point]
        quality, luck = (random.Random(repr(of)).random() for of in (segment.point.configuration, segment))
        self.trained.append((segment.point, member.epochs, segment.until_epoch))
        value = quality + 0.05 * luck + segment.until_epoch
        self.table.report(member, {"epochs": segment.until_epoch, "val_accuracy": value, "val_loss": 1.0})
        member.state = DONE if segment.until_epoch == self.many.job.train.num_epochs else WAITING
        if segment.point == self.failing:
            member.state, member.reason = FAILED, "diverged"

    @property
    def outcome(self) -> Any:
        best = find_best(self.table)
        assert best is not None
        reports = {member.point: (member.reports, member.state) for member in self.table.members}
        return reports, best.configuration, best.val_monitor


@pytest.mark.parametrize(
    ("num_slots", "failing", "settings"),
    [(2, None, {}), (3, 5, {}), (16, None, {}), (3, None, {"folds": 2}), (16, 5, {"folds": 2})],
)
def test_any_number_of_slots_trains_the_same_and_nothing_twice(
    num_slots: int, failing: int | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    many = sweep_of(tmp_path, **settings)
    one, some = MadeUp(many, failing).run(1), MadeUp(many, failing).run(num_slots)
    assert some.outcome == one.outcome
    reached = dict[Point, float]()
    for trained, start, end in some.trained:
        assert reached.get(trained, 0.0) == start < end
        reached[trained] = end
    first = [sum(end == rung and trained.seed == 0 for trained, _, end in some.trained) for rung in rungs_of(many)]
    assert many.space.default
    default = many.points(many.space.default)
    assert first == [len(default) * number for number in (16, 9, 5, 4)]
    assert {reached[each] for each in default} == {2}, "the default, which is compared with the best, always goes on"
    assert some.seconds < one.seconds


@pytest.mark.parametrize("max_segments", range(0, 40, 6))
def test_a_killed_sweep_goes_on_where_it_was(max_segments: int, tmp_path: Path) -> None:
    many = sweep_of(tmp_path)
    whole, killed = MadeUp(many).run(2), MadeUp(many).run(2, max_segments)
    killed.table.write(many.job.run)
    resumed = MadeUp(many).run(2)
    assert resumed.outcome == whole.outcome
    assert {*killed.trained}.isdisjoint(resumed.trained)
    assert sorted([*killed.trained, *resumed.trained], key=repr) == sorted(whole.trained, key=repr)


def test_seeds_and_folds_are_trained_at_once_and_tested_and_what_has_failed_is_tried_again(tmp_path: Path) -> None:
    many = sweep_of(tmp_path, num_seeds=2, folds=2)
    single = MadeUp(Many(many.job))
    names = ["seed-0_fold-1", "seed-0_fold-2", "seed-1_fold-1", "seed-1_fold-2"]
    assert [segment.point.name for segment in single.segments()] == names
    assert all(segment.is_tested and segment.until_epoch == 2 for segment in single.segments())
    for segment, state in zip(single.segments(), (DONE, FAILED, LOST, RUNNING), strict=True):
        single.table.start(segment.point).state = state
    assert [segment.point.name for segment in single.segments()] == names[1:]


A, B, C, D = (point(32, rate).configuration for rate in (0.01, 0.02, 0.03, 0.04))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.4, 0.3, 0.2], {B, C}),
        ([0.1, 0.4, 0.2, 0.2], {B, C, D}),  # a tie
        ([0.1, 0.4, FAILING, FAILING], {A, B}),
        ([FAILING, FAILING, FAILING, 0.2], {D}),
        ([FAILING] * 4, set()),
        ([0.1, 0.4, 0.3, math.nan], None),  # one is not there yet
    ],
)
def test_the_better_half_goes_on_when_all_are_there(
    scores: list[float], expected: set[Configuration] | None, tmp_path: Path
) -> None:
    grid = {"sweep": ["batch_size=32", "learning_rate=0.01,0.02,0.03,0.04"], "search_algorithm": "grid"}
    made_up = MadeUp(sweep_of(tmp_path, num_confirmed=0, **grid))
    for some, score in zip((A, B, C, D), scores, strict=True):
        member = made_up.table.start(Point(some, 0))
        member.state = FAILED if score == FAILING else WAITING
        if not math.isnan(score):
            made_up.table.report(member, {"epochs": 0.25, "val_accuracy": score})
    rungs = climb(made_up.many, made_up.table)
    assert [set(rung) for rung in rungs[1:]] == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({A: [0.9, 0.8], B: [0.8, 0.7]}, {A}),  # the seeds explain everything else
        ({A: [0.9, 0.8], B: [0.8, 0.9]}, {A, B}),
        ({A: [0.9, 0.8], B: [0.88, 0.81], C: [0.5, 0.41]}, {A, B}),
        ({A: [0.9, 0.8], B: [0.8, 0.9], C: [FAILING, 0.95]}, {A, B}),
        ({A: [0.9, FAILING], B: [0.8, 0.7]}, set()),  # B is alone
        # a paired t-test: the differences 0.1, 0.2 and 0.3 have mean 0.2 and standard error 0.0577
        ({A: [1.1, 1.2, 1.3], B: [1.0, 1.0, 1.0]}, {A}),  # t = 3.46 > 1.89
        ({A: [1.0, 1.2, 1.3], B: [1.0, 1.0, 1.2]}, {A, B}),  # 0.1 / 0.0577 = 1.73
        ({A: [1.02, 1.2, 1.3], B: [1.0, 1.0, 1.2]}, {A}),  # 0.1067 / 0.0521 = 2.05
    ],
)
def test_who_is_behind_by_more_than_chance_is_out_of_the_race(
    scores: dict[Configuration, list[float]], expected: set[Configuration], tmp_path: Path
) -> None:
    assert set(still_racing(sweep_of(tmp_path), scores)) == expected


def test_the_race_ends_where_the_validation_set_cannot_tell(tmp_path: Path) -> None:
    many = dataclasses.replace(sweep_of(tmp_path), num_validation=900)  # 0.9 of 900 examples: a standard error of 0.01
    assert still_racing(many, {A: [0.904, 0.896], B: [0.887, 0.895]}) == []
    assert still_racing(many, {A: [0.904, 0.896], B: [0.887, 0.890]}) == [A, B]
    assert still_racing(many, {A: [1.3, 1.3], B: [1.3, 1.2]}) == [A, B]  # a fraction such as MAPE may be above 1


def test_the_race_adds_a_seed_at_a_time_and_a_lost_trial_is_out_until_the_sweep_is_resumed(tmp_path: Path) -> None:
    made_up = MadeUp(sweep_of(tmp_path, num_trials=4)).run(4)
    seeds = [trained.seed for trained, *_ in made_up.trained if trained.seed]
    assert seeds == sorted(seeds)
    member = next(member for member in made_up.table.members if member.point.seed == 1)
    member.state = LOST
    assert made_up.segments() == []
    member.state, member.reports = RUNNING, {}
    assert made_up.segments() == [Segment(member.point, 2)]


def test_rungs_are_parts_of_all_epochs(tmp_path: Path) -> None:
    assert rungs_of(sweep_of(tmp_path, num_epochs=3)) == [0.375, 0.75, 1.5, 3]
    assert rungs_of(sweep_of(tmp_path, scheduler="none")) == [2]


def test_only_what_was_reported_from_an_epoch_on_counts_there_and_of_several_members_the_mean(tmp_path: Path) -> None:
    table = MadeUp(sweep_of(tmp_path)).table
    first, second = Point(A, 0), Point(A, 1)
    member = table.start(first)
    assert math.isnan(score_at(table, [second], 0.5))
    for epochs, value in ((0.25, 0.1), (0.5, 0.2), (1.0, 0.3)):
        table.report(member, {"epochs": epochs, "val_accuracy": value})
    assert [score_at(table, [first], epoch) for epoch in (0.25, 0.5, 1)] == [0.1, 0.2, 0.3]
    assert math.isnan(score_at(table, [first], 2))
    member.state = DONE  # by --early-stopping-patience
    assert score_at(table, [first], 2) == 0.3
    assert math.isnan(score_at(table, [first, second], 1))
    table.report(table.start(second), {"epochs": 1.0, "val_accuracy": 0.5})
    assert score_at(table, [first, second], 1) == pytest.approx(0.4)
    member.state = FAILED
    assert score_at(table, [first, second], 0.25) == FAILING
