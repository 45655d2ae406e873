import math
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch

from mnist_ray.config import TrainConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.mnist.cnn import CNN
from mnist_ray.run.find import find
from mnist_ray.tools import export
from mnist_ray.training.checkpoint import snapshot
from mnist_ray.training.engine import create_state
from mnist_ray.workload.data import Arrays
from tests.conftest import folder_at, mnist, run_main


def prepared(images: Arrays, number: int) -> torch.Tensor:
    tensor: torch.Tensor = mnist().prepare(torch.tensor(images.inputs[:number]), None)
    return tensor


@pytest.fixture
def model(finished_run: Path) -> torch.nn.Module:
    model: torch.nn.Module = find(str(finished_run), "~/ray_results").load_model()
    return model


def program_of(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize(("kind", "suffix"), [("torch", ".pt2"), ("onnx", ".onnx")])
def test_an_exported_program_computes_the_same_as_the_checkpoint(
    kind: str,
    suffix: str,
    finished_run: Path,
    model: torch.nn.Module,
    few_images: Arrays,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / f"digits{suffix}"
    run_main("export", str(finished_run), "--format", kind, "--output", str(file))
    said = capfd.readouterr()
    assert said.err == ""
    assert f"{kind:<10} {file}: images (N, 1, 28, 28) float32 to logits (N, 10)\n" in said.out
    assert "checked    on 512 test images" in said.out
    for size in (1, 3, 600):
        images = prepared(few_images, size)
        with torch.inference_mode():
            torch.testing.assert_close(program_of(file)(images), model(images), rtol=0, atol=1e-4)


def test_the_check_sees_another_model(model: torch.nn.Module, few_images: Arrays) -> None:
    other, images = CNN(10).eval(), prepared(few_images, 100)
    assert export.largest_difference(model, model, images) == 0
    assert export.largest_difference(model, other, images) > 0.1
    other.dense2.bias.data[0] = math.nan
    assert math.isnan(export.largest_difference(model, other, images))


def test_without_the_data_a_checkpoint_is_exported_unchecked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = mnist(data_dir=Path("/nowhere"))
    state = create_state(workload, TrainConfig(), 600, torch.device("cpu"))
    snapshot(state, {"workload": workload.identity}).write(folder_at(tmp_path))
    run_main("export", str(tmp_path), "--output", str(tmp_path / "digits.pt2"))
    assert "checked    no: --data-dir /nowhere is not a folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("model.onnx", UsageError, "--output model.onnx must end in .pt2 for --format torch"),
        ("/nowhere/model.pt2", JobError, "cannot write /nowhere/model.pt2: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(
    finished_run: Path, output: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        run_main("export", str(finished_run), "--output", output)
    assert str(raised.value) == message
