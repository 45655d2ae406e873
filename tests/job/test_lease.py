import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import OwnerRecord, SoftFileLease

from mnist_ray.errors import UsageError
from mnist_ray.job import lease
from mnist_ray.job.job import check_free
from mnist_ray.job.lease import owned, owner_of
from mnist_ray.storage import RunFolder, locate

OWNING = """
import sys
from mnist_ray.job.lease import owned
from mnist_ray.storage import locate
with owned(locate(sys.argv[1], "run")):
    print("owned", flush=True)
    input()
"""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[Exception]:
    """The errors that end an owner; it renews its file often, and a silent one is soon taken for dead."""
    errors = queue.Queue[Exception]()
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_AFTER_S", 0.5)
    monkeypatch.setattr(lease, "end_with", errors.put)
    return errors


@pytest.fixture
def owner(run: RunFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which owns the run."""
    command = [sys.executable, "-c", OWNING, run.storage_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owned\n"
        yield process
        process.kill()


def file_of(run: RunFolder) -> Path:
    return Path(run.storage_path) / f".{run.name}.owner"


def claim_elsewhere(run: RunFolder) -> None:
    """Write the file of an owner on another machine, which never renews it."""
    text = f"filelock/2\npid=7\nhost=other-host\nmode=lease\ntoken={'0' * 32}\nduration={lease.EXPIRES_AFTER_S!r}\n"
    file_of(run).write_text(text)
    found = SoftFileLease(file_of(run), lease_duration=lease.EXPIRES_AFTER_S).owner
    assert found == OwnerRecord(7, "other-host", "lease", "0" * 32, lease.EXPIRES_AFTER_S)


def assert_is_free(run: RunFolder) -> None:
    with owned(run):
        assert f"pid={os.getpid()}\n" in file_of(run).read_text()
    assert not file_of(run).exists()


def test_a_run_that_another_job_owns_is_refused_and_free_afterwards(
    run: RunFolder, owner: subprocess.Popen[bytes]
) -> None:
    waited = list[str]()
    found = f"run is in use by another job: process {owner.pid} on .+; if that has exited, delete {file_of(run)}$"
    with pytest.raises(UsageError, match=found), owned(run, waited.append):
        pass
    assert (
        waited[0] == f"checking whether process {owner.pid} on {owner_of(run)}, which owns this run, is still alive …"
    )
    with owned(locate(run.storage_path, "run2")), owned(locate(run.storage_path, "ru")):
        pass
    owner.communicate(b"\n")
    assert owner_of(run) == ""
    assert_is_free(run)


def test_a_run_of_a_killed_process_on_this_machine_is_free_at_once(
    run: RunFolder, owner: subprocess.Popen[bytes]
) -> None:
    owner.kill()
    owner.wait()
    with owned(run, pytest.fail):
        pass


def test_the_file_of_a_finished_runs_owner_is_removed_once_that_is_killed(
    run: RunFolder, owner: subprocess.Popen[bytes]
) -> None:
    run.write_text("result.json", '{"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}}')
    check_free(run, resume="auto", is_resumed=True)
    assert file_of(run).exists()
    owner.kill()
    owner.wait()
    check_free(run, resume="auto", is_resumed=True)
    assert not file_of(run).exists()


def test_the_files_of_a_killed_owners_ray_are_removed_once_its_run_has_ended_well(
    run: RunFolder, owner: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session, other = (tmp_path / "ray" / f"session_2026-12-02_{pid}" for pid in (owner.pid, os.getpid()))
    for folder in (session, other):
        (folder / "logs").mkdir(parents=True)
    owner.kill()
    owner.wait()
    left = file_of(run).read_text()
    with pytest.raises(ZeroDivisionError), owned(run):
        raise ZeroDivisionError
    assert session.exists()
    file_of(run).write_text(left)
    assert_is_free(run)
    assert (session.exists(), other.exists()) == (False, True)


@pytest.mark.usefixtures("ended")
def test_a_run_is_free_if_the_file_of_its_owner_elsewhere_does_not_change(run: RunFolder) -> None:
    claim_elsewhere(run)
    assert owner_of(run) == "other-host"
    waited = list[str]()
    with owned(run, waited.append):
        assert waited[0].startswith("checking whether process 7 on other-host")
    claim_elsewhere(run)
    os.utime(file_of(run), (0, 0))
    assert owner_of(run) == ""


def test_an_owner_ends_if_another_job_has_taken_the_run(run: RunFolder, ended: queue.Queue[Exception]) -> None:
    with owned(run):
        file_of(run).unlink()
        claim_elsewhere(run)
        assert str(ended.get(timeout=30)) == f"run {run.uri} was taken over by another job"
    assert "host=other-host\n" in file_of(run).read_text()
