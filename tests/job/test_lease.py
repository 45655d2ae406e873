import json
import os
import queue
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from mnist_ray.errors import JobError, UsageError
from mnist_ray.job import lease
from mnist_ray.job.lease import Owner, owned, this_process
from mnist_ray.storage import RunFolder, locate
from tests.conftest import wait_for

ELSEWHERE = Owner("other-host", "another boot", 7, 0)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[Exception]:
    """The errors that end an owner, which looks at its file often."""
    errors = queue.Queue[Exception]()
    monkeypatch.setattr(lease, "CHECKED_AFTER_S", 0.05)
    monkeypatch.setattr(lease, "end_with", errors.put)
    return errors


def claim_of(run: RunFolder, owner: Owner, renewed: int = 0) -> Path:
    """Write an owner's file."""
    changed = Path(run.storage_path) / "changed"
    changed.write_text(json.dumps({**asdict(owner), "renewed": renewed}))
    return changed.rename(changed.with_name(lease.file_of(run)))


def claims(run: RunFolder) -> list[Path]:
    return list(Path(run.storage_path).glob(".*.owner"))


def assert_taken(run: RunFolder) -> None:
    """Own a run although it has an owner's file."""
    with owned(run):
        assert json.loads(claims(run)[0].read_text())["pid"] == os.getpid()


def test_a_run_that_another_job_owns_is_refused_and_free_afterwards(run: RunFolder, tmp_path: Path) -> None:
    parent = os.getppid()
    left = claim_of(run, replace(this_process(), pid=parent, ticks=lease.ticks_at_start(parent)))
    with (
        pytest.raises(UsageError, match=f"run is in use by another job: process {parent} on this machine"),
        owned(run),
    ):
        pass
    left.unlink()
    with owned(run), owned(locate(str(tmp_path), "run2")), owned(locate(str(tmp_path), "ru")):
        assert len(claims(run)) == 3
    assert not any(tmp_path.iterdir())


def test_a_run_of_a_dead_process_on_this_machine_is_free_at_once(run: RunFolder) -> None:
    with psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = replace(this_process(), pid=process.pid, ticks=lease.ticks_at_start(process.pid))
        claim_of(run, owner)
        with pytest.raises(UsageError, match="in use"), owned(run):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert_taken(run)  # from a zombie
    claim_of(run, owner)
    assert_taken(run)
    for wrong in ({"ticks": 1}, {"pid": -5}):  # another process has its id by now; the file is damaged
        claim_of(run, replace(this_process(), **wrong))  # type: ignore[arg-type]
        assert_taken(run)


def test_the_files_of_a_killed_owners_ray_are_removed_once_its_run_has_ended_well(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        owner = replace(this_process(), pid=process.pid, ticks=1)
    session, other = (tmp_path / "ray" / f"session_2026-12-02_{pid}" for pid in (process.pid, os.getpid()))
    for folder in (session, other):
        (folder / "logs").mkdir(parents=True)
    claim_of(run, owner)
    with pytest.raises(ZeroDivisionError), owned(run):
        raise ZeroDivisionError
    assert session.exists()
    claim_of(run, owner)
    assert_taken(run)
    assert (session.exists(), other.exists()) == (False, True)


def test_a_run_that_an_earlier_call_of_this_process_could_not_give_back_is_free(run: RunFolder) -> None:
    claim_of(run, this_process())
    assert_taken(run)


INFINITE = b'{"host": "h", "machine": "", "pid": 1e999, "ticks": 1}'


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"host": 1}', INFINITE, b"[" * 100_000])
def test_a_run_is_free_if_its_owners_file_does_not_change(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(lease, "time", Mock(monotonic=lambda: now[0], time=time.time, sleep=sleep))
    left = claim_of(run, ELSEWHERE)
    if content is not None:
        left.write_bytes(content)
    waited: list[str] = []
    with owned(run, waited.append):
        assert json.loads(left.read_text())["pid"] == os.getpid()
    assert waited
    assert now[0] > lease.EXPIRES_AFTER_S


def test_a_run_is_refused_if_its_owners_file_changes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def renew(text: str) -> None:
        claim_of(run, ELSEWHERE, renewed=1)

    monkeypatch.setattr(lease, "EXPIRES_AFTER_S", 60)
    claim_of(run, ELSEWHERE)
    with pytest.raises(UsageError, match="in use by another job: process 7 on other-host"), owned(run, renew):
        pass


def test_an_owner_renews_its_file_and_ends_if_it_finds_another_owners(
    run: RunFolder, ended: queue.Queue[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.05)
    with owned(run):
        (own,) = claims(run)
        own.write_bytes(b"[]")
        wait_for(lambda: own.read_bytes() != b"[]" and json.loads(own.read_text())["pid"] == os.getpid())
        assert ended.empty()
        claim_of(run, ELSEWHERE)
        error = ended.get(timeout=30)
    assert isinstance(error, JobError)
    assert "was taken over by process 7 on other-host" in str(error)


@pytest.mark.parametrize(("expires_after_s", "ends"), [(60.0, False), (-1.0, True)])
def test_an_owner_without_its_file_writes_it_again_but_ends_if_it_was_silent_for_long(
    expires_after_s: float,
    ends: bool,
    run: RunFolder,
    ended: queue.Queue[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "EXPIRES_AFTER_S", expires_after_s)
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.05)
    with owned(run):
        (own,) = claims(run)
        own.unlink()  # as another job does, which has taken the run over and has ended
        wait_for(lambda: ended.qsize() if ends else own.exists(), timeout_s=30)
        assert ended.qsize() == ends
        if ends:
            assert "was taken over by a job that has exited" in str(ended.get())


def test_of_jobs_that_write_the_file_at_the_same_moment_only_the_last_one_goes_on(
    run: RunFolder, ended: queue.Queue[Exception]
) -> None:
    with owned(run):
        others = claim_of(run, ELSEWHERE)
        assert "was taken over by process 7 on other-host" in str(ended.get(timeout=30))
    assert json.loads(others.read_text())["pid"] == 7
