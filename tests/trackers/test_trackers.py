import ast
import io
import json
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import mlflow
import pytest
from PIL import Image
from pyarrow import fs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.schema import ORIGIN_FILE
from mnist_ray.settings import values_of
from mnist_ray.storage import RunFolder
from mnist_ray.trackers import Ending, Tracker, Trackers, start
from mnist_ray.training.events import EpochFinished, Event, Progress, Started, Validated
from mnist_ray.training.stopwatch import PARTS
from mnist_ray.workload import user_code
from mnist_ray.workload.drawing import new_plot, png_of
from tests.conftest import Digits, folder_at

INTERRUPTED = Ending(None, {}, has_failed=True)
PICTURE = png_of(new_plot("step")[0])
FORMATS = {"val_loss": "number", "test_loss": "number", "test_accuracy": "fraction", "examples_per_s": ",.0f"}
RESULT = {"test_accuracy": 0.875, "test_loss": 0.5, "examples_per_s": 100.0, "formats": FORMATS}


def started(step: int = 0) -> Started:
    return Started(1, ("host",), 1, "cpu", "fp32", epoch=0, step=step, total_step=step, epochs=0)


def progress(step: int, losses: list[float]) -> Progress:
    window, so_far = {"loss": 0.25, "accuracy": 0.75}, {"loss": 0.5, "accuracy": 0.75}
    parts = [[1.0, 0, 2.0, *[0.0] * (len(PARTS) - 3)], [0.0, 0, 5.0, *[0.0] * (len(PARTS) - 3)]]
    values: dict[str, Any] = {"learning_rate": 0.5 / step, "others": {"gradient_norm": 1.5}}
    return Progress(1, step, 4, losses, window, so_far, 16, 2.0, total_step=step, parts=parts, **values)


EPOCH: list[Event] = [
    started(),
    progress(2, [4.0, 3.0]),
    progress(4, [2.0, 1.0]),
    EpochFinished(progress(4, [2.0, 1.0])),
    Validated(1, {"loss": 0.25, "accuracy": 0.75}, 1.0, total_step=4),
]


def follow(run: RunFolder, events: list[Event], ending: Ending, *trackers_of_user: str | Path) -> list[str]:
    """Track a run to its end; return the warnings."""
    warnings: list[str] = []
    trackers = start(run, Digits(), values_of(TrainConfig()), [*map(str, trackers_of_user)], warnings.append)
    for event in events:
        trackers.log(event)
    trackers.close(ending)
    return warnings


@pytest.fixture(scope="module")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One database for all tests: MLflow needs seconds to create it."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where MLflow puts the files of a run whose values are in a database
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield
    mlflow.set_tracking_uri(None)


def in_mlflow(run: RunFolder) -> list[Any]:
    """Return the runs that MLflow has of a run's folder and what is in it."""
    wanted = f"tags.`mnist_ray.run` LIKE '{run.uri}%'"
    return list(mlflow.search_runs(experiment_names=["mnist_ray"], filter_string=wanted, output_format="list"))


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def points(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_tensorboard_has_every_step_every_epoch_and_the_pictures(run: RunFolder, tmp_path: Path) -> None:
    ending = Ending(RESULT, {"seconds": PICTURE})
    assert follow(run, EPOCH, ending) == []
    reader = read_events(tmp_path / "run")
    assert points(reader, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert points(reader, "train/accuracy") == [(2, 0.75), (4, 0.75)]
    assert points(reader, "train/learning_rate") == [(2, 0.25), (4, 0.125)]
    assert points(reader, "train/gradient_norm") == [(2, 1.5), (4, 1.5)]
    assert points(reader, "time/data") == [(2, 0.125), (4, 0.125)]
    assert points(reader, "time/compute") == [(2, 0.875), (4, 0.875)]
    assert points(reader, "epoch/loss") == [(4, 0.5)]
    assert points(reader, "val/accuracy") == [(4, 0.75)]
    assert points(reader, "test/accuracy") == [(0, 0.875)]
    assert "_hparams_/session_start_info" in reader.summary_metadata
    (image,) = reader.Images("seconds")
    assert image.encoded_image_string == PICTURE
    assert (image.width, image.height) == Image.open(io.BytesIO(PICTURE)).size


def test_tensorboard_shows_steps_that_are_done_again_once_and_what_comes_before_them(
    run: RunFolder, tmp_path: Path
) -> None:
    follow(run, EPOCH[:-1], INTERRUPTED)
    assert follow(run, [started(step=2), progress(4, [2.5, 1.5]), EPOCH[-1]], INTERRUPTED) == []
    reader = read_events(tmp_path / "run")
    assert points(reader, "val/accuracy") == [(4, 0.75)]
    assert points(reader, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.5), (4, 1.5)]


def test_a_full_disk_is_one_warning(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: FileIO("/dev/full", "w"))
    warnings = follow(run, EPOCH, INTERRUPTED)
    assert warnings == ["TensorBoard failed and is no longer used: [Errno 28] No space left on device"]


def test_storage_that_is_no_local_disk_gets_the_event_file_at_the_end(tmp_path: Path) -> None:
    storage = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert follow(RunFolder("run", "far://away", storage, "run"), EPOCH, INTERRUPTED) == []
    assert points(read_events(tmp_path / "run"), "epoch/loss") == [(4, 0.5)]


@pytest.mark.usefixtures("mlflow_database")
def test_a_killed_run_and_its_second_start_are_one_run_of_mlflow_with_settings_metrics_and_report(
    run: RunFolder,
) -> None:
    run.write_text(ORIGIN_FILE, json.dumps({"command_line": "python jobs/train.py", "git_commit": "0123abcd"}))
    assert follow(run, EPOCH[:3], INTERRUPTED, "mlflow") == []
    (found,) = in_mlflow(run)
    assert (found.info.run_name, found.info.status) == ("run", "KILLED")
    run.write_text("report.html", "the report")
    assert follow(run, EPOCH, Ending(RESULT, {}), "mlflow") == []
    (found,) = in_mlflow(run)
    assert found.info.status == "FINISHED"
    assert [found.data.tags[name] for name in ("mlflow.source.git.commit", "command_line")] == [
        "0123abcd",
        "python jobs/train.py",
    ]
    assert (found.data.params["batch_size"], found.data.params["lr_schedule"]) == ("32", "constant")
    assert found.data.metrics["val/accuracy"] == 0.75
    assert found.data.metrics["test/accuracy"] == 0.875
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)}
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/report.html") == "the report"


def test_a_tracker_that_fails_warns_once_is_asked_no_more_and_the_others_go_on() -> None:
    leaving, broken, recorder, warnings = Mock(), Mock(), Mock(), list[str]()
    leaving.log.side_effect = SystemExit(3)
    broken.log.side_effect = ConnectionError("the server is gone\nand this is its traceback")
    cannot_start = Mock(side_effect=ZeroDivisionError("division by zero"))
    good: list[Any] = [("leaving", lambda: leaving), ("broken", lambda: broken), ("recorder", lambda: recorder)]
    trackers = Trackers([("MLflow", cannot_start), *good], warnings.append)
    for event in EPOCH:
        trackers.log(event)
    trackers.close(INTERRUPTED)
    assert warnings == [
        "MLflow failed and is no longer used: division by zero",
        "leaving failed and is no longer used: sys.exit(3)",
        "broken failed and is no longer used: the server is gone",
    ]
    assert recorder.mock_calls == [*map(call.log, EPOCH), call.close(INTERRUPTED)]
    assert leaving.mock_calls == broken.mock_calls == [call.log(EPOCH[0])]


@pytest.mark.usefixtures("mlflow_database")
def test_mlflow_gets_no_secrets_and_knows_a_run_with_other_keys(tmp_path: Path) -> None:
    settings = {"database": "postgresql://user:password@host/examples"}
    for path in ("s3://KEY:SECRET@bucket", "s3://bucket"):
        run = RunFolder("run", path, fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
        trackers = start(run, Digits(), settings, ["mlflow"], pytest.fail)
        trackers.close(INTERRUPTED)
    (found,) = in_mlflow(run)
    assert found.data.tags["mnist_ray.run"] == "s3://bucket/run"
    assert found.data.params == {"database": "postgresql://***@host/examples"}


OWN = """
from mnist_ray.trackers import Tracker


class Lines(Tracker):
    def __init__(self, run, workload, settings, *, file="lines.txt"):
        super().__init__(run, workload, settings)
        self.lines, self.file = [], file

    def log(self, event):
        self.lines += self.scalars(event)

    def close(self, ending):
        self.run.write_text(self.file, repr([*self.lines, *self.final(ending), self.settings["batch_size"]]))
"""


def test_trackers_of_the_users_get_all_figures_each_with_its_arguments(run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "lines.py"
    file.write_text(OWN)
    assert follow(run, EPOCH, Ending(RESULT, {}), str(file), f"{file}(file='more.txt')") == []
    assert run.read_text("more.txt") == run.read_text("lines.txt")
    got = ast.literal_eval(run.read_text("lines.txt") or "")
    assert got[:3] == [("train/loss", 4.0, 1), ("train/loss", 3.0, 2), ("train/accuracy", 0.75, 2)]
    assert ("val/loss", 0.25, 4) in got
    assert ("epoch", 0.5, 2) in got
    assert got[-3:] == ["test/loss", "test/accuracy", 32]


def test_weights_and_biases_has_the_run_offline(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    run.write_text("report.html", "the report")
    (tmp_path / "default").mkdir()  # of an earlier run in this process
    for each, ending in (
        (folder_at(tmp_path / "default"), INTERRUPTED),
        (run, INTERRUPTED),
        (run, Ending(RESULT, {})),
    ):
        assert follow(each, EPOCH, ending, "wandb") == []
    first, resumed = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == resumed.name  # the same run
    for text in (b"train/loss", b"val/accuracy", b"test/accuracy", b"batch_size", b"report.html"):
        assert text in resumed.read_bytes()


def test_a_missing_package_of_a_tracker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "mnist_ray.trackers.wandb", raising=False)
    with pytest.raises(UsageError, match=r"^--tracker wandb needs a package: pip install wandb$"):
        user_code.find_with_arguments("wandb", Tracker)


def test_tensorboard_by_name_is_the_one_that_follows_every_run(run: RunFolder, tmp_path: Path) -> None:
    assert follow(run, EPOCH, INTERRUPTED, "tensorboard") == []
    assert len([*(tmp_path / "run").glob("events*")]) == 1
