import contextlib
import subprocess
import sys
import threading
from unittest.mock import Mock

import pytest
import ray
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup

from mnist_ray.cluster import watch
from mnist_ray.cluster.watch import RaySilentError, Watch
from mnist_ray.extras import processes
from tests.conftest import wait_for


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("asked", ["ray.put", "ray.nodes", "mnist_ray.extras.processes.remove_orphans"])
def test_a_ray_that_does_not_answer_is_silent(
    asked: str, plain: bool, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    is_asked = asked == "ray.put" or plain == (asked == "ray.nodes")
    monkeypatch.setattr(watch, "MAX_SILENCE_S", 0.2 if is_asked else 50.0)  # a busy machine answers late
    monkeypatch.setattr(watch, "_LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(asked, lambda *content: answered.wait())
    with pytest.raises(RaySilentError, match="has not answered for 0 s") if is_asked else contextlib.nullcontext():
        watch.look(plain=plain)
    answered.set()


def test_a_process_of_ray_that_has_died_is_named_while_another_part_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, dead = threading.Event(), iter([[], [], ["gcs_server"]])
    monkeypatch.setattr(watch, "_LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(processes, "remove_orphans", answered.wait)
    monkeypatch.setattr(processes, "dead_processes", lambda: next(dead))
    with pytest.raises(RaySilentError, match="its gcs_server has died"):
        watch.look(plain=False)
    answered.set()


def test_a_ray_goes_on_without_its_dashboard(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_worker.node, "dead_processes", lambda: [("dashboard", None)])
    watch.look(plain=False)
    monkeypatch.setattr(global_worker.node, "dead_processes", lambda: [("dashboard", None), ("raylet", None)])
    with pytest.raises(RaySilentError, match="its raylet has died"):
        watch.look(plain=False)


def test_an_error_is_a_sign_of_life(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Mock(side_effect=RuntimeError)
    monkeypatch.setattr("ray.put", asked)
    watch.look(plain=False)
    asked.assert_called()


def test_python_exits_while_a_thread_waits_for_a_silent_ray() -> None:
    code = "import time; from mnist_ray.process import in_thread; print(in_thread(lambda: time.sleep(100)).done())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout == b"False\n"
    )


class Controller:
    """Reserves a CPU, as Ray Train's does for its workers."""

    def reserve(self) -> PlacementGroup:
        group = placement_group([{"CPU": 1}])
        ray.get(group.ready())
        return group


def is_there(group: PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def test_only_a_dead_actors_placement_group_is_removed(ray_address: str) -> None:
    actor = ray.remote(num_cpus=0)(Controller)
    dead, alive = actor.remote(), actor.remote()
    left, kept = ray.get([dead.reserve.remote(), alive.reserve.remote()])
    own = placement_group([{"CPU": 0.001}])
    ray.kill(dead)
    watching = Watch(plain=False)
    watching.start()
    wait_for(lambda: not is_there(left))
    watching.stop()
    ray.get(own.ready())  # its CPU is free
    assert is_there(kept)
    for group in (kept, own):
        ray.util.remove_placement_group(group)
    ray.kill(alive)


@pytest.mark.parametrize(
    ("state", "actor", "is_removed"),
    [
        ("CREATED", "", True),  # Ray has forgotten it
        ("PENDING", "DEAD", False),
        ("PREPARED", "DEAD", False),
    ],
)
def test_a_dead_actors_placement_group_is_removed_once_it_is_created(
    state: str, actor: str, is_removed: bool, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, actor_id = bytes.fromhex(ray.get_runtime_context().get_job_id()), bytes(range(12))
    group = PlacementGroupTableData(
        placement_group_id=bytes(range(14)) + job_id,
        state=PlacementGroupTableData.PlacementGroupState.Value(state),
        creator_job_id=job_id,
        creator_actor_id=actor_id + job_id,
    )
    info = ActorTableData(state=ActorTableData.ActorState.Value(actor)).SerializeToString() if actor else None
    table = [group.SerializeToString()]
    accessor = Mock(**{"get_placement_group_table.return_value": table, "get_actor_info.return_value": info})
    removed = Mock()
    monkeypatch.setattr("ray._private.state.state._connect_and_get_accessor", lambda: accessor)
    monkeypatch.setattr(processes, "remove_placement_group", removed)
    processes.remove_orphans()
    assert removed.called == is_removed
