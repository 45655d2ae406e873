"""The table of a job of many runs, and which of its members are better."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.many.console import ManyConsole
from mnist_ray.many.jobs import read_sweep
from mnist_ray.many.points import space_of
from mnist_ray.many.rungs import finalists, find_best, ranked
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.run_files import DONE, FAILED, RUNNING, STOPPED, csv_text
from mnist_ray.storage import locate
from mnist_ray.workload import Regression, Workload, setting
from tests.conftest import mnist
from tests.many.conftest import point


@pytest.fixture
def many(tmp_path: Path) -> Many:
    return read_sweep({"storage_path": str(tmp_path), "run_name": "sweep"})


def table_with(*members: Member, workload: Any = None) -> Table:
    workload = workload or type(mnist())
    return Table(workload, space_of(workload, {}), members)


def member(number: int, state: str, value: float, loss: float = 1.0, monitor: str = "val_accuracy") -> Member:
    figures = {"epochs": 2.0, "val_loss": loss, monitor: value}
    return Member(number, point(32, number / 100), state, figures)


def table_of(*rows: tuple[float, int, str, float]) -> Table:
    """Return a table of (learning rate, seed, state, accuracy)."""
    members = [(point(128, rate, seed), state, value) for rate, seed, state, value in rows]
    figures = [{"epochs": 2.0, "val_accuracy": value, "val_loss": 1.0} for *_, value in members]
    return table_with(*(Member(1, some, state, of) for (some, state, _), of in zip(members, figures, strict=True)))


def test_the_table_ranks_by_accuracy_then_loss_and_failed_trials_last() -> None:
    rows = [
        member(1, FAILED, 0.99),
        member(2, DONE, 0.97, loss=0.5),
        member(3, STOPPED, 0.97, loss=0.25),
        member(4, RUNNING, math.nan),
        member(5, DONE, 0.98),
    ]
    assert [row.number for row in ranked(table_with(*rows))] == [5, 3, 2, 1, 4]
    assert find_best(table_with(rows[0], rows[3])) is None


def test_less_is_better_if_the_workload_says_so_and_without_metrics_the_loss_chooses() -> None:
    class Plain(Workload):
        metrics = ()

    of_prices = [member(1, DONE, 12.0, 1.0, "val_rmse"), member(2, DONE, 11.0, 1.0, "val_rmse")]
    of_prices.append(member(3, DONE, 11.0, 0.5, "val_rmse"))
    assert [row.number for row in ranked(table_with(*of_prices, workload=Regression))] == [3, 2, 1]
    of_losses = [member(number, DONE, loss, loss, "val_loss") for number, loss in ((1, 0.5), (2, 0.25))]
    assert [row.number for row in ranked(table_with(*of_losses, workload=Plain))] == [2, 1]


def test_a_written_table_is_read_back_also_if_the_workload_has_more_metrics_since(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "sweep")
    first, second = member(1, FAILED, math.nan, monitor="val_rmse"), member(2, DONE, 0.1 + 0.2, monitor="val_rmse")
    first.reason, first.point = 'OSError: "no, space"\n', dataclasses.replace(first.point, fold=3)
    table = table_with(first, second, workload=Regression)
    table.report(second, {"epochs": 1, "val_rmse": 0.1 + 0.2, "val_mae": 0.5, "val_score": [3], "notes": []})
    table.write(run)
    again = table_with(workload=Regression)
    again.read(run)
    assert repr(again.rows) == repr(table.rows)
    assert [*again.by_point] == [first.point, second.point]
    columns = [name for name in table.columns if name != "val_r2"]
    run.write_text("members.csv", csv_text(columns, table.rows))
    again.read(run)
    assert math.isnan(again.rows[0]["val_r2"])
    restarted = again.start(first.point)
    assert (restarted.number, restarted.state, restarted.reason) == (1, RUNNING, "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "trial,batch_size\n1,2\n",
        lambda text: text[:-9],
        lambda text: text.replace("batch_size-32", "../batch_size-32"),
        lambda text: text.replace("2.0,0.5", "2.0,half"),
    ],
)
def test_a_damaged_table_is_rejected(tmp_path: Path, damage: Callable[[str], str]) -> None:
    run = locate(str(tmp_path), "sweep")
    table_with(member(1, DONE, 0.5)).write(run)
    run.write_text("members.csv", damage(run.read_text("members.csv") or ""))
    with pytest.raises(JobError, match=r"sweep/members\.csv is damaged: .*; restore it, or delete it$"):
        table_with().read(run)


def test_a_job_whose_table_is_lost_is_an_error(many: Many) -> None:
    assert many.table().rows == []
    many.job.run.inside("members").write_text("some", "")
    with pytest.raises(JobError, match=r"/sweep has members/, but no members\.csv; restore it, or start another job$"):
        many.table()


def test_the_best_and_the_default_race_unless_each_has_several_seeds_or_folds(many: Many, tmp_path: Path) -> None:
    rate = many.space.defaults["learning_rate"]
    table = table_of((1e-3, 0, DONE, 0.99), (2e-3, 0, DONE, 0.98), (3e-3, 0, STOPPED, 0.995), (rate, 0, DONE, 0.9))
    one = dataclasses.replace(many, config=dataclasses.replace(many.config, num_confirmed=1))
    assert [dict(each)["learning_rate"] for each in finalists(one, table)] == [1e-3, rate]
    assert len(finalists(many, table)) == 3  # of the three best, the default is one
    none = dataclasses.replace(many, config=dataclasses.replace(many.config, num_confirmed=0))
    folded = read_sweep({"storage_path": str(tmp_path), "folds": 3})
    assert finalists(none, table) == finalists(folded, table) == []


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
        # a further seed that has not finished does not count
        ([(1e-3, 0, DONE, 0.99), (1e-3, 1, RUNNING, 0.9)], ONE_SEED),
        # a trial that has not finished counts only if none has
        ([(1e-3, 0, DONE, 0.99), (2e-3, 0, STOPPED, 0.995), (3e-3, 0, DONE, 0.98)], ONE_SEED),
        ([(1e-3, 0, STOPPED, 0.9), (2e-3, 0, STOPPED, 0.95)], (2e-3, 0.95, "seed 0")),
    ],
)
def test_the_best_mean_over_the_seeds_is_chosen(
    many: Many, rows: list[tuple[float, int, str, float]], chosen: tuple[float, float, str]
) -> None:
    best: Any = find_best(table_of(*rows))
    assert (dict(best.configuration)["learning_rate"], best.val_monitor, best.mean_of) == chosen


def test_a_member_is_a_run_with_the_points_values_seed_and_fold(tmp_path: Path) -> None:
    several = read_sweep({"storage_path": str(tmp_path), "num_seeds": 2, "folds": 2, "sweep": ["beta1=0.5,0.6"]})
    points = several.points(several.space.configuration({"beta1": 0.5}))
    assert [(each.seed, each.fold) for each in points] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    job = several.member(points[-1])
    assert job.run.name == "beta1-0.5_seed-1_fold-2"
    train = job.train
    assert (train.beta1, train.seed, train.num_seeds, train.folds, train.fold) == (0.5, 1, 1, 2, 2)
    workers = dataclasses.replace(WorkerConfig(), num_workers=1, cpus_per_worker=1)
    assert job.workers == workers, "so that the job's config.json trains the same bits"


def test_the_console_has_a_line_for_each_end_with_its_reason(many: Many, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of((1e-3, 0, FAILED, 0.5))
    (some,) = table.members
    some.reason = "ArrowInvalid [red]\x1b[31m"
    with ManyConsole(many) as console:
        console.show_table(table)
        console.show_table(table, some)
        console.show_result(table)
    line, *of_table = capsys.readouterr().out.splitlines()
    reason = r"failed: ArrowInvalid [red]\x1b[31m"
    assert line.endswith(f" learning rate 0.001, seed 0: accuracy 50.00% after 2/2 epochs, {reason} · 1 failed")
    assert of_table[-2].rstrip().endswith(reason)


def test_a_setting_with_the_name_of_another_column_is_not_searched() -> None:
    settings = dataclasses.make_dataclass("Settings", [("state", str, setting("CA", "of the union"))], frozen=True)
    workload = type("Stated", (Regression,), {"Settings": settings})
    with pytest.raises(UsageError, match=r"members\.csv has another column state; rename the setting$"):
        Table(workload, space_of(workload, {"sweep": ["state=CA,NY"]}))
