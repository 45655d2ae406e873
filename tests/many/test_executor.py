"""How members are trained one after another: with a stand-in for Tune, and without Ray."""

import functools
import itertools
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray import tune
from ray.tune.search import Searcher

from mnist_ray.cluster.plan import Cluster, Node, WorkerPlan
from mnist_ray.cluster.watch import RaySilentError
from mnist_ray.errors import JobError
from mnist_ray.many import executor
from mnist_ray.many.jobs import read_sweep, read_train
from mnist_ray.many.table import Many
from mnist_ray.report.run_files import DONE, LOST
from mnist_ray.storage import RunFolder

pytestmark = pytest.mark.usefixtures("ray_address")  # whose session folder Tune's files go to
ON_ONE = WorkerPlan(1, 1, use_gpu=False, must_scale_up=False)


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
    nodes: list[Node], workers: int, cpus: int, asked: int | None, autoscaling: bool, expected: int, tmp_path: Path
) -> None:
    plan = WorkerPlan(workers, cpus, use_gpu=False, must_scale_up=autoscaling)
    settings = {"storage_path": str(tmp_path), "autoscaling": autoscaling, "max_concurrent_trials": asked}
    cluster = Cluster(False, tuple(nodes), "/logs")
    assert executor.at_a_time(read_sweep(settings), plan, cluster) == expected


def test_seeds_and_folds_run_at_a_time_as_many_as_fit(tmp_path: Path) -> None:
    several = read_train({"storage_path": str(tmp_path), "num_seeds": 2, "folds": 3})
    for num_cpus, expected in ((2, 2), (64, 6)):
        assert executor.at_a_time(several, ON_ONE, Cluster(False, (Node(num_cpus),), "/logs")) == expected


class OneAtATime:
    """Runs a segment after the other in place of Tune; the first one fails, so often."""

    error_file: str | None = None

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
            trial = Mock(config=config, num_failures=self.num_failures, error_file=self.error_file, last_result=result)
            self.source.on_trial_complete(f"{number}", error=has_failed)
            if has_failed:
                self.watcher.on_trial_error(trial=trial)
                continue
            self.watcher.on_trial_start(trial=trial)
            self.watcher.on_trial_result(trial=trial, result=result)
            self.watcher.on_trial_complete(trial=trial)


def train(many: Many, say: Any = print) -> Any:
    return executor.train_members(Mock(many=many, plan=ON_ONE), Mock(), 1, Mock(), say)


@pytest.mark.parametrize(
    ("num_failures", "settings", "states"),
    [
        (1, {"num_trials": 2, "scheduler": "none"}, [DONE, DONE]),
        (4, {"num_trials": 2, "scheduler": "none"}, [LOST, DONE]),
        (0, {"num_trials": 5, "sweep": ["batch_size=64,128"]}, [DONE, DONE]),  # there are only two points
    ],
)
def test_a_sweep_trains_until_nothing_is_left_also_if_a_process_dies_as_tune_resets_it(
    num_failures: int, settings: dict[str, Any], states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_ray.many.executor.tune.Tuner", functools.partial(OneAtATime, num_failures))
    table = train(read_sweep({"num_confirmed": 0, "storage_path": str(tmp_path), **settings}))
    assert [member.state for member in table.members] == states


@pytest.mark.parametrize("num_failures", [1, 4])
def test_a_run_of_several_that_is_lost_continues_and_in_the_end_is_an_error(
    num_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist_ray.many.executor.tune.Tuner", functools.partial(OneAtATime, num_failures))
    many = read_train({"storage_path": str(tmp_path), "num_seeds": 2})
    if num_failures == 1:
        assert [member.state for member in train(many).members] == [DONE, DONE]
        assert capsys.readouterr().out == "lost seed 0: it gave no reason; it continues from its last checkpoint\n"
    else:
        with pytest.raises(JobError, match=r"^seed 0: it gave no reason$"):
            train(many)


class Wrapping(OneAtATime):
    """Raises what goes wrong in a callback as a TuneError, as Tune does."""

    def fit(self) -> None:
        try:
            super().fit()
        except JobError as error:
            raise tune.TuneError(f"Traceback …\nmnist_ray.errors.JobError: {error}\n")  # noqa: B904


def test_another_threads_error_ends_a_sweep_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Mock(side_effect=RaySilentError("Ray has failed"))
    monkeypatch.setattr("mnist_ray.many.executor.tune.Tuner", functools.partial(Wrapping, 0))
    monkeypatch.setattr(RunFolder, "write_text", write)
    with pytest.raises(RaySilentError, match=r"^Ray has failed$"):
        train(read_sweep({"storage_path": str(tmp_path)}))
    assert write.call_count == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (tune.TuneError("Traceback:\n…\nValueError: a bug\n"), "Ray Tune failed: ValueError: a bug"),
        (OSError(28, "No space left on device"), "the storage has failed: No space left on device"),
    ],
)
def test_what_fails_in_tune_is_one_line(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_ray.many.executor.tune.Tuner", Mock(return_value=Mock(fit=Mock(side_effect=error))))
    with pytest.raises(JobError, match=f"^{re.escape(said)}$"):
        train(read_sweep({"storage_path": str(tmp_path)}))


def test_the_reason_of_a_lost_trial_is_the_last_line_of_its_error_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.txt"
    file.write_text("Traceback …\npyarrow.lib.ArrowInvalid: s3://KEY:SECRET@bucket\n")
    monkeypatch.setattr("mnist_ray.many.executor.tune.Tuner", functools.partial(OneAtATime, 4))
    monkeypatch.setattr(OneAtATime, "error_file", str(file))
    table = train(read_sweep({"storage_path": str(tmp_path), "num_trials": 2, "scheduler": "none", "num_confirmed": 0}))
    assert [member.reason for member in table.members] == ["ArrowInvalid: s3://***@bucket", ""]
