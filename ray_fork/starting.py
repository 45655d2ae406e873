"""Starts fork servers: a job starts one for its local Ray; on a cluster, each node's first worker starts one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_fork.shim import MODULES_VARIABLE, SOCKET_VARIABLE, launch, temporary_folder

SHIM = Path(__file__).with_name("shim.py")
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it to a submitted job's runtime environment
_FIRST_JOB = "01000000"
_HARMLESS = {"working_dir", "env_vars", "excludes", "config"}  # settings that do not replace a worker's Python
# A node starts its workers with its Ray's own Python if it lacks this Python or this package at these paths, or if its
# Ray's version differs from this Python's Ray. The first argument is a script in the folder of the node's Ray.
_START = (
    'if [ -x {python} ] && [ -f {shim} ] && [ "$(cat {version})" = "$(cat "${{1%/_private/*}}/_version.py")" ]; '
    'then exec {python} -S -E {shim} "$@"; fi; '
    'echo "a worker is started as usual, not forked: its node lacks the job\'s Python, Ray or ray_fork" >&2; '
    'python="${{1%/lib*/python*}}/bin/python"; [ -x "$python" ] || python=python3; exec "$python" "$@"'
)


@dataclass(frozen=True)
class Forking:
    """The settings for forking a job's workers."""

    is_wanted: bool
    modules: tuple[str, ...]  # imported before the fork
    server: subprocess.Popen[bytes] | None  # for a local Ray; None if the job joins a cluster


@contextlib.contextmanager
def prepared_forking(*modules: str, is_wanted: bool = True) -> Iterator[Forking]:
    """Yield a job's ``Forking``. Inside the block, run a fork server if the job will probably start a local Ray.

    ``modules``: the modules to import before the fork. An environment variable of this process names the server's
    socket. Forked workers outlive the server. If it cannot start, as on a full disk, workers start as usual.
    """
    is_wanted = is_wanted and sys.platform.startswith("linux")
    is_connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not is_wanted or is_connected or os.environ.get("RAY_ADDRESS", "") not in ("", "auto", "local"):
        yield Forking(is_wanted, modules, None)
        return
    with contextlib.ExitStack() as at_the_end:
        server = None
        try:
            server = _start_server(modules, at_the_end)
        except OSError as error:
            logging.getLogger(__name__).warning("workers are started as usual, not forked: %s", error)
        yield Forking(is_wanted, modules, server)


def _start_server(modules: tuple[str, ...], at_the_end: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    """Start a server for a local Ray. Raises OSError if there is no room for its folder or its process."""
    folder = tempfile.TemporaryDirectory(prefix="ray_fork-", dir=temporary_folder(), ignore_cleanup_errors=True)
    address = os.path.join(at_the_end.enter_context(folder), "fork")
    # Ray reads these on import: the id of a local Ray's first job, and the process whose exit ends the workers.
    of_workers = {"RAY_JOB_ID": _FIRST_JOB, "RAY_RAYLET_PID": str(os.getpid())}
    server = launch(address, modules, {**os.environ, **of_workers}, subprocess.PIPE)
    os.environ[SOCKET_VARIABLE] = address
    at_the_end.callback(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    os.environ.pop(SOCKET_VARIABLE, None)
    server.kill()
    server.communicate()


def own_runtime_env() -> dict[str, Any]:
    """Return the runtime environment of a submitted job; empty if the job was not submitted."""
    config: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG_VARIABLE, "{}"))
    return config.get("runtime_env", {})


def has_own_python() -> bool:
    """Return whether this submitted job's workers may have another Python, or packages that nodes install first."""
    return not own_runtime_env().keys() <= _HARMLESS


def runtime_env_to_fork(forking: Forking) -> dict[str, Any]:
    """Return the runtime environment that lets a cluster fork a job's workers; empty if they must not be forked.

    ``py_executable`` is Ray's public setting for the program that starts workers, but Ray imports itself before it runs
    that program. A local Ray runs the shim directly, without this import.
    """
    if not forking.is_wanted or has_own_python():
        return {}
    import ray

    # The job's working directory has a different path on each node; workers start in it.
    travels = "working_dir" in own_runtime_env() and SHIM.is_relative_to(Path.cwd())
    shim = SHIM.relative_to(Path.cwd()) if travels else SHIM
    paths = {"python": sys.executable, "shim": shim, "version": Path(ray.__file__).with_name("_version.py")}
    start = _START.format(**{name: shlex.quote(str(path)) for name, path in paths.items()})
    return {
        "py_executable": f"sh -c {shlex.quote(start)} sh",
        "env_vars": {MODULES_VARIABLE: " ".join(forking.modules)},
    }
