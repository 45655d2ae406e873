import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import ResNet18_Weights, resnet18

from mnist_ray import layers, train
from mnist_ray.errors import UsageError
from mnist_ray.text import VERSION
from mnist_ray.tools.new import requirement_here
from mnist_ray.workload import loading
from tests.conftest import ROOT, copy_tracked_files, run_main

KINDS = ("images", "table", "text", "blank")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_project_trains_with_its_settings_and_learns(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("new", "my-birds", "--kind", kind)
    assert capsys.readouterr().out.startswith("project    my-birds/, whose workload is my-birds/workload.py\n")
    project = place / "my-birds"
    assert "class MyBirds(" in (project / "workload.py").read_text()
    assert len((project / "workload.py").read_text().splitlines()) <= 80
    settings: dict[str, Any] = {"config": project / "settings.toml", "storage_path": place, "num_workers": 0}
    first, last = (
        train(project / "workload.py", **settings, quiet=True, overfit_batches=1, num_steps=number).metrics["loss"]
        for number in (1, 20)
    )
    assert last < 0.9 * first


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_projects_files_are_valid_and_pass_the_linter(kind: str, place: Path) -> None:
    run_main("new", "birds", "--kind", kind)
    project = place / "birds"
    of_file = tomllib.loads((project / "pyproject.toml").read_text())
    table = of_file["project"]
    (requirement,) = map(Requirement, table["dependencies"])
    assert (table["name"], requirement.name, requirement.extras) == ("birds", "mnist_ray", {"cluster"})
    assert requirement.url == ROOT.as_uri()
    assert of_file["tool"]["mnist_ray"] == {"workload": "workload.py"}
    assert layers.read_files(str(project / "settings.toml"))[0].values["seed"] == 0
    job = yaml.safe_load((project / "deploy" / "rayjob.yaml").read_text())
    assert (job["kind"], job["metadata"]["name"]) == ("RayJob", "birds")
    for sources in re.findall(r"^COPY (.+) \S+$", (project / "deploy" / "Dockerfile").read_text(), re.MULTILINE):
        assert all((project / source).exists() for source in sources.split())
    assert yaml.safe_load((project / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    for command in (["check", "--select", "E,F,UP,W"], ["format", "--check"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", "birds"]
        checked = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def birds(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of images; files with weights of ResNet-18, one of them in torchvision's cache; and one of others."""
    run_main("new", "birds", "--kind", "images")
    cache = place / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(place / "hub"))
    torch.save(resnet18().state_dict(), "resnet18.pt")
    shutil.copy("resnet18.pt", cache / Path(ResNet18_Weights.DEFAULT.url).name)
    torch.save({"conv1.weight": torch.zeros(3)}, "other.pt")
    return place / "birds"


@pytest.mark.parametrize("weights", ["resnet18.pt", "ResNet18_Weights.DEFAULT"])
def test_images_start_from_pretrained_weights_with_their_transforms_and_a_head_of_their_own(
    weights: str, birds: Path
) -> None:
    workload_class = loading.load(str(birds / "workload.py"))
    workload = workload_class(workload_class.Settings(pretrained=weights), {"class_names": ["circle", "square"]})
    model, saved = workload.create_model(), torch.load("resnet18.pt")
    assert torch.equal(model.state_dict()["layer4.1.conv2.weight"], saved["layer4.1.conv2.weight"])
    assert model.get_submodule("fc").out_features == 2
    picture = Image.linear_gradient("L").resize((300, 240))
    prepared = workload.prepare(torch.as_tensor(workload.read_picture(picture))[None], None)
    torch.testing.assert_close(prepared[0], ResNet18_Weights.DEFAULT.transforms()(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("other.pt", r"/other.pt cannot be read as weights of resnet18: size mismatch .*; get_weight\(NAME\)"),
        ("gone.pth", r"^gone.pth cannot be read as weights of resnet18: .*No such file"),
        ("ResNet50_Weights.DEFAULT", r"hub/checkpoints/resnet50-\w+.pth cannot be read as weights of resnet50: "),
        ("ResNet18", r"^ResNet18 is neither a .pt or .pth file nor the name of weights; write a name such as"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(weights: str, said: str, birds: Path) -> None:
    workload_class = loading.load(str(birds / "workload.py"))
    workload = workload_class(workload_class.Settings(pretrained=weights), {"class_names": ["circle", "square"]})
    with pytest.raises(UsageError, match=said):
        workload.create_model()


def test_the_backbone_is_frozen_in_the_first_epochs(birds: Path, place: Path) -> None:
    settings: dict[str, Any] = {"pretrained": "resnet18.pt", "frozen_epochs": 1, "limit": 0.3, "num_workers": 0}
    run = train(birds / "workload.py", **settings, num_epochs=2, keep_checkpoints=None, storage_path=place, quiet=True)
    given = torch.load("resnet18.pt")
    first, second = (
        load_file(place / run.name / f"checkpoint_epoch-00{epoch}_step-000000" / "model.safetensors")
        for epoch in (1, 2)
    )
    backbone = [name for name in given if not name.startswith("fc.")]
    assert all(torch.equal(first[name], given[name]) for name in backbone)
    assert not torch.equal(second["conv1.weight"], given["conv1.weight"])
    assert not torch.equal(first["fc.weight"], second["fc.weight"])


def test_names_and_places_that_cannot_be_used_are_errors_and_leave_nothing_behind(place: Path) -> None:
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    (place / "file").touch()
    for arguments, said in {
        ("full",): "full exists already; choose another name, or empty it",
        ("",): "the project's folder is empty; name a file or a folder",
        ("file",): "file exists already; choose another name, or empty it",
        ("2pets",): "2pets is no project name; use ASCII letters, digits, _ and -, and begin with a letter",
        ("a b",): "a b is no project name; use ASCII letters, digits, _ and -, and begin with a letter",
        ("gone/birds",): "cannot make gone/birds: No such file or directory",
        ("torch",): "torch is the name of a Python module; choose another name",
        ("test",): "test is the name of a Python module; choose another name",
        ("workload",): "workload is the name of a Python module; choose another name",
        ("typing-extensions",): "typing-extensions is the name of a Python module; choose another name",
        ("data",): "the workload cannot be called Data, which means something else; choose another name",
        ("none",): "the workload cannot be called None, which means something else; choose another name",
        ("birds", "--kind", "pictures"): "--kind must be one of images, table, text, blank, not 'pictures'",
    }.items():
        with pytest.raises(UsageError) as raised:
            run_main("new", *arguments)
        assert str(raised.value) == said
    assert sorted(path.name for path in place.iterdir()) == ["file", "full"]


def test_if_a_file_cannot_be_written_nothing_is_left_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, *arguments: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(UsageError, match="cannot make birds: Permission denied"):
        run_main("new", "birds")
    assert not [*place.iterdir()]


def test_the_package_is_required_from_where_it_came(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = place / "a b.whl"
    assert requirement_here() == f" @ {ROOT.as_uri()}"
    new = importlib.import_module("mnist_ray.tools.new")
    monkeypatch.setattr(new, "_PACKAGE", place / "site-packages" / "mnist_ray")
    for recorded, expected in {
        None: f"=={VERSION}",
        f'{{"url": "{wheel.as_uri()}", "archive_info": {{}}}}': f" @ file://{place}/a%20b.whl",
        '{"url": "https://host/birds", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}': (
            " @ git+https://host/birds@c0ffee"
        ),
    }.items():
        monkeypatch.setattr(new, "distribution", lambda name, text=recorded: Recorded(text))
        assert requirement_here() == expected


class Recorded:
    """An installed distribution."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    def read_text(self, name: str) -> str | None:
        return self._text if name == "direct_url.json" else None


def test_the_package_runs_as_a_module_and_makes_a_project_in_another_folder(place: Path) -> None:
    arguments = [sys.executable, "-m", "mnist_ray", "new", str(place / "birds")]
    made = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert (made.returncode, made.stderr) == (0, b"")
    assert (place / "birds" / "workload.py").exists()


@pytest.mark.long
def test_with_a_wheel_in_a_fresh_environment_a_new_project_trains_and_passes_its_tests(tmp_path: Path) -> None:
    copy_tracked_files(tmp_path / "checkout")
    variables = {**os.environ, "VENV": str(tmp_path / "environment"), "MNIST_RAY_STORAGE_PATH": str(tmp_path / "runs")}
    variables.pop("PYTHONPATH", None)

    def run(*command: str | Path, folder: Path = tmp_path) -> str:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=folder, env=variables, check=False, **options)
        assert done.returncode == 0, done.stdout[-20_000:]
        return done.stdout

    programs = tmp_path / "environment" / "bin"
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    run(programs / "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "checkout")
    (wheel,) = tmp_path.glob("*.whl")
    run(programs / "pip", "install", f"mnist_ray[cluster] @ {wheel.as_uri()}")
    run(programs / "mnist-ray", "new", "birds", "--kind", "images")
    assert wheel.as_uri() in (tmp_path / "birds" / "pyproject.toml").read_text()
    trained = run("make", "train", folder=tmp_path / "birds")
    assert "(circle, square, triangle): 65 images to train on, 7 for validation, 18 to test\n" in trained
    assert re.search(r"^test +accuracy (9\d|100)\.", trained, re.MULTILINE)
    assert " 2 passed" in run("make", "test", folder=tmp_path / "birds")
