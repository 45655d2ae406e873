import contextlib
import gzip
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from mnist_ray import environment
from mnist_ray.config import DataConfig
from mnist_ray.runs.launch import train_and_evaluate
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import Split

ROOT = Path(__file__).parent.parent
FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)

QUICK = {"batch_size": 50, "validation_size": 600, "learning_rate": 3e-3, "precision": "fp32"}
LONGER = {**QUICK, "num_epochs": 8, "checkpoint_every": 20}


def as_flags(values: dict[str, Any]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of uint8 as an IDX file's content."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_data_set(folder: Path, train: Split, test: Split, *, gzipped: bool = False) -> Path:
    """Write the four files of a data set in MNIST's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for names, split in zip(FILES, (train, test), strict=True):
        for name, array in zip(names, (split.images, split.labels), strict=True):
            content = idx_bytes(array)
            if gzipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def mnist_test() -> Split:
    """The embedded test images."""
    return data.find(DataConfig()).load("test")


@pytest.fixture(scope="session")
def few_images(mnist_test: Split) -> Split:
    """The first 600 real test images: enough to learn a little from, in milliseconds."""
    return Split(mnist_test.images[:600], mnist_test.labels[:600])


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, mnist_test: Split) -> Path:
    """A folder in MNIST's format: 3,000 real images to train on, 1,100 to test."""
    train = Split(mnist_test.images[:3000], mnist_test.labels[:3000])
    test = Split(mnist_test.images[3000:4100], mnist_test.labels[3000:4100])
    return write_data_set(tmp_path_factory.mktemp("small"), train, test)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray of two CPUs that all tests share; the address is for processes that connect to it."""
    environment.prepare(verbose=False)
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def run_job(job: str, *flags: str, address: str | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess:
    """Run a job as a user would, on the Ray at ``address`` or on one of its own."""
    variables = {**os.environ, "RAY_ADDRESS": address or "local"}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *flags],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=variables,
        check=False,
    )


def run_and_act(
    act: Callable[[psutil.Process], None], when: str, *flags: str, address: str, status: int = 0
) -> tuple[str, str]:
    """Run the training job, do something when it prints a line that starts with ``when``; return what it printed.

    That is its standard output, and its standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        job = psutil.Popen(
            [sys.executable, "-u", str(ROOT / "jobs" / "train.py"), *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "RAY_ADDRESS": address},
        )
        try:
            lines, acted = [], False
            for line in job.stdout:
                lines.append(line)
                if line.startswith(when) and not acted:
                    acted = True
                    act(job)
            returned = job.wait()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                job.kill()
        errors.seek(0)
        printed, complained = "".join(lines), errors.read()
    assert returned == status, printed + complained
    assert acted, printed + complained
    return printed, complained


@pytest.fixture(scope="session")
def finished_run(ray_address: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers on 2,400 real images, one CPU each."""
    storage = tmp_path_factory.mktemp("storage")
    flags = {"num_workers": 2, "data_dir": str(small_data), "storage_path": str(storage), "run_name": "two", **QUICK}
    train_and_evaluate(flags, time.perf_counter())
    return storage / "two"


@pytest.fixture(scope="session")
def undisturbed(ray_address: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing happens to."""
    storage = tmp_path_factory.mktemp("undisturbed")
    flags = as_flags({**LONGER, "data_dir": small_data, "storage_path": storage, "run_name": "run", "num_workers": 2})
    done = run_job("train.py", *flags, address=ray_address)
    assert done.returncode == 0, done.stderr
    return storage / "run"
