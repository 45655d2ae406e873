import dataclasses
import math

import pytest

from mnist_ray.cluster.connection import Cluster, Node, WorkerPlan
from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.sweeps import search, sweep
from mnist_ray.sweeps.search import DONE, FAILED, RUNNING, STOPPED, Point, TrialRecord, TrialTable

DEFAULT = Point(TrainConfig().batch_size, TrainConfig().learning_rate, 0)


def test_the_same_seed_gives_the_same_proposals_and_another_seed_others() -> None:
    proposals = [search.propose(SweepConfig(), seed) for seed in (0, 0, 1)]
    assert proposals[0] == proposals[1]
    assert proposals[0][1:] != proposals[2][1:]


def test_random_proposals_stay_inside_and_start_with_the_default() -> None:
    points = search.propose(SweepConfig(num_trials=200), seed=0)
    assert points[0] == DEFAULT
    assert len(points) == 200
    assert {point.batch_size for point in points} == {32, 64, 128, 256, 512}
    rates = [point.learning_rate for point in points]
    assert all(5e-4 <= rate <= 2e-2 for rate in rates)
    below = sum(rate < math.sqrt(5e-4 * 2e-2) for rate in rates)
    assert 70 < below < 130, "not log-uniform"


def test_a_default_outside_the_space_is_not_tried() -> None:
    assert DEFAULT not in search.propose(SweepConfig(batch_sizes=(32, 64)), seed=0)
    assert DEFAULT not in search.propose(SweepConfig(learning_rate_min=6e-3), seed=0)


def test_a_grid_covers_both_ends_for_every_batch_size() -> None:
    points = search.propose(SweepConfig(search="grid", num_trials=7, batch_sizes=(32, 64)), seed=0)
    assert len(points) == len(set(points)) == 6
    assert {point.learning_rate for point in points} == {5e-4, 3.162e-3, 2e-2}


def test_a_grid_without_a_trial_for_each_batch_size_is_refused() -> None:
    with pytest.raises(UsageError, match="--search grid needs a trial for each of the 5 batch sizes"):
        search.propose(SweepConfig(search="grid", num_trials=4), seed=0)


def test_a_point_replaces_just_what_is_searched() -> None:
    config = TrainConfig(num_epochs=7, seed=3)
    assert Point(9, 0.5, 4).applied_to(config) == dataclasses.replace(config, batch_size=9, learning_rate=0.5, seed=4)


def record(trial: int, state: str, accuracy: float, loss: float = 1.0, epochs: float = 2.0) -> TrialRecord:
    return TrialRecord(trial, 32, trial / 100, 0, state, epochs, accuracy, loss)


def test_the_table_ranks_by_accuracy_then_loss_and_failed_trials_last() -> None:
    rows = [
        record(1, FAILED, 0.99),
        record(2, DONE, 0.97, loss=0.5),
        record(3, STOPPED, 0.97, loss=0.25, epochs=1.0),
        record(4, RUNNING, math.nan),
        record(5, DONE, 0.98),
    ]
    table = TrialTable(rows)
    assert [row.trial for row in table.ranked[:3]] == [5, 3, 2]
    assert table.best is not None
    assert table.best.records == (rows[4],)
    assert (table.count(DONE), table.count(STOPPED, FAILED)) == (2, 2)
    assert table.epochs_run() == 9.0


def test_a_table_without_a_validated_trial_has_no_best() -> None:
    assert TrialTable([record(1, FAILED, math.nan), record(2, RUNNING, math.nan)]).best is None


def test_a_written_table_is_read_back() -> None:
    table = TrialTable([record(1, FAILED, math.nan), record(2, DONE, 0.1 + 0.2)])
    table.by_point[Point(32, 0.01, 0)].reason = 'OSError: "no, space"\n'
    again = TrialTable.from_csv(table.to_csv())
    assert repr(list(again.by_point.values())) == repr(list(table.by_point.values()))
    assert list(TrialTable.from_csv("").by_point) == []


def test_a_damaged_table_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sweep\.csv is damaged"):
        TrialTable.from_csv("trial,batch_size\n1,2\n")


def test_a_trial_that_starts_again_keeps_its_number() -> None:
    table = TrialTable()
    first = table.start(Point(8, 0.5, 0))
    first.state, first.reason = FAILED, "killed"
    assert table.start(Point(8, 0.25, 0)).trial == 2
    again = table.start(Point(8, 0.5, 0))
    assert (again.trial, again.state, again.reason) == (1, RUNNING, "")


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "asked", "expected"),
    [
        ([Node(2)], 1, 1, None, 2),
        ([Node(2)], 2, 1, None, 1),
        ([Node(2)], 1, 2, None, 1),
        ([Node(8), Node(8)], 1, 3, None, 4),
        ([Node(8), Node(8)], 4, 1, None, 4),
        ([Node(8)], 1, 1, 3, 3),
        ([Node(64)], 1, 1, None, 16),
    ],
)
def test_no_more_trials_run_at_a_time_than_the_cluster_holds(
    nodes: list[Node], workers: int, cpus: int, asked: int | None, expected: int
) -> None:
    plan = WorkerPlan(workers, cpus, use_gpu=False, must_scale_up=False)
    cluster = Cluster(False, tuple(nodes), "/logs")
    limit = SweepConfig(max_concurrent_trials=asked)
    assert sweep.trials_at_a_time(limit, plan, cluster, autoscaling=False) == expected


def test_as_many_trials_as_asked_for_run_where_the_cluster_starts_nodes_on_demand() -> None:
    plan = WorkerPlan(1, 1, use_gpu=False, must_scale_up=True)
    head_only = Cluster(False, (Node(0),), "/logs")
    asked = SweepConfig(max_concurrent_trials=8)
    assert sweep.trials_at_a_time(asked, plan, head_only, autoscaling=True) == 8
    assert sweep.trials_at_a_time(SweepConfig(), plan, head_only, autoscaling=True) == 1


def table_of(*rows: tuple[float, int, str, float]) -> TrialTable:
    """Return a table of (learning rate, seed, state, accuracy)."""
    return TrialTable(
        TrialRecord(number, 128, rate, seed, state, 2.0, accuracy, 1.0)
        for number, (rate, seed, state, accuracy) in enumerate(rows, 1)
    )


def test_the_best_and_the_default_are_confirmed_with_two_more_seeds() -> None:
    default = TrainConfig().learning_rate
    table = table_of((1e-3, 0, DONE, 0.99), (2e-3, 0, DONE, 0.98), (3e-3, 0, STOPPED, 0.995), (default, 0, DONE, 0.9))
    points = search.confirmations(SweepConfig(num_confirmed=1), 0, table)
    assert [(point.learning_rate, point.seed) for point in points] == [(1e-3, 1), (default, 1), (1e-3, 2), (default, 2)]
    assert search.confirmations(SweepConfig(num_confirmed=0), 0, table) == []


def test_the_mean_over_seeds_chooses_among_those_that_were_confirmed() -> None:
    table = table_of(
        (1e-3, 0, DONE, 0.99), (1e-3, 1, DONE, 0.97),
        (2e-3, 0, DONE, 0.985), (2e-3, 1, DONE, 0.985),
        (3e-3, 0, DONE, 0.989),
        (4e-3, 0, DONE, 0.999), (4e-3, 1, FAILED, 0.999),
    )  # fmt: skip
    assert table.best is not None
    assert {record.learning_rate for record in table.best.records} == {2e-3}
    assert table.best.val_accuracy == pytest.approx(0.985)


def test_checkpoints_are_kept_of_what_may_come_out_as_the_best() -> None:
    rows = [(1e-3, 0, DONE, 0.99), (2e-3, 0, DONE, 0.985), (3e-3, 0, DONE, 0.98)]
    searched = search.contenders(SweepConfig(num_confirmed=2), 0, table_of(*rows))
    assert {point.learning_rate for point in searched} == {1e-3, 2e-3}
    confirmed = search.contenders(SweepConfig(num_confirmed=2), 0, table_of(*rows, (2e-3, 1, DONE, 0.9)))
    assert {(point.learning_rate, point.seed) for point in confirmed} == {(1e-3, 0), (2e-3, 0), (2e-3, 1)}
    single = search.contenders(SweepConfig(num_confirmed=0), 0, table_of(*rows))
    assert {point.learning_rate for point in single} == {1e-3}
    assert search.contenders(SweepConfig(), 0, table_of((1e-3, 0, FAILED, 0.9))) == set()
    still_better = search.contenders(SweepConfig(num_confirmed=0), 0, table_of(*rows, (4e-3, 0, RUNNING, 0.999)))
    assert {point.learning_rate for point in still_better} == {1e-3}
