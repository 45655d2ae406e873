"""Jobs on a cluster whose nodes have labels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import QUICK, as_flags, run_job

WHERE = """\
import pathlib
import ray
from mnist_ray.training.callback import Callback

class Where(Callback):
    def on_start(self, state, group):
        pathlib.Path({folder!r}, ray.get_runtime_context().get_node_id()).touch()
"""


@pytest.fixture(scope="module")
def mixed() -> Iterator[tuple[str, str]]:
    """A cluster of a head and three nodes with one CPU each: its address, and the id of the node with a label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        added = [cluster.add_node(num_cpus=1, labels=labels) for labels in ({}, {"market": "spot"}, {})]
    yield cluster.address, added[1].node_id
    cluster.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("job", ["train.py", "tune.py"])
def test_workers_and_trials_run_only_on_nodes_with_the_label(
    job: str, mixed: tuple[str, str], small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "where.py").write_text(WHERE.format(folder=str(tmp_path / "nodes")))
    (tmp_path / "nodes").mkdir()
    flags = {**QUICK, "num_epochs": 1, "data_dir": small_data, "storage_path": tmp_path}
    flags |= {"callback": tmp_path / "where.py", "label_selector": "market=spot"}
    if job == "tune.py":
        flags |= {"sweep": "beta1=0.7,0.8,0.9", "num_trials": 3, "num_confirmed": 0}
    done = run_job(job, *as_flags(flags), address=mixed[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == [mixed[1]]
    assert "workers    1, each with 1 CPU" in done.stdout
