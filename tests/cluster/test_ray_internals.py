"""Changes of Ray that would otherwise go unnoticed. A missing name fails at its import."""

import contextlib
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from ray._private import parameter, utils
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from mnist_ray.cli import status_of
from mnist_ray.cluster import ray_internals, train_internals
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.rendezvous import WorkerGroupConfig
from mnist_ray.run.fit import create_trainer
from mnist_ray.run.job import read_job
from mnist_ray.run.worker import LoopSpec
from mnist_ray.storage import SNAPSHOT_FILE
from mnist_ray.training.events import WorkersLost
from mnist_ray.workload.data import Arrays, Split
from ray_fork import ray_internals as fork_internals
from ray_fork import starting


def test_a_ray_without_a_name_that_is_imported_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, ray_internals.__name__)
    monkeypatch.delattr(parameter, "RayParams")

    def work() -> None:
        importlib.import_module(ray_internals.__name__)

    assert status_of(work) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: Ray {ray.__version__} does not work here: ")
    assert said.endswith("; pip install 'ray[train,tune]==2.60.*'\n")
    assert said.count("\n") == 1


def test_a_ray_without_a_name_that_is_used_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(utils, "set_sigterm_handler")
    assert status_of(lambda: ray_internals.without_sigterm_handler().__enter__()) == 1
    assert capsys.readouterr().err.startswith(f"error: Ray {ray.__version__} does not work here: ")


def test_replaced_names_of_ray_are_restored() -> None:
    before = ray.actor.ActorClassID, utils.set_sigterm_handler
    with fork_internals.actor_ids_from_kernel(), ray_internals.without_sigterm_handler():
        ids = {ray.actor.ActorClassID.from_random() for _ in range(2)}
        assert utils.set_sigterm_handler != before[1]
    assert len(ids) == 2
    assert (ray.actor.ActorClassID, utils.set_sigterm_handler) == before


def test_a_trainer_creates_the_callbacks_that_are_left_out() -> None:
    trainer = TorchTrainer(lambda: None, torch_config=WorkerGroupConfig(is_local=True))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert {train_internals.DatasetsCallback, train_internals.PlacementGroupCleanerCallback} <= kinds


def test_workers_that_are_replaced_because_their_node_is_to_leave_are_lost(tmp_path: Path) -> None:
    job, queue = read_job({"storage_path": str(tmp_path)}), Mock()
    spec = LoopSpec(job=job, train=Split(Arrays(np.ones(3), np.ones(3))), event_queue=queue)
    trainer = create_trainer(spec, WorkerPlan(1, 1, use_gpu=False, must_scale_up=False), max_failures=0)
    *_, callback = trainer._create_default_callbacks()
    leaving, restarting = map(object.__new__, (train_internals.PreemptingState, train_internals.RestartingState))
    for states in ((None, leaving), (leaving, restarting), (None, restarting)):
        callback.after_controller_state_update(*states)
    queue.put.remote.assert_called_once_with(WorkersLost("a worker's node was preempted", is_failure=False))


def test_ray_uses_the_names_of_the_file_and_variable_that_are_read() -> None:
    assert SNAPSHOT_FILE == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert starting.JOB_CONFIG_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR


# --- the cluster of this machine's `ray start`


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
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for name in ("gcs_server", "raylet"):
            (folder / name).write_text("#!/bin/sh\necho runs; read nothing")
            (folder / name).chmod(0o755)
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "user": user}
        with (
            subprocess.Popen([folder / "gcs_server"], pass_fds=[listener.fileno()], **options) as gcs,
            subprocess.Popen([folder / "raylet", f"--gcs-address={address}"], **options) as raylet,
        ):
            listener.close()
            assert gcs.stdout
            assert raylet.stdout
            assert gcs.stdout.readline() == raylet.stdout.readline() == b"runs\n"
            yield address


def test_a_cluster_is_joined_only_while_its_processes_are_this_users(address_file: Path, tmp_path: Path) -> None:
    assert ray_internals.address_of_ray_start() is None
    with head(tmp_path) as address, socket.create_server(("127.0.0.1", 0)) as another:
        for content in (b"127.0.0.1:1", bytes(range(256)), f"127.0.0.1:{another.getsockname()[1]}".encode()):
            address_file.write_bytes(content)
            assert ray_internals.address_of_ray_start() is None
        address_file.write_text(address)
        assert ray_internals.address_of_ray_start() == address
    assert ray_internals.address_of_ray_start() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_cluster_of_another_user_or_an_address_that_he_may_have_written_is_not_joined(
    address_file: Path, tmp_path: Path
) -> None:
    for path in (*tmp_path.parents[:-1], tmp_path):
        path.chmod(path.stat().st_mode | 0o055)
    with head(tmp_path, user=65534) as address:
        address_file.write_text(address)
        assert ray_internals.owners_here(address) == {65534}
        assert ray_internals.address_of_ray_start() is None
    for path in (address_file, address_file.parent):
        os.chown(path, 65534, -1)
        with pytest.raises(PermissionError, match="another user may have written it") as raised:
            ray_internals.address_of_ray_start()
        assert raised.value.filename == str(address_file)
        os.chown(path, 0, -1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_an_address_that_is_in_no_file_is_not_read(make: Callable[[Path], None], address_file: Path) -> None:
    make(address_file)
    with pytest.raises(OSError, match=r"not a file|Is a directory|symbolic links") as raised:
        ray_internals.address_of_ray_start()
    assert raised.value.filename == str(address_file)
