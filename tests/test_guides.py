"""The code in the guides trains."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from mnist_ray import load_run
from mnist_ray.checkpoints.checkpoint import snapshot
from mnist_ray.checkpoints.saved_model import load_model
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.splits import splits_of
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group
from mnist_ray.training import engine
from mnist_ray.workload import Classification, Data, Mix, Regression, Streamed, Workload, setting
from mnist_ray.workload.calls import data_of
from tests.conftest import ROOT, folder_at
from tests.ranks import Hooks

CONFIG = TrainConfig(precision="fp32", num_epochs=1, batch_size=10, optimizer="sgd", learning_rate=0.05)


def code_of(page: str, **names: Any) -> dict[str, Any]:
    """Run the Python code of a guide; return its names."""
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"```python\n(.+?)```", text, re.DOTALL)), names)
    return names


def test_the_code_of_the_docs_trains_and_what_it_reports_is_right() -> None:
    names: dict[str, Any] = {"torch": torch, "F": F, "v2": v2, "lr_scheduler": torch.optim.lr_scheduler}
    code = code_of("steps.md", Classification=Classification, Workload=Workload, **names)
    images = Arrays(np.random.default_rng(0).random((20, 3, 8, 8), np.float32), np.arange(20) % 10)
    for name in ("ByLBFGS", "BySAM", "OfExperts", "Rivals", "Contrastive", "Mixed", "Patient"):
        model = {"Contrastive": Views, "Rivals": OfPictures}.get(name, Labels)
        own = {"create_model": lambda self, model=model: model()}
        workload: Any = type("Own", (code[name],), own)(None, {"class_names": [*range(10)]})
        config = replace(CONFIG, num_steps=4, validate_every=4)
        state = engine.create_state(workload, config, len(images), Group())
        losses = list[float]()
        note = Hooks(on_progress=lambda state, progress, losses=losses: losses.extend(progress.losses))
        engine.train(workload, state, Split(images), config, Group(), [note])
        assert all(np.isfinite(losses)), name


def test_the_docs_callback_trains_the_backbone_after_two_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of("callbacks.md", Classification=Classification)
    images = Arrays(np.random.default_rng(0).random((20, 192), np.float32), np.arange(20) % 10)
    model = nn.Sequential()
    model.backbone, model.head = nn.Linear(192, 4), nn.Linear(4, 10)
    pets, config = code["Pets"](None, {"class_names": [*range(10)]}), replace(CONFIG, num_epochs=3)
    pets.create_model = lambda: model
    weights = list[Tensor]()
    note = Hooks(on_epoch=lambda state, progress: weights.append(state.model.backbone.weight.detach().clone()))
    callbacks = [*pets.callbacks, code["Watch"](), note]
    engine.train(pets, engine.create_state(pets, config, 20, Group()), Split(images), config, Group(), callbacks)
    assert [torch.equal(weights[0], later) for later in weights] == [True, True, False]
    assert capsys.readouterr().out.count("norm of the last gradients") == 3


def test_the_data_of_the_docs_are_drawn_mixed_and_streamed() -> None:
    blocks = "".join(re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "guides" / "draws.md").read_text(), re.DOTALL))
    whole = Arrays(np.zeros((20, 2), np.float32), np.arange(20) // 15)
    parquet = SimpleNamespace(Parquet=lambda place: whole)
    names = {"np": np, "itertools": itertools, "Data": Data, "Mix": Mix, "Arrays": Arrays, "sources": parquet}
    found = []
    for code in blocks.split("def load_data(self):")[1:]:
        scope: dict[str, Any] = {**names, "load_arrays": lambda: (whole, whole)}
        exec(f"{blocks.partition('def counted')[1]}{blocks.partition('def counted')[2]}", scope)
        exec("def load_data(self):" + code.partition("\n\n\n")[0], scope)
        workload = type("Own", (Regression,), {"load_data": scope["load_data"]})()
        found.append(splits_of(data_of(workload), None))
    assert [splits.name for splits in found[:2]] == ["Own (drawn by weight)", "Own (shares: web 0.7, books 0.3)"]
    assert isinstance(found[2].train.examples, Streamed)
    assert [target for _, target in found[2].train.examples.first(8)] == [0, 0, 0, 0, 1, 1, 1, 0]


def test_the_docs_adapted_run_learns_and_its_checkpoints_have_only_the_new_layer(
    finished_run: Path, few_images: Arrays, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"dataclass": dataclass, "setting": setting, "load_run": load_run, "nn": nn, "F": F}
    code = code_of("weights.md", MNIST=MNIST, Photos=MNIST, Tensor=Tensor, **names)
    metadata, losses = {"class_names": [*range(10)]}, list[float]()
    workload = code["Adapted"](code["Settings"](teacher=str(finished_run)), metadata)
    config = replace(CONFIG, ema_decay=0.9)
    state = engine.create_state(workload, config, len(few_images), Group())
    note = Hooks(on_progress=lambda state, progress: losses.extend(progress.losses))
    engine.train(workload, state, Split(few_images), config, Group(), [note])
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    snapshot(state, {"workload": workload.identity}).write(folder_at(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == {"dense2.weight", "dense2.bias"}
    assert len(load_model(folder_at(tmp_path), workload).state_dict()) == 10


class Labels(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 10))


class OfPictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = nn.Linear(8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.maker(inputs).view_as(inputs)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(192, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        views = torch.stack([inputs, inputs.flip(3)], 1)
        return {"features": self.layer(views.flatten(2)), "scale": self.scale}
