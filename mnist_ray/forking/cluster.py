"""Fork servers of a job on a cluster: one on each node, which the first worker there starts."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from mnist_ray import private
from mnist_ray.forking.local import SHIM, Forking
from mnist_ray.forking.shim import MODULES_VARIABLE

_HARMLESS = {"working_dir", "env_vars", "excludes", "config"}
"""Of a job's own runtime environment: what leaves a worker's Python as it is."""
_START = (
    'if [ -x {python} ] && [ -f {shim} ]; then exec {python} -S -E {shim} "$@"; fi; '
    'python="${{1%/lib*/python*}}/bin/python"; [ -x "$python" ] || python=python3; exec "$python" "$@"'
)
"""A node that has its Python or this package elsewhere starts its workers with the Python beside its Ray."""


def own_runtime_env() -> dict[str, Any]:
    """Return the runtime environment that a job was submitted with; an empty one where it was not submitted."""
    config: dict[str, Any] = json.loads(os.environ.get(private.RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return config.get("runtime_env", {})


def runtime_env_to_fork(forking: Forking) -> dict[str, Any]:
    """Return the runtime environment with which a job's workers are forked on a cluster; an empty one where not.

    It is Ray's public way to start workers by another program. For a local Ray there is one that is faster by what
    it takes to import Ray, since ``py_executable`` is run by a program of Ray's.
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
