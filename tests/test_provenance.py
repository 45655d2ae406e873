"""The state of git repositories, also of those that are large, broken, or somebody else's."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_ray import provenance
from mnist_ray.provenance import Repository, state_of

Git = Callable[..., str]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """A function that runs git in a new repository, or in another folder."""
    root = tmp_path / "own"
    root.mkdir()
    for name, value in {"CONFIG_GLOBAL": os.devnull, "AUTHOR_NAME": "a", "COMMITTER_NAME": "a", "EMAIL": "a@b"}.items():
        monkeypatch.setenv(f"GIT_{name}", value)
    monkeypatch.setenv("EMAIL", "a@b")

    def run(*arguments: str, folder: Path = root) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run("init", "--quiet")
    return run


@pytest.fixture
def root(git: Git, tmp_path: Path) -> Path:
    """A repository with a commit of a text and of a binary file."""
    root = tmp_path / "own"
    (root / "code.py").write_text("one\n")
    (root / "image.bin").write_bytes(bytes(range(256)))
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    return root


def known_state(folder: Path) -> Repository:
    state = state_of(folder)
    assert state is not None
    return state


def program_at(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    file.chmod(0o755)
    return file


def test_a_clean_repository_has_a_commit_and_no_changes_also_seen_from_a_folder_in_it(git: Git, root: Path) -> None:
    (root / "inner").mkdir()
    known = {"folder": str(root), "commit": git("rev-parse", "HEAD")}
    assert state_of(root / "inner") == {**known, "changes": "", "changes_sha256": None, "note": ""}


def test_changes_are_a_diff_without_secrets_that_also_identifies_binary_files(git: Git, root: Path) -> None:
    (root / "code.py").write_text("one\ns3://KEY:SECRET@bucket/runs\n")
    (root / "image.bin").write_bytes(bytes(range(255)))
    index = (root / ".git" / "index").read_bytes()
    state = known_state(root)
    assert "\n one\n+s3://***@bucket/runs\n" in state["changes"]
    assert git("hash-object", "image.bin") in state["changes"]
    assert "Binary files a/image.bin and b/image.bin differ" in state["changes"]
    (root / "code.py").write_text("one\ns3://KEY:OTHER@bucket/runs\n")
    assert known_state(root)["changes_sha256"] != state["changes_sha256"]
    assert (root / ".git" / "index").read_bytes() == index


def test_too_many_changes_have_only_a_digest(root: Path) -> None:
    (root / "code.py").write_text("a line of text\n" * 100_000)
    state = known_state(root)
    assert state["changes"] == ""
    assert state["changes_sha256"] is not None


def test_before_the_first_commit_a_note_says_what_git_says(git: Git, tmp_path: Path) -> None:
    assert "git rev-parse failed" in known_state(tmp_path / "own")["note"]


def test_without_a_repository_or_git_there_is_no_state(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert state_of(tmp_path) is None
    assert state_of(tmp_path / "nowhere") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state_of(root) is None


def test_no_program_runs_that_a_repositorys_settings_name(git: Git, root: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program = program_at(tmp_path / "program", f"touch {mark}", "cat")
    for name in ("core.fsmonitor", "diff.external", "diff.seen.textconv", "diff.seen.command", "core.pager"):
        git("config", name, str(program))
    (root / ".git" / "info" / "attributes").write_text("* diff=seen\n")
    program_at(root / ".git" / "hooks" / "post-index-change", f"touch {mark}")
    (root / "code.py").write_text("two\n")
    mark.unlink(missing_ok=True)
    assert "\n+two\n" in known_state(root)["changes"]
    assert not mark.exists()
    git("status")
    assert mark.exists()  # the programs would run


def test_a_git_that_hangs_is_killed_with_its_children(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program_at(tmp_path / "bin" / "git", "sleep 1000 &", "sleep 1000")  # the first one holds git's output, too
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "TIME_LIMIT_S", 0.5)
    assert known_state(root)["note"] == f"git rev-parse took longer than 0.5 s in {root}"


def test_git_cannot_ask_for_a_password(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    asked = "sh -c ': < /dev/tty' 2>/dev/null && exit 7", "read line && exit 8", "echo $GIT_TERMINAL_PROMPT", "exit 0"
    program_at(tmp_path / "bin" / "git", *asked)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert provenance.run_git(root, "fetch") == "0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_somebody_elses_repository_is_not_read(root: Path) -> None:
    for path in (root, root / ".git"):
        os.chown(path, 12345, 12345)
    said = f"git rev-parse failed in {root}: fatal: detected dubious ownership in repository"
    assert known_state(root)["note"].startswith(said)
