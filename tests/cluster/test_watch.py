import functools
import subprocess
import sys
import time
from concurrent.futures import Future
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup

from mnist_ray.cluster import watch
from mnist_ray.cluster.watch import RaySilentError, Watch, end_controllers, in_thread, orphans_removed
from tests.conftest import wait_for


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def test_a_part_that_does_not_answer_in_time_is_named_and_others_are_asked_again(clock: Clock) -> None:
    answers: dict[str, list[Future[object]]] = {"prompt": [], "silent": []}

    def ask(name: str) -> Future[object]:
        answers[name].append(Future())
        return answers[name][-1]

    watched = Watch({name: functools.partial(ask, name) for name in answers})
    for second in range(51):
        clock.now = second
        assert watched.silent() is None
        if not answers["prompt"][-1].done():
            answers["prompt"][-1].set_result(None)
    clock.now = 51
    assert watched.silent() == "silent"
    assert (len(answers["prompt"]), len(answers["silent"])) == (11, 1)


def test_an_error_is_a_sign_of_life(clock: Clock) -> None:
    failed: Future[object] = Future()
    failed.set_exception(RuntimeError())
    watched = Watch({"failing": lambda: failed})
    for clock.now in (0, 100, 200):
        assert watched.silent() is None


def test_python_exits_while_a_thread_waits_for_a_silent_ray() -> None:
    code = (
        "import time; from mnist_ray.cluster.watch import in_thread; print(in_thread(lambda: time.sleep(100)).done())"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout == b"False\n"
    )


def test_a_call_in_a_thread_returns_its_result_or_raises_its_error() -> None:
    assert in_thread(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 // 0).result()


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


def test_only_a_dead_actors_placement_group_is_removed(ray_address: str) -> None:
    actor = ray.remote(num_cpus=0)(Controller)
    dead, alive = actor.remote(), actor.remote()
    left, kept = ray.get([dead.reserve.remote(), alive.reserve.remote()])
    own = placement_group([{"CPU": 0.001}])
    ray.kill(dead)
    with orphans_removed():
        wait_for(lambda: not is_there(left))
        ray.get(own.ready())  # its CPU is free
    assert is_there(kept)
    for group in (kept, own):
        ray.util.remove_placement_group(group)
    ray.kill(alive)


def test_a_wait_for_a_controller_ends_with_it(ray_address: str) -> None:
    controller, other = ray.remote(num_cpus=0)(TrainController).remote(), ray.remote(num_cpus=0)(Controller).remote()
    ended = controller.run.remote()
    end_controllers()
    with pytest.raises(RayActorError):
        ray.get(ended, timeout=60)
    group = ray.get(other.reserve.remote(), timeout=60)
    ray.util.remove_placement_group(group)
    ray.kill(other)


def test_a_thread_that_waits_for_a_silent_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Mock()
    monkeypatch.setattr("threading.Thread.join", lambda thread, wait_s: waits(wait_s))
    with pytest.raises(RaySilentError), orphans_removed():
        raise RaySilentError.of("its raylet", has_died=True)
    with orphans_removed():
        pass
    assert [call.args[0] for call in waits.call_args_list] == [0, 5]
