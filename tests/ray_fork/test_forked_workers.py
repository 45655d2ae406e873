import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, wait_for
from tests.ray_fork.conftest import ENVIRONMENT, end, has_ended

pytestmark = pytest.mark.processes

HEAD = """\
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
CONNECT = """\
import json, os, signal, sys
from ray_fork.starting import prepared_forking, runtime_env_to_fork

def connect(forking):
    import ray
    from ray_fork.ray_internals import shim_in_local_ray
    if os.environ["RAY_ADDRESS"] == "local":
        with shim_in_local_ray(forking):
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env=runtime_env_to_fork(forking))
"""
DRIVER = """\
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

with prepared_forking("ray") as forking:
    connect(forking)
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


@pytest.fixture(autouse=True, scope="module")
def temporary() -> Iterator[None]:
    """Let Rays and fork servers have their files in a folder that goes with them."""
    made = tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True)
    with made as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_TMPDIR", "TMPDIR"):
            patch.setitem(ENVIRONMENT, name, folder)
        yield


@contextlib.contextmanager
def driver(*words: str, address: str = "local") -> Iterator[tuple[psutil.Popen, dict[str, Any]]]:
    """Run a driver whose workers look at themselves. Yields its process and its report."""
    variables = {**ENVIRONMENT, "RAY_ADDRESS": address}
    process = psutil.Popen(
        [sys.executable, "-c", CONNECT + DRIVER, *words], cwd=ROOT, env=variables, stdout=subprocess.PIPE
    )
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


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """The address of a Ray that starts workers as usual."""
    environment, pipe = {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}, subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HEAD], env=environment, stdin=pipe, stdout=pipe, text=True) as head:
        assert head.stdout is not None
        yield head.stdout.readline().strip()
        head.communicate()


def test_a_job_on_a_cluster_has_its_workers_forked_by_a_server_of_its_own(ray_address: str) -> None:
    content = report("end", address=ray_address)
    (server,) = {worker["parent"] for worker in content["workers"]}
    end([psutil.Process(server)])
    assert f"/ray_fork-{os.geteuid()}/fork-" in content["workers"][0]["parent's title"]


def test_the_readmes_example_prints_what_the_readme_says_also_on_a_cluster(ray_address: str, tmp_path: Path) -> None:
    readme = (ROOT / "ray_fork" / "README.md").read_text()
    (tmp_path / "example.py").write_text(readme.partition("```python\n")[2].partition("```")[0])
    for address in ("local", ray_address):
        environment = {**ENVIRONMENT, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(tmp_path / "example.py")]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.endswith(" in a child of ['-m', 'ray_fork.server']\n")
