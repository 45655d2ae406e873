"""Starting fork servers: a job starts its own for a local Ray; on a cluster, each node's first worker does."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_fork.shim import MODULES_VARIABLE, SOCKET_VARIABLE, launch

SHIM = Path(__file__).with_name("shim.py")
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # by which a submitted job knows its runtime environment
_FIRST_JOB = "01000000"
_IMPORTED_LATE = ("ray.tune", "torch._dynamo")  # by a worker as it begins: by Ray Train, and by PyTorch's optimizers
_HARMLESS = {"working_dir", "env_vars", "excludes", "config"}
"""Of a job's own runtime environment: what leaves a worker's Python as it is."""
_START = (
    'if [ -x {python} ] && [ -f {shim} ]; then exec {python} -S -E {shim} "$@"; fi; '
    'python="${{1%/lib*/python*}}/bin/python"; [ -x "$python" ] || python=python3; exec "$python" "$@"'
)
"""A node that has its Python or this package elsewhere starts its workers with the Python beside its Ray."""


@dataclass(frozen=True)
class Forking:
    """How a job's workers are forked."""

    is_wanted: bool
    modules: tuple[str, ...]  # what they need imported
    server: subprocess.Popen[bytes] | None  # for a local Ray, if one can be expected


@contextlib.contextmanager
def prepared_forking(module: str, *, is_wanted: bool = True) -> Iterator[Forking]:
    """Run a fork server meanwhile, if ``is_wanted`` on this system and the job will probably start its own Ray.

    ``module`` is what the workers need imported.
    """
    is_wanted = is_wanted and sys.platform.startswith("linux")
    modules = (module, *_IMPORTED_LATE)
    is_connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    may_be_local = not is_connected and os.environ.get("RAY_ADDRESS", "") in ("", "auto", "local")
    with _fork_server(modules) if is_wanted and may_be_local else contextlib.nullcontext() as server:
        yield Forking(is_wanted, modules, server)


@contextlib.contextmanager
def _fork_server(modules: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Run a fork server for the local Ray that this process will start; a variable of this process names its socket.

    The workers that it has forked live on after it. Give None if it cannot be started: then Ray starts the workers its
    own way.
    """
    # Read when Ray is imported. A local Ray's first job is this one; a worker that sees this process end, ends too.
    of_workers = {"RAY_JOB_ID": _FIRST_JOB, "RAY_RAYLET_PID": str(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="mnist_ray-", ignore_cleanup_errors=True) as folder:
        address = os.path.join(folder, "fork")
        try:
            server = launch(address, modules, {**os.environ, **of_workers}, stdin=subprocess.PIPE)
        except OSError:
            yield None
            return
        os.environ[SOCKET_VARIABLE] = address
        try:
            yield server
        finally:
            os.environ.pop(SOCKET_VARIABLE, None)
            server.kill()
            server.communicate()


def own_runtime_env() -> dict[str, Any]:
    """Return the runtime environment that a job was submitted with; an empty one if it was not submitted."""
    config: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG_VARIABLE, "{}"))
    return config.get("runtime_env", {})


def runtime_env_to_fork(forking: Forking) -> dict[str, Any]:
    """Return the runtime environment with which a job's workers are forked on a cluster; an empty one if they are not.

    It is Ray's public way to start workers by another program. A local Ray has one that is faster by an import of Ray,
    since ``py_executable`` is run by a program of Ray's.
    """
    own = own_runtime_env()
    if not forking.is_wanted or not own.keys() <= _HARMLESS:
        return {}
    # Each node has the job's working directory in another place, and starts the workers there.
    travels = "working_dir" in own and SHIM.is_relative_to(Path.cwd())
    shim = SHIM.relative_to(Path.cwd()) if travels else SHIM
    start = _START.format(python=shlex.quote(sys.executable), shim=shlex.quote(str(shim)))
    return {
        "py_executable": f"sh -c {shlex.quote(start)} sh",
        "env_vars": {MODULES_VARIABLE: " ".join(forking.modules)},
    }
