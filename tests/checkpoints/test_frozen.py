"""Checkpoints without the weights that ``create_model`` returns frozen: ``keeps_frozen = False``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mnist_ray
from mnist_ray.checkpoints import checkpoint, saved_model
from mnist_ray.checkpoints.checkpoint import DamagedCheckpointError, OtherModelError
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError
from mnist_ray.job.find import read_initial
from mnist_ray.job.job import Job, read_job
from mnist_ray.mnist import MNIST
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training import engine
from mnist_ray.training.state import TrainingState
from tests.checkpoints.test_checkpoint import CONFIG, bits_of, changed, train_and_save
from tests.conftest import METADATA, QUICK, folder_at
from tests.ranks import Hooks

CHANGED = r"the frozen weights that create_model returns have changed since checkpoint .*; restore the files and code"
KEPT = {"2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked", "4.weight", "4.bias"}


class Adapted(MNIST):
    """A frozen layer, a trained one, and buffers."""

    keeps_frozen = False
    value = 0.0  # of one of the frozen weights

    def create_model(self) -> nn.Sequential:
        base = nn.Linear(784, 16).requires_grad_(False)
        nn.init.constant_(base.bias, 0.1)
        base.weight.copy_(torch.linspace(-0.1, 0.1, base.weight.numel()).view_as(base.weight).sin())
        base.weight[0, 0] = self.value
        return nn.Sequential(nn.Flatten(), base, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


class Whole(Adapted):
    keeps_frozen = True


def adapted(kind: type[Adapted] = Adapted, value: float = 0.0) -> Adapted:
    workload = kind(None, METADATA)
    workload.value = value
    return workload


@pytest.fixture(scope="module", params=[None, 0.9], ids=["plain", "EMA"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, few_images: Arrays) -> Any:
    """A folder with the checkpoints of a run without its frozen weights, the run's settings, and its last state."""
    root, config = tmp_path_factory.mktemp("frozen"), replace(CONFIG, ema_decay=request.param)
    return root, config, train_and_save(root, few_images, config, workload=adapted())


def contents(folder: Path) -> list[Any]:
    """Return the bytes of a checkpoint's tensors and the rest of its state, without times."""
    return [bits_of(folder), *(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))]


def test_the_files_have_no_frozen_tensors_but_all_others(saved: Any) -> None:
    root, config, _ = saved
    for folder in root.iterdir():
        kinds = ["model"] if config.ema_decay is None else ["model", "trained"]
        assert [{*load_file(folder / f"{kind}.safetensors")} for kind in kinds] == [KEPT] * len(kinds)
        state = json.loads((folder / "state.json").read_text())
        assert state["frozen"]["names"] == ["1.bias", "1.weight"]
        assert state["tensors"]["model"] == len(KEPT)


@pytest.mark.parametrize("position", ["0-14", "1-0"])
def test_a_resumed_run_ends_bit_identical(saved: Any, position: str, few_images: Arrays, tmp_path: Path) -> None:
    root, config, _ = saved
    train_and_save(tmp_path, few_images, config, root / position, adapted())
    assert contents(tmp_path / "2-0") == contents(root / "2-0")


def test_the_loaded_model_is_whole_and_the_one_of_a_run_that_keeps_all(
    saved: Any, few_images: Arrays, tmp_path: Path
) -> None:
    root, config, state = saved
    whole = train_and_save(tmp_path, few_images, config, workload=adapted(Whole))
    loaded = saved_model.load_model(folder_at(root / "2-0"), adapted()).state_dict()
    for other in (state.result.state_dict(), whole.result.state_dict()):
        assert loaded.keys() == other.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in other.items())


def test_a_callback_that_unfreezes_for_a_while_ends_the_run(few_images: Arrays) -> None:
    def thaw(state: TrainingState) -> None:
        if state.step:  # not at the end of an epoch, where a checkpoint is saved
            state.model.get_parameter("1.weight").requires_grad_(state.step % 2 == 1)

    state = engine.create_state(adapted(), CONFIG, len(few_images), Group())
    with pytest.raises(TrainingStoppedError, match=r"a callback has unfrozen 1\.weight, which checkpoints leave out"):
        engine.train(adapted(), state, Split(few_images), CONFIG, Group(), [Hooks(on_step=thaw)])


def test_a_run_that_keeps_all_has_no_trace_of_it(few_images: Arrays, tmp_path: Path) -> None:
    train_and_save(tmp_path, few_images, CONFIG, workload=adapted(Whole))
    document = checkpoint.read_state(folder_at(tmp_path / "2-0"))
    assert {*load_file(tmp_path / "2-0" / "model.safetensors")} == KEPT | {"1.weight", "1.bias"}
    assert document.keys() == {"format", "epoch", "step", "tensors", "note", "workload", "sha256"}
    assert saved_model.weights_digest(document) == document["sha256"]["model.safetensors"]
    assert MNIST.keeps_frozen


def test_the_digest_of_the_weights_depends_on_the_frozen_ones() -> None:
    def digest(value: float) -> str:
        taken = checkpoint.snapshot(engine.create_state(adapted(value=value), CONFIG, 600, Group()), {})
        return saved_model.weights_digest({**taken.document, "sha256": {"model.safetensors": "the same"}})

    assert digest(0.0) == digest(0.0)
    assert len({digest(0.0), digest(1.0), digest(-0.0)}) == 3, "a sign of zero is a bit, too"


def test_an_ema_shares_the_frozen_weights_and_changes_no_bit_of_them(few_images: Arrays, tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.9, num_epochs=1)
    state = train_and_save(tmp_path, few_images, config, workload=adapted(value=-0.0))
    averages = dict(state.result.named_parameters())
    shared = {name for name, parameter in state.model.named_parameters() if averages[name] is parameter}
    assert shared == {"1.weight", "1.bias"}
    assert state.model.get_parameter("1.weight")[0, 0].signbit()
    whole = engine.create_state(adapted(Whole), config, 600, Group())
    assert not {*whole.result.parameters()} & {*whole.model.parameters()}, "a callback may unfreeze them"
    model, size = whole.model, sum(parameter.nbytes for parameter in whole.model.parameters())
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    held = [sharding.held_bytes(model, adapted(kind), config, 1) for kind in (Whole, Adapted)]
    assert held == [2 * frozen + 5 * (size - frozen), frozen + 5 * (size - frozen)]


def test_changed_frozen_weights_are_one_line(saved: Any) -> None:
    root, config, _ = saved
    folder, other = folder_at(root / "1-0"), adapted(value=1.0)
    state = engine.create_state(other, config, 600, Group())
    calls: list[Callable[[], object]] = [
        lambda: checkpoint.restore(folder, state),
        lambda: saved_model.load_model(folder, other),
    ]
    for call in calls:
        with pytest.raises(OtherModelError, match=CHANGED) as raised:
            call()
        assert str(folder.uri) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_damaged_list_of_what_is_left_out_is_a_damaged_checkpoint(saved: Any, tmp_path: Path) -> None:
    folder = changed(shutil.copytree(saved[0] / "1-0", tmp_path / "1-0"), {"frozen": {"names": 5}}, is_signed=True)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: state\.json: "):
        saved_model.load_model(folder_at(folder), adapted())


@pytest.mark.parametrize("kinds", [(Whole, Adapted), (Adapted, Whole)], ids=["to False", "to True"])
def test_a_run_is_not_resumed_if_keeps_frozen_has_changed(
    kinds: tuple[type[Adapted], type[Adapted]], tmp_path: Path
) -> None:
    before, after = (engine.create_state(adapted(kind), CONFIG, 600, Group()) for kind in kinds)
    checkpoint.snapshot(before, {}).write(folder_at(tmp_path))
    with pytest.raises(
        OtherModelError, match=r"does not fit the model: keeps_frozen has changed, .*; restore the code"
    ):
        checkpoint.restore(folder_at(tmp_path), after)


def test_a_callback_that_unfreezes_what_checkpoints_leave_out_is_refused(few_images: Arrays, tmp_path: Path) -> None:
    def unfreeze(state: TrainingState) -> None:
        if state.step == 10:
            state.model.get_parameter("1.bias").requires_grad_(True)

    with pytest.raises(TrainingStoppedError, match=r"^a callback has unfrozen 1\.bias, which checkpoints leave out; "):
        train_and_save(tmp_path, few_images, CONFIG, workload=adapted(), callbacks=[Hooks(on_step=unfreeze)])
    assert [folder.name for folder in tmp_path.iterdir()] == ["0-7"]


class Tied(Adapted):
    """Two layers share a frozen parameter and a trained one."""

    def create_model(self) -> nn.Sequential:
        first, second = nn.Linear(16, 16), nn.Linear(16, 16)
        first.weight = second.weight = nn.Parameter(torch.eye(16), requires_grad=False)
        first.bias = second.bias
        flatten, base, *_, head = super().create_model()
        return nn.Sequential(flatten, base, first, second, head)


def test_tied_parameters_are_left_out_by_all_names_and_restored(few_images: Arrays, tmp_path: Path) -> None:
    whole, resumed, config = tmp_path / "whole", tmp_path / "resumed", replace(CONFIG, ema_decay=0.9)
    for folder, resume in ((whole, None), (resumed, whole / "1-14")):
        state = train_and_save(folder, few_images, config, resume, adapted(Tied))
    assert contents(resumed / "2-0") == contents(whole / "2-0")
    assert {*load_file(whole / "2-0" / "model.safetensors")} == {"2.bias", "3.bias", "4.weight", "4.bias"}
    average, loaded = state.result, saved_model.load_model(folder_at(whole / "2-0"), adapted(Tied))
    assert all(torch.equal(average.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    for model in (average, loaded):
        assert model.get_parameter("3.weight") is model.get_parameter("2.weight")
        assert model.get_parameter("3.bias") is model.get_parameter("2.bias")
    assert average.get_parameter("3.weight") is state.model.get_parameter("3.weight")


# --- --init-from


def job_from(place: Path, workload: Adapted, tmp_path: Path) -> Job:
    return replace(read_job({"init_from": str(place), "storage_path": str(tmp_path)}), workload=workload)


class Unfrozen(Adapted):
    """A second training, of all weights."""

    def create_model(self) -> nn.Sequential:
        return super().create_model().requires_grad_(True)


@pytest.mark.parametrize("kind", [Adapted, Whole, Unfrozen])
def test_a_run_starts_from_a_checkpoint_that_left_out_the_same_weights(
    saved: Any, kind: type[Adapted], tmp_path: Path
) -> None:
    place = saved[0] / "1-0"
    _, line = read_initial(job_from(place, adapted(kind), tmp_path))
    assert line == f"{place}: 9 of the model's 9 tensors"
    with pytest.raises(OtherModelError, match=CHANGED):
        read_initial(job_from(place, adapted(kind, value=1.0), tmp_path))


def test_weights_to_start_from_must_not_change_what_checkpoints_leave_out(tmp_path: Path) -> None:
    same, other = (adapted(value=value).create_model().state_dict() for value in (0.0, 1.0))
    for name, weights in (("same", same), ("other", other)):
        save_file(dict(weights), tmp_path / f"{name}.safetensors")
    assert (
        " 9 of the model's 9 tensors" in read_initial(job_from(tmp_path / "same.safetensors", adapted(), tmp_path))[1]
    )
    file = tmp_path / "other.safetensors"
    with pytest.raises(UsageError, match=rf"^--init-from {file} has other frozen weights than create_model returns; "):
        read_initial(job_from(file, adapted(), tmp_path))
    assert read_initial(job_from(file, adapted(Whole), tmp_path))


# --- whole runs

RUN = """
from pathlib import Path
import torch
from torch import nn
from mnist_ray.mnist import MNIST

class Loaded(MNIST):
    keeps_frozen = False
    def create_model(self):
        base = nn.Linear(784, 8).requires_grad_(False)
        base.load_state_dict(torch.load(Path(__file__).with_name("base.pt")))
        return nn.Sequential(nn.Flatten(), base, nn.ReLU(), nn.Linear(8, 10))

class Random(MNIST):
    keeps_frozen = False
    def create_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 10))
"""


def test_a_run_is_exported_and_refused_wherever_its_base_has_changed(
    ray_address: str, write: Callable[..., Path], small_data: Path, few_images: Arrays, tmp_path: Path
) -> None:
    file, runs = write(RUN, "with_base.py"), tmp_path / "runs"
    torch.manual_seed(1)
    base = nn.Linear(784, 8).state_dict()
    torch.save(base, tmp_path / "base.pt")
    settings: dict[str, Any] = {**QUICK, "num_workers": 0, "num_epochs": 1, "storage_path": runs, "run_name": "run"}
    settings["data_dir"] = small_data
    run = mnist_ray.train(f"{file}:Loaded", **settings)
    assert {*load_file(Path(run.checkpoint) / "model.safetensors")} == {"3.weight", "3.bias"}
    exported = load_file(run.export(tmp_path / "model.pt2").with_suffix(".safetensors"))
    assert torch.equal(exported["1.weight"], base["weight"])
    assert mnist_ray.evaluate(run) == run.metrics

    torch.save({name: tensor + 1e-7 for name, tensor in base.items()}, tmp_path / "base.pt")
    (Path(run.folder.path) / "result.json").rename(tmp_path / "result.json")
    calls: list[Callable[[], object]] = [
        lambda: mnist_ray.evaluate(Path(run.checkpoint)),
        lambda: mnist_ray.predict(few_images.inputs[:2], Path(run.checkpoint)),
        lambda: run.load_model(),
        lambda: run.export(tmp_path / "again.pt2"),
        lambda: mnist_ray.train(f"{file}:Loaded", **{**settings, "run_name": "next"}, init_from=run),
        lambda: mnist_ray.train(f"{file}:Loaded", **settings, resume=True),
    ]
    for call in calls:
        with pytest.raises(JobError, match=CHANGED) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_frozen_weights_that_are_random_are_refused_before_the_start(
    write: Callable[..., Path], small_data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**QUICK, "num_workers": 0, "storage_path": tmp_path / "runs", "data_dir": small_data}
    with pytest.raises(
        UsageError, match=r"^Random\.create_model returns other frozen weights each time, so "
    ) as raised:
        mnist_ray.train(f"{write(RUN, 'of_chance.py')}:Random", **settings)
    assert "\n" not in str(raised.value)
