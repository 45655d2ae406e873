import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, wait_for
from tests.ray_fork.conftest import ENVIRONMENT, end, has_ended

DRIVER = """\
import json, os, signal, sys
from mnist_ray.cluster.connect import connect
from mnist_ray.config import WorkerConfig
from ray_fork.starting import prepared_forking

def look():
    import ray
    print("hello")
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "parent's title": open(f"/proc/{os.getppid()}/cmdline").read(),
        "title": open("/proc/self/cmdline").read(),
        "id": ray.NodeID.from_random().hex(),
        "log": os.readlink("/proc/self/fd/1"),
    }

class Actor:
    look = staticmethod(look)

def start_actor(**variables):
    return ray.remote(Actor).options(num_cpus=0, runtime_env={"env_vars": variables}).remote()

config = WorkerConfig()
with prepared_forking("ray") as forking, connect(config, forking):
    import ray
    one, another = start_actor(), start_actor()
    report = {"workers": ray.get([ray.remote(look).remote(), one.look.remote(), another.look.remote()])}
    if forking.server is not None:
        report |= {"server": forking.server.pid, "folder": os.path.dirname(os.environ["RAY_FORK_SERVER"])}
    if sys.argv[1] == "kill the server":
        forking.server.kill()
        forking.server.wait()
        report["usual"], report["one"] = ray.get([start_actor(LATER="1").look.remote(), one.look.remote()])
        report["workers"][0]["printed"] = open(report["workers"][0]["log"]).read()
    print(json.dumps(report), flush=True)
    if sys.argv[1] == "stay":
        signal.pause()
"""
SPILLING = """\
import functools, numpy, ray
from mnist_ray.cluster.connect import connect
from mnist_ray.config import WorkerConfig
from ray_fork.starting import prepared_forking

ray.init = functools.partial(ray.init, object_store_memory=80 * 2**20)
with prepared_forking("mnist_ray") as forking, connect(WorkerConfig(), forking):
    kept = [ray.put(numpy.full(30 * 2**20, number, numpy.uint8)) for number in range(5)]
    print([int(ray.get(one)[-1]) for one in kept])
"""


@contextlib.contextmanager
def driver(*words: str, address: str = "local") -> Iterator[tuple[psutil.Popen, dict[str, Any]]]:
    """Run a driver whose workers look at themselves. Yields its process and its report."""
    variables = {**ENVIRONMENT, "RAY_ADDRESS": address}
    process = psutil.Popen([sys.executable, "-c", DRIVER, *words], cwd=ROOT, env=variables, stdout=subprocess.PIPE)
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        if process.is_running():
            process.kill()
        process.communicate()


def report(*words: str, **options: str) -> dict[str, Any]:
    """Return the report of a driver that ends by itself."""
    with driver(*words, **options) as (process, content):
        assert process.wait(60) == 0
        return content


@pytest.fixture(scope="module")
def forked() -> dict[str, Any]:
    """Workers before and after their server was killed."""
    return report("kill the server")


def test_tasks_and_actors_run_in_children_of_the_server_with_different_ids_and_the_titles_that_ray_gives(
    forked: dict[str, Any],
) -> None:
    workers = forked["workers"]
    assert {worker["parent"] for worker in workers} == {forked["server"]}
    assert len({worker["id"] for worker in workers}) == len(workers)
    titles = [worker["title"].rstrip("\0") for worker in [*workers, forked["usual"]]]
    assert titles == ["ray::look", *["ray::Actor.look"] * 3]


def test_a_forked_workers_log_is_like_that_of_rays_own(forked: dict[str, Any]) -> None:
    for worker in (*forked["workers"], forked["usual"]):
        assert re.fullmatch(rf"worker-[0-9a-f]{{56}}-01000000-{worker['pid']}\.out", Path(worker["log"]).name)
    assert "hello\n" in forked["workers"][0]["printed"]


def test_when_the_server_is_killed_workers_live_on_and_later_ones_start_as_usual(forked: dict[str, Any]) -> None:
    assert "/raylet" in forked["usual"]["parent's title"]
    assert forked["one"]["pid"] == forked["workers"][1]["pid"]
    assert not Path(forked["folder"]).exists()


def test_when_the_driver_is_killed_the_server_its_workers_and_its_folder_go() -> None:
    with driver("stay") as (process, content):
        everything, server = process.children(recursive=True), psutil.Process(content["server"])
        forked = server.children()
        assert {worker["pid"] for worker in content["workers"]} <= {one.pid for one in forked}
        process.kill()
        process.wait()
        wait_for(lambda: all(map(has_ended, [server, *forked])))
        assert not Path(content["folder"]).exists()
    end(everything)  # Ray's agents take their time


@pytest.mark.long
def test_objects_that_do_not_fit_into_memory_are_spilled_and_read_again() -> None:
    environment = {**ENVIRONMENT, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", SPILLING], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == b"[0, 1, 2, 3, 4]\n"


def test_a_job_on_a_cluster_has_its_workers_forked_by_a_server_of_its_own(ray_address: str) -> None:
    content = report("end", address=ray_address)
    (server,) = {worker["parent"] for worker in content["workers"]}
    end([psutil.Process(server)])
    assert f"/ray_fork-{os.geteuid()}/fork-" in content["workers"][0]["parent's title"]


@pytest.mark.long
def test_workers_that_die_at_once_end_a_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('default_worker.py' in word for word in sys.orig_argv):\n"
        "    print('no room', file=sys.stderr, flush=True)\n"
        "    os._exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--fork-workers", "no", "--storage-path", str(tmp_path)],
        env={**ENVIRONMENT, "RAY_ADDRESS": "local", "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = r"error: Ray's worker processes do not start; a worker's last line: no room \(log: \S+/raylet\.err\)\n"
    assert re.fullmatch(said, done.stderr)
