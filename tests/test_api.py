"""The commands as functions: in this process, in a new one, and from a notebook."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import mnist_ray
from mnist_ray import Run, process
from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import read_job
from mnist_ray.many.table import Many
from mnist_ray.mnist import MNIST
from mnist_ray.storage import locate
from mnist_ray.workload import Data, Regression
from mnist_ray.workload.calls import data_of
from mnist_ray.workload.loading import reference_of
from ray_fork.shim import SOCKET_VARIABLE
from ray_fork.starting import prepared_forking
from tests.conftest import QUICK, ROOT, callback_at


@pytest.fixture(scope="module")
def run(ray_address: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings: dict[str, Any] = {**QUICK, "data_dir": small_data, "num_epochs": 2}
    return mnist_ray.train(**settings, storage_path=tmp_path_factory.mktemp("api"), run_name="one")


class Still(Regression):
    """Its validations are all alike."""

    def load_data(self) -> Data:
        zeros = Arrays(np.zeros((40, 1), np.float32), np.zeros(40))
        return Data(zeros, zeros)

    def create_model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_of_equal_epochs_the_first_is_tested(num_workers: int, ray_address: str, tmp_path: Path) -> None:
    run = mnist_ray.train(Still, num_workers=num_workers, num_epochs=4, storage_path=tmp_path, quiet=True)
    assert run.metrics["rmse"] == 0
    assert run.checkpoint.rpartition("/")[2] == "checkpoint_epoch-001_step-000000"


def children() -> set[int]:
    """Return this process's children, a fork server among them; a new child has no command line for a moment."""
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")
def test_a_failed_call_leaves_no_fork_server_and_no_variable(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv(SOCKET_VARIABLE, "")  # restored afterwards
    before, started = children(), list[set[int]]()

    def look(workload: Any) -> Any:
        started.append(children() - before)
        return data_of(workload)

    monkeypatch.setattr("mnist_ray.many.jobs.data_of", look)
    with pytest.raises(UsageError, match="--batch-size 10,000 is larger than"):
        mnist_ray.train(settings=MNIST.Settings(data_dir=small_data), storage_path=tmp_path, batch_size=10_000)
    assert [len(servers) for servers in started] == [1]
    assert not children() - before
    assert os.environ[SOCKET_VARIABLE] == ""  # as before


def test_no_fork_server_is_started_if_ray_is_connected(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    before = children()
    with prepared_forking("mnist_ray.run.fit") as forking:
        assert (forking.server, children()) == (None, before)


def test_training_returns_the_run_with_its_files_and_evaluation_by_name_agrees(run: Run) -> None:
    assert str(run).startswith("one: loss ")
    assert repr(run) == f"<Run {run}>"
    assert run.metrics["accuracy"] == run.result["test_accuracy"] > 0.5
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.steps[-1]["epoch"] == 2
    assert (Path(run.checkpoint) / "model.safetensors").exists()
    assert Path(run.report).name == "report.html"
    assert run._repr_html_().startswith('<iframe sandbox srcdoc="&lt;!doctype html&gt;')
    assert sum(parameter.numel() for parameter in run.load_model().parameters()) == 49_770
    assert mnist_ray.evaluate("one", storage_path=run.folder.storage_path, num_tasks=2) == run.metrics
    one: Any = np.int64(1)
    assert mnist_ray.evaluate(Path(run.folder.path), num_tasks=one) == run.metrics


def test_a_run_of_another_process_is_loaded_by_its_name_or_path(run: Run) -> None:
    for loaded in (mnist_ray.load_run("one", storage_path=run.folder.storage_path), mnist_ray.load_run(run.folder.uri)):
        assert (str(loaded), loaded.history, loaded.checkpoint) == (str(run), run.history, run.checkpoint)
    with pytest.raises(UsageError, match=r"two is not a run: it has no config\.json"):
        mnist_ray.load_run("two", storage_path=run.folder.storage_path)
    unfinished = locate(f"{run.folder.storage_path}/more", "three")
    unfinished.write_text("config.json", '{"num_epochs": 2}')
    with pytest.raises(UsageError, match=r"/three is not finished: it has no result\.json yet$"):
        mnist_ray.load_run(unfinished.uri)


def test_a_swept_runs_workload_has_the_best_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tuned(many: Many) -> Many:
        many.job.run.write_text("config.json", '{"sweep": ["width=16,48"]}')
        for name in ("members/best/config.json", "best.json"):
            many.job.run.write_text(name, '{"width": 48, "depth": 2}')
        result = {"checkpoint": "members/best/checkpoint_epoch-001_step-000000", "seconds": {}}
        many.job.run.write_text("result.json", json.dumps(result))
        return many

    monkeypatch.setattr("mnist_ray.api.run_job", tuned)
    shapes = ROOT / "examples" / "shapes.py"
    best = mnist_ray.tune(shapes, sweep={"width": [16, 48]}, storage_path=tmp_path, run_name="run")
    assert best.workload.settings.width == 48
    assert best.best == {"width": 48}


def test_weights_to_start_from_may_be_a_run_or_a_path(run: Run, small_data: Path, tmp_path: Path) -> None:
    own = MNIST.Settings(data_dir=small_data)
    for weights in (run, Path(run.checkpoint) / "model.safetensors"):
        with pytest.raises(UsageError, match="--batch-size 10,000 is larger than"):
            mnist_ray.train(settings=own, init_from=weights, storage_path=tmp_path, batch_size=10_000)


def test_arrays_pictures_and_files_are_predicted(run: Run, mnist_test: Arrays, tmp_path: Path) -> None:
    images = mnist_test.inputs[:40]
    digits = np.array([prediction.top[0][0] for prediction in mnist_ray.predict(images, run)])
    assert (digits == mnist_test.targets[:40]).mean() > 0.5
    as_tensors = mnist_ray.predict([torch.tensor(image) for image in images], run)
    assert [prediction.top[0][0] for prediction in as_tensors] == digits.tolist()
    pictures = [Image.fromarray(image) for image in images[:2]]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    as_files = [*mnist_ray.predict(str(tmp_path / "0.png"), run), *mnist_ray.predict([tmp_path / "1.png"], run)]
    as_pictures = mnist_ray.predict(pictures, run)
    assert [prediction.top for prediction in as_files] == [prediction.top for prediction in as_pictures]


def test_many_threads_predict_at_once_beside_another_call_and_change_nothing(run: Run, mnist_test: Arrays) -> None:
    pictures = [Image.fromarray(image) for image in mnist_test.inputs[:3]]

    def state() -> Any:
        return signal.getsignal(signal.SIGINT), [*warnings.filters], torch.get_num_threads(), dict(os.environ)

    before, expected = state(), [prediction.top for prediction in mnist_ray.predict(pictures, run)]
    with process.left_as_found(), ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(mnist_ray.predict, pictures, run) for _ in range(16)]
        models = [threads.submit(run.load_model) for _ in range(4)]
        assert all([prediction.top for prediction in future.result()] == expected for future in futures)
        assert all(model.result().training is False for model in models)
    assert state() == before


def test_a_metric_without_a_value_is_nan(run: Run) -> None:
    without = {name: value for name, value in run.result.items() if name != "test_accuracy"}  # of an older workload
    for result in (without, {**run.result, "test_accuracy": None}):
        other = Run(run.folder, run.workload)
        other.result = result
        assert math.isnan(other.metrics["accuracy"])
        assert "accuracy -" in str(other)


def test_what_has_no_prediction_raises_the_line_that_the_command_prints(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for pictures, error, message in (
        ([tmp_path / "empty.png"], JobError, f"{tmp_path}/empty.png: not an image in a known format"),
        (str(tmp_path / "no.png"), JobError, f"{tmp_path}/no.png: cannot be read: No such file or directory"),
        ([5], UsageError, "MNIST, a prediction: "),
        (
            np.zeros((2, 20, 20), np.uint8),
            UsageError,
            "MNIST, a prediction: RuntimeError: Calculated padded input size per channel: (2 x 2)",
        ),
    ):
        with pytest.raises(error) as raised:
            mnist_ray.predict(pictures, run)
        assert str(raised.value).startswith(message)
    assert mnist_ray.predict([], run) == []


TEXTS = """\
import torch
from mnist_ray import load_run
from mnist_ray.workload import Classification, Data

PAIRS = [("good", 1), ("bad film", 0)] * 30

class Texts(Classification):
    def load_data(self):
        return Data(PAIRS, PAIRS, metadata={"class_names": ["bad", "good"]})
    def collate(self, examples):
        texts, targets = zip(*examples)
        return torch.tensor([[len(text), 1.0] for text in texts]), torch.tensor(targets)
    def create_model(self):
        return torch.nn.Linear(2, 2)

class Student(Texts):
    def create_model(self):
        load_run("teacher", storage_path="STORAGE")
        return super().create_model()
"""


def test_texts_are_predicted_and_a_missing_teacher_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    file = write(TEXTS.replace("STORAGE", str(runs)), "texts.py")
    settings: dict[str, Any] = {"num_workers": 0, "num_epochs": 1, "storage_path": runs}
    teacher = mnist_ray.train(f"{file}:Texts", **settings, run_name="teacher")
    (one,) = mnist_ray.predict("good", teacher)
    assert one.top[0][0] in ("bad", "good")
    two = mnist_ray.predict(["good", "bad film"], teacher)
    assert [prediction.inputs for prediction in two] == ["good", "bad film"]
    student = mnist_ray.train(f"{file}:Student", **settings, run_name="student")
    shutil.rmtree(runs / "teacher")
    with pytest.raises(UsageError, match=r"/teacher is not a run"):
        student.load_model()


def test_calls_in_two_threads_at_once_are_refused_but_not_predictions(run: Run) -> None:
    begins, ends = threading.Event(), threading.Event()

    def wait() -> None:
        with process.left_as_found():
            begins.set()
            ends.wait(60)

    other = threading.Thread(target=wait)
    other.start()
    begins.wait(60)
    with pytest.raises(JobError, match=r"^this process is busy with another call; "):
        mnist_ray.evaluate(run)
    assert mnist_ray.predict([], run) == []
    ends.set()
    other.join()


NO_WORKLOAD = "--workload must be a class derived from Workload, a file or a module, not"
NO_PART = "must be in [0, 1), not"


@pytest.mark.parametrize(
    ("function", "given", "settings", "message"),
    [
        (mnist_ray.train, [5], {}, f"{NO_WORKLOAD} 5"),
        (mnist_ray.train, [MNIST()], {}, f"{NO_WORKLOAD} <mnist_ray.mnist.problem.MNIST object at …"),
        (mnist_ray.train, [], {"settings": MNIST.Settings(), "data_dir": "a"}, "data_dir is in settings and a …"),
        (mnist_ray.train, [], {"json": True}, "the call has unknown settings: json"),
        (mnist_ray.train, [], {"run_name": "a", "resume": 1}, "--resume must be of type str, not 1"),
        (mnist_ray.train, [], {"config": 5}, "--config must be a list of str, not 5"),
        (mnist_ray.train, [], {"num_epoch": 3}, "the call has unknown settings: num_epoch; did you mean num_epochs?"),
        (mnist_ray.tune, [], {"sweep": {"beta1": 2}}, f"--sweep beta1=2: --set beta1 {NO_PART} 2.0"),
        (mnist_ray.tune, [], {"sweep": {"beta1": "log:1:2"}}, f"--sweep beta1=log:1:2: --set beta1 {NO_PART} 1.0"),
        (mnist_ray.tune, [], {"sweep": 5}, "--sweep must be a list of str, not 5"),
        (mnist_ray.evaluate, [5], {}, "a run must be given by its name, its path or a Run, not as 5"),
        (mnist_ray.evaluate, ["one"], {"storage_path": 5}, "--storage-path must be of type str, not 5"),
    ],
)
def test_a_mistake_raises_the_line_that_a_command_prints(
    function: Any, given: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        function(*given, **settings)
    start, *any_end = message.split("…")
    assert str(raised.value).startswith(start)
    assert any_end or str(raised.value) == start


def test_a_call_is_resumed_by_a_call(tmp_path: Path) -> None:
    tracker = tmp_path / "quiet_tracker.py"
    tracker.write_text("from mnist_ray.trackers import Tracker\nclass Lines(Tracker): pass\n")
    job = read_job({"storage_path": str(tmp_path), "run_name": "one", "tracker": str(tracker)})
    said = f"train(resume=True, run_name='one', storage_path='{tmp_path}', tracker='{tracker}')"
    assert job.resume_with == said


class Mine(MNIST):
    pass


def test_a_class_is_named_by_its_file_or_module_and_refused_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference_of("wine.py") == "wine.py"
    assert reference_of(Mine) == "tests.test_api:Mine"
    monkeypatch.setattr(Mine, "__module__", "test_api")
    monkeypatch.setitem(sys.modules, "test_api", sys.modules[__name__])
    assert reference_of(Mine) == f"{ROOT / 'tests' / 'test_api.py'}:Mine"
    monkeypatch.setattr(Mine, "__module__", "__main__")  # as in a notebook's cell
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(UsageError, match=r"write it to a file \(%%writefile mine\.py\) and give the file's name"):
        reference_of(Mine)


def test_a_class_of_python_m_is_named_by_its_module_and_one_in_a_function_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Local(MNIST):
        pass

    with pytest.raises(UsageError, match=r"^Local is in a notebook's cell or a function, where"):
        reference_of(Local)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])
    assert reference_of(Mine) == "tests.test_api:Mine"


CALLS = """
import contextlib, logging, os, signal, sys, threading, warnings
import numpy, torch, torch._dynamo  # what an import changes stays
import mnist_ray
from mnist_ray.report import page
from mnist_ray.run import fit
from mnist_ray.many import executor
from mnist_ray import trackers


def described():
    levels = {name: logging.getLogger(name).level for name in ("", "ray", "ray.widgets.util")}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    facts = [*levels.items(), *handlers.items(), *os.environ.items(), *warnings.filters, *threading.enumerate()]
    return {*map(str, facts), os.getcwd(), f"{torch.get_num_threads()} threads of torch"}


settings = {"storage_path": sys.argv[1], "data_dir": sys.argv[2], "callback": "ends.py", "num_epochs": 1, "quiet": True}
for end in ("finished", "failing", "interrupted"):
    os.environ["ENDS"] = end
    before = described()
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        run = mnist_ray.train(num_workers=0, run_name=end, **settings)
        mnist_ray.predict(numpy.zeros((2, 28, 28), "uint8"), run)
        print("ended", mnist_ray.evaluate(run) == run.metrics)
    print(end, described() ^ before)
"""


@pytest.mark.long
def test_a_call_leaves_its_process_as_it_found_it(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    callback_at(
        tmp_path / "ends.py",
        "on_step(self, state)",
        'if os.environ["ENDS"] == "interrupted" and state.step == 1: os.kill(os.getpid(), signal.SIGINT)',
        'if os.environ["ENDS"] == "failing": raise ValueError',
    )
    command = [sys.executable, "calls.py", str(tmp_path / "runs"), str(small_data)]
    variables = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ended", "finished", "failing", "interr"))]
    assert lines == ["ended True", "finished set()", "failing set()", "interrupted set()"]
    assert list(tmp_path.glob("runs/interrupted/checkpoint_*"))


CHECKS = """
assert [prediction.top[0][0] for prediction in predictions].count(7) >= 1
assert circle.metrics["accuracy"] > 0.8
assert set(sweep.best) == {"width", "learning_rate"}
assert sweep.load_model()[0].out_features == sweep.best["width"]
assert {row["width"] for row in sweep.table} <= {"8", "32"}
assert len(sweep.table) == 4
"""


@pytest.mark.long
def test_the_tour_runs_in_a_notebook_each_call_on_a_new_local_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("HOME", str(tmp_path))
    tour = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    tour.cells.append(nbformat.v4.new_code_cell(CHECKS))
    nbclient.NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = json.dumps([cell.get("outputs") for cell in tour.cells])
    assert "label: 3, images: 60,000 to train on, 10,000 to test" in said
    assert "<iframe sandbox srcdoc=" in said
    assert "search     random, 4 trials" in said
    assert "\\u001b" not in said  # nothing that only a terminal understands
    assert "Missing packages" not in said
    assert said.count("image/png") >= 3
    assert (tmp_path / "circle.pt2").exists()


def completed(line: str) -> list[str]:
    """Return what the shell would complete a command line with."""
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = ["bash", "-c", '"$0" -m mnist_ray 8>&1', sys.executable]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines()]


def test_a_shell_completes_commands_flags_values_runs_and_files(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    assert completed("mnist-ray ev") == ["evaluate"]
    assert completed("mnist-ray train --num-s") == ["--num-steps", "--num-seeds"]
    assert completed("mnist-ray train --optimizer a") == ["adam", "adamw"]
    assert completed(f"mnist-ray view --config {tmp_path}/t") == [f"{tmp_path}/two/"]
    for words in ("train --run-name", "evaluate", "predict --run", "compare two"):
        command, *more = words.split()
        assert completed(f"mnist-ray {command} --storage-path {tmp_path} {' '.join(more)} t") == ["two"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "usage: mnist-ray COMMAND [FLAGS]"),
        (["cake"], 2, "mnist-ray: error: argument COMMAND: invalid choice: 'cake' (choose from "),
        (["train", "--epochs", "3"], 2, "mnist-ray train: error: unrecognized arguments: --epochs 3; did you mean"),
    ],
)
def test_the_installed_program_runs_the_commands(arguments: list[str], status: int, said: str) -> None:
    program = Path(sys.executable).with_name("mnist-ray")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    printed = " ".join((done.stdout + done.stderr).split())  # argparse wraps long lists
    assert (done.returncode, printed[: len(said)]) == (status, said)
