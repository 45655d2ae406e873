"""Tune cancels a request for resources only once they are reserved: else Ray 2.60 may lose them."""

import ray
from ray.air.execution import ResourceRequest
from ray.air.execution.resources.placement_group import PlacementGroupResourceManager
from ray.util import placement_group, placement_group_table, remove_placement_group

from mnist_ray.extras import groups
from tests.conftest import wait_for


def test_a_cancelled_group_is_removed_once_it_is_created(ray_address: str) -> None:
    all_cpus = placement_group([{"CPU": 2}])
    assert all_cpus.wait(60)
    manager, request, before = (
        PlacementGroupResourceManager(),
        ResourceRequest([{"CPU": 1}]),
        {*placement_group_table()},
    )
    with groups.cancelled_once_created():
        manager.request_resources(request)
        manager.cancel_resource_request(request)
    (cancelled,) = {*placement_group_table()} - before
    assert placement_group_table()[cancelled]["state"] == "PENDING"
    remove_placement_group(all_cpus)
    wait_for(lambda: placement_group_table()[cancelled]["state"] == "REMOVED")
    on_all_cpus = ray.remote(num_cpus=2)(lambda: "it runs")
    assert ray.get(on_all_cpus.remote(), timeout=60) == "it runs"
