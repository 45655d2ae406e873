import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mnist_ray.checkpoints import checkpoint, state_file
from mnist_ray.checkpoints.find import find, load_model
from mnist_ray.checkpoints.state_file import DamagedCheckpointError
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.tensors import map_tensors
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group
from mnist_ray.storage import RunFolder
from mnist_ray.training import step
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Workload
from tests.conftest import folder_at, mnist
from tests.ranks import Hooks

CONFIG = TrainConfig(
    precision="fp32", num_epochs=2, batch_size=20, learning_rate=2e-3, lr_schedule="one-cycle", checkpoint_every=7
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, few_images: Arrays) -> Path:
    """A folder with every checkpoint of a short run, each named by its epoch and step."""
    root = tmp_path_factory.mktemp("checkpoints")
    train_and_save(root, few_images, CONFIG)
    return root


def train_and_save(
    root: Path,
    arrays: Arrays,
    config: TrainConfig,
    resume: Path | None = None,
    workload: Workload | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingState:
    workload = workload or mnist()
    torch.set_num_threads(1)

    def save(state: TrainingState, progress: Progress) -> None:
        folder = root / f"{state.epoch}-{state.step}"
        if state.step == 0:
            state.scores.append((1 / state.epoch, 0.0))
        checkpoint.snapshot(state, {"note": "hello", "workload": mnist().identity}, callbacks).write(folder_at(folder))

    state = create_state(workload, config, len(arrays), Group())
    if resume:
        restore(folder_at(resume), state, callbacks)
    Trainer(workload, state, Split(arrays), config, Group(), [*callbacks, Hooks(on_checkpoint=save)]).train()
    return state


def restore(folder: RunFolder, state: TrainingState, callbacks: Sequence[Callback] = ()) -> None:
    checkpoint.load(checkpoint.read(folder, state)[1], state, callbacks, folder)


def bits_of(folder: Path) -> tuple[bytes, str]:
    """Return the content of a checkpoint, without times."""
    training = torch.load(folder / "training.pt", weights_only=True)
    assert training.pop("epoch_s") >= 0
    assert training.pop("finished_s") >= 0
    exact = map_tensors(lambda tensor: (tensor.numpy().tobytes(), tensor.stride()), training)
    return (folder / "model.safetensors").read_bytes(), repr(exact)


@pytest.mark.parametrize("position", ["0-7", "0-28", "1-0", "1-14", "2-0"])
def test_a_run_resumed_anywhere_ends_bit_identical(
    saved: Path, tmp_path: Path, few_images: Arrays, position: str
) -> None:
    train_and_save(tmp_path, few_images, CONFIG, resume=saved / position)
    expected = {path.name for path in saved.iterdir() if as_numbers(path.name) > as_numbers(position)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name in expected:
        assert bits_of(tmp_path / name) == bits_of(saved / name)


class Steep(MNIST):
    """Gradients that overflow fp16 at first. Without convolutions, which take minutes in fp16 on CPUs."""

    def create_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 100 * super().loss(outputs, targets)


class Counts(Callback):
    """Scales the gradients by its number of steps, which a checkpoint keeps."""

    def __init__(self) -> None:
        self.count = 0

    def on_gradients(self, state: TrainingState) -> None:
        self.count += 1
        for parameter in state.model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1 + 1 / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.count = values["count"]


SCALED = replace(CONFIG, num_epochs=1, precision="fp16", micro_batch_size=7, clip_grad_norm=0.5)
AVERAGED = replace(CONFIG, ema_decay=0.9, optimizer="sgd", early_stopping_patience=2, label_smoothing=0.1)
AVERAGED = replace(AVERAGED, lr_schedule="cosine", warmup_steps=20)


@pytest.mark.parametrize(
    ("config", "workload", "positions"),
    [(SCALED, Steep(), ["0-14"]), (AVERAGED, mnist(), ["0-14", "1-7"])],
    ids=["a scaled loss in micro-batches", "an EMA, a callback, scores, momentum, a warm-up"],
)
def test_all_state_is_resumed_bit_identical(
    config: TrainConfig, workload: Workload, positions: list[str], tmp_path: Path, few_images: Arrays
) -> None:
    last = f"{config.num_epochs}-0"
    state = train_and_save(tmp_path / "whole", few_images, config, workload=workload, callbacks=[Counts()])
    assert state.scaler.get_scale() < 65536
    for position in positions:
        resumed = tmp_path / f"from {position}"
        state = train_and_save(resumed, few_images, config, tmp_path / "whole" / position, workload, [Counts()])
        assert bits_of(resumed / last) == bits_of(tmp_path / "whole" / last)
        assert state.scores == [(1.0, 0.0), (0.5, 0.0)][: config.num_epochs]
    averaged = load_model(folder_at(tmp_path / "whole" / last), workload).state_dict()
    trained, result = state.model.state_dict(), state.result.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in result.items())
    assert any(not torch.equal(averaged[name], value) for name, value in trained.items()) == bool(config.ema_decay)


@pytest.mark.parametrize("value", [threading.Lock(), np.float64(1)], ids=["a lock", "a number of NumPy's"])
def test_a_callbacks_state_that_a_checkpoint_cannot_hold_is_one_line(value: Any) -> None:
    class Holds(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"value": value}

    with pytest.raises(UsageError, match=r"^Holds\.state_dict has more than numbers, strings, "):
        checkpoint.snapshot(create_state(mnist(), CONFIG, 600, Group()), {}, [Holds()])


def as_numbers(position: str) -> list[int]:
    return [int(number) for number in position.split("-")]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_rejected(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(saved / "1-0", tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 255
        cut = {"truncated": len(content) // 2, "flipped": len(content), "empty": 0}[damage]
        (folder / name).write_bytes(content[:cut])
    state = create_state(mnist(), CONFIG, 600, Group())
    with pytest.raises((JobError, UsageError)) as raised:
        restore(folder_at(folder), state)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def changed(folder: Path, changes: dict[str, Any], *, is_signed: bool = False) -> Path:
    """Change entries of a checkpoint's state.json; ``is_signed``: its digests with them."""
    state = json.loads((folder / "state.json").read_text()) | changes
    if is_signed:
        contents = {name: (folder / name).read_bytes() for name in state["sha256"] if name != "state.json"}
        state["sha256"] |= {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        state["sha256"]["state.json"] = state_file.digest_of(state)
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("changes", [{"step": 2}, {"note": "hallo"}, {"sha256": []}, {"sha256": {}}])
def test_a_state_file_that_was_changed_is_damaged(saved: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = changed(shutil.copytree(saved / "1-0", tmp_path / "copy"), changes)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: state\.json: .*; use another one$"):
        find(str(folder), str(tmp_path))


def test_a_folder_without_state_file_or_of_another_format_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    state = state_file.read_state(folder_at(saved / "1-0"))
    assert (state["epoch"], state["step"], state["note"]) == (1, 0, "hello")
    with pytest.raises(UsageError, match=r"is not a checkpoint: it has no state\.json"):
        load_model(folder_at(tmp_path), mnist())
    folder = changed(shutil.copytree(saved / "1-0", tmp_path / "copy"), {"format": 99}, is_signed=True)
    with pytest.raises(UsageError, match=r"has format 99; this version reads 5$"):
        load_model(folder_at(folder), mnist())


def test_a_checkpoint_of_another_model_or_optimizer_is_rejected_but_not_damaged(
    saved: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved / "1-0", Path(run.path) / "checkpoint_epoch-001_step-000000")
    state = create_state(mnist(), CONFIG, 600, Group())
    state.optimizers[""] = torch.optim.Adam([{"params": [parameter]} for parameter in state.model.parameters()])
    with pytest.raises(
        TrainingStoppedError, match=r"0000 does not fit the optimizer, schedule or callback: ValueError: "
    ):
        checkpoint.restore_newest(run, state)
    monkeypatch.setattr(MNIST, "create_model", lambda workload: nn.Linear(784, 10))
    state = create_state(mnist(), CONFIG, 600, Group())
    with pytest.raises(TrainingStoppedError, match=r"_step-000000 does not fit the model: .*conv1\.weight"):
        checkpoint.restore_newest(run, state)
    with pytest.raises(TrainingStoppedError, match=r"1-0 does not fit the model: .*conv1\.weight") as raised:
        load_model(folder_at(saved / "1-0"), mnist())
    assert "\n" not in str(raised.value)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.pt"])
@pytest.mark.parametrize("format_of", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_file_is_rejected_and_not_run(
    saved: Path, tmp_path: Path, name: str, format_of: str
) -> None:
    folder, marker = shutil.copytree(saved / "1-0", tmp_path / "copy"), tmp_path / "was-run"
    if format_of == "pickle":
        (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    else:
        torch.save({"weights": Marker(marker)}, folder / name)
    changed(folder, {}, is_signed=True)
    state = create_state(mnist(), CONFIG, 600, Group())
    with pytest.raises(DamagedCheckpointError, match="is damaged: ") as raised:
        restore(folder_at(folder), state)
    assert "\n" not in str(raised.value)
    assert not marker.exists()
    assert (state.epoch, state.step) == (0, 0)


def test_reading_a_checkpoint_is_tried_again_after_an_error_of_the_storage(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[tuple[str, ...]] = []

    def at_the_second_attempt(read: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(folder: RunFolder, *place: Any) -> Any:
            attempts.append(place)
            if attempts.count(place) == 1:
                raise OSError("connection reset")
            return read(folder, *place)

        return wrapped

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(RunFolder, "read_bytes", at_the_second_attempt(RunFolder.read_bytes))
    state = create_state(mnist(), CONFIG, 600, Group())
    restore(folder_at(saved / "1-0"), state)
    assert {attempts.count(place) for place in attempts} == {2}
    assert {name for name, *_ in attempts} == {path.name for path in (saved / "1-0").iterdir()}
    assert state.epoch == 1


@pytest.mark.parametrize("on_gpu", [False, True])
def test_dropout_on_the_cpu_draws_the_same_in_a_resumed_run(
    on_gpu: bool, few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_dropout(workload: Workload) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(784, 10))

    if on_gpu:
        monkeypatch.setattr(step, "_generator", lambda device: torch.Generator())  # in place of the GPU's
    monkeypatch.setattr(MNIST, "create_model", with_dropout)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder, position in ((whole, None), (resumed, whole / "1-7")):
        train_and_save(folder, few_images, CONFIG, resume=position)
    assert (resumed / "2-0" / "model.safetensors").read_bytes() == (whole / "2-0" / "model.safetensors").read_bytes()


def test_tied_weights_are_saved_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied(workload: Workload) -> nn.Module:
        first, second = nn.Linear(784, 784), nn.Linear(784, 784)
        second.weight = first.weight
        return nn.Sequential(nn.Flatten(), first, second, nn.Linear(784, 10))

    monkeypatch.setattr(MNIST, "create_model", tied)
    state, restored = (create_state(mnist(), replace(CONFIG, seed=seed), 600, Group()) for seed in (0, 1))
    checkpoint.snapshot(state, {"workload": mnist().identity}).write(folder_at(tmp_path))
    restore(folder_at(tmp_path), restored)
    weights = restored.model.state_dict()
    assert torch.equal(weights["2.weight"], state.model.state_dict()["1.weight"])
    assert torch.equal(weights["1.weight"], weights["2.weight"])
