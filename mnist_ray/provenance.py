"""The origin of a result: versions, command line, commit, processor."""

from __future__ import annotations

import contextlib
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mnist_ray import repository
from mnist_ray.text import PROGRAM, VERSION, masked


def versions() -> dict[str, str]:
    """Return the versions of mnist_ray, Python, torch, Ray and NumPy."""
    packages = {name: version(name) for name in ("torch", "ray", "numpy")}
    return {"mnist_ray": VERSION, "python": platform.python_version(), **packages}


def cpuinfo(names: str = "flags|Features") -> str:
    """Return the value that Linux reports for the first processor under one of ``names``; empty on other systems."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="ascii", errors="replace") if file.exists() else ""
    found = re.search(rf"^(?:{names})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def arithmetic() -> dict[str, list[str]]:
    """Return what decides the last bits of a result: versions of libraries, and properties of the processor.

    Libraries choose kernels depending on the vector instructions, and block sizes depending on the caches.
    """
    features = sorted(name for name in {*cpuinfo().split()} if re.match("amx|asimd|avx|f16c|fma|sse|ssse|sve", name))
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-2]/size"))
    return {
        "versions": [f"{name} {version(name)}" for name in ("torch", "numpy")],
        "processor": [platform.machine(), *features],
        "caches": [path.read_text(encoding="ascii").strip() for path in caches],
    }


def cpu_has_bf16() -> bool:
    """Return whether the processor computes in bf16; always False on systems other than Linux."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo().split())


def origin() -> dict[str, Any]:
    """Return this process's command line without secrets, the package's git commit, and versions."""
    program, *flags = map(masked, sys.argv or [""])
    words = program.split() if program.startswith(PROGRAM) else ["python", program]
    return {"command_line": shlex.join([*words, *flags]), "git_commit": git_commit(), "versions": versions()}


def git_commit() -> str | None:
    """Return the commit of the package's checkout, with ``-dirty`` if it has changes; None if there is no checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(repository.GitError, OSError):
        found = repository.run_git(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
        return found.decode("utf-8", "replace").strip() or None
    return None
