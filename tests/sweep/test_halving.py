"""What a sweep trains next: made-up sweeps, whose trials reach scores without training."""

import dataclasses
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from mnist_ray.sweep.halving import Segment, climb, rungs_of, segments, still_racing
from mnist_ray.sweep.proposals import Candidates
from mnist_ray.sweep.ranking import FAILING, find_best, score_at
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import DONE, FAILED, LOST, RUNNING, WAITING, Sweep
from mnist_ray.sweep.tune import read_sweep
from tests.sweep.conftest import point


def sweep_of(storage: Path, **settings: Any) -> Sweep:
    return read_sweep({"storage_path": str(storage), "run_name": "made-up", **settings})


class MadeUp:
    """A sweep whose trials reach what only the configuration, the seed and the epoch decide."""

    def __init__(self, sweep: Sweep, failing: int | None = None, slow: int | None = None) -> None:
        self.sweep, self.table = sweep, sweep.table()
        self.candidates = Candidates(sweep, self.table)
        points = self.candidates.points
        self.failing, self.slow = [None if number is None else points[number] for number in (failing, slow)]
        self.trained: list[tuple[Point, float, float]] = []  # of each segment: its trial, where it starts and ends

    def segments(self) -> list[Segment]:
        return segments(self.sweep, self.table, self.candidates)

    def run(self, num_slots: int, max_segments: float = math.inf) -> "MadeUp":
        """Run the sweep until it is over, or until it is killed after ``max_segments``."""
        now, running = 0.0, dict[Point, tuple[float, Segment]]()  # with the time when a segment ends
        while len(self.trained) < max_segments:
            free = [segment for segment in self.segments() if segment.point not in running]
            for segment in free[: num_slots - len(running)]:
                speed = 10 if segment.point == self.slow else 1
                seconds = speed * (segment.until_epoch - self.table.start(segment.point).epochs)
                running[segment.point] = now + seconds, segment
            if not running:
                break
            ended = min(running, key=lambda some: running[some][0])
            now, segment = running.pop(ended)
            self.end(segment)
        self.seconds = now
        return self

    def end(self, segment: Segment) -> None:
        record = self.table.by_point[segment.point]
        quality, luck = (random.Random(repr(of)).random() for of in (segment.point.configuration, segment))
        self.trained.append((segment.point, record.epochs, segment.until_epoch))
        record.epochs, record.val_monitor = segment.until_epoch, quality + 0.05 * luck + segment.until_epoch
        record.val_loss = 1.0
        record.add_report(record.epochs, record.val_monitor)
        record.state = DONE if segment.until_epoch == self.sweep.job.train.num_epochs else WAITING
        if segment.point == self.failing:
            record.state, record.reason = FAILED, "diverged"

    @property
    def outcome(self) -> Any:
        best = find_best(self.table)
        assert best is not None
        reports = {record.point: (record.reports, record.state) for record in self.table.by_point.values()}
        return reports, best.records[0].point, best.val_monitor


@pytest.mark.parametrize("failing", [None, 5])
@pytest.mark.parametrize("num_slots", [2, 3, 4, 16])
def test_any_number_of_slots_trains_the_same_and_nothing_twice(
    num_slots: int, failing: int | None, tmp_path: Path
) -> None:
    sweep = sweep_of(tmp_path)
    one, some = MadeUp(sweep, failing).run(1), MadeUp(sweep, failing).run(num_slots)
    assert some.outcome == one.outcome
    reached = dict[Point, float]()
    for trained, start, end in some.trained:
        assert reached.get(trained, 0.0) == start < end
        reached[trained] = end
    first = [sum(end == rung and trained.seed == 0 for trained, _, end in some.trained) for rung in rungs_of(sweep)]
    default = sweep.space.default_points(0)[0]
    assert first == [16, 9, 5, 4]
    assert reached[default] == 2, "the default, which is compared with the best, always goes on"
    assert some.seconds < one.seconds


@pytest.mark.parametrize("max_segments", range(0, 40, 3))
def test_a_killed_sweep_goes_on_where_it_was(max_segments: int, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    whole, killed = MadeUp(sweep).run(2), MadeUp(sweep).run(2, max_segments)
    sweep.job.run.write_text("sweep.csv", killed.table.to_csv())
    resumed = MadeUp(sweep).run(2)
    assert resumed.outcome == whole.outcome
    assert {*killed.trained}.isdisjoint(resumed.trained)
    assert sorted([*killed.trained, *resumed.trained], key=repr) == sorted(whole.trained, key=repr)


def test_a_rung_waits_for_its_slowest_trial(tmp_path: Path) -> None:
    """The default needs 20 s for the two epochs, and all others together less than 12 s."""
    sweep = sweep_of(tmp_path, num_confirmed=0)
    slow = MadeUp(sweep, slow=0).run(2)
    assert slow.outcome == MadeUp(sweep).run(2).outcome
    assert 20 < slow.seconds < 24


A, B, C, D = (point(32, rate) for rate in (0.01, 0.02, 0.03, 0.04))


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
    scores: list[float], expected: set[Point] | None, tmp_path: Path
) -> None:
    made_up = MadeUp(sweep_of(tmp_path, num_confirmed=0))
    made_up.candidates.points = [A, B, C, D]
    for some, score in zip((A, B, C, D), scores, strict=True):
        record = made_up.table.start(some)
        record.state = FAILED if score == FAILING else WAITING
        if not math.isnan(score):
            record.add_report(0.25, score)
    rungs = climb(made_up.sweep, made_up.table, made_up.candidates)
    assert [set(rung) for rung in rungs[1:]] == ([] if expected is None else [expected])
    made_up.candidates.num_unknown = 1  # Optuna has not proposed all
    assert climb(made_up.sweep, made_up.table, made_up.candidates) == [[A, B, C, D]]


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
    scores: dict[Point, list[float]], expected: set[Point], tmp_path: Path
) -> None:
    assert set(still_racing(sweep_of(tmp_path), scores)) == expected


def test_the_race_ends_where_the_validation_set_cannot_tell(tmp_path: Path) -> None:
    sweep = dataclasses.replace(sweep_of(tmp_path), num_validation=900)  # 0.9 of 900 examples: a standard error of 0.01
    assert still_racing(sweep, {A: [0.904, 0.896], B: [0.887, 0.895]}) == []
    assert still_racing(sweep, {A: [0.904, 0.896], B: [0.887, 0.890]}) == [A, B]
    assert still_racing(sweep, {A: [1.3, 1.3], B: [1.3, 1.2]}) == [A, B]  # a fraction such as MAPE may be above 1


def test_the_race_adds_a_seed_at_a_time_and_a_lost_trial_is_out_until_the_sweep_is_resumed(tmp_path: Path) -> None:
    made_up = MadeUp(sweep_of(tmp_path, num_trials=4)).run(4)
    seeds = [trained.seed for trained, *_ in made_up.trained if trained.seed]
    assert seeds == sorted(seeds)
    record = next(record for record in made_up.table.by_point.values() if record.point.seed == 1)
    record.state = LOST
    assert made_up.segments() == []
    record.state, record.reports = RUNNING, ""
    assert made_up.segments() == [Segment(record.point, 2)]


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        ({}, [0.25, 0.5, 1, 2]),
        ({"num_epochs": 3}, [0.375, 0.75, 1.5, 3]),
        ({"scheduler": "none"}, [2]),
    ],
)
def test_rungs_are_parts_of_all_epochs(settings: dict[str, Any], rungs: list[float], tmp_path: Path) -> None:
    assert rungs_of(sweep_of(tmp_path, **settings)) == rungs


def test_only_what_was_reported_from_an_epoch_on_counts_there(tmp_path: Path) -> None:
    made_up = MadeUp(sweep_of(tmp_path))
    record = made_up.table.start(A)
    assert math.isnan(score_at(made_up.table, B, 0.5))
    record.add_report(0.25, 0.1)
    record.add_report(0.5, 0.2)
    record.add_report(1.0, 0.3)
    assert [score_at(made_up.table, A, epoch) for epoch in (0.25, 0.5, 1)] == [0.1, 0.2, 0.3]
    assert math.isnan(score_at(made_up.table, A, 2))
    record.state, record.val_monitor = DONE, 0.3  # by --early-stopping-patience
    assert score_at(made_up.table, A, 2) == 0.3
    record.state = FAILED
    assert score_at(made_up.table, A, 0.25) == FAILING


def test_optuna_learns_from_the_first_rung_and_proposes_nothing_twice(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, search_algorithm="optuna", num_trials=40, sweep=["learning_rate=log:1e-5:1"])
    candidates = Candidates(sweep, sweep.table())
    assert candidates.points == sweep.space.default_points(0)

    def away(some: Point) -> float:
        return abs(math.log10(some.values["learning_rate"]) + 4)

    while candidates.propose(lambda some: -away(some)):
        pass
    assert len({*candidates.points}) == len(candidates.points) == 40
    at_random = (1**2 / 2 + 4**2 / 2) / 5  # the mean distance of a point from -4, uniform in -5 to 0
    assert statistics.mean(map(away, candidates.points[-15:])) < 0.5 * at_random


@pytest.mark.parametrize("num_known", [1, 12])
def test_a_resumed_search_with_optuna_proposes_the_same(num_known: int, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, search_algorithm="optuna", num_trials=16)

    def proposed_after(known: list[Point]) -> list[Point]:
        table = sweep.table()
        for some in known:
            table.start(some)
        candidates = Candidates(sweep, table)
        while candidates.propose(lambda some: some.values["learning_rate"]):
            pass
        return candidates.points

    whole = proposed_after([])
    assert proposed_after(whole[:num_known]) == whole


def test_optuna_stops_proposing_if_there_are_no_new_points(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, search_algorithm="optuna", num_trials=8, sweep=["batch_size=32,64,128"])
    table = sweep.table()
    known = [sweep.space.point({"batch_size": size}, 0) for size in (64, 32)]
    for some in known:
        table.start(some)
    candidates = Candidates(sweep, table)
    assert candidates.points == known
    candidates.propose(lambda some: FAILING if some == known[0] else math.nan)
    assert candidates.propose(lambda some: 0.5) is None, "there are only three batch sizes"
    assert (len(candidates.points), candidates.num_unknown) == (3, 0)
