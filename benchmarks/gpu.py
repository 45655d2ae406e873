"""Report what works on this machine's GPU, and how fast. Prints a table for the docs.

    python benchmarks/gpu.py                  # make gpu: about 10 minutes; no run of it on a GPU is known
    python benchmarks/gpu.py --device cpu     # checks the program itself on few steps: about 5 minutes on two cores

Guards what the docs say of GPUs, which no machine of this project has.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch.profiler import ProfilerActivity, profile

from mnist_ray.cluster.devices import name_of
from mnist_ray.config import TrainConfig
from mnist_ray.data.splits import splits_of
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import StopWantedError, TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload.calls import data_of
from mnist_ray.workload.loading import DEFAULT, load

ROOT = Path(__file__).parent.parent
GPT = str(ROOT / "examples" / "gpt.py")
GPT_SIZE = {"depth": 14, "width": 768, "length": 512}
GPT_BATCH = {"batch_size": 64, "micro_batch_size": 16, "precision": "bf16"}
NUM_PROFILED = 20  # steps
Row = tuple[str, str]


@dataclass(frozen=True)
class Trained:
    """Measurements of a training in this process, without Ray."""

    num_parameters: int
    step_s: float
    busy: float
    """Share of the time in which the GPU computes."""
    peak_bytes: int
    """Largest size of all tensors on the GPU."""


class Meter(Callback):
    """Times ``num_steps`` steps but for the first tenth, then notes the GPU's work in some more."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._marks: list[tuple[int, float]] = []
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self._profiled_from = 0.0
        self.busy: float | None = None

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note the time of a window's last step, for which the engine has waited."""
        if not self._profiled_from:
            self._marks.append((progress.total_step, time.perf_counter()))

    def on_step(self, state: TrainingState) -> None:
        """Profile some steps after the timed ones."""
        if state.total_step == self._num_steps:
            synchronize()
            self._profile.start()
            self._profiled_from = time.perf_counter()
        if state.total_step == self._num_steps + NUM_PROFILED:
            synchronize()
            seconds = time.perf_counter() - self._profiled_from
            self._profile.stop()
            of_kernels = [kind for kind in self._profile.key_averages() if kind.device_type.name == "CUDA"]
            worked_us = sum(kind.self_device_time_total for kind in of_kernels if not kind.is_user_annotation)
            self.busy = worked_us / 1e6 / seconds

    def wants_stop(self) -> bool:
        """Stop once the profile is there."""
        return self.busy is not None

    @property
    def step_s(self) -> float:
        """Seconds per step."""
        first, *_, last = [mark for mark in self._marks if mark[0] >= self._num_steps / 10]
        return (last[1] - first[1]) / (last[0] - first[0])


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_here(
    reference: str, settings: Mapping[str, Any], values: Mapping[str, Any], group: Group, steps: int
) -> Trained:
    """Train a workload in this process, until ``steps`` steps and some more are done."""
    kind = load(reference)
    workload = kind(kind.Settings(**settings))
    train = splits_of(data_of(workload), None).train
    recipe = {**kind.recipes["default"], **values, "num_epochs": 10**6, "num_steps": None}
    config = TrainConfig(**recipe)
    config = TrainConfig(**{**recipe, "precision": resolve_precision(config.precision, group)})
    state, meter = create_state(workload, config, len(train), group), Meter(steps)
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    on_gpu = group.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(StopWantedError):
        Trainer(workload, state, train, config, group, [meter]).train()
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Trained(num_parameters, meter.step_s, meter.busy or 0.0, peak_bytes)


def matmul_flops(device: torch.device, size: int) -> float:
    """Return the operations per second of a large product of matrices in bf16: what the GPU can do at best."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / statistics.median(seconds))


def job(name: str, folder: Path, flags: Sequence[object]) -> tuple[float, str, Path]:
    """Run a job, with its results below a folder; return its seconds from start to exit, its output, and its run."""
    command = [sys.executable, ROOT / "jobs" / f"{name}.py", "--storage-path", folder, "--run-name", "run", *flags]
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return time.perf_counter() - start, done.stdout, folder / "run"


def environment(device: torch.device) -> Iterator[Row]:
    """Describe the machine."""
    yield "device", name_of(device)
    yield "versions", f"PyTorch {torch.__version__}, Ray {ray.__version__}, Python {platform.python_version()}"
    yield "processor", name_of(torch.device("cpu"))


def tests() -> Iterator[Row]:
    """Run the tests that need a GPU, but for the one that compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-k", "not compile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    yield "tests (`make test-gpu`)", done.stdout.strip().splitlines()[-1].strip("= ")
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield "", line


def mnist(device: torch.device, steps: int, use_gpu: str) -> Iterator[Row]:
    """Compare the job with the same loop without Ray."""
    here = train_here(DEFAULT, {}, {}, Group(device=device), steps)
    num_epochs = max(2, steps // 430)
    flags = ["--use-gpu", use_gpu, "--num-workers", 1]
    with tempfile.TemporaryDirectory() as folder:
        seconds, _, _ = job("train", Path(folder) / "short", flags)
        _, said, run = job("train", Path(folder) / "long", [*flags, "--num-epochs", num_epochs])
        with (run / "metrics.csv").open() as file:
            _, *warm = (float(row["examples_per_s"]) for row in csv.DictReader(file))
    bare = MNIST.recipes["default"]["batch_size"] / here.step_s
    ours = statistics.harmonic_mean(warm)
    yield "MNIST, images/s: the job; the same loop without Ray", f"{ours:,.0f}; {bare:,.0f} (ratio {ours / bare:.2f})"
    yield "MNIST, 2 epochs, seconds from start to exit", f"{seconds:.1f}"
    yield "where its worker's time goes", next(line[11:] for line in said.splitlines() if line.startswith("time "))
    yield "share of the time in which the GPU computes", f"{here.busy:.0%}"
    yield "largest memory of its tensors", f"{here.peak_bytes / 2**20:,.0f} MiB"


def gpt(device: torch.device, steps: int, size: Mapping[str, Any], batch: Mapping[str, Any]) -> Iterator[Row]:
    """Time a language model."""
    trained = train_here(GPT, size, batch, Group(device=device), steps)
    tokens = batch["batch_size"] * size["length"]
    # Forward and backward pass: 6 for each weight, and 12 for each pair of places and unit of attention (PaLM, app. B).
    flops = tokens * (6 * trained.num_parameters + 12 * size["depth"] * size["width"] * size["length"])
    best = matmul_flops(device, 8192 if device.type == "cuda" else 512)
    name = f"a GPT of {trained.num_parameters / 1e6:.0f} million parameters, {batch['precision']}"
    yield f"{name}: tokens/s", f"{tokens / trained.step_s:,.0f}"
    yield "operations/s, of those of a product of large matrices", f"{flops / trained.step_s / best:.0%}"
    yield "share of the time in which the GPU computes", f"{trained.busy:.0%}"
    yield "largest memory of its tensors", f"{trained.peak_bytes / 2**20:,.0f} MiB"


def sweep(use_gpu: str) -> Iterator[Row]:
    """Search with 8 trials."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _, _ = job("tune", Path(folder), ["--num-trials", 8, "--use-gpu", use_gpu])
    yield "a sweep of 8 trials on MNIST, seconds from start to exit", f"{seconds:.1f}"


def main() -> None:
    """Measure, and print the table's rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU here: nothing to measure")
        return
    is_real = device.type == "cuda"
    use_gpu = "yes" if is_real else "no"
    small: dict[str, Any] = {"depth": 2, "width": 64, "length": 64}
    parts = [
        environment(device),
        tests(),
        mnist(device, 4300 if is_real else 100, use_gpu),
        gpt(device, 100, GPT_SIZE, GPT_BATCH) if is_real else gpt(device, 20, small, GPT_BATCH),
        sweep(use_gpu),
    ]
    print("| | |\n|---|---|")
    for rows in parts:
        for name, value in rows:
            print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    main()
