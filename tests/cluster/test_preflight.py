from pathlib import Path

import pytest

from mnist_ray import provenance
from mnist_ray.cluster import preflight
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.remote_data import share
from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import RunFolder, locate
from mnist_ray.workload.data import Arrays, Split
from tests.conftest import as_flags, mnist, run_job, run_main

PLAN = WorkerPlan(2, 1, use_gpu=False, must_scale_up=False)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return locate(str(tmp_path), "run")


def check(run: RunFolder, images: Arrays, fingerprint: str | None = None) -> str:
    lines: list[str] = []
    shared, own = share(mnist(), Split(images)), fingerprint or Split(images).fingerprint()
    preflight.check_nodes(run, shared, own, "image", 128, PLAN, lambda label, text: lines.append(f"{label} {text}"))
    return "\n".join(lines)


def test_a_job_that_would_run_is_told_so_and_leaves_nothing(
    ray_address: str, run: RunFolder, few_images: Arrays, tmp_path: Path
) -> None:
    said = check(run, few_images)
    assert "2 CPUs" in said
    assert "room for 2 workers" in said
    assert "plan 2 workers (PACK); a step's 128 images are 64 a worker" in said
    assert said.endswith("check this job would run")
    assert list(tmp_path.iterdir()) == []


def test_another_version_on_a_node_is_named(
    ray_address: str, run: RunFolder, few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "versions", lambda: {**provenance.versions(), "torch": "0.1"})
    with pytest.raises(JobError, match=r"^node \S+ has torch \S+, the driver has 0\.1$"):
        check(run, few_images)


def test_other_images_on_a_node_are_named(ray_address: str, run: RunFolder, few_images: Arrays) -> None:
    with pytest.raises(JobError, match=r"^node \S+ has other training images than the driver$"):
        check(run, few_images, fingerprint="another")


def test_storage_that_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    host, problem = preflight._read_probe(locate(str(tmp_path), "run"), ".probe-1")
    assert problem == "what the driver has written is not there"
    assert preflight._unseen(host, locate("/a", "run"), problem).startswith(
        f"node {host} does not see --storage-path /a:"
    )


def test_check_trains_nothing_and_says_whether_the_job_would_run(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({"data_dir": small_data, "validation_size": 600, "batch_size": 50, "storage_path": tmp_path})
    done = run_job("train.py", *flags, "--check", "--num-workers", "2", address=ray_address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("check      this job would run\n")
    with pytest.raises(UsageError, match="the cluster cannot hold 3 workers of 1 CPU"):
        run_main("train", *flags, "--check", "--num-workers", "3")
    assert list(tmp_path.iterdir()) == []
    done = run_job(
        "tune.py", *[flag for flag in flags if flag not in ("--batch-size", "50")], "--check", address=ray_address
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
