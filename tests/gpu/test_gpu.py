"""Jobs on a real GPU: python -m pytest -m gpu tests/gpu"""

import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mnist_ray
from mnist_ray.errors import JobError
from tests.conftest import callback_at, weights
from tests.gpu.conftest import Train, losses

NUM_GPUS = torch.cuda.device_count()
if NUM_GPUS == 0:
    pytest.skip("PyTorch finds no GPU here", allow_module_level=True)
pytestmark = pytest.mark.gpu

FP32, HALF = 1e-3, 5e-2
"""How far losses may be from those of the CPU in fp32. Sums on a GPU have another order, and those of max-pooling's
gradients none at all; bf16 and fp16 have 8 and 11 bits. A training makes more of it, and so do metrics."""


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--precision", "fp32"], FP32),
        (["--precision", "bf16"], HALF),
        (["--precision", "fp16"], HALF),
        (["--precision", "fp32", "--compile"], FP32),
    ],
)
def test_a_worker_trains_like_the_cpu(flags: list[str], tolerance: float, train: Train, ray_address: str) -> None:
    on_cpu = train("mnist", "cpu", "no")
    on_gpu = train("mnist", "gpu", "yes", *flags, num_workers=1)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=tolerance)


@pytest.mark.parametrize("example", ["digits", "shapes", "diabetes", "gpt", "finetune", "shards"])
def test_an_example_trains_like_on_the_cpu(example: str, train: Train) -> None:
    """Random numbers of augmentation and dropout are the GPU's own: losses are similar, no more."""
    is_random = example in ("digits", "shapes", "diabetes", "finetune")
    on_cpu, on_gpu = train(example, "cpu", "no"), train(example, "gpu", "yes")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=0.3 if is_random else FP32)


def test_without_ray_a_run_has_the_losses_of_a_worker(train: Train, ray_address: str) -> None:
    runs = [train("mnist", f"workers_{number}", "yes", num_workers=number) for number in (0, 1)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=FP32)


def kills_once(file: Path, *lines: str) -> Path:
    """Write a callback that kills its worker after the second epoch's first step, once."""
    kill = "open(__file__ + '.done', 'w').close() or os.kill(os.getpid(), signal.SIGKILL)"
    due = "state.epoch == 1 and state.step == 1 and not os.path.exists(__file__ + '.done')"
    return callback_at(file, "on_step(self, state)", *lines, f"if {due}: {kill}")


def test_a_killed_run_ends_with_the_same_bits(
    train: Train, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of max-pooling have no deterministic kernel: this is the network of diabetes, with dropout."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = "import torch; torch.use_deterministic_algorithms(True)"
    callbacks = {
        "undisturbed": callback_at(tmp_path / "deterministic.py", "on_step(self, state)", deterministic),
        "killed": kills_once(tmp_path / "kills.py", deterministic),
    }
    runs = [train("diabetes", name, "yes", num_workers=1, callback=callback) for name, callback in callbacks.items()]
    assert (tmp_path / "kills.py.done").exists()
    assert weights(runs[0]) == weights(runs[1])


def test_a_killed_run_of_the_cnn_ends_with_the_same_losses(train: Train, ray_address: str, tmp_path: Path) -> None:
    undisturbed = train("mnist", "undisturbed", "yes", num_workers=1)
    killed = train("mnist", "killed", "yes", num_workers=1, callback=kills_once(tmp_path / "kills_cnn.py"))
    assert (tmp_path / "kills_cnn.py.done").exists()
    assert losses(killed) == pytest.approx(losses(undisturbed), rel=FP32)


@pytest.mark.parametrize("devices", [("yes", "no"), ("no", "yes")])
def test_a_run_is_resumed_on_the_other_device(devices: tuple[str, str], train: Train, tmp_path: Path) -> None:
    undisturbed = train("mnist", "undisturbed", "no")
    name = f"stops_{devices[0]}.py"
    stops = callback_at(tmp_path / name, "wants_stop(self)", "return not os.path.exists(__file__ + '.go')")
    with pytest.raises(JobError, match="a callback has stopped the training"):
        train("mnist", "resumed", devices[0], callback=stops)
    (tmp_path / f"{name}.go").touch()
    resumed = train("mnist", "resumed", devices[1], "--resume", callback=stops)
    assert losses(resumed) == pytest.approx(losses(undisturbed), rel=FP32)


def test_an_evaluation_gives_the_gpus_memory_back(train: Train, ray_address: str) -> None:
    run = train("mnist", "run", "yes", num_workers=1)
    free, _ = torch.cuda.mem_get_info()
    on_gpu, on_cpu = (mnist_ray.evaluate(run, use_gpu=use_gpu) for use_gpu in ("yes", "no"))
    assert on_gpu == pytest.approx(on_cpu, rel=FP32)
    end = time.monotonic() + 30
    while torch.cuda.mem_get_info()[0] < free - 2**26:
        assert time.monotonic() < end, "the evaluation's process has kept the GPU's memory"
        time.sleep(0.1)


def workload(folder: Path, name: str, loss: str) -> Path:
    """Write a workload, MNIST's with another loss on GPUs."""
    text = f"""
        import torch
        from mnist_ray.mnist import MNIST

        class {name}(MNIST):
            def loss(self, outputs, targets):
                if outputs.is_cuda:
                    {loss}
                return super().loss(outputs, targets)
        """
    file = folder / f"{name.lower()}.py"
    file.write_text(textwrap.dedent(text))
    return file


@pytest.mark.parametrize(
    ("name", "loss", "said"),
    [
        ("Huge", "torch.empty(2**43, device=outputs.device)", "out of memory.*; try --micro-batch-size 10"),
        ("Outside", "outputs[torch.tensor(10**6, device=outputs.device)].sum().item()", "device-side assert"),
    ],
)
def test_an_error_of_the_gpu_is_one_line(
    name: str, loss: str, said: str, train: Train, ray_address: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=said) as raised:
        train("mnist", "fails", "yes", num_workers=1, micro_batch_size=20, workload=workload(tmp_path, name, loss))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_train_like_one_on_the_cpu(strategy: str, num_workers: int, train: Train, ray_address: str) -> None:
    if num_workers > NUM_GPUS:
        pytest.skip("PyTorch finds one GPU here")
    flags: dict[str, Any] = {"micro_batch_size": 20, "num_workers": num_workers}
    on_cpu = train("mnist", "cpu", "no", micro_batch_size=20)
    on_gpu = train("mnist", "gpu", "yes", strategy=strategy, **flags)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=FP32)
