import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnxruntime
import pytest
import torch

from mnist_ray.config import ExportConfig, TrainConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.mnist.cnn import CNN
from mnist_ray.run.find import Found, find
from mnist_ray.run.job import read_job
from mnist_ray.run.session import load_data, try_batch
from mnist_ray.settings import build
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
    assert f"{kind:<10} {file}: images (N, 1, 28, 28) float32 to logits (N, 10) float32\n" in said.out
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


def test_data_that_have_moved_are_named_by_the_workloads_flags(small_data: Path, tmp_path: Path) -> None:
    workload, file = mnist(data_dir=Path("/nowhere")), tmp_path / "digits.pt2"
    state = create_state(workload, TrainConfig(), 600, torch.device("cpu"))
    snapshot(state, {"workload": workload.identity}).write(folder_at(tmp_path))
    with pytest.raises(UsageError, match=r"^--data-dir /nowhere is not a folder"):
        run_main("export", str(tmp_path), "--output", str(file))
    assert not file.exists()
    run_main("export", str(tmp_path), "--output", str(file), "--data-dir", str(small_data))
    assert file.exists()


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("model.onnx", UsageError, "--output model.onnx must end in .pt2 for --format torch"),
        ("/proc/nowhere/model.pt2", JobError, "cannot write /proc/nowhere/model.pt2: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(
    finished_run: Path, output: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        run_main("export", str(finished_run), "--output", output)
    assert str(raised.value) == message


NETS = """
import numpy as np
import torch
from torch import nn

from mnist_ray.workload import Arrays, Classification, Data

class Many(Classification):
    noun = "pair"
    def load_data(self):
        words = np.triu(np.ones((40, 9), np.int64))  # of 1 to 9 words, and zeros
        arrays = Arrays(words[np.arange(40) % 9], np.arange(40) % 2)
        return Data(arrays, arrays)
    def create_model(self): return ManyNet()
    def prepare(self, inputs, generator):
        words = inputs[:, inputs.any(0)]
        return {"words": words, "parts": (inputs[:, :3].float(), [inputs.float()])}
    def loss(self, outputs, targets): return super().loss(outputs[0]["main"], targets)
    def measure(self, outputs, targets): return super().measure(outputs[0]["main"], targets)
    def check_outputs(self, outputs, targets): pass
    def predictions(self, outputs, targets): return {}

class ManyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.some, self.all = nn.Embedding(2, 2), nn.Linear(3, 2), nn.Linear(9, 2)
    def forward(self, inputs):
        some, (all,) = inputs["parts"]
        embedded = self.embedding(inputs["words"])
        return {"main": embedded.sum(1) + self.some(some) + self.all(all)}, [embedded, inputs["words"].sum(1)], None

class One(Many):
    def prepare(self, inputs, generator): return inputs.float()
    def create_model(self): return OneNet()

class OneNet(nn.Linear):
    def __init__(self): super().__init__(9, 2)
    def forward(self, inputs): return [{"main": self.one(inputs)}]
    def one(self, inputs): return super().forward(inputs)

class Branch(One):
    def create_model(self): return BranchNet()
class BranchNet(OneNet):
    def one(self, inputs):
        return super().one(inputs if inputs.sum() > 0 else -inputs)

class Fixed(One):
    def create_model(self): return FixedNet()
class FixedNet(OneNet):
    def one(self, inputs): return super().one(inputs).reshape(len(inputs), 2)

class Operator(One):
    def create_model(self): return OperatorNet()
class OperatorNet(OneNet):
    def one(self, inputs): return super().one(inputs) @ torch.linalg.svd(self.weight @ self.weight.T)[0]

class Last(Many):
    def prepare(self, inputs, generator):
        return {"words": inputs, "lengths": inputs.sum(1), "joined": inputs[inputs > 0]}
    def create_model(self): return LastNet()
    def loss(self, outputs, targets): return Classification.loss(self, outputs, targets)
    def measure(self, outputs, targets): return Classification.measure(self, outputs, targets)
class LastNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
    def forward(self, inputs):
        last = (inputs["lengths"] - 1).view(-1, 1, 1).expand(-1, 1, 2)
        embedded = self.embedding(inputs["words"]) + 0 * inputs["joined"].sum()
        return embedded.cumsum(1).gather(1, last).squeeze(1)

class Text(Many):
    def prepare(self, inputs, generator): return super().prepare(inputs, generator) | {"names": ["a"] * len(inputs)}
"""


def found_of(folder: Path, name: str) -> Found:
    """Return a checkpoint, as made before the first step, of a workload in NETS."""
    (folder / "code").mkdir()
    code = folder / "code" / f"nets_{folder.name}.py"  # another name for each test: Python keeps modules
    code.write_text(NETS)
    given = {"workload": f"{code}:{name}", "storage_path": str(folder), "precision": "fp32", "batch_size": 30}
    job, data = load_data(read_job(given))
    try_batch(job, data.train, [])
    state = create_state(job.workload, job.train, len(data.train), torch.device("cpu"))
    snapshot(state, {"workload": job.workload.identity}).write(folder_at(folder / "checkpoint"))
    return find(str(folder / "checkpoint"), str(folder / "runs"))


def test_a_program_takes_and_returns_several_tensors_of_sizes_that_vary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = found_of(tmp_path, "Many")
    model, inputs = found.load_model(), found.workload.prepare(torch.eye(9, dtype=torch.int64)[:5], None)
    assert inputs["words"].shape == (5, 5)
    with torch.inference_mode():
        outputs, others, _ = model(inputs)
    program = torch.export.load(export.export(found, ExportConfig(output=str(tmp_path / "many.pt2")))).module()
    torch.testing.assert_close(program(inputs)[:2], (outputs, others), check_stride=False)

    file = export.export(found, ExportConfig(format="onnx", output=str(tmp_path / "many.onnx")))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    first, (second,) = inputs["parts"]
    feeds = {"pairs_words": inputs["words"], "pairs_parts_0": first, "pairs_parts_1_0": second}
    names = ["logits_0_main", "logits_1_0", "logits_1_1"]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    torch.testing.assert_close([*map(torch.from_numpy, arrays)], [outputs["main"], *others])
    assert capsys.readouterr().out.splitlines()[1] == (
        f"torch      {tmp_path}/many.pt2: pairs_words (N, any) int64, pairs_parts_0 (N, 3) float32, pairs_parts_1_0 "
        "(N, 9) float32 to logits_0_main (N, 2) float32, logits_1_0 (N, any, 2) float32, logits_1_1 (N) int64"
    )


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_model_that_fails_on_zeros_is_exported_with_examples_of_the_test_set(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, kind = found_of(tmp_path, "Last"), "onnx" if suffix == ".onnx" else "torch"
    export.export(found, build(ExportConfig, {"format": kind, "output": str(tmp_path / f"last{suffix}")}))
    line, checked = capsys.readouterr().out.splitlines()[1:]
    assert line.endswith(
        "pairs_words (N, 9) int64, pairs_lengths (N) int64, pairs_joined (any) int64 to logits (N, 2) float32"
    )
    assert checked.startswith("checked    on 40 test pairs: ")


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        (
            "Branch",
            "torch",
            r"PyTorch cannot export the model: .* data-dependent .* \(nets_\w+\.py, line 45\); see docs",
        ),
        ("Fixed", "onnx", r"PyTorch cannot export the model: .*\b16; see docs"),
        ("Operator", "onnx", r"PyTorch cannot export the model: .*No ONNX function found for .*svd"),
        ("Text", "torch", "to be exported, a model must take tensors, alone or in dicts, lists and tuples$"),
    ],
)
def test_what_pytorch_refuses_is_one_line_and_leaves_the_file_as_it_was(
    name: str, kind: Literal["torch", "onnx"], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = found_of(tmp_path, name)
    file = tmp_path / ("model.onnx" if kind == "onnx" else "model.pt2")
    file.write_text("an older model")
    with pytest.raises(UsageError, match=f"^{name}: {reason}"):
        export.export(found, ExportConfig(format=kind, output=str(file)))
    assert capfd.readouterr() == ("", "")
    assert file.read_text() == "an older model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "code", file.name]
