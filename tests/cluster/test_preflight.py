from pathlib import Path

import pytest

from mnist_ray import provenance
from mnist_ray.cluster import preflight
from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import RunFolder, locate
from tests.conftest import as_flags, run_job, run_main


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return locate(str(tmp_path), "run")


def test_all_nodes_are_asked_and_nothing_is_left(ray_address: str, run: RunFolder, tmp_path: Path) -> None:
    assert len(preflight.check_nodes(run, provenance.versions())) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_version_on_a_node_is_named(ray_address: str, run: RunFolder) -> None:
    with pytest.raises(JobError, match=r"^node \S+ has torch \S+, the driver has 0\.1$"):
        preflight.check_nodes(run, {**provenance.versions(), "torch": "0.1"})


def test_storage_that_a_node_does_not_see_is_named(
    ray_address: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight.report(run, ".probe-1")[2] == "what the driver has written is not there"
    monkeypatch.setattr(preflight, "report", lambda run, probe: ("far", {}, "it is not there"))
    with pytest.raises(JobError, match=r"^node far does not see --storage-path .*: it is not there; use one"):
        preflight.check_nodes(run)


def test_check_trains_nothing_and_says_whether_the_job_would_run(
    ray_address: str, small_data: Path, tmp_path: Path
) -> None:
    flags = as_flags({"data_dir": small_data, "validation_size": 600, "batch_size": 50, "storage_path": tmp_path})
    done = run_job("train.py", *flags, "--check", "--num-workers", "2", address=ray_address)
    assert done.returncode == 0, done.stderr
    assert "plan       2 workers (PACK); a step's 50 images are 25 a worker\n" in done.stdout
    assert done.stdout.endswith("check      this job would run\n")
    with pytest.raises(UsageError, match="the cluster cannot hold 3 workers of 1 CPU"):
        run_main("train", *flags, "--check", "--num-workers", "3")
    assert list(tmp_path.iterdir()) == []
    done = run_job(
        "tune.py", *[flag for flag in flags if flag not in ("--batch-size", "50")], "--check", address=ray_address
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
