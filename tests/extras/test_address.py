import contextlib
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from mnist_ray.extras import address


@pytest.fixture
def address_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray notes the address of a cluster that ``ray start`` has started; the folder is there."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@contextlib.contextmanager
def head(folder: Path, *, user: int = os.geteuid()) -> Iterator[str]:
    """Run processes that look like a cluster's GCS and raylet; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        for name in ("gcs_server", "raylet"):
            (folder / name).write_text("#!/bin/sh\necho runs; read nothing")
            (folder / name).chmod(0o755)
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "user": user}
        with (
            subprocess.Popen([folder / "gcs_server"], pass_fds=[listener.fileno()], **options) as gcs,
            subprocess.Popen([folder / "raylet", f"--gcs-address={here}"], **options) as raylet,
        ):
            listener.close()
            assert gcs.stdout
            assert raylet.stdout
            assert gcs.stdout.readline() == raylet.stdout.readline() == b"runs\n"
            yield here


def test_a_cluster_is_joined_only_while_its_processes_are_this_users(address_file: Path, tmp_path: Path) -> None:
    assert address.address_of_ray_start() is None
    with head(tmp_path) as here:
        for content in (b"127.0.0.1:1", bytes(range(256))):
            address_file.write_bytes(content)
            assert address.address_of_ray_start() is None
        address_file.write_text(here)
        assert address.address_of_ray_start() == here
    assert address.address_of_ray_start() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_cluster_of_another_user_is_not_joined(address_file: Path, tmp_path: Path) -> None:
    for path in (*tmp_path.parents[:-1], tmp_path):
        path.chmod(path.stat().st_mode | 0o055)
    with head(tmp_path, user=65534) as here:
        address_file.write_text(here)
        assert address.address_of_ray_start() is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_an_address_that_is_in_no_file_is_not_read(make: Callable[[Path], None], address_file: Path) -> None:
    make(address_file)
    assert address.address_of_ray_start() is None


def test_a_cluster_of_another_ray_version_is_not_joined_with_a_note(
    address_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    versions = {"ray_version": "2.51.2", "python_version": "3.11.9"}
    monkeypatch.setattr(address, "_ask", lambda here: None)
    monkeypatch.setattr(address, "GcsClient", lambda address: None)
    monkeypatch.setattr(address, "get_cluster_metadata", lambda client: versions)
    with head(tmp_path) as here:
        address_file.write_text(here)
        assert address.find_ray_start(notes.append) is None
        (note,) = notes
        assert note.startswith(f"not joining the cluster at {here}: Version mismatch: ")
        assert " Ray: 2.51.2 " in note
        assert "\n" not in note
        versions |= {"ray_version": ray.__version__, "python_version": platform.python_version()}
        assert address.find_ray_start(notes.append) == here
        assert notes == [note]
