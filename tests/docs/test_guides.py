"""The guides' code trains, and their commands compare and predict."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from mnist_ray import load_run
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.splits import splits_of
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Classification, Data, Regression, Streamed, Workload, setting, sources
from mnist_ray.workload.calls import data_of
from tests.conftest import ROOT, run_main
from tests.ranks import Hooks

STEPS = (
    "A step of your own",
    "Losses to minimize, and values to log",
    "Mixup and CutMix",
    "A GAN: several optimizers",
    "LBFGS and SAM: several gradients in a step",
    "Contrastive losses: over the whole batch",
    "A schedule for plateaus",
)
CONFIG = TrainConfig(precision="fp32", num_epochs=1, batch_size=10, optimizer="sgd", learning_rate=0.05)


def text_of(page: str, *titles: str) -> str:
    """Return the text of sections of a guide."""
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    return "\n".join(sections[title] for title in titles)


def code_of(page: str, *titles: str, place: str = "", **names: Any) -> dict[str, Any]:
    """Run the Python code of sections of a guide, with a place instead of its bucket; return its names."""
    code = "\n".join(re.findall(r"```python\n(.+?)```", text_of(page, *titles), re.DOTALL))
    exec(code.replace("s3://bucket", place), names)
    return names


def test_the_code_of_the_docs_trains_and_what_it_reports_is_right() -> None:
    names: dict[str, Any] = {"torch": torch, "F": F, "v2": v2, "lr_scheduler": torch.optim.lr_scheduler}
    code = code_of("recipes.md", *STEPS, Classification=Classification, Workload=Workload, **names)
    images = Arrays(np.random.default_rng(0).random((20, 3, 8, 8), np.float32), np.arange(20) % 10)
    for name in ("Usual", "Penalized", "Mixed", "GAN", "ByLBFGS", "BySAM", "Contrastive", "Patient"):
        model = {"Contrastive": Views, "GAN": OfPictures}.get(name, Labels)
        own = {"create_model": lambda self, model=model: model()}
        workload: Any = type("Own", (code[name],), own)(None, {"class_names": [*range(10)]})
        config = replace(CONFIG, num_steps=4, validate_every=4)
        state = create_state(workload, config, len(images), Group())
        losses = list[float]()
        note = Hooks(on_progress=lambda state, progress, losses=losses: losses.extend(progress.losses))
        Trainer(workload, state, Split(images), config, Group(), [note]).train()
        assert all(np.isfinite(losses)), name


def test_the_docs_callback_trains_the_backbone_after_two_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of("callbacks.md", "Callbacks", "Freeze and unfreeze", Classification=Classification)
    images = Arrays(np.random.default_rng(0).random((20, 192), np.float32), np.arange(20) % 10)
    model = nn.Sequential()
    model.backbone, model.head = nn.Linear(192, 4), nn.Linear(4, 10)
    pets, config = code["Pets"](None, {"class_names": [*range(10)]}), replace(CONFIG, num_epochs=3)
    pets.create_model = lambda: model
    weights = list[Tensor]()
    note = Hooks(on_epoch=lambda state, progress: weights.append(state.model.backbone.weight.detach().clone()))
    callbacks = [*pets.callbacks, code["Watch"](), note]
    Trainer(pets, create_state(pets, config, 20, Group()), Split(images), config, Group(), callbacks).train()
    assert [torch.equal(weights[0], later) for later in weights] == [True, True, False]
    assert capsys.readouterr().out.count("norm of the last gradients") == 3


def test_the_data_of_the_docs_are_drawn_and_streamed() -> None:
    code = "\n".join(re.findall(r"```python\n(.+?)```", text_of("data.md", "Rare classes"), re.DOTALL))
    whole = Arrays(np.zeros((20, 2), np.float32), np.arange(20) // 15)
    scope: dict[str, Any] = {"np": np, "Data": Data, "load_arrays": lambda: (whole, whole)}
    exec(code, scope)
    splits = splits_of(data_of(type("Own", (Regression,), {"load_data": scope["load_data"]})()), None)
    assert splits.name == "Own (drawn by weight)"
    scope = code_of("data.md", "Streams of unknown length", np=np, itertools=itertools, Data=Data, Arrays=Arrays)
    splits = splits_of(data_of(type("Own", (Regression,), {"load_data": scope["load_data"]})()), None)
    assert isinstance(splits.train.examples, Streamed)
    assert [target for _, target in splits.train.examples.first(8)] == [0, 0, 0, 0, 1, 1, 1, 0]


def test_the_docs_student_learns_from_a_run(finished_run: Path, few_images: Arrays) -> None:
    names: dict[str, Any] = {"dataclass": dataclass, "setting": setting, "load_run": load_run, "nn": nn, "F": F}
    code = code_of("recipes.md", "Distillation", MNIST=MNIST, Photos=MNIST, Tensor=Tensor, **names)
    metadata, losses = {"class_names": [*range(10)]}, list[float]()
    workload = code["Distilled"](code["Settings"](teacher=str(finished_run)), metadata)
    state = create_state(workload, CONFIG, len(few_images), Group())
    teacher = {name: tensor.clone() for name, tensor in state.model.get_submodule("teacher").state_dict().items()}
    note = Hooks(on_progress=lambda state, progress: losses.extend(progress.losses))
    Trainer(workload, state, Split(few_images), CONFIG, Group(), [note]).train()
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert all(
        torch.equal(teacher[name], tensor) for name, tensor in state.model.get_submodule("teacher").state_dict().items()
    )


def test_the_docs_recipe_turns_json_lines_and_tar_files_into_parquet(ray_address: str, tmp_path: Path) -> None:
    for folder in ("reviews", "pets-tars"):
        (tmp_path / folder).mkdir()
    for part in range(2):
        lines = [json.dumps({"length": number, "stars": part}) for number in range(150)]
        (tmp_path / "reviews" / f"{part}.jsonl").write_text("\n".join(lines))
    picture = io.BytesIO()
    Image.new("RGB", (9, 6), (200, 100, 0)).save(picture, "png")
    members = [
        (f"{i}.{end}", data) for i in range(3) for end, data in (("png", picture.getvalue()), ("cls", b"%d" % i))
    ]
    with tarfile.open(tmp_path / "pets-tars" / "0.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    code_of("data.md", "From JSON lines or tar files", place=str(tmp_path))
    reviews = sources.Parquet(tmp_path / "reviews-parquet", columns=["length", "stars"])
    assert sorted((int(length), int(stars)) for length, stars in map(reviews.__getitem__, range(300))) == sorted(
        (length, stars) for length in range(150) for stars in range(2)
    )
    assert max(reviews.sizes) <= 100
    pets = sources.Parquet(tmp_path / "pets-parquet", columns=["image", "label"])
    assert sorted(int(pets[index][1]) for index in range(len(pets))) == [0, 1, 2]
    assert pets[0][0].shape == (6, 9, 3)


class Labels(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 10))


class OfPictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.generator(inputs).view_as(inputs)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(192, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        views = torch.stack([inputs, inputs.flip(3)], 1)
        return {"features": self.layer(views.flatten(2)), "scale": self.scale}


SHADES = """
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Shades(Classification):
    recipes = {"default": {"num_epochs": 2, "validation_size": 30}}
    def load_data(self):
        rng = np.random.default_rng(0)
        targets = rng.integers(2, size=200)
        inputs = (targets[:, None] * 60 + rng.integers(150, size=(200, 16))).astype(np.float32)
        return Data(Arrays(inputs[:120], targets[:120]), Arrays(inputs[120:], targets[120:]))
    def create_model(self): return nn.Linear(16, 2)
    def prepare(self, inputs, generator): return inputs / 100 - 1
"""


def test_the_guides_commands_compare_runs(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = tmp_path / "runs"
    monkeypatch.setenv("MNIST_RAY_STORAGE_PATH", str(storage))
    guide = text_of("several.md", "Which run is better")
    write(SHADES, "shades.py")
    common = ["--workload", str(tmp_path / "shades.py"), "--num-workers", "0", "--quiet"]
    for name, rate in (("base", "0.05"), ("slow", "0.00001")):
        run_main("train", *common, "--run-name", name, "--learning-rate", rate)
    capsys.readouterr()
    (words,) = re.findall(r"^    \$ mnist-ray compare (.+)$", guide, re.MULTILINE)
    run_main("compare", *words.split())
    assert "settings   learning_rate 0.05 in A, 1e-05 in B" in capsys.readouterr().out
    exec(re.search(r"```python\n(.+?)```", guide, re.DOTALL)[1], {})  # type: ignore[index]
    assert capsys.readouterr().out.splitlines()[1].startswith("A  base  1 seed")


def test_the_guides_commands_and_code_predict_at_scale(
    ray_address: str, finished_run: Path, mnist_test: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "guides" / "predict.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for folder in ("scans", "tables"):
        (tmp_path / folder).mkdir()
    for index in range(23):
        Image.fromarray(mnist_test.inputs[index]).save(tmp_path / "scans" / f"{index:02}.png")
    cells = [{"bytes": file.read_bytes()} for file in sorted(tmp_path.glob("scans/0*.png"))]
    pq.write_table(pa.table({"image": cells, "other": cells}), tmp_path / "tables" / "a.parquet")
    commands = re.findall(r"^    mnist-ray predict (.+)$", page, re.MULTILINE)
    assert len(commands) == 2
    for words in commands:
        run_main("predict", *words.replace("RUN", str(finished_run)).split())
    assert pd.read_parquet("digits-of-tables").columns.tolist()[:3] == ["image", "other", "prediction"]
    names: dict[str, Any] = {"pandas": pd, "contents": [cell["bytes"] for cell in cells]}
    exec(
        "\n".join(re.findall(r"```python\n(.+?)```", page, re.DOTALL)).replace('"RUN"', repr(str(finished_run))), names
    )
    assert len(names["predictions"]) == 23
    assert names["columns"]["prediction"].tolist() == names["predictions"].sort_values("file").prediction[:10].tolist()
