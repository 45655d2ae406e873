"""The origin of a result: versions, command line, processor, and the state of git repositories.

A repository may be large, broken or somebody else's: git gets a time limit, asks for no password, and runs no code that
the repository's settings name, except filters of files (``git lfs``).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_ray.text import PROGRAM, VERSION, masked

Repository = Mapping[str, Any]  # the value of "repository" in origin.json
TIME_LIMIT_S = 5.0  # of a call of git
_MAX_DIFF_SIZE = 2**20  # characters; of a larger diff, only the digest is kept
_SAFELY = ["--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
_SAFELY += ["-c", "safe.bareRepository=explicit"]  # one inside of a clone would bring settings of its own
_ENVIRONMENT = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "GIT_OPTIONAL_LOCKS": "0"}


def versions() -> dict[str, str]:
    """Return the versions of mnist_ray, Python, torch, Ray and NumPy."""
    from importlib.metadata import version  # whose import would delay the first line of output

    own = {"mnist_ray": VERSION, "python": platform.python_version()}
    return {**own, **{name: version(name) for name in ("torch", "ray", "numpy")}}


def cpuinfo(names: str = "flags|Features") -> str:
    """Return the value that Linux reports for the first processor under one of ``names``; empty on other systems."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="ascii", errors="replace") if file.exists() else ""
    found = re.search(rf"^(?:{names})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_has_bf16() -> bool:
    """Return whether the processor computes in bf16; always False on systems other than Linux."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo().split())


def arithmetic() -> dict[str, list[str]]:
    """Return what decides the last bits of a result: versions of libraries, and properties of the processor.

    Libraries choose kernels depending on the vector instructions, and block sizes depending on the caches.
    """
    from importlib.metadata import version

    features = sorted(name for name in {*cpuinfo().split()} if re.match("amx|asimd|avx|f16c|fma|sse|ssse|sve", name))
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-2]/size"))
    return {
        "versions": [f"{name} {version(name)}" for name in ("torch", "numpy")],
        "processor": [platform.machine(), *features],
        "caches": [path.read_text(encoding="ascii").strip() for path in caches],
    }


def origin() -> dict[str, Any]:
    """Return this process's command line without secrets, the package's git commit, and versions."""
    program, *flags = map(masked, sys.argv or [""])
    words = program.split() if program.startswith(PROGRAM) else ["python", program]
    return {"command_line": shlex.join([*words, *flags]), "git_commit": git_commit(), "versions": versions()}


def git_commit() -> str | None:
    """Return the commit of the package's checkout, with ``-dirty`` if it has changes; None if there is no checkout."""
    root = Path(__file__).parent.parent
    state = (state_of(root) if (root / ".git").exists() else None) or {}
    is_dirty = state.get("changes_sha256") is not None
    return state["commit"] + "-dirty" * is_dirty if state.get("commit") else None


class GitError(Exception):
    """Git failed, or took too long; the message is one line."""


def state_of(folder: Path) -> Repository | None:
    """Return the state of the repository that holds a folder; None if there is none, or no git."""
    state = {"folder": str(folder), "commit": None, "changes": "", "changes_sha256": None, "note": ""}
    try:
        root, commit = run_git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        diff = run_git(Path(root), "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--full-index", "HEAD")
    except FileNotFoundError:  # git itself, or the folder
        return None
    except Exception as error:  # whatever it is, it must not end the run
        return None if "not a git repository" in str(error) else {**state, "note": str(error)}
    digest = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    changes = {"changes": masked(diff) if len(diff) <= _MAX_DIFF_SIZE else "", "changes_sha256": digest}
    return {**state, "folder": root, "commit": commit, **changes}


def run_git(folder: Path, *arguments: str) -> str:
    """Return what git prints. Raises GitError if it fails, or takes longer than ``TIME_LIMIT_S``."""
    kept = {name: value for name, value in os.environ.items() if not re.match("GIT_(?!CONFIG)", name)}
    with subprocess.Popen(
        ["git", *_SAFELY, *arguments],
        cwd=folder,
        env={**kept, **_ENVIRONMENT},
        encoding="utf-8",
        errors="backslashreplace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # without a terminal, on which ssh could ask for a password
    ) as git:
        try:
            printed, complaint = git.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(git.pid, signal.SIGKILL)  # also the programs that it has started
            raise GitError(f"git {arguments[0]} took longer than {TIME_LIMIT_S:g} s in {folder}") from error
    if git.returncode:
        raise GitError(masked(f"git {arguments[0]} failed in {folder}: {complaint.partition(chr(10))[0]}"))
    return printed
