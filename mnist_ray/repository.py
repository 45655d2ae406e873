"""The state of a git repository: its commit, the diff of uncommitted changes, and untracked files.

The repository may be large, broken or somebody else's: git gets a time limit, asks for no password, and runs no code
that the repository's settings name, except filters of files (``git lfs``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mnist_ray.text import masked

TIME_LIMIT_S = 5.0
MAX_DIFF_BYTES = 2**20
MAX_HASHED_BYTES = 2**20  # of a file; of a larger one, only the size is known
_MAX_UNTRACKED = 200
_MAX_NAMES_BYTES = 2**20
_MAX_LINE = 2_000  # characters; secrets are not searched for in longer lines, which would take long
_SAFE_SETTINGS = (
    "core.fsmonitor=false",  # may be a program
    f"core.hooksPath={os.devnull}",
    "core.quotePath=true",
    "safe.bareRepository=explicit",  # one inside of a clone would bring settings of its own
)
_SAFELY = ["--no-pager", *(word for setting in _SAFE_SETTINGS for word in ("-c", setting))]
_DIFF = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--no-renames", "--full-index", "--unified=3"]
_DIFF += ["--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=none"]
_OF_CALLERS = {f"GIT_{name}" for name in ("DIR", "WORK_TREE", "INDEX_FILE", "COMMON_DIR", "OBJECT_DIRECTORY", "PREFIX")}


_VARIABLES = {
    "LC_ALL": "C",  # messages are read
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",  # a program that answers every question with nothing
    "SSH_ASKPASS": "true",
    "GIT_OPTIONAL_LOCKS": "0",  # leaves the repository's index alone
    "GIT_NO_LAZY_FETCH": "1",
}


class GitError(Exception):
    """Git failed, or took too long; the message is one line."""


@dataclass(frozen=True)
class Printed:
    """What a call of git has printed."""

    kept: bytes  # the first bytes
    sha256: str  # of all
    num_bytes: int  # of all
    status: int
    complaint: str  # the first bytes of stderr


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The state of a repository."""

    folder: str
    commit: str | None  # None before the first commit
    changes: str  # the diff of uncommitted changes, with secrets masked; empty if it is too large
    changes_sha256: str | None  # of the whole diff; None if there are no changes
    changes_bytes: int
    untracked: dict[str, str]  # fingerprints of the first untracked files, by path
    num_untracked: int


def state_of(folder: Path) -> Repository | None:
    """Return the state of the repository that holds a folder; None if there is none, or no git. Raises GitError."""
    end = time.monotonic() + TIME_LIMIT_S
    if (root := _root_of(folder, end)) is None:
        return None
    commit = run_git(root, ["rev-parse", "--verify", "--quiet", "HEAD"], end, 100).kept.decode().strip() or None
    # Before the first commit, only staged files can be compared: with nothing.
    changes = _checked(root, ["diff", *_DIFF, "HEAD" if commit else "--cached", "--"], end, MAX_DIFF_BYTES)
    others = _checked(root, ["ls-files", "--others", "--exclude-standard", "-z"], end, _MAX_NAMES_BYTES)
    names, untracked = [os.fsdecode(name) for name in others.kept.split(b"\0")[:-1]], {}
    for name in names[:_MAX_UNTRACKED]:
        if time.monotonic() > end:
            raise GitError(f"reading the untracked files of {root} took longer than {TIME_LIMIT_S:g} s")
        untracked[name] = fingerprint(root / name)
    return Repository(
        folder=str(root),
        commit=commit,
        changes=_masked(changes.kept) if changes.num_bytes <= MAX_DIFF_BYTES else "",
        changes_sha256=changes.sha256 if changes.num_bytes else None,
        changes_bytes=changes.num_bytes,
        untracked=untracked,
        num_untracked=len(names),
    )


def fingerprint(path: Path) -> str:
    """Return the SHA-256 digest of a file, the size of a large one, or why there is neither."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for its writer
        with open(number, "rb") as file:
            about = os.fstat(number)
            if not stat.S_ISREG(about.st_mode):
                return "not a file"
            if about.st_size > MAX_HASHED_BYTES:
                return f"{about.st_size} bytes"
            return hashlib.sha256(file.read(MAX_HASHED_BYTES)).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        return "missing" if isinstance(error, FileNotFoundError) else "not readable"


def run_git(folder: Path, arguments: Sequence[str], end: float, max_bytes: int) -> Printed:
    """Run git until ``end``, a time of ``time.monotonic``; keep the first bytes. Raises GitError if it takes longer."""
    variables = {name: value for name, value in os.environ.items() if name not in _OF_CALLERS}
    digest, kept, num_bytes = hashlib.sha256(), bytearray(), 0
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            ["git", *_SAFELY, *arguments],
            cwd=folder,
            env={**variables, **_VARIABLES},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # without a terminal, on which ssh could ask for a password
        ) as git,
    ):
        output = cast(io.BufferedReader, git.stdout)
        timer = threading.Timer(end - time.monotonic(), _kill, [git.pid])
        timer.start()
        try:
            while block := output.read1(2**16):
                digest.update(block)
                kept += block[: max(0, max_bytes - num_bytes)]
                num_bytes += len(block)
            status = git.wait()
        finally:
            timer.cancel()
        if status == -signal.SIGKILL:
            raise GitError(f"git {arguments[0]} took longer than {TIME_LIMIT_S:g} s in {folder}")
        errors.seek(0)
        complaint = errors.read(1000).decode("utf-8", "backslashreplace").strip()
    return Printed(bytes(kept), digest.hexdigest(), num_bytes, status, complaint)


def _kill(group: int) -> None:
    with contextlib.suppress(OSError):  # it has just ended
        os.killpg(group, signal.SIGKILL)


def _checked(folder: Path, arguments: Sequence[str], end: float, max_bytes: int) -> Printed:
    """Run git like ``run_git``. Raises GitError also if it fails."""
    printed = run_git(folder, arguments, end, max_bytes)
    if printed.status:
        raise GitError(f"git {arguments[0]} failed in {folder}: {printed.complaint.partition(chr(10))[0]}")
    return printed


def _root_of(folder: Path, end: float) -> Path | None:
    """Return the top folder of a folder's repository; None if there is none, or no git. Raises GitError."""
    try:
        found = run_git(folder, ["rev-parse", "--show-toplevel"], end, 2**16)
    except FileNotFoundError:  # git itself, or the folder
        return None
    if found.status and "not a git repository" in found.complaint:
        return None
    if found.status:
        raise GitError(f"git cannot read {folder}: {found.complaint.partition(chr(10))[0]}")
    return Path(os.fsdecode(found.kept.removesuffix(b"\n")))


def _masked(diff: bytes) -> str:
    """Return a diff as text without secrets. A very long line, whose search would take long, becomes its length."""
    lines = diff.decode("utf-8", "backslashreplace").split("\n")
    return "\n".join(
        masked(line) if len(line) <= _MAX_LINE else f"{line[0]}[a line of {len(line):,} characters]" for line in lines
    )
