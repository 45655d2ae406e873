"""What a job prepares before it connects to Ray: environment variables, and the fork server."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mnist_ray.cluster.plan import threads_per_worker
from mnist_ray.config import WorkerConfig
from mnist_ray.extras import EXTRAS
from mnist_ray.process import usable_cores
from mnist_ray.ray_versions import is_at_least, must_ask_for_tokens
from mnist_ray.storage import others_can_write
from ray_fork.shim import own_folder
from ray_fork.starting import Forking, prepared_forking

_SETTINGS = {
    # Tasks without GPUs keep CUDA_VISIBLE_DEVICES, as later versions of Ray will do. This avoids a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # How often Train looks for nodes that will be preempted. Notice may be short; the default is 5 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Ray Train's own print would write each line to a worker's log twice: it mistakes Ray's streams for the user's.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray's own handler of SIGTERM prints a stack and may end the process; the job's handler saves a checkpoint.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Under `uv run`, workers use uv's environment instead of making their own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_LOCAL_SETTINGS = {
    # A local Ray is never preempted; this saves the watcher's actor.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The dashboard's process, which --plain-ray leaves on, would report to Ray's authors.
    "RAY_USAGE_STATS_ENABLED": "0",
}
_LOAD = Path("/proc/loadavg")


@contextlib.contextmanager
def prepared(config: WorkerConfig, *modules: str, verbose: bool = False, batch_size: int = 1) -> Iterator[Forking]:
    """Prepare this process for a job's ``Connection``. During the block, a fork server may run for a local Ray.

    Sets defaults for variables that Ray and OpenMP read; those that the user has set win. ``modules``: what workers
    need; they are imported before the fork. ``batch_size``: of a training, if there is one.
    """
    if not verbose:  # in a notebook, Ray's import warns about missing widgets that nothing here needs
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="IProgress not found")
        # Skip all lines: raylets' errors would appear on the driver's console even without logs. Log files keep them.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    _set_defaults(_SETTINGS)
    if "ray" not in sys.modules and os.environ.get("RAY_ADDRESS", "") in ("", "auto", "local"):
        # A local Ray is to require a token and to listen on loopback only. Ray reads both variables when it is
        # imported. The extra sets the second one when a local Ray starts: the job may join a cluster here instead.
        if must_ask_for_tokens():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        if config.plain_ray or not is_at_least(EXTRAS["small"].since):
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as by default on macOS
    if others_can_write(Path.cwd()):  # for programs that Python starts here, as `multiprocessing` does
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    cores = usable_cores()
    spin_briefly_if_busy(threads_per_worker(cores, cores, 1, batch_size))
    is_wanted = config.num_workers != 0 and config.fork_workers == "auto" and not config.plain_ray
    with prepared_forking(*modules, is_wanted=is_wanted) as forking:
        yield forking


def prepare_local() -> None:
    """Set defaults for a local Ray before it starts, and a token of its own, unless the user has one."""
    _set_defaults(_LOCAL_SETTINGS)
    has_own = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not has_own and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would write one into a file that all can read


def ray_folder() -> str:
    """Return the folder of this user's local Rays. Raises PermissionError.

    Only this user can enter the default one: Ray lets everybody write to its sessions.
    """
    return os.environ.get("RAY_TMPDIR") or own_folder("mnist_ray")


def sessions_of(process_id: int) -> list[Path]:
    """Return the folders of the files of the local Rays that a process of this user has started."""
    return [*Path(ray_folder()).absolute().glob(f"ray/session_*_{process_id}")]


def remove_sessions(sessions: Iterable[Path]) -> None:
    """Remove the files of local Rays, with the link to the latest: Ray never replaces one that leads nowhere."""
    for session in sessions:
        shutil.rmtree(session, ignore_errors=True)
        latest = session.parent / "session_latest"
        with contextlib.suppress(OSError):  # the link is missing
            if os.readlink(latest) == str(session):  # else another Ray has replaced it
                latest.unlink()


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def spin_briefly_if_busy(num_threads: int) -> None:
    """Shorten how long waiting threads spin if other programs leave fewer cores than threads that are to train here.

    A worker's threads wait for each other in every operator. Spinning is faster on a quiet machine, but a thread that
    spins may block the thread that it waits for. OpenMP reads this when torch is imported.
    """
    if num_threads == 1 or "OMP_WAIT_POLICY" in os.environ or not _LOAD.exists():  # only Linux uses GNU's OpenMP
        return
    num_running = []
    for _ in range(3):
        time.sleep(0.004)
        num_running.append(int(_LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]))
    others = min(num_running) - 1  # this process runs, too
    if (os.cpu_count() or 1) - others < num_threads:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
