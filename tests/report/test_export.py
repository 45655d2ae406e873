import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import torch
from transformers import ViTForImageClassification

from mnist_ray import load_run
from mnist_ray.checkpoints.checkpoint import snapshot
from mnist_ray.checkpoints.find import Found, find
from mnist_ray.config import ExportConfig, TrainConfig
from mnist_ray.data.data import Arrays
from mnist_ray.errors import UsageError
from mnist_ray.job.dry_run import try_batch
from mnist_ray.job.job import read_job
from mnist_ray.mnist.cnn import CNN
from mnist_ray.parallel.group import Group
from mnist_ray.report import export
from mnist_ray.training.trainer import create_state
from tests.conftest import folder_at, mnist, run_main, with_data


def prepared(images: Arrays, number: int) -> torch.Tensor:
    tensor: torch.Tensor = mnist().prepare(torch.tensor(images.inputs[:number]), None)
    return tensor


@pytest.fixture
def model(finished_run: Path) -> torch.nn.Module:
    model: torch.nn.Module = find(str(finished_run), "~/ray_results").load_model()
    return model


def run_pt2(file: Path, images: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = torch.export.load(file).module()(images)
    return outputs


def run_onnx(file: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    (outputs,) = session.run(None, {given.name: images.numpy()})
    return torch.from_numpy(outputs)


@pytest.mark.parametrize(("ending", "outputs", "run"), [("pt2", "outputs", run_pt2), ("onnx", "outputs[0]", run_onnx)])
def test_an_exported_program_computes_the_same_as_the_checkpoint_with_any_batch_size(
    ending: str,
    outputs: str,
    run: Callable[[Path, torch.Tensor], torch.Tensor],
    finished_run: Path,
    model: torch.nn.Module,
    few_images: Arrays,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / f"digits.{ending}"
    run_main("export", str(finished_run), "--output", str(file))
    said = capfd.readouterr()
    assert said.err == ""
    assert f"program    {file}: images (N, 1, 28, 28) float32 to {outputs} (N, 10) float32\n" in said.out
    assert "checked    on 512 test images" in said.out
    for size in (1, 3, 600):
        images = prepared(few_images, size)
        with torch.inference_mode():
            torch.testing.assert_close(run(file, images), model(images), rtol=0, atol=1e-4)


def test_weights_are_exported_also_by_a_run_in_python(finished_run: Path, model: torch.nn.Module) -> None:
    file = load_run(finished_run).export(finished_run.parent / "digits.safetensors")
    weights = safetensors.torch.load_file(file)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_onnx_without_its_packages_says_what_to_install(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UsageError, match=r"^--format onnx needs onnxscript; pip install 'mnist_ray\[onnx\]'$"):
        run_main("export", str(finished_run), "--output", str(tmp_path / "digits.onnx"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output", "model.pth"), "--output model.pth must end in .pt2, .onnx, .safetensors"),
        (("--format", "onnx", "--output", "model.pt2"), "--output model.pt2 must end in .onnx"),
    ],
)
def test_a_file_of_another_format_is_one_line(flags: tuple[str, ...], said: str, finished_run: Path) -> None:
    with pytest.raises(UsageError) as raised:
        run_main("export", str(finished_run), *flags)
    assert str(raised.value) == said


TRANSFORMER = """
import numpy as np
from transformers import ViTConfig, ViTForImageClassification

from mnist_ray.workload import Arrays, Classification, Data

class Transformer(Classification):
    def load_data(self):
        arrays = Arrays(np.random.default_rng(0).random((40, 1, 8, 8), np.float32), np.arange(40) % 2)
        return Data(arrays, arrays)
    def create_model(self):
        return ViTForImageClassification(ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            image_size=8, patch_size=4, num_channels=1, num_labels=2,
        ))
    def loss(self, outputs, targets): return super().loss(outputs.logits, targets)
    def measure(self, outputs, targets): return super().measure(outputs.logits, targets)
    def predictions(self, outputs, targets): return {}
"""


def test_a_model_with_save_pretrained_is_saved_beside_for_from_pretrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = found_of(tmp_path, "Transformer", TRANSFORMER)
    export.export(found, ExportConfig(output=str(tmp_path / "vit.safetensors")))
    assert f"pretrained {tmp_path}/vit/: for ViTForImageClassification.from_pretrained" in capsys.readouterr().out
    images = torch.rand(3, 1, 8, 8)
    with torch.inference_mode():
        loaded = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()(images).logits
        torch.testing.assert_close(loaded, found.load_model()(images).logits, rtol=0, atol=0)


def test_the_check_sees_another_model(model: torch.nn.Module, few_images: Arrays) -> None:
    other, images = CNN(10).eval(), prepared(few_images, 100)
    assert export.largest_difference(model, model, images) == 0
    assert export.largest_difference(model, other, images) > 0.1
    other.dense2.bias.data[0] = -math.inf  # as of a masked class
    assert export.largest_difference(other, other, images) == 0
    other.dense2.bias.data[0] = math.nan
    assert math.isnan(export.largest_difference(model, other, images))


def test_data_that_have_moved_are_named_by_a_setting(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_RAY_STORAGE_PATH", str(tmp_path / "no_runs"))  # not the newest run of whoever tests
    workload, file = mnist(data_dir=Path("/nowhere")), tmp_path / "digits.pt2"
    state = create_state(workload, TrainConfig(), 600, Group())
    snapshot(state, {"workload": workload.identity}).write(folder_at(tmp_path))
    with pytest.raises(UsageError, match=r"^--data-dir /nowhere is not a folder"):
        run_main("export", str(tmp_path), "--output", str(file))
    assert not file.exists()
    run_main("export", str(tmp_path), "--output", str(file), "--set", f"data_dir={small_data}")
    assert file.exists()


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
        self.embedding, self.some, self.all = nn.Embedding(2, 2, padding_idx=0), nn.Linear(3, 2), nn.Linear(9, 2)
    def forward(self, inputs):
        some, (all,) = inputs["parts"]
        embedded = self.embedding(inputs["words"])
        return {"main": embedded.sum(1) + self.some(some) + self.all(all)}, [embedded, inputs["words"].sum(1)], None

class Branch(Many):
    def create_model(self): return BranchNet()
class BranchNet(ManyNet):
    def forward(self, inputs):
        return super().forward(inputs if inputs["words"].sum() > 0 else {**inputs, "words": -inputs["words"]})

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


def found_of(folder: Path, name: str, text: str = NETS) -> Found:
    """Return a checkpoint, as made before the first step, of a workload in a text."""
    (folder / "code").mkdir()
    code = folder / "code" / f"nets_{folder.name}.py"  # another name for each test: Python keeps modules
    code.write_text(text)
    given = {"workload": f"{code}:{name}", "storage_path": str(folder), "precision": "fp32", "batch_size": 30}
    job, data = with_data(read_job(given))
    try_batch(job.workload, data.train, job.train, [job.train.batch_size], Fraction(1))
    state = create_state(job.workload, job.train, len(data.train), Group())
    snapshot(state, {"workload": job.workload.identity}).write(folder_at(folder / "runs" / "checkpoint"))
    return find(str(folder / "runs" / "checkpoint"), str(folder / "runs"))


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
    assert capsys.readouterr().out.splitlines()[1] == (
        f"program    {tmp_path}/many.pt2: pairs['words'] (N, any) int64, pairs['parts'][0] (N, 3) float32, "
        "pairs['parts'][1][0] (N, 9) float32 to outputs[0]['main'] (N, 2) float32, outputs[1][0] (N, any, 2) float32, "
        "outputs[1][1] (N) int64"
    )


def test_a_model_that_fails_on_zeros_is_exported_with_examples_of_the_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.export(found_of(tmp_path, "Last"), ExportConfig(output=str(tmp_path / "last.pt2")))
    line, checked = capsys.readouterr().out.splitlines()[1:]
    assert "pairs['words'] (N, 9) int64, pairs['lengths'] (N) int64, pairs['joined'] (any) int64 to" in line
    assert checked.startswith("checked    on 40 test pairs: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Branch", r"PyTorch cannot export the model: .* data-dependent .* \(nets_\w+\.py, line 36\); see docs"),
        ("Text", "to be exported, a model must take tensors, alone or in dicts, lists and tuples$"),
    ],
)
def test_what_pytorch_refuses_is_one_line_and_leaves_the_file_as_it_was(
    name: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = found_of(tmp_path, name)
    file = tmp_path / "model.pt2"
    file.write_text("an older model")
    with pytest.raises(UsageError, match=f"^{name}: {reason}"):
        export.export(found, ExportConfig(output=str(file)))
    assert capfd.readouterr() == ("", "")
    assert file.read_text() == "an older model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", file.name, "runs"]
