"""``--init-from``: the weights that a run starts from."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from mnist_ray import train
from mnist_ray.checkpoints import checkpoint
from mnist_ray.checkpoints.find import read_initial
from mnist_ray.config import TrainConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job, read_job
from mnist_ray.parallel.group import Group
from mnist_ray.schema import INITIAL_FILE
from mnist_ray.settings import json_lines
from mnist_ray.storage import RunFolder
from mnist_ray.training.trainer import create_state
from tests.conftest import METADATA, folder_at, mnist

HEAD = """
from torch import nn
from mnist_ray.mnist import MNIST

class Head(MNIST):
    def create_model(self):
        model = super().create_model()
        model.dense1, model.dense2 = nn.Linear(64, 32), nn.Sequential(nn.Linear(32, 10))
        return model
"""
RUNS = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in a run whose files name code that must not run."""
    code, folder = tmp_path / "runs_when_loaded.py", tmp_path / "source" / "checkpoint_epoch-001_step-000000"
    code.write_text(RUNS)
    state = create_state(mnist(), replace(TrainConfig(), seed=1), 600, Group())
    state.epoch = 1
    about = {"workload": {**mnist().identity, "reference": str(code)}}
    checkpoint.snapshot(state, about).write(folder_at(folder))
    (tmp_path / "source" / "config.json").write_text(json.dumps({"workload": str(code), "num_epochs": 1}))
    return folder


def result_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint_epoch-001_step-000000" / "model.safetensors")


def test_a_run_starts_from_the_weights_that_fit_and_resumes_without_their_source(
    source: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "head.py").write_text(HEAD)
    # The learning rate is too small to change a weight: the result, an average, is what training started from.
    changes: dict[str, Any] = {
        "num_workers": 0,
        "num_epochs": 1,
        "limit": 0.2,
        "learning_rate": 1e-30,
        "ema_decay": 0.5,
    }
    where: dict[str, Any] = {"data_dir": small_data, "storage_path": tmp_path, "run_name": "tuned"}
    train(str(tmp_path / "head.py"), **where, **changes, init_from="source")
    missing = "dense1.weight (of another shape), dense1.bias (of another shape), dense2.0.weight, dense2.0.bias"
    assert f"init from  {source}: 6 of the model's 10 tensors; not {missing}\n" in capsys.readouterr().out
    assert not (tmp_path / "it_ran").exists()
    started, found = result_of(tmp_path / "tuned"), load_file(source / "model.safetensors")
    assert sum(torch.equal(found[name], tensor) for name, tensor in started.items() if name in found) == 6

    shutil.rmtree(tmp_path / "source")
    (tmp_path / "tuned" / "result.json").unlink()
    shutil.rmtree(tmp_path / "tuned" / "checkpoint_epoch-001_step-000000")  # as if it had been killed before it
    train(str(tmp_path / "head.py"), resume=True, **where, num_workers=0)
    again = result_of(tmp_path / "tuned")
    assert all(torch.equal(again[name], tensor) for name, tensor in started.items())


def test_a_run_whose_initial_weights_could_not_be_written_is_resumed(
    source: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunFolder.write_bytes

    def write_but_weights(folder: RunFolder, name: str, content: bytes) -> None:
        if name == INITIAL_FILE:
            raise JobError("no space")
        write(folder, name, content)

    where: dict[str, Any] = {"storage_path": tmp_path, "run_name": "run"}
    few: dict[str, Any] = {
        "num_workers": 0,
        "num_epochs": 1,
        "limit": 0.05,
        "data_dir": small_data,
        "init_from": "source",
    }
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_bytes", write_but_weights)
        with pytest.raises(JobError, match="no space"):
            train(None, **where, **few)
    assert train(None, **where, resume=True).metrics["loss"] > 0
    assert load_file(tmp_path / "run" / INITIAL_FILE).keys() == load_file(source / "model.safetensors").keys()


def test_a_run_is_resumed_by_the_same_source_even_if_that_is_gone_but_not_by_another(
    source: Path, tmp_path: Path
) -> None:
    given = {"init_from": "source", "storage_path": str(tmp_path), "run_name": "run"}
    started = read_job(given)
    started.run.write_text("config.json", json_lines(started.values))
    for is_gone in (False, True):
        if is_gone:
            shutil.rmtree(tmp_path / "source")
        assert read_job({**given, "resume": True}).values == started.values
    with pytest.raises(UsageError, match=r"was started with --init-from .*/source, not .*/other; leave that out"):
        read_job({**given, "resume": True, "init_from": "other"})


def job_from(init_from: Path | str, tmp_path: Path) -> Job:
    job = read_job({"init_from": str(init_from), "storage_path": str(tmp_path)})
    return replace(job, workload=type(job.workload)(job.workload.settings, METADATA))


def save_tied(weights: dict[str, Tensor], file: Path) -> None:
    torch.save({**weights, "one": weights["conv1.weight"], "turned": weights["dense1.weight"].t()}, file)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.safetensors", save_file),
        ("a.pt", save_tied),
        ("a.pth", lambda weights, file: torch.save(weights, file, _use_new_zipfile_serialization=False)),
    ],
)
def test_weights_may_come_from_a_file(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in mnist().create_model().state_dict().items()}
    write(weights, tmp_path / name)
    content, line = read_initial(mnist(), str(tmp_path / name), str(tmp_path))
    assert line == f"{tmp_path / name}: 10 of the model's 10 tensors"
    assert all(torch.equal(load(content)[name], tensor) for name, tensor in weights.items())


def test_a_relative_path_is_saved_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert job_from("a.pt", tmp_path).values["init_from"] == str(tmp_path / "a.pt")


def test_a_uri_is_saved_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RunFolder("a.pt", "s3://KEY:SECRET@bucket", fs.LocalFileSystem(), str(tmp_path))
    monkeypatch.setattr("mnist_ray.job.job.find_run", lambda *given: place)
    assert job_from(place.uri, tmp_path).values["init_from"] == "s3://***@bucket/a.pt"


RUBBISH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty.pt": (Path.touch, "has no weights that can be read: write"),
    "empty.safetensors": (Path.touch, "has no weights that can be read: write"),
    "object.pt": (lambda file: file.write_bytes(pickle.dumps(np.zeros(3))), "has no weights that can be read: write"),
    "model.pt": (lambda file: torch.save(nn.Linear(2, 2), file), "has no weights that can be read: write"),
    "nested.pt": (lambda file: torch.save({"model": {}, "epoch": 1}, file), "has no weights that can be read: write"),
    "other.pt": (
        lambda file: torch.save({"module.fc": torch.ones(2)}, file),
        r"nothing fits the model by name and shape: module.fc against conv1.weight, conv1.bias, .* \[\.\.\.\]$",
    ),
    "folder.pt": (Path.mkdir, "is neither a checkpoint nor a run with a checkpoint$"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_weights_that_cannot_be_used_are_one_line(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write, message = RUBBISH[name]
    write(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}.* {message}") as raised:
        read_initial(mnist(), str(tmp_path / name), str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not [str(warning.message) for warning in recwarn if "pickle" in str(warning.message)]
