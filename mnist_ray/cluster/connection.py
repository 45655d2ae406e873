"""Opens and closes a job's Ray: a local one, a cluster, the one that the caller has opened, or none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.job_config import JobConfig

from mnist_ray import extras
from mnist_ray.cluster import nodes
from mnist_ray.cluster.environment import prepare_local, ray_folder, remove_sessions, sessions_of
from mnist_ray.cluster.plan import Cluster, local_cpus
from mnist_ray.cluster.watch import RaySilentError, Watch, as_raised
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, about_ray, first_line
from mnist_ray.process import in_thread
from mnist_ray.signals import take_signals
from mnist_ray.storage import in_one_line, others_can_write
from ray_fork.ray_internals import shim_in_local_ray
from ray_fork.starting import Forking, runtime_env_to_fork

_LISTENS_TIMEOUT_S = 4.0
_WORKER_START_TIMEOUT_S = 50.0
_DISCONNECT_TIMEOUT_S = 5.0  # from a Ray of which a part has died or hangs


def _nothing() -> None:
    """Do nothing."""


class Connection:
    """The connection of a job to Ray.

    If this process is connected already, the job uses that connection, which stays open. Otherwise, it joins the
    cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``, or starts a local Ray, which ends with it. With
    ``--num-workers 0``, there is no Ray.
    """

    def __init__(self, config: WorkerConfig, forking: Forking, *, verbose: bool = False) -> None:
        self._config, self._forking = config, forking
        self._options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
        self._watch = Watch(plain=config.plain_ray)
        self._is_own = False  # whether this object disconnects at the end
        self._is_local = False  # whether it has started a local Ray
        self._leaving: threading.Thread | None = None

    @contextlib.contextmanager
    def opened(self, note: Callable[[str], object], meanwhile: Callable[[], None] = _nothing) -> Iterator[Cluster]:
        """Connect, and watch over Ray; at the end, disconnect. ``note`` prints a line for the user.

        ``meanwhile`` runs in a thread while Ray and a first worker start. Raises what it raises; JobError if the
        cluster does not answer, a local Ray does not start, or Ray fails; and UsageError if a setting is impossible.
        """
        if self._config.num_workers == 0:
            meanwhile()
            yield Cluster(is_local=True, nodes=(), log_folder="")
            return
        done = in_thread(meanwhile)
        with contextlib.ExitStack() as at_the_end:
            at_the_end.push(self._close)
            if not ray.is_initialized():
                self._is_own = True
                self._connect(note)
            elif ray.util.client.ray.is_connected():
                raise UsageError("this job cannot use a connection of Ray Client", fix="run it with ray job submit")
            self._watch.start()
            cluster = nodes.current_cluster(is_local=self._is_local)
            at_the_end.enter_context(_errors_in_one_line(cluster.log_folder))
            if self._is_own:  # for the first actor. If none starts, Ray itself would try five times, for a minute each
                start_worker = ray.remote(num_cpus=0, scheduling_strategy=nodes.this_node())(_nothing)
                ray.get(start_worker.remote(), timeout=_WORKER_START_TIMEOUT_S)
            done.result()
            if missing := "" if self._config.plain_ray else extras.note():
                note(missing)
            if self._config.use_gpu == "auto":
                from mnist_ray.cluster.devices import without_unusable_gpus  # imports torch, by now in parallel

                cluster = without_unusable_gpus(cluster, note)
            yield cluster

    def leave(self) -> None:
        """Begin to disconnect, while the caller does work that needs no Ray."""
        if self._is_own:
            self._watch.stop()
            self._leaving = threading.Thread(target=ray.shutdown)
            self._leaving.start()

    def _close(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Disconnect. Remove the files of a local Ray, unless something failed: then its logs are needed."""
        is_silent = isinstance(error, RaySilentError)
        self._watch.stop(is_silent=is_silent)
        if not self._is_own:
            return
        try:
            if self._leaving is not None:
                self._leaving.join()
            elif is_silent:
                # A part that hangs never answers. If a part has died, Ray ends this process a few seconds later unless
                # it disconnects, even if the caller from Python has caught the error.
                wait([in_thread(ray.shutdown)], _DISCONNECT_TIMEOUT_S)
            else:
                ray.shutdown()
        finally:
            if not isinstance(error, Exception) or isinstance(error, UsageError):
                remove_sessions(self._own_sessions())

    def _own_sessions(self) -> list[Path]:
        """Return the folders of the local Rays of this process."""
        return sessions_of(os.getpid()) if self._is_local else []

    def _connect(self, note: Callable[[str], object]) -> None:
        if not self._options["log_to_driver"]:  # Ray still writes its log files, and failures are still raised
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            warnings.filterwarnings("ignore", module=r"ray\.")
        if (address := self._find_cluster(note)) is None:
            self._start_local()
        else:
            self._join(address)

    def _find_cluster(self, note: Callable[[str], object]) -> str | None:
        """Return the address of the cluster to join, or None to start a local Ray."""
        named = os.environ.get("RAY_ADDRESS") or "auto"
        if "/" in named or "@" in named:
            raise UsageError("RAY_ADDRESS is not HOST:PORT", fix="for a dashboard's address, use ray job submit")
        if named == "local":
            return None
        extra = extras.load("address", plain=self._config.plain_ray)
        if named == "auto":
            return extra.find_ray_start(note) if extra else None
        if not _listens(named) or (extra and not extra.answers(named)):
            raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}", fix="unset it to start a local Ray")
        return named

    def _start_local(self) -> None:
        """Start a Ray on this machine, with at least the CPUs that are asked for: more workers than cores can run."""
        prepare_local()
        with in_one_line("a local Ray cannot start"):
            os.environ["RAY_TMPDIR"] = ray_folder()
        self._is_local = True
        plain, options = self._config.plain_ray, dict[str, Any](self._options)
        options["num_cpus"] = local_cpus(self._config)
        try:
            with contextlib.ExitStack() as during_start:
                if small := extras.load("small", plain=plain):
                    during_start.enter_context(small.for_one_job(log_to_driver=self._options["log_to_driver"]))
                if extras.is_on("workers", plain=plain):
                    during_start.enter_context(shim_in_local_ray(self._forking))
                    # Ray Train passes these to its controller and workers, and Ray reuses a process only for workers
                    # with the same variables. Without forking, they only slow the start.
                    of_train = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
                    options["runtime_env"] = {"env_vars": of_train}
                _init(address="local", include_dashboard=False, **options)
        except Exception as error:
            reason = about_ray(error) or first_line(error)
            logs = "".join(f" (logs: {session / 'logs'})" for session in self._own_sessions())
            raise JobError(f"a local Ray cannot start: {reason}{logs}") from error

    def _join(self, address: str) -> None:
        options = dict[str, Any](self._options)
        if extras.is_on("workers", plain=self._config.plain_ray):
            options["runtime_env"] = runtime_env_to_fork(self._forking)
        if self._forking.server is not None:  # for a local Ray; on a cluster, each node's first worker starts one
            self._forking.server.kill()
        try:
            _init(address=address, **options)
        except (ConnectionError, RuntimeError, RayError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            advice = "; install the cluster's versions, or use ray job submit" if type(error) is RuntimeError else ""
            raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}{advice}") from error


def _listens(address: str) -> bool:
    """Return whether any process, of Ray or not, listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError, OverflowError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENS_TIMEOUT_S).close()
        return True
    return False


class _SafeFolders(list[str]):
    """Folders that Ray's workers import from: Ray adds the script's and the current one, unless others can write there.

    Ray has no public setting for this.
    """

    def extend(self, folders: Iterable[str]) -> None:
        super().extend(folder for folder in folders if not others_can_write(folder))


def _init(**options: Any) -> None:
    """Connect. Ray handles SIGTERM meanwhile; afterwards, restore the job's own handlers."""
    job_config = JobConfig()
    job_config._py_driver_sys_path = _SafeFolders()
    try:
        ray.init(job_config=job_config, **options)
    except SystemExit as ending:
        raise KeyboardInterrupt from ending
    finally:
        take_signals()


@contextlib.contextmanager
def _errors_in_one_line(log_folder: str) -> Iterator[None]:
    """Raise Ray's own errors as one-line JobErrors, and errors in a task's code unchanged."""
    try:
        with as_raised():
            yield
    except RayTaskError:
        raise
    except RayError as error:
        raise JobError(f"Ray failed: {type(error).__name__}: {first_line(error)} (logs: {log_folder})") from error
