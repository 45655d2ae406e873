import contextlib
import gc
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from PIL import Image
from pyarrow import parquet as pq
from ray._private.node import Node
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster

from mnist_ray import cli, extras
from mnist_ray.cluster import environment
from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.data.data import Arrays, Blocks, Splits
from mnist_ray.job.job import Job
from mnist_ray.job.rules import check_against_data
from mnist_ray.mnist import MNIST, idx
from mnist_ray.settings import declared
from mnist_ray.storage import RunFolder, locate
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, splits_for
from mnist_ray.workload.classification import Classification
from ray_fork.ray_internals import shim_in_local_ray
from tests.ranks import WORLD_SIZES

ROOT = Path(__file__).parent.parent

METADATA = {"class_names": [*range(10)]}
"""Metadata of MNIST's data."""
Flags = Callable[..., list[str]]
QUICK = {"batch_size": 50, "validation_size": 600, "learning_rate": 3e-3, "precision": "fp32"}


SIZES = [40, 7, 0, 25, 33, 1, 18, 60, 12, 12, 30, 5]


class Numbers(Blocks):
    """Each example is its index, as input and as target."""

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        self.sizes = sizes
        self.read_blocks: list[int] = []

    def read(self, block: int) -> Any:
        self.read_blocks.append(block)
        start = sum(self.sizes[:block])
        numbers = np.arange(start, start + self.sizes[block])
        return Arrays(numbers, numbers)


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Return as soon as the condition is true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not true within {timeout_s} s"
        time.sleep(0.02)


def as_flags(values: dict[str, Any]) -> list[str]:
    known, words = declared(TrainConfig, WorkerConfig), list[str]()
    for name, value in values.items():
        has_flag = name not in known or known[name].has_flag
        words += [f"--{name.replace('_', '-')}", str(value)] if has_flag else ["--set", f"{name}={value}"]
    return words


class Digits(MNIST):
    """MNIST with the metrics of any classification, whatever MNIST's own are."""

    metrics, measure = Classification.metrics, Classification.measure


def mnist(**settings: Any) -> Workload:
    """Return MNIST's workload with the metadata of its data."""
    workload_class = loading.load(loading.DEFAULT)
    return workload_class(workload_class.Settings(**settings), METADATA)


def load_splits(job: Job) -> Splits:
    """Return a job's data; its workload gets their metadata."""
    return splits_for(job.workload, data_of(job.workload), job.train)


def with_data(job: Job) -> tuple[Job, Splits]:
    """Return a job, as it runs on its data, and the data."""
    data = load_splits(job)
    return check_against_data(job, data), data


def folder_at(path: Path) -> RunFolder:
    """Return a local folder as a RunFolder."""
    return locate(str(path.parent), path.name)


def close(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a run's folder refuse its files, as another user's does, also to root."""
    info = RunFolder.info

    def refuse(run: RunFolder, file_name: str = "") -> Any:
        if run.name == name and file_name:
            raise PermissionError(13, "Permission denied")
        return info(run, file_name)

    monkeypatch.setattr(RunFolder, "info", refuse)


def weights(run: Path) -> str:
    """Return the digest of a finished run's last weights."""
    last = max(run.glob("checkpoint_epoch*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def run_main(job: str, *flags: str) -> None:
    """Run a job in this process, on the Ray that it is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        is_script = job in ("train", "tune", "evaluate")
        patch.setattr("sys.argv", [f"jobs/{job}.py" if is_script else f"mnist-ray {job}", *flags])
        cli.call(cli.COMMANDS[job])


def callback_at(file: Path, method: str, *lines: str) -> Path:
    """Write a callback with one method, such as ``on_step(self, state)``, into a file; return the file."""
    imports = "import os, pathlib, signal, time\nfrom mnist_ray.training.callback import Callback\n"
    body = "\n".join(f"        {line}" for line in lines)
    file.write_text(f"{imports}\nclass Written(Callback):\n    def {method}:\n{body}\n")
    return file


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of uint8 as an IDX file's content."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_data_set(folder: Path, train: Arrays, test: Arrays, *, gzipped: bool = False) -> Path:
    """Write the four files of a data set in MNIST's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for names, split in zip(idx.FILES.values(), (train, test), strict=True):
        for name, array in zip(names, (split.inputs, split.targets), strict=True):
            content = idx_bytes(array)
            if gzipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


def copy_tracked_files(folder: Path) -> Path:
    """Copy the files that git tracks, or would track; return ``folder``."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def write_pictures(folder: Path, number: int, rows: int) -> None:
    """Write pictures of two classes, dark and light, as docs/guides/data.md does; ``rows`` a row group."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=number).tolist()
    column = []
    for label in labels:
        content = io.BytesIO()
        Image.fromarray(rng.integers(128 * label, 128 * label + 127, (9, 12), dtype=np.uint8)).save(content, "png")
        column.append({"bytes": content.getvalue(), "path": None})
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": column, "label": labels}), folder / "some.parquet", row_group_size=rows)


@dataclass(frozen=True)
class Gate:
    """Holds a training like ``finished_run``'s after a step, until a test opens the gate."""

    folder: Path
    data: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def flags(self, epoch: int = 1, step: int = 30, **values: Any) -> list[str]:
        callback = self.folder / f"held_{self.folder.name}.py"  # Python loads a name once
        folder = f"pathlib.Path({str(self.folder)!r})"
        hold = f"while not ({folder} / 'open').exists(): ({folder} / f'held_{{os.getpid()}}').touch(); time.sleep(0.01)"
        lines = f"if (state.epoch, state.step) == ({epoch}, {step}):", f"    {hold}"
        callback_at(callback, "on_step(self, state)", *lines)
        paths = {"data_dir": self.data, "storage_path": self.folder, "run_name": "run", "callback": callback}
        return as_flags({**QUICK, **paths, "num_workers": 2, "checkpoint_every": 20, **values})

    def opened_after(self, act: Callable[..., object]) -> Callable[..., None]:
        """Return a function that acts after the checkpoint before the gate was written, and opens the gate."""

        def act_and_open(*job: psutil.Process) -> None:
            wait_for((self.run / "checkpoint_epoch-001_step-000020" / "state.json").exists)
            act(*job)
            self.open()

        return act_and_open

    def kill(self, job: psutil.Process) -> None:
        """Kill a job at the gate, and open the gate when its workers, which Ray ends soon, have ended as well."""
        wait_for(lambda: list(self.folder.glob("held_*[0-9]")))
        job.kill()
        workers = [int(held.name.removeprefix("held_")) for held in self.folder.glob("held_*[0-9]")]
        wait_for(lambda: not any(psutil.pid_exists(worker) for worker in workers))
        self.open()

    def open(self) -> None:
        (self.folder / "open").touch()


@pytest.fixture(scope="session")
def ranks() -> Iterator[ProcessPoolExecutor]:
    """The processes of all tests that train on several ranks, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_ray.training.trainer", "torch.distributed.fsdp"])
    with ProcessPoolExecutor(max(WORLD_SIZES), mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="session")
def mnist_test() -> Arrays:
    """The test images that ship with the package."""
    return idx.load("test")


@pytest.fixture(scope="session")
def few_images(mnist_test: Arrays) -> Arrays:
    """The first 600 real test images: enough to learn a little from, in milliseconds."""
    return Arrays(mnist_test.inputs[:600], mnist_test.targets[:600])


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, mnist_test: Arrays) -> Path:
    """A folder in MNIST's format: 3,000 real images to train on, 1,100 to test."""
    train = Arrays(mnist_test.inputs[:3000], mnist_test.targets[:3000])
    test = Arrays(mnist_test.inputs[3000:4100], mnist_test.targets[3000:4100])
    return write_data_set(tmp_path_factory.mktemp("small"), train, test)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text that repeats itself, and a file that is none."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "rhyme.txt").write_text("the mouse ran up the clock, the clock struck one.\n" * 150)
    (folder / "noise.bin").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="session")
def small_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a new model's config and its tokenizer, whose tokens are words; and texts of two lengths."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llm")
    words = {word: number for number, word in enumerate(["[UNK]", *["a", "mouse", "ran", "up", "the", "clock"]])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(words)}
    transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    lines = [json.dumps({"text": "a mouse ran up the clock " * (1 + number % 3)}) for number in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder ``run`` in the test's own, not made yet."""
    return locate(str(tmp_path), "run")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of two nodes with one CPU each, the head and another."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Cluster, unlike `ray start`, never asks for a token
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    # An atexit handler of each node holds its client. From Python 3.13 on, multiprocessing clears these handlers in a
    # fork, where the end of a client without its threads would be that of the process.
    for node in gc.get_objects():
        if type(node) is Node and node is not global_worker.node:
            node._gcs_client = None


@pytest.fixture
def gate(tmp_path: Path, small_data: Path) -> Gate:
    return Gate(tmp_path, small_data)


@pytest.fixture
def quick(small_data: Path, tmp_path: Path) -> Flags:
    """A function that returns the flags of a quick run, the folder of the fixture ``run``, and others."""
    paths = {"data_dir": small_data, "storage_path": tmp_path, "run_name": "run"}
    return lambda **others: as_flags({**QUICK, **paths, **others})


def forget_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules that were loaded from the tests' folders: another test may give a file the same name."""
    path, folder = sys.path[:], str(tmp_path_factory.getbasetemp())
    before = {*sys.modules}
    yield
    sys.path[:] = path
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


_of_a_test = pytest.fixture(autouse=True)(forget_modules)
_of_a_file = pytest.fixture(autouse=True, scope="module")(forget_modules)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray of two CPUs that all tests share."""
    with environment.prepared(WorkerConfig(), "mnist_ray.run.fit") as forking:
        with pytest.MonkeyPatch.context() as patch, shim_in_local_ray(forking), contextlib.ExitStack() as during_start:
            if small := extras.load("small", plain=False):
                during_start.enter_context(small.for_one_job(log_to_driver=False))
                # Jobs in processes of their own join it, by the node's address.
                during_start.enter_context(mock.patch("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True))
            # Ray passes this on to Ray Train's cleaner, which asks a dashboard: here none answers, so it fails at once.
            # Otherwise it would try an old address of `ray start`.
            patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def run_job(job: str, *flags: str, address: str | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess:
    """Run a script of ``jobs/`` or a command in a process, on the Ray at ``address`` or a new local one."""
    program = [str(ROOT / "jobs" / job)] if job.endswith(".py") else ["-m", "mnist_ray", job]
    return subprocess.run(
        [sys.executable, *program, *flags],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "RAY_ADDRESS": address or "local"},
        check=False,
    )


def run_and_act(
    acts: Mapping[str, Callable[[psutil.Process], None]], *flags: str, address: str, status: int = 0
) -> tuple[str, str]:
    """Run the training job and act at its first line that starts with each text; return its output and its errors."""
    to_do = dict(acts)
    with tempfile.TemporaryFile("w+") as errors:
        job = psutil.Popen(
            [sys.executable, "-u", str(ROOT / "jobs" / "train.py"), *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "RAY_ADDRESS": address},
            start_new_session=True,
            # SIGHUP may be ignored here, as under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        try:
            lines = []
            for line in job.stdout:
                lines.append(line)
                for when in [when for when in to_do if line.startswith(when)]:
                    to_do.pop(when)(job)
            returned = job.wait()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                job.kill()
        errors.seek(0)
        printed, complained = "".join(lines), errors.read()
    assert returned == status, printed + complained
    assert not to_do, printed + complained
    return printed, complained


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes whose Ray has its files in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
    return found


@pytest.fixture(scope="session")
def finished_run(ray_address: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers on 2,400 real images, one CPU each."""
    storage = tmp_path_factory.mktemp("storage")
    flags = {"num_workers": 2, "data_dir": str(small_data), "storage_path": str(storage), "run_name": "two", **QUICK}
    run_main("train", *as_flags(flags))
    return storage / "two"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file into the test's folder."""

    def write_text(text: str, name: str = "problem.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    return write_text


CELL = """
import sys
import numpy as np
from torch import nn
from mnist_ray import train
from mnist_ray.workload import Arrays, Classification, Data

class Signs(Classification):
    def load_data(self):
        inputs = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
        some = Arrays(inputs, (inputs[:, 0] > 0).astype(np.int64))
        return Data(some, some)

    def create_model(self):
        return nn.Linear(2, 2)

if __name__ == "__main__":
    settings = {"num_epochs": 5, "batch_size": 20, "learning_rate": 0.1, "quiet": True}
    run = train(Signs, num_workers=0, storage_path=sys.argv[1], run_name="cell", **settings)
    print(run.metrics["accuracy"] > 0.9, sum(p.numel() for p in run.load_model().parameters()))
"""


def run_text(text: str, storage: Path) -> subprocess.CompletedProcess:
    """Run code that is in no file, like a notebook's cell."""
    command = [sys.executable, "-", str(storage)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
