"""The origin of a result: versions, command line, code and its repository, processor."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import shlex
import sys
import types
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mnist_ray import repository
from mnist_ray.errors import first_line
from mnist_ray.repository import Repository
from mnist_ray.text import PROGRAM, VERSION, masked

CHANGES_FILE = "changes.diff"
_OTHERS_CODE = ("site-packages", "dist-packages")


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


def package_sha256() -> str:
    """Return one digest of this package's code, which may have changed since its commit or its installation."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def modules_below(folder: Path, but: Path) -> dict[str, str]:
    """Return the digests of the modules that are imported from a folder, by path within it; without ``but``.

    Installed packages and Python's own modules do not count.
    """
    loaded = [
        vars(module).get("__file__") for module in [*sys.modules.values()] if isinstance(module, types.ModuleType)
    ]
    files = {file for file in loaded if isinstance(file, str) and file.startswith(f"{folder}{os.sep}")}
    places = (os.path.dirname(os.__file__), os.path.join(sys.prefix, "bin"))  # the latter has mnist-ray itself
    installed = (*(place + os.sep for place in places), *(f"{os.sep}{name}{os.sep}" for name in _OTHERS_CODE))
    own = sorted(file for file in files - {str(but)} if not any(place in file for place in installed))
    return {os.path.relpath(file, folder): _sha256(Path(file)) for file in own}


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:  # it was deleted after its import
        return "not readable"


@dataclass(frozen=True)
class Surroundings:
    """What a run finds around its code."""

    package_sha256: str | None = None  # of this package's code
    repository: Repository | None = None
    note: str = ""  # why something is unknown

    def to_dict(self) -> dict[str, Any]:
        """Return all but the diff, which has a file of its own."""
        state = dataclasses.asdict(self.repository) if self.repository else None
        kept = state and {name: state[name] for name in state if name != "changes"}
        return {"package_sha256": self.package_sha256, "repository": kept, "note": self.note}


def surroundings(folder: Path) -> Surroundings:
    """Return the digest of this package, and the state of a folder's repository. Whatever fails becomes a note."""
    found: dict[str, Any] = {}
    try:
        found["package_sha256"] = package_sha256()
        found["repository"] = repository.state_of(folder)
    except Exception as error:  # must not end the run
        found["note"] = masked(first_line(error))
    return Surroundings(**found)
