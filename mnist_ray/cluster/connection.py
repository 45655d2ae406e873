"""Opens and closes a job's Ray: a local one, a cluster, the one that the caller has opened, or none."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.job_config import JobConfig

from mnist_ray import extras
from mnist_ray.cluster import nodes
from mnist_ray.cluster.environment import prepare_local, remove_sessions_of, sessions_folder, sessions_of
from mnist_ray.cluster.plan import Cluster, local_cpus
from mnist_ray.cluster.watch import RaySilentError, Watch, as_raised
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import JobError, UsageError, about_ray, first_line
from mnist_ray.process import in_thread
from mnist_ray.signals import end_with, take_signals
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
        self._leaving: threading.Thread | None = None

    @contextlib.contextmanager
    def opened(self, note: Callable[[str], object], meanwhile: Callable[[], None] = _nothing) -> Iterator[Cluster]:
        """Connect, and watch over Ray; at the end, disconnect. ``note`` prints a line for the user.

        ``meanwhile`` runs in a thread while Ray and a first worker start. Its exception ends the start, and is raised
        here.

        Raises JobError if the cluster does not answer, a local Ray does not start, or Ray fails; and UsageError if the
        settings or ``RAY_ADDRESS`` are impossible.
        """
        if self._config.num_workers == 0:
            meanwhile()
            yield Cluster(is_local=True, nodes=(), log_folder="")
            return
        with contextlib.ExitStack() as at_the_end:
            if ray.is_initialized():
                self._check_callers()
                meanwhile()
                cluster = nodes.current_cluster(is_local=False)
            else:
                self._is_own = True
                address, found = self._find_cluster()
                if address is None:
                    at_the_end.enter_context(_files_removed_unless_failed())
                at_the_end.push(self._disconnect)
                with _in_parallel(meanwhile):
                    self._connect(address)
                    cluster = nodes.current_cluster(is_local=address is None)
                    _start_worker(cluster.log_folder)
                for text in filter(None, (found, "" if self._config.plain_ray else extras.note())):
                    note(text)
            at_the_end.enter_context(self._watch)
            at_the_end.enter_context(_errors_in_one_line(cluster.log_folder))
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

    def _disconnect(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._leaving is not None:
            self._leaving.join()
        elif isinstance(error, RaySilentError):
            # A part that hangs never answers. If a part has died, Ray ends this process a few seconds later unless it
            # disconnects, even if the caller from Python has caught the error.
            wait([in_thread(ray.shutdown)], _DISCONNECT_TIMEOUT_S)
        else:
            ray.shutdown()

    def _check_callers(self) -> None:
        """Raise UsageError or JobError if the Ray that the caller has opened is of no use."""
        if ray.util.client.ray.is_connected():
            raise UsageError("this job cannot use a Ray Client connection; run it on the cluster with ray job submit")
        processes = extras.load("processes", plain=self._config.plain_ray)
        if processes and processes.dead_processes():
            raise JobError("the Ray that this process started has died; use a new process")

    def _find_cluster(self) -> tuple[str | None, str]:
        """Return the address of the cluster to join, or None to start a local Ray, and a note for the user."""
        named = os.environ.get("RAY_ADDRESS") or "auto"
        if "://" in named or "@" in named:
            shown = re.sub(r"[^/]*@", "***@", named)
            raise UsageError(f"RAY_ADDRESS={shown} is not HOST:PORT; for a dashboard's address, use ray job submit")
        if named == "local":
            return None, ""
        extra = extras.load("address", plain=self._config.plain_ray)
        if named == "auto":
            return extra.find_ray_start() if extra else (None, "")
        if not _listens(named) or (extra and not extra.answers(named)):
            raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local Ray")
        return named, ""

    def _connect(self, address: str | None) -> None:
        if not self._options["log_to_driver"]:  # Ray still writes its log files, and failures are still raised
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            warnings.filterwarnings("ignore", module=r"ray\.")
        if address is None:
            self._start_local()
        else:
            self._join(address)

    def _start_local(self) -> None:
        """Start a Ray on this machine. It has at least the CPUs that are asked for: more workers than cores can run."""
        prepare_local()
        plain, num_cpus, environment = self._config.plain_ray, local_cpus(self._config), dict[str, Any]()
        try:
            with contextlib.ExitStack() as during_start:
                if small := extras.load("small", plain=plain):
                    during_start.enter_context(small.for_one_job(log_to_driver=self._options["log_to_driver"]))
                if extras.is_on("workers", plain=plain):
                    during_start.enter_context(shim_in_local_ray(self._forking))
                    # Ray Train passes these to its controller and workers, and Ray reuses a process only for workers
                    # with the same variables. Without forking, they only slow the start.
                    of_train = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
                    environment = {"runtime_env": {"env_vars": of_train}}
                options = {**self._options, **environment}
                _init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
        except Exception as error:
            reason = about_ray(error) or first_line(error)
            logs = "".join(f" (logs: {session / 'logs'})" for session in sessions_of(os.getpid()))
            raise JobError(f"a local Ray cannot start: {reason}{logs}") from error

    def _join(self, address: str) -> None:
        environment: dict[str, Any] = {}
        if extras.is_on("workers", plain=self._config.plain_ray):
            environment = {"runtime_env": runtime_env_to_fork(self._forking)}
        if self._forking.server is not None:  # for a local Ray; on a cluster, each node's first worker starts one
            self._forking.server.kill()
        try:
            _init(address=address, **self._options, **environment)
        except (ConnectionError, RuntimeError, RayError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            advice = "; install the cluster's versions, or use ray job submit" if type(error) is RuntimeError else ""
            raise JobError(f"cannot connect to the Ray cluster at {address}: {reason}{advice}") from error


def _listens(address: str) -> bool:
    """Return whether any process, of Ray or not, listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENS_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


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


def _start_worker(log_folder: str) -> None:
    """Start a worker on this node, for the first actor to take over.

    Raises JobError if no worker starts. Ray itself would try five times, for a minute each.
    """
    started = ray.remote(num_cpus=0, scheduling_strategy=nodes.this_node())(_nothing).remote()
    try:
        ray.get(started, timeout=_WORKER_START_TIMEOUT_S)
    except RayError as error:
        raise JobError(f"Ray's worker processes do not start: {first_line(error)} (logs: {log_folder})") from error


@contextlib.contextmanager
def _in_parallel(meanwhile: Callable[[], None]) -> Iterator[None]:
    """Call a function in a thread during the block. If it fails, end the block, and raise its exception instead."""
    is_main, failure = threading.current_thread() is threading.main_thread(), None

    def call() -> None:
        nonlocal failure
        try:
            meanwhile()
        except Exception as error:
            failure = error
            if is_main:
                end_with(error)
            raise

    done = in_thread(call)
    try:
        yield
    except BaseException:  # perhaps the failure, perhaps in other words
        if failure is not None:
            raise failure  # noqa: B904, as its own cause is to stay
        raise
    done.result()


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


@contextlib.contextmanager
def _files_removed_unless_failed() -> Iterator[None]:
    """Remove the files of the local Ray that the block starts, unless something failed: then its logs are needed."""
    with in_one_line("a local Ray cannot start"):
        sessions_folder()
    has_failed = False
    try:
        yield
    except Exception as error:
        has_failed = not isinstance(error, UsageError)
        raise
    finally:
        if not has_failed:
            remove_sessions_of(os.getpid())
