import time

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup

from mnist_ray.cluster.watch import end_controllers, orphans_removed


class Controller:
    """Reserves a CPU, as Ray Train's does for its workers."""

    def reserve(self) -> PlacementGroup:
        group = placement_group([{"CPU": 1}])
        ray.get(group.ready())
        return group


class TrainController:
    """Named as Ray Train's."""

    def run(self) -> None:
        time.sleep(1000)


def is_there(group: PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def test_only_what_a_dead_actor_has_reserved_is_freed(ray_address: str) -> None:
    actor = ray.remote(num_cpus=0)(Controller)
    dead, alive = actor.remote(), actor.remote()
    left, kept = ray.get([dead.reserve.remote(), alive.reserve.remote()])
    own = placement_group([{"CPU": 0.001}])
    ray.kill(dead)
    end = time.monotonic() + 30
    with orphans_removed():
        while is_there(left):
            assert time.monotonic() < end, "still there after 30 s"
            time.sleep(0.05)
        ray.get(own.ready())  # the room is free
    assert is_there(kept)
    for group in (kept, own):
        ray.util.remove_placement_group(group)
    ray.kill(alive)


def test_what_waits_for_a_controller_goes_on_when_it_is_ended(ray_address: str) -> None:
    controller, other = ray.remote(num_cpus=0)(TrainController).remote(), ray.remote(num_cpus=0)(Controller).remote()
    ended = controller.run.remote()
    end_controllers()
    with pytest.raises(RayActorError):
        ray.get(ended, timeout=60)
    group = ray.get(other.reserve.remote(), timeout=60)
    ray.util.remove_placement_group(group)
    ray.kill(other)
