import subprocess
import sys
from pathlib import Path

import psutil
import ray
from ray._raylet import (  # type: ignore[attr-defined]  # Cython, partly without stubs
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    persist_port,
)

from mnist_ray.extras import agents
from tests.conftest import wait_for

START = """
import subprocess, sys
print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True)
sys.stdin.read()
"""


def test_ports_are_named_as_ray_names_them_until_the_raylet_ends(tmp_path: Path) -> None:
    node, rays, ours = ray.NodeID.from_random().hex(), tmp_path / "rays", tmp_path / "ours"
    for folder in (rays, ours):
        folder.mkdir()
    for name in (DASHBOARD_AGENT_LISTEN_PORT_NAME, METRICS_AGENT_PORT_NAME, METRICS_EXPORT_PORT_NAME):
        persist_port(str(rays), node, name, -1)
    command = [agents.__file__, f"--node-id={node}", f"--session-dir={ours}", "--head"]
    raylet = [sys.executable, "-c", START, *command]
    with subprocess.Popen(raylet, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        agent = psutil.Process(int(running.stdout.readline()))
        wait_for(lambda: len(list(ours.iterdir())) == 3 and not list(ours.glob("*.new")))
        assert agent.is_running()
    wait_for(lambda: not agent.is_running())
    assert [(file.name, file.read_text()) for file in sorted(ours.iterdir())] == [
        (file.name, file.read_text()) for file in sorted(rays.iterdir())
    ]


def test_a_local_ray_runs_no_agent_of_the_dashboard(ray_address: str) -> None:
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    # Unlike `Process.cmdline`, this passes over a worker that ends meanwhile.
    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]) if process.pid in ours]
    commands = [" ".join(words) for words in found]
    assert any(agents.__file__ in command and "raylet" not in command.split()[0] for command in commands)
    assert not any("dashboard/agent.py" in command for command in commands)
    assert any(f"{agents.__file__} /" in command for command in commands), "the other agent ends with the raylet"


def test_the_agent_for_runtime_environments_ends_with_the_raylet(tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text("import time\nprint('begun', flush=True)\ntime.sleep(30)\nprint('outlived the raylet')")
    raylet = f"import subprocess, sys\nsubprocess.run([sys.executable, {agents.__file__!r}, {str(agent)!r}])"
    with subprocess.Popen([sys.executable, "-c", raylet], text=True, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        running.kill()
        assert running.stdout.read() == ""
