"""Ray's settings that are read from the environment, in one place; to be set before Ray is imported."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import secrets
import warnings
from pathlib import Path

_SETTINGS = {
    # Train's controller looks at its workers this often. The default of 2 s is waited for at the end of every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Take the behaviour that Ray has announced: tasks without GPUs keep CUDA_VISIBLE_DEVICES. Spares a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What Ray Train sets for its controller; set for all, one process can serve all evaluations (`for_evaluation`).
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # Ray's own handler of SIGTERM prints a stack and may end the process, where the job's saves a checkpoint.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Under `uv run`, workers have the environment that uv has made, instead of each making one of its own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_LOCAL_SETTINGS = {
    # An evaluation's process is kept for the next one, instead of for a second: to start it costs more than it does.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
    # Processes that wait for tasks with an environment of their own, which none here has.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody takes a laptop away with notice; an actor less to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_QUIET_SETTINGS = {
    # Raylets send errors to the driver's console apart from logs; they are in the log files as well.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare(*, verbose: bool) -> None:
    """Set what is not set yet; whatever the user has set stays."""
    if not verbose:  # in a notebook, Ray says as it is imported that widgets are missing, which nothing here shows
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="IProgress not found")
    for name, value in (_SETTINGS if verbose else _SETTINGS | _QUIET_SETTINGS).items():
        os.environ.setdefault(name, value)


def users_variables() -> list[str]:
    """Return the names of the variables for Ray that are not from here."""
    own = _SETTINGS | _LOCAL_SETTINGS | _QUIET_SETTINGS
    names = [name for name, value in os.environ.items() if name.startswith("RAY_") and own.get(name) != value]
    return sorted(set(names) - {"RAY_ADDRESS", "RAY_CLIENT_MODE"})  # the latter is set by Ray as it is imported


def prepare_local() -> None:
    """Set what only holds for a Ray that this job starts for itself; before it is started."""
    for name, value in _LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    if not _can_keep_token():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _can_keep_token() -> bool:
    """Tell whether Ray has the token of its local clusters in the user's home, or can write it there."""
    folder = Path(os.path.expanduser("~/.ray"))
    has_token = os.access(folder / "auth_token", os.R_OK)
    return has_token or os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK)


def for_workers() -> dict[str, str]:
    """Return what Ray Train hands on from the driver to its controller and workers."""
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_TRAIN_", "RAY_WARN_"))}


def for_evaluation() -> dict[str, str]:
    """Return the environment of processes that evaluate: that of Ray Train's own, and one thread.

    Ray runs tasks with the same environment in the same processes, so that one serves a run's validations, which Ray
    Train starts, and its evaluation, which the driver starts.
    """
    return {**for_workers(), "OMP_NUM_THREADS": "1"}


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, if glibc manages it, instead of handing it back.

    Each step frees its activations and allocates the next. In a worker of Ray Train glibc returned them to the kernel
    each time, and a third of the training's time went into page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions take no more than 32 MiB. One threshold without the other makes it worse.
    if mallopt and (mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def end_if_hung(timeout_s: float) -> None:
    """End this process, all stacks in its log, unless this, or ``faulthandler``'s cancel, is called in time."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
