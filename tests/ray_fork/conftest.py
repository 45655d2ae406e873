"""Fork servers, and workers that write down their own state."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from ray_fork.shim import SOCKET_VARIABLE
from ray_fork.starting import SHIM
from tests.conftest import ROOT, wait_for

collect_ignore_glob = [] if sys.platform.startswith("linux") else ["test_*.py"]  # nothing is forked elsewhere

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
ENVIRONMENT |= {"LC_ALL": "C.UTF-8"}  # else Python may set a variable by itself
WORKER = """\
import os, sys
environment, threads = dict(os.environ), len(os.listdir("/proc/self/task"))
descriptors = {name: f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}

import json, random, resource, signal
import numpy, ray, torch

text = json.dumps({
    "environment": environment,
    "argv": sys.argv,
    "name": __name__,
    "folder": os.getcwd(),
    "folder of imports": sys.path[0],
    "descriptors": {name: os.readlink(path) for name, path in descriptors.items() if os.path.islink(path)},
    "threads": threads,
    "threads of PyTorch": torch.get_num_threads(),
    "uses CUDA": torch.cuda.is_initialized(),
    "pid": os.getpid(),
    "parent": os.getppid(),
    "leads a group": os.getpgid(0) == os.getpid(),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
    "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "SIGINT": str(signal.getsignal(signal.SIGINT)),
    "SIGCHLD": str(signal.getsignal(signal.SIGCHLD)),
    "Python's number": random.random(),
    "NumPy's number": numpy.random.random(),
    "PyTorch's number": torch.rand(1).item(),
    "Ray's number": ray.NodeID.from_random().hex(),
})
with open(sys.argv[1] + ".part", "w") as file:
    file.write(text)
os.rename(file.name, sys.argv[1])
"""


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, also if its parent has not collected its status yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end(processes: list[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    wait_for(lambda: all(map(has_ended, processes)))


def run_shim(folder: Path, *words: object, **options: Any) -> tuple[str, str]:
    """Run the shim with files of a folder as its descriptors; return its standard output and error.

    ``words`` are the worker's script and arguments.
    """
    command = [sys.executable, "-S", "-E", str(SHIM), *map(str, words)]
    stdin, stdout, stderr = (folder / name for name in ("stdin", "stdout", "stderr"))
    with stdin.open("w+") as file, stdout.open("w") as out, stderr.open("w") as err:
        subprocess.run(command, check=True, timeout=60, stdin=file, stdout=out, stderr=err, **options)
    return stdout.read_text(), stderr.read_text()


def script_in(folder: Path, source: str, version: str = ray.__version__) -> Path:
    """Write a worker's script into a folder, where it lies as in a Ray of a version."""
    script = folder / "of_ray" / "_private" / "workers" / "worker.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(source)
    (folder / "of_ray" / "_version.py").write_text(f'# by a build\ncommit = "5"\nversion = "{version}"\n')
    return script


def fork(folder: Path, *words: str, **options: Any) -> dict[str, Any]:
    """Have a worker forked, and return its state."""
    script, seen = script_in(folder, WORKER), folder / "seen.json"
    seen.unlink(missing_ok=True)
    assert run_shim(folder, script, seen, *words, **options) == ("", "")
    wait_for(seen.exists)
    content: dict[str, Any] = json.loads(seen.read_text())
    return content


def parent_of_worker(folder: Path, **options: Any) -> int:
    """Have a worker forked that imports nothing; return its parent's process id."""
    script = script_in(folder, "import os; print(os.getppid())")
    assert run_shim(folder, script, **options)[1] == ""
    wait_for((stdout := folder / "stdout").read_text)
    return int(stdout.read_text())


def answers(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(address)) == 0


@dataclass(frozen=True)
class Server:
    """A fork server for tests."""

    process: subprocess.Popen[bytes]
    address: Path
    environment: dict[str, str]  # of a worker that it can fork


@contextlib.contextmanager
def serving(folder: Path, *modules: str, stdin: int = subprocess.PIPE, **sources: str) -> Iterator[Server]:
    """Run a fork server; ``sources`` are modules to write first. At the end it and its workers are killed."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    address = folder / "own" / "fork"
    address.parent.mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(folder), SOCKET_VARIABLE: str(address)}
    environment |= {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_fork.server", str(address), *modules, *sources],
        cwd=ROOT,
        env={**environment, "ONLY_THE_SERVERS": "1"},
        stdin=stdin,
    )
    try:
        wait_for(lambda: answers(address))
        yield Server(process, address, environment)
    finally:
        end(psutil.Process(process.pid).children() if process.poll() is None else [])
        process.kill()
        process.communicate()
