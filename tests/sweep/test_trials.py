import dataclasses
import functools
import itertools
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray import tune
from ray.tune.search import Searcher

from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.cluster.plan import Cluster, Node, WorkerPlan
from mnist_ray.cluster.watch import RaySilentError
from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import read_job
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group
from mnist_ray.report.run_files import csv_text
from mnist_ray.run.worker import LoopSpec, TrialSink, train_worker
from mnist_ray.storage import RunFolder, checkpoint_name, locate
from mnist_ray.sweep import trial, tuner
from mnist_ray.sweep.ranking import finalists, find_best, may_be_tested, ranked, result_of
from mnist_ray.sweep.space import space_of
from mnist_ray.sweep.trials import DONE, FAILED, LOST, RUNNING, STOPPED, WAITING, TrialRecord, TrialTable
from mnist_ray.sweep.tune import SweepConsole, read_sweep
from mnist_ray.training.state import StopWantedError
from mnist_ray.workload import Regression, Workload, setting
from tests.conftest import QUICK, mnist, with_data
from tests.sweep.conftest import point


def test_the_reports_of_a_trials_workers_come_from_its_own_thread(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = list[tuple[int, int]]()

    def create_trainer(spec: Any, plan: Any, folder: str, max_failures: int, callbacks: Any) -> Any:
        def fit() -> None:
            for number in range(3):
                callbacks[0].after_report(None, [{"number": number}, {}], None)

        return Mock(fit=fit)

    monkeypatch.setattr(trial, "create_trainer", create_trainer)
    monkeypatch.setattr(tune, "report", lambda metrics: reported.append((threading.get_ident(), metrics["number"])))
    trial.train_on_workers(Mock(), Mock())
    assert reported == [(threading.get_ident(), number) for number in range(3)]


def table_with(*records: TrialRecord, workload: Any = None) -> TrialTable:
    workload = workload or type(mnist())
    return TrialTable(workload, space_of(workload, {}), records)


def record(trial: int, state: str, accuracy: float, loss: float = 1.0) -> TrialRecord:
    return TrialRecord(trial, point(32, trial / 100), state, 2.0, accuracy, loss)


def table_of(*rows: tuple[float, int, str, float]) -> TrialTable:
    """Return a table of (learning rate, seed, state, accuracy)."""
    points = [(point(128, rate, seed), state, accuracy) for rate, seed, state, accuracy in rows]
    return table_with(*(TrialRecord(1, some, state, 2.0, accuracy, 1.0) for some, state, accuracy in points))


def test_the_table_ranks_by_accuracy_then_loss_and_failed_trials_last() -> None:
    rows = [
        record(1, FAILED, 0.99),
        record(2, DONE, 0.97, loss=0.5),
        record(3, STOPPED, 0.97, loss=0.25),
        record(4, RUNNING, math.nan),
        record(5, DONE, 0.98),
    ]
    table = table_with(*rows)
    assert [row.trial for row in ranked(table)] == [5, 3, 2, 1, 4]
    best = find_best(table)
    assert best is not None
    assert best.records == (rows[4],)
    assert (table.count(DONE), table.count(STOPPED, FAILED)) == (2, 2)
    assert find_best(table_with(rows[0], rows[3])) is None


def test_a_trial_reports_each_checkpoint_and_keeps_the_last(small_data: Path, tmp_path: Path) -> None:
    given = {**QUICK, "data_dir": str(small_data), "num_epochs": 1, "checkpoint_every": 20}
    job, data = with_data(read_job({**given, "storage_path": str(tmp_path), "run_name": "trial"}))
    reports = list[tuple[float, bool]]()

    def report(metrics: dict[str, Any]) -> None:
        reports.append((metrics["epochs"], "val_score" in metrics))
        if "val_score" in metrics:
            assert [name.name for name in Path(job.run.path).iterdir()] == [checkpoint_name(0, 36)]
            assert read_state(job.run.inside(checkpoint_name(0, 36)))["step"] == 36

    spec = LoopSpec(job=job, train=data.train, validation=data.validation, until_epoch=0.75, is_trial=True)
    with pytest.raises(StopWantedError):
        train_worker(spec, Group(), TrialSink(report), cpus=1)
    assert reports == [(pytest.approx(20 / 48), False), (0.75, True)]


def test_less_is_better_if_the_workload_says_so_and_without_metrics_the_loss_chooses(tmp_path: Path) -> None:
    class Prices(Regression):
        pass

    table = table_with(record(1, DONE, 12.0), record(2, DONE, 11.0), record(3, DONE, 11.0, loss=0.5), workload=Prices)
    assert [row.trial for row in ranked(table)] == [3, 2, 1]
    assert table.to_csv().startswith(
        "trial,batch_size,learning_rate,seed,state,epochs,val_rmse,val_mae,val_r2,val_loss,train_loss,examples_per_s,"
        "train_s,reports,reason\n"
    )

    class Plain(Workload):
        metrics = ()

    run = locate(str(tmp_path), "sweep")
    run.write_text("sweep.csv", table_with(record(1, DONE, 0.5, loss=0.5), workload=Plain).to_csv())
    best = find_best(table_with(workload=Plain).read(run))
    assert best is not None
    assert (best.val_monitor, best.val_loss) == (0.5, 0.5)


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    table = table_with(record(1, FAILED, math.nan), record(2, DONE, 0.1 + 0.2), workload=Regression)
    first, second = table.by_point.values()
    first.reason = 'OSError: "no, space"\n'
    table.update(first, {"epochs": 1, "val_mae": math.nan, "val_r2": math.nan, "val_score": 3})
    table.update(second, {"val_mae": 0.5, "val_r2": 1})
    run = locate(str(tmp_path), "sweep")
    assert list(table_with().read(run).by_point) == []
    run.write_text("sweep.csv", table.to_csv())
    again = table_with(workload=Regression).read(run)
    assert repr(list(again.by_point.values())) == repr([first, second])
    assert again.rows[1]["val_mae"] == 0.5


def test_a_metric_that_the_workload_did_not_have_yet_has_no_value(tmp_path: Path) -> None:
    run, table = locate(str(tmp_path), "sweep"), table_with(record(1, DONE, 0.5), workload=Regression)
    columns = [name for name in table.rows[0] if name != "val_r2"]
    run.write_text("sweep.csv", csv_text(columns, table.rows, has_header=True))
    again = table_with(workload=Regression).read(run)
    assert math.isnan(again.rows[0]["val_r2"])
    assert find_best(again) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "trial,batch_size\n1,2\n",
        lambda text: text[:-9],
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, damage: Callable[[str], str]) -> None:
    run = locate(str(tmp_path), "sweep")
    run.write_text("sweep.csv", damage(table_with(record(1, DONE, 0.5)).to_csv()))
    with pytest.raises(JobError, match=r"sweep/sweep\.csv is damaged: .*; restore it, or delete it$"):
        table_with().read(run)


def test_a_trial_that_starts_again_keeps_its_number() -> None:
    table = table_with()
    first = table.start(point(8, 0.5))
    first.state, first.reason = FAILED, "killed"
    assert table.start(point(8, 0.25)).trial == 2
    again = table.start(point(8, 0.5))
    assert (again.trial, again.state, again.reason) == (1, RUNNING, "")


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "asked", "autoscaling", "expected"),
    [
        ([Node(2)], 2, 1, None, False, 1),
        ([Node(8), Node(8)], 1, 3, None, False, 4),
        ([Node(8), Node(8)], 4, 1, None, False, 4),
        ([Node(8)], 1, 1, 3, False, 3),
        ([Node(64)], 1, 1, None, False, 16),
        ([Node(0)], 1, 1, 8, True, 8),
        ([Node(0)], 1, 1, None, True, 1),
    ],
)
def test_no_more_trials_run_at_a_time_than_the_cluster_holds_unless_it_autoscales(
    nodes: list[Node], workers: int, cpus: int, asked: int | None, autoscaling: bool, expected: int
) -> None:
    plan = WorkerPlan(workers, cpus, use_gpu=False, must_scale_up=autoscaling)
    cluster = Cluster(False, tuple(nodes), "/logs")
    limit = SweepConfig(max_concurrent_trials=asked)
    assert tuner.trials_at_a_time(limit, plan, cluster, autoscaling=autoscaling) == expected


def test_the_best_and_the_default_race() -> None:
    default = MNIST.recipes["default"]["learning_rate"]
    table = table_of((1e-3, 0, DONE, 0.99), (2e-3, 0, DONE, 0.98), (3e-3, 0, STOPPED, 0.995), (default, 0, DONE, 0.9))
    points = finalists(table, 1, 0)
    assert [(point.values["learning_rate"], point.seed) for point in points] == [(1e-3, 0), (default, 0)]
    assert finalists(table, 0, 0) == []


MEAN, ONE_SEED = (2e-3, 0.985, "mean of 2 seeds"), (1e-3, 0.99, "seed 0")


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([(1e-3, 0, DONE, 0.99), (1e-3, 1, DONE, 0.97), (2e-3, 0, DONE, 0.985), (2e-3, 1, DONE, 0.985)], MEAN),
        # one seed does not count beside the mean over two
        ([(2e-3, 0, DONE, 0.985), (2e-3, 1, DONE, 0.985), (3e-3, 0, DONE, 0.989)], MEAN),
        # a configuration that fails with a seed is not chosen
        ([(2e-3, 0, DONE, 0.985), (2e-3, 1, DONE, 0.985), (4e-3, 0, DONE, 0.999), (4e-3, 1, FAILED, 0.999)], MEAN),
        ([(1e-3, 0, FAILED, math.nan), (1e-3, 1, DONE, 0.99), (2e-3, 0, DONE, 0.9)], (2e-3, 0.9, "seed 0")),
        # a further seed that the time has cut off, or that has not finished, does not count
        ([(1e-3, 0, DONE, 0.99), (1e-3, 1, STOPPED, 0.98), (2e-3, 0, DONE, 0.9), (2e-3, 1, DONE, 0.9)], ONE_SEED),
        ([(1e-3, 0, DONE, 0.99), (1e-3, 1, RUNNING, 0.9)], ONE_SEED),
        # a trial that has not finished counts only if none has
        ([(1e-3, 0, DONE, 0.99), (2e-3, 0, STOPPED, 0.995), (3e-3, 0, DONE, 0.98)], ONE_SEED),
        ([(1e-3, 0, STOPPED, 0.9), (2e-3, 0, STOPPED, 0.95)], (2e-3, 0.95, "seed 0")),
    ],
)
def test_the_best_mean_over_the_seeds_is_chosen(rows: list[tuple[float, int, str, float]], chosen: tuple) -> None:
    best: Any = find_best(table_of(*rows))
    assert (best.records[0].point.values["learning_rate"], best.val_monitor, best.seeds_text) == chosen


SEARCHED = [(1e-3, 0, DONE, 0.99), (2e-3, 0, DONE, 0.985), (3e-3, 0, DONE, 0.98)]


@pytest.mark.parametrize(
    ("rows", "num_confirmed", "kept"),
    [
        (SEARCHED, 2, {(1e-3, 0), (2e-3, 0)}),
        ([*SEARCHED, (2e-3, 1, DONE, 0.9)], 2, {(1e-3, 0), (2e-3, 0)}),
        (SEARCHED, 0, {(1e-3, 0)}),
        ([*SEARCHED, (4e-3, 0, RUNNING, 0.999)], 0, {(1e-3, 0)}),
        ([(1e-3, 0, FAILED, 0.9)], 3, set()),
    ],
)
def test_the_checkpoints_that_may_be_tested_are_kept(
    rows: list[tuple[float, int, str, float]], num_confirmed: int, kept: set[tuple[float, int]]
) -> None:
    points = may_be_tested(table_of(*rows), num_confirmed, 0)
    default = MNIST.recipes["default"]["learning_rate"]
    assert {(point.values["learning_rate"], point.seed) for point in points} == kept | {(default, 0)}


@pytest.mark.parametrize(
    ("reports", "state", "is_tested"),
    [
        ([(0.25, 0.95), (1, 0.8), (2, 0.9)], DONE, True),  # within an epoch, the training job does not validate
        ([(1, 0.9), (2, 0.8)], DONE, False),
        ([(1, 0.9), (2, 0.9)], DONE, False),  # of equal epochs, the training job tests the first
        ([(1, 0.8)], STOPPED, False),
    ],
)
def test_a_trial_stands_for_its_run_if_its_last_epoch_is_its_best(
    reports: list[tuple[float, float]], state: str, is_tested: bool
) -> None:
    table = table_of((1e-3, 0, state, 0.9))
    (some,) = table.by_point.values()
    for epochs, accuracy in reports:
        some.add_report(epochs, accuracy)
    assert result_of(table, some.point) == (some if is_tested else None)
    assert result_of(table, point(64, 1e-3)) is None


def test_a_failed_trials_reason_is_kept_without_secrets_and_printed_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "error.txt").write_text("Traceback …\npyarrow.lib.ArrowInvalid: s3://KEY:SECRET@bucket [red]\x1b[31m\n")
    failed = record(1, FAILED, math.nan)
    failed.reason = tuner.error_line_of(Mock(error_file=str(tmp_path / "error.txt")))
    assert failed.reason == "ArrowInvalid: s3://***@bucket [red]\x1b[31m"
    with SweepConsole(read_sweep({"storage_path": str(tmp_path), "num_trials": 1, "num_confirmed": 0})) as console:
        console.show_table(table_with(failed), failed)
        console.show_result(table_with(failed))
    line, *_, row, _ = capsys.readouterr().out.splitlines()
    reason = r"failed: ArrowInvalid: s3://***@bucket [red]\x1b[31m"
    assert f" learning rate 0.01, seed 0: accuracy - after 2/2 epochs, {reason} · " in line
    assert row.rstrip().endswith(reason)


def test_the_console_has_a_line_for_each_end_but_not_again_for_a_trial_that_its_rung_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of((1e-3, 0, WAITING, 0.5))
    (some,) = table.by_point.values()
    with SweepConsole(read_sweep({"storage_path": str(tmp_path)})) as console:
        console.show_table(table, some)
        some.state = STOPPED
        console.show_table(table, some)
    assert capsys.readouterr().out.count("trial 1 ") == 1


def test_a_setting_with_the_name_of_another_column_is_not_searched() -> None:
    settings = dataclasses.make_dataclass("Settings", [("state", str, setting("CA", "of the union"))], frozen=True)
    workload = type("Stated", (Regression,), {"Settings": settings})
    with pytest.raises(UsageError, match=r"sweep\.csv has another column state; rename the setting$"):
        TrialTable(workload, space_of(workload, {"sweep": ["state=CA,NY"]}))


SPEC: Any = Mock(plan=WorkerPlan(1, 1, use_gpu=False, must_scale_up=False))


class OneAtATime:
    """Runs a segment after the other in place of Tune; the first one fails, so often."""

    def __init__(self, num_failures: int, trainable: Any, *, tune_config: Any, run_config: Any, **options: Any) -> None:
        self.source, (self.watcher,) = tune_config.search_alg, run_config.callbacks
        self.num_failures = num_failures

    def fit(self) -> None:
        for number in itertools.count():
            config = self.source.suggest(f"{number}")
            if config == Searcher.FINISHED:
                return
            has_failed, epochs = number == 0 < self.num_failures, config["until_epoch"]
            result = {"epochs": epochs, "val_accuracy": 0.5, "val_score": 0.5, "val_loss": 1.0, "is_over": epochs == 2}
            trial = Mock(config=config, num_failures=self.num_failures, error_file=None, last_result=result)
            self.source.on_trial_complete(f"{number}", error=has_failed)
            if has_failed:
                self.watcher.on_trial_error(trial=trial)
                continue
            self.watcher.on_trial_start(trial=trial)
            self.watcher.on_trial_result(trial=trial, result=result)
            self.watcher.on_trial_complete(trial=trial)


@pytest.mark.parametrize(
    ("num_failures", "settings", "states"),
    [
        (1, {"num_trials": 2, "scheduler": "none"}, [DONE, DONE]),
        (4, {"num_trials": 2, "scheduler": "none"}, [LOST, DONE]),
        # There are two points: all further proposals are known, and the later rungs follow.
        (0, {"num_trials": 5, "search_algorithm": "optuna", "sweep": ["batch_size=64,128"]}, [DONE, DONE]),
    ],
)
def test_a_sweep_trains_until_nothing_is_left_also_if_a_process_dies_as_tune_resets_it(
    num_failures: int, settings: dict[str, Any], states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_ray.sweep.tuner.tune.Tuner", functools.partial(OneAtATime, num_failures))
    given = {"num_confirmed": 0, "storage_path": str(tmp_path), **settings}
    table = tuner.run_sweep(read_sweep(given), SPEC, 1, Mock(), Mock())
    assert [record.state for record in table.by_point.values()] == states


class Wrapping(OneAtATime):
    """Raises what goes wrong in a callback as a TuneError, or drops it, as Tune does."""

    drops = False

    def fit(self) -> None:
        try:
            super().fit()
        except JobError as error:
            if not self.drops:
                raise tune.TuneError(f"Traceback …\nmnist_ray.errors.JobError: {error}\n")  # noqa: B904


class Dropping(Wrapping):
    drops = True


@pytest.mark.parametrize("kind", [Wrapping, Dropping])
def test_another_threads_error_ends_a_sweep_as_what_it_is(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Mock(side_effect=RaySilentError("Ray has failed"))
    monkeypatch.setattr("mnist_ray.sweep.tuner.tune.Tuner", functools.partial(kind, 0))
    monkeypatch.setattr(RunFolder, "write_text", write)
    with pytest.raises(RaySilentError, match=r"^Ray has failed$"):
        tuner.run_sweep(read_sweep({"storage_path": str(tmp_path)}), SPEC, 1, Mock(), Mock())
    assert write.call_count == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (tune.TuneError("Traceback:\n…\nValueError: a bug\n"), "Ray Tune failed: ValueError: a bug"),
        (
            OSError(28, "No space left on device"),
            "the storage has failed: No space left on device, or no inodes (df -i)",
        ),
    ],
)
def test_what_fails_in_tune_is_one_line(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_ray.sweep.tuner.tune.Tuner", Mock(return_value=Mock(fit=Mock(side_effect=error))))
    with pytest.raises(JobError, match=f"^{re.escape(said)}$"):
        tuner.run_sweep(read_sweep({"storage_path": str(tmp_path)}), SPEC, 1, Mock(), Mock())
