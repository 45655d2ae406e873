"""Where a result came from: versions, command line, git commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mnist_ray


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = {name: version(name) for name in ("torch", "ray", "numpy")}
    return {"mnist_ray": mnist_ray.__version__, "python": platform.python_version(), **packages}


def command_line() -> str:
    """Return the command that started this process, as one would type it."""
    return shlex.join(["python", *sys.argv])


def origin() -> dict[str, Any]:
    """Return where a run comes from: this process's command line, the package's commit, versions."""
    return {"command_line": command_line(), "git_commit": git_commit(), "versions": versions()}


def git_commit() -> str | None:
    """Return the commit of the package's checkout, with ``-dirty`` where it was changed; None outside of one."""
    root = Path(mnist_ray.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
