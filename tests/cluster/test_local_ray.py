import contextlib
from pathlib import Path

import pytest

from mnist_ray.cluster.connect import removed_unless_failed
from mnist_ray.errors import JobError, UsageError


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session's folder that is not empty, to which a link leads as Ray makes one."""
    session = tmp_path / "session_2"
    (session / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(session)
    return session


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
    another, latest = session.with_name("session_of_another"), session.with_name("session_latest")
    another.mkdir()
    latest.unlink()
    latest.symlink_to(another)
    with removed_unless_failed(session):
        pass
    assert sorted(session.parent.iterdir()) == [latest, another]
