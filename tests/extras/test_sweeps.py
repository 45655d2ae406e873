"""What Tune does otherwise during a sweep."""

from pathlib import Path

import pytest
import ray
from ray import tune
from ray.air._internal import usage
from ray.air.execution import ResourceRequest
from ray.air.execution.resources.placement_group import PlacementGroupResourceManager
from ray.util import placement_group, placement_group_table, remove_placement_group

from mnist_ray.extras import sweeps
from tests.conftest import wait_for


def test_a_cancelled_group_is_removed_once_it_is_created(ray_address: str) -> None:
    all_cpus = placement_group([{"CPU": 2}])
    assert all_cpus.wait(60)
    manager, request, before = (
        PlacementGroupResourceManager(),
        ResourceRequest([{"CPU": 1}]),
        {*placement_group_table()},
    )
    with sweeps.frugal():
        manager.request_resources(request)
        manager.cancel_resource_request(request)
    (cancelled,) = {*placement_group_table()} - before
    assert placement_group_table()[cancelled]["state"] == "PENDING"
    remove_placement_group(all_cpus)
    wait_for(lambda: placement_group_table()[cancelled]["state"] == "REMOVED")
    on_all_cpus = ray.remote(num_cpus=2)(lambda: "it runs")
    assert ray.get(on_all_cpus.remote(), timeout=60) == "it runs"


def test_tune_counts_no_callbacks_and_thus_imports_no_trackers(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(usage, "_count_callbacks")  # imports them
    run_config = tune.RunConfig(storage_path=str(tmp_path), callbacks=[tune.Callback()], verbose=0)
    with sweeps.frugal():
        (result,) = tune.Tuner(lambda config: {"score": 1}, run_config=run_config).fit()
    assert (result.metrics or {}).get("score") == 1
