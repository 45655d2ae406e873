"""Jobs on a cluster whose nodes have labels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import Flags, callback_at, run_job


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
    job: str, mixed: tuple[str, str], quick: Flags, tmp_path: Path
) -> None:
    (tmp_path / "nodes").mkdir()
    touch = f"pathlib.Path({str(tmp_path / 'nodes')!r}, ray.get_runtime_context().get_node_id()).touch()"
    callback = callback_at(tmp_path / "where.py", "on_start(self, state, group)", "import ray", touch)
    more = {"sweep": "beta1=0.7,0.8,0.9", "num_trials": 3, "num_confirmed": 0} if job == "tune.py" else {}
    flags = quick(num_epochs=1, callback=callback, label_selector="market=spot", **more)
    done = run_job(job, *flags, address=mixed[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == [mixed[1]]
    assert "workers    1, each with 1 CPU" in done.stdout
