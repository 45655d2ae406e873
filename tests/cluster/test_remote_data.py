from pathlib import Path

import pytest

from mnist_ray import provenance
from mnist_ray.cluster import nodes
from mnist_ray.cluster.nodes import check_nodes
from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import RunFolder, locate
from tests.conftest import as_flags, run_main


def test_another_version_on_a_node_is_named(ray_address: str, run: RunFolder) -> None:
    with pytest.raises(JobError, match=r"^node \S+ has torch \S+, the driver has 0\.1$"):
        check_nodes(run, {**provenance.versions(), "torch": "0.1"})


def test_storage_that_a_node_does_not_see_is_named(
    ray_address: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = locate(str(tmp_path / "elsewhere"), "run")
    check_here = nodes.check_here
    monkeypatch.setattr(nodes, "check_here", lambda run, *rest: check_here(elsewhere, *rest))
    with pytest.raises(JobError, match=r"^node \S+ does not see --storage-path \S+elsewhere: .+; use a path that all"):
        check_nodes(run)


def test_check_says_whether_the_job_would_run_and_trains_nothing(
    ray_address: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = as_flags({"data_dir": small_data, "validation_size": 600, "storage_path": tmp_path})
    run_main("train", *flags, "--dry-run", "--batch-size", "50", "--num-workers", "2")
    printed = capsys.readouterr().out
    assert "\nworkers    2, " in printed
    assert printed.endswith("check      this job would run\n")
    with pytest.raises(UsageError, match="cannot hold 3 workers of 1 CPU: it has 2 CPUs and 0 GPUs on 1 node; lower"):
        run_main("train", *flags, "--dry-run", "--num-workers", "3")
    run_main("tune", *flags, "--dry-run")
    assert capsys.readouterr().out.endswith("check      this job would run\n")
    assert list(tmp_path.iterdir()) == []
