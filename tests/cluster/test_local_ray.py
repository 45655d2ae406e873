import contextlib
import os
import re
from pathlib import Path

import pytest

from mnist_ray.cluster import local_ray
from mnist_ray.cluster.local_ray import new_session, removed_unless_failed
from mnist_ray.errors import JobError, UsageError


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new session's folder that is not empty, to which a link leads as Ray makes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", ".")
    monkeypatch.setattr(local_ray, "_MOST_BYTES_OF_A_SOCKET", 1000)  # the test's own folder has a long path
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
