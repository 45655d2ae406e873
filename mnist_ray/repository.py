"""The state of a git repository: its commit, and the diff of uncommitted changes.

The repository may be large, broken or somebody else's: git gets a time limit, asks for no password, and runs no code
that the repository's settings name, except filters of files (``git lfs``).
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mnist_ray.errors import first_line
from mnist_ray.text import masked

TIME_LIMIT_S = 5.0  # of a call of git
_MAX_DIFF_BYTES = 2**20
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


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The state of a repository."""

    folder: str
    commit: str | None = None  # None before the first commit
    changes: str = ""  # the diff of uncommitted changes, with secrets masked; empty if it is larger than 1 MiB
    changes_sha256: str | None = None  # of the whole diff; None if there are no changes
    note: str = ""  # why the rest is unknown


def state_of(folder: Path) -> Repository | None:
    """Return the state of the repository that holds a folder; None if there is none, or no git.

    Whatever fails becomes a note.
    """
    try:
        return _read(folder)
    except Exception as error:  # must not end the run
        return Repository(folder=str(folder), note=masked(first_line(error)))


def _read(folder: Path) -> Repository | None:
    try:
        root = Path(os.fsdecode(run_git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
    except FileNotFoundError:  # git itself, or the folder
        return None
    except GitError as error:
        if "not a git repository" in str(error):
            return None
        raise
    commit = run_git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip() or None
    # Before the first commit, only staged files can be compared: with nothing.
    diff = run_git(root, "diff", *_DIFF, "HEAD" if commit else "--cached", "--")
    return Repository(
        folder=str(root),
        commit=commit,
        changes=_masked(diff) if len(diff) <= _MAX_DIFF_BYTES else "",
        changes_sha256=hashlib.sha256(diff).hexdigest() if diff else None,
    )


def run_git(folder: Path, *arguments: str) -> bytes:
    """Return what git prints. Raises GitError if it fails with a message, or takes longer than ``TIME_LIMIT_S``."""
    variables = {name: value for name, value in os.environ.items() if name not in _OF_CALLERS}
    with subprocess.Popen(
        ["git", *_SAFELY, *arguments],
        cwd=folder,
        env={**variables, **_VARIABLES},
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
    if git.returncode and complaint:
        first, *_ = complaint.decode("utf-8", "backslashreplace").splitlines()
        raise GitError(f"git {arguments[0]} failed in {folder}: {first}")
    return printed


def _masked(diff: bytes) -> str:
    """Return a diff as text without secrets. A very long line, whose search would take long, becomes its length."""
    lines = diff.decode("utf-8", "backslashreplace").split("\n")
    return "\n".join(
        masked(line) if len(line) <= _MAX_LINE else f"{line[0]}[a line of {len(line):,} characters]" for line in lines
    )
