import contextlib
import os
import re
import resource
from pathlib import Path

import pytest

from mnist_ray.cluster import local
from mnist_ray.cluster.local import check_folder, check_limits, last_error, new_session, removed_unless_failed
from mnist_ray.errors import JobError, UsageError

LOG = """\
[2026-11-26 03:45:56,101 I 98 98] (raylet) main.cc:290: Setting cluster ID to: 8c4a
[2026-11-26 03:45:56,169 E 98 99] (raylet) dlmalloc.cc:215: mmap failed with error: Cannot allocate memory
[2026-11-26 03:45:56,179 C 98 99] (raylet) plasma_allocator.cc:79:  An unexpected system state has occurred. You ha
[2026-11-26 03:45:56,188 E 98 99] (raylet) logging.cc:125:     @ 0x4810c08348001aa0  (unknown)  (unknown)
*** StackTrace Information ***
"""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new session's folder that is not empty, to which a link leads as Ray makes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", ".")
    monkeypatch.setattr(local, "_MOST_BYTES_OF_A_SOCKET", 1000)  # the test's own folder has a long path
    session = new_session()
    (session / "logs").mkdir()
    (session.parent / "session_latest").symlink_to(session)
    return session


def test_a_session_has_a_folder_that_is_named_as_ray_does_it(session: Path, tmp_path: Path) -> None:
    assert session.parent == tmp_path / "ray"
    assert re.fullmatch(rf"session_\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{{6}}_{os.getpid()}", session.name)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/dev/null", "a local Ray cannot keep files in /dev/null/ray: Not a directory"),
        (f"/tmp/{'x' * 80}", f"/tmp/{'x' * 80}/ray is too long a path for the sockets of a local Ray"),
    ],
    ids=["no folder", "too long"],
)
def test_a_folder_that_ray_could_not_use_is_named(folder: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(UsageError) as caught:
        new_session()
    assert str(caught.value) == f"{reason}; set RAY_TMPDIR to another folder"
    assert not Path("/tmp", "x" * 80).exists()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (resource.RLIMIT_NOFILE, "a limit of 64 open files is too low for a local Ray; try ulimit -n 4096"),
        (resource.RLIMIT_NPROC, "a limit of 64 processes is too low for a local Ray; try ulimit -u 4096"),
    ],
)
def test_a_limit_that_is_too_low_is_named(limit: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (64, 4096), resource.RLIMIT_NPROC: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    check_limits()
    limits[limit] = (64, 64)
    with pytest.raises(UsageError, match=message):
        check_limits()


@pytest.mark.parametrize("name", ["torch.py", "numpy/__init__.py"])
def test_a_file_that_would_hide_a_library_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_folder()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"{name} would hide (torch|numpy) from Ray's workers; rename it"):
        check_folder()


def test_the_last_error_in_the_logs_is_told(session: Path) -> None:
    assert last_error(session) is None
    (session / "logs" / "raylet.out").write_text(LOG)
    assert last_error(session) == "mmap failed with error: Cannot allocate memory"


CRASH = """\
[2026-11-26 08:03:41,877 E 17464 17464] (gcs_server) logging.cc:118: Unhandled exception: St12system_error. what(): \
Resource temporarily unavailable /lib/python3.11/site-packages/ray/core/src/ray/gcs/gcs_server(+0x14c484c) [0x5574]
/lib/x86_64-linux-gnu/libstdc++.so.6(+0xb344a) [0x7f468c2b344a]
[2026-11-26 08:03:41,880 E 17464 17464] (gcs_server) logging.cc:125: Stack trace:
 /lib/x86_64-linux-gnu/libstdc++.so.6(+0xb344a) [0x7f468c2b344a]
[2026-11-26 08:03:41,883 E 17464 17464] (gcs_server) logging.cc:474: *** SIGABRT received at time=1795680221 ***
[2026-11-26 08:03:41,883 E 17464 17464] (gcs_server) logging.cc:474: PC: @     0x7f468c0a06dc  (unknown)  (unknown)
[2026-11-26 08:03:41,883 E 17464 17464] (gcs_server) logging.cc:474:     @     0x7f468c04bd70  (unknown)  (unknown)
"""


def test_of_a_crash_the_reason_is_told_and_not_the_place(session: Path) -> None:
    (session / "logs" / "gcs_server.out").write_text(CRASH)
    assert last_error(session) == "Resource temporarily unavailable"


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, UsageError])
def test_nothing_is_left_of_a_session_without_failures(ending: type[BaseException] | None, session: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt, UsageError), removed_unless_failed(session):
        if ending:
            raise ending
    assert list(session.parent.iterdir()) == []


def test_after_a_failure_the_logs_stay(session: Path) -> None:
    with pytest.raises(JobError), removed_unless_failed(session):
        raise JobError(f"no (logs: {session / 'logs'})")
    assert (session / "logs").is_dir()


def test_another_rays_session_stays(session: Path) -> None:
    another = session.with_name("session_of_another")
    another.mkdir()
    latest = session.with_name("session_latest")
    latest.unlink()
    latest.symlink_to(another)
    with removed_unless_failed(session):
        pass
    assert sorted(session.parent.iterdir()) == [latest, another]
