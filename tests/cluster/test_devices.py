"""GPUs, on machines without one: Ray takes the GPUs that it is told of for real, but PyTorch cannot use them."""

import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as Nodes

from mnist_ray import provenance
from mnist_ray.cluster import devices, nodes
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.run import evaluate
from mnist_ray.storage import RunFolder
from mnist_ray.training.metrics import Evaluation
from tests.conftest import Flags, mnist, run_job, run_main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
UNUSABLE = r"PyTorch on \S+ cannot use the GPU: .*(CUDA|NVIDIA).*; install a PyTorch that fits .*, or use --use-gpu no"


@pytest.mark.parametrize(
    ("given", "visible", "device"),
    [([3], "3", "cuda:0"), ([2], "0,1,2", "cuda:2"), (["1"], "0,1", "cuda:1"), ([5], "", "cuda:0"), ([], "", "cpu")],
)
def test_the_device_is_the_gpu_that_ray_has_given_or_else_the_cpu(
    given: list[int | str], visible: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get_gpu_ids", lambda: given)
    monkeypatch.setattr(devices, "usable", lambda device: device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_here() == torch.device(device)


def test_a_gpu_is_named_with_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"NVIDIA of {device}")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91002)
    assert devices.name_of(torch.device("cuda", 1)) == "NVIDIA of cuda:1, CUDA 12.8, cuDNN 91002"


def test_a_gpu_that_pytorch_cannot_use_is_one_line_with_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [0])
    with pytest.raises(TrainingStoppedError, match=f"^{UNUSABLE}$"):
        device_here()
    no_kernels = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nMore")
    monkeypatch.setattr("torch.ones", Mock(side_effect=no_kernels))
    with pytest.raises(TrainingStoppedError, match=r"the GPU: CUDA error: no kernel image .* on the device; install"):
        device_here()


def test_without_ray_a_gpu_that_is_asked_for_must_be_usable(quick: Flags) -> None:
    with pytest.raises(TrainingStoppedError, match=UNUSABLE):
        run_main("train", *quick(num_workers=0, use_gpu="yes"))


def test_versions_that_differ_only_in_the_driver_they_need_are_no_problem(run: RunFolder, ray_address: str) -> None:
    torch_version, _, _ = provenance.versions()["torch"].partition("+")
    run.storage.write_text("probe", "probe")
    for local, problem in (("+cu128", ""), (".1+cpu", "has torch")):
        drivers = {**provenance.versions(), "torch": torch_version + local}
        found = nodes.check_here(run, "probe", drivers)[1]
        assert found[: len("has torch")] == problem


def test_the_test_asks_for_a_gpu_for_each_task(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Mock()
    remote.return_value.return_value.remote.side_effect = lambda *args: iter(
        [ray.put(None), ray.put(Evaluation((), args[3] - args[2], {"bounds": np.array([args[2:4]])}))]
    )
    monkeypatch.setattr("ray.wait", lambda streams, timeout: (streams, []))
    monkeypatch.setattr("ray.remote", remote)
    monkeypatch.setattr(evaluate, "share", lambda workload, split: split)
    tasks = WorkerPlan(2, 3, use_gpu=True, must_scale_up=False)
    tested = evaluate.evaluate_in_tasks(mnist(), Mock(), range(1000), tasks, 0, Mock())  # type: ignore[arg-type]
    asked = {"num_cpus": 3, "num_gpus": 1, "scheduling_strategy": "DEFAULT"}
    assert remote.call_args.kwargs == asked
    assert tested.columns["bounds"].tolist() == [[0, 512], [512, 1000]]


ON_TWO_GPUS = """
import sys
import ray
init = ray.init
ray.init = lambda **options: init(**options, num_gpus=2)
from mnist_ray import cli
cli.run(cli.COMMANDS[sys.argv.pop(1)])
"""


@pytest.mark.long
def test_a_local_ray_takes_cpus_with_a_note_if_pytorch_cannot_use_its_gpus(quick: Flags, tmp_path: Path) -> None:
    (tmp_path / "on_two_gpus.py").write_text(ON_TWO_GPUS)
    done = run_job(str(tmp_path / "on_two_gpus.py"), "train", *quick())
    assert done.returncode == 0, done.stderr
    assert "note       using CPUs, since PyTorch finds no CUDA GPU" in done.stdout
    assert "started    1 × cpu" in done.stdout


@pytest.fixture(scope="module")
def with_gpus() -> Iterator[str]:
    """The address of a cluster with two GPUs that PyTorch cannot use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    yield nodes.address
    nodes.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("more", [["--num-workers", "1"], ["--num-workers", "2"]])
def test_on_a_cluster_a_worker_that_cannot_use_its_gpu_ends_the_run_in_one_line(
    more: list[str], with_gpus: str, quick: Flags
) -> None:
    done = run_job("train.py", *quick(), *more, address=with_gpus)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "cannot use the GPU" in done.stderr
    assert "restarted" not in done.stdout
    done = run_job("train.py", *quick(run_name="on_cpus", use_gpu="no"), *more, address=with_gpus)
    assert done.returncode == 0, done.stderr


AS_IF_USABLE = """
import torch
from mnist_ray.cluster import devices
devices.usable = lambda device: torch.device("cpu")
devices.without_unusable_gpus = lambda cluster, warn: cluster
"""


@pytest.mark.long
def test_with_gpus_the_workers_validate_and_the_test_and_the_trials_have_gpus(
    quick: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AS_IF_USABLE)  # every process of Ray takes its GPU for usable
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "on_two_gpus.py").write_text(ON_TWO_GPUS)
    done = run_job(str(tmp_path / "on_two_gpus.py"), "train", *quick(num_workers=1))
    assert "workers    1, each with 2 CPUs and 1 GPU" in done.stdout, done.stderr
    assert "validation after epoch 2" in done.stdout, done.stderr
    assert "test       accuracy" in done.stdout, done.stderr
    flags = quick(run_name="sweep", num_workers=1, sweep="beta1=0.7,0.8", num_trials=2, num_confirmed=0)
    done = run_job(str(tmp_path / "on_two_gpus.py"), "tune", *flags)
    assert "trials     2 at a time, each 1 worker with 1 CPU and 1 GPU" in done.stdout, done.stderr
    # Halving stops the worse one of two trials, unless they are equal.
    assert re.search(r"(1 done, 1 stopped early|2 done); best", done.stdout)
    assert "test       accuracy" in done.stdout, done.stderr


@pytest.mark.long
def test_trials_that_cannot_use_their_gpu_fail_once_with_the_reason(with_gpus: str, quick: Flags) -> None:
    done = run_job("tune.py", *quick(num_trials=2, sweep="beta1=0.7,0.8"), address=with_gpus)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "every trial failed; the first one: PyTorch on " in done.stderr
