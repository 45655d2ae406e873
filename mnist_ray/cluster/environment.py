"""Environment variables that Ray reads when it is imported or started."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
import warnings
from pathlib import Path

from mnist_ray.ray_versions import must_ask_for_tokens
from mnist_ray.storage import others_can_write

IMPORTED_LATE = ("ray.tune", "torch._dynamo")  # by Ray Train and PyTorch's optimizers, in running workers
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
_QUIET_SETTINGS = {
    # Skip all lines: raylets' errors would appear on the driver's console even without logs. Log files keep them.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
_LOAD = Path("/proc/loadavg")


def prepare(*, verbose: bool, plain: bool = False, num_threads: int = 1) -> None:
    """Set defaults for variables that Ray and OpenMP read; variables that the user has set win.

    ``plain``: use only Ray's public API. ``num_threads``: the maximum that will train on this machine.
    """
    if not verbose:  # in a notebook, Ray's import warns about missing widgets that nothing here needs
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="IProgress not found")
    _set_defaults(_SETTINGS if verbose else _SETTINGS | _QUIET_SETTINGS)
    if "ray" not in sys.modules and os.environ.get("RAY_ADDRESS", "") in ("", "auto", "local"):
        _protect_local(plain=plain)
    if others_can_write(Path.cwd()):  # for programs that Python starts here, as `multiprocessing` does
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    spin_briefly_if_busy(num_threads)


def _protect_local(*, plain: bool) -> None:
    """Let a local Ray require a token and, if it is plain, listen on loopback only. Ray reads both when it is imported.

    Otherwise, an extra does so when the local Ray starts: the job may join a cluster on this machine instead.
    """
    if must_ask_for_tokens():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if plain:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as by default on macOS


def prepare_local() -> None:
    """Set defaults for a local Ray before it starts."""
    _set_defaults(_LOCAL_SETTINGS)
    has_own = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if has_own or os.environ.get("RAY_AUTH_MODE", "token") != "token":  # the user has decided on authentication
        return
    token = Path(os.path.expanduser("~/.ray/auth_token"))
    try:  # before Ray does: it would let everybody read the token
        token.parent.mkdir(exist_ok=True)
        if token.exists() and token.stat().st_mode & 0o077:
            token.chmod(0o600)
        with contextlib.suppress(FileExistsError), open(token, "x", opener=_for_owner_only) as file:
            file.write(secrets.token_hex(32))
    except OSError:  # such as a read-only home folder
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _for_owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def for_workers() -> dict[str, str]:
    """Return the variables that Ray Train passes from the driver to its controller and workers.

    Ray reuses a process only for workers with the same variables. Without forking, they only slow the start.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


def spin_briefly_if_busy(num_threads: int) -> None:
    """Shorten how long waiting threads spin if cores are scarce. OpenMP reads this when torch is imported."""
    if num_threads > 1 and "OMP_WAIT_POLICY" not in os.environ and _free_cores() < num_threads:
        # A worker's threads wait for each other in every operator. Spinning is faster on a quiet machine, but a thread
        # that spins may block the thread it waits for.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _free_cores() -> int:
    """Return how many of the machine's cores other programs leave free; programs that sleep use none."""
    num_running = []
    with contextlib.suppress(OSError):  # only Linux has this file and uses GNU's OpenMP
        for _ in range(3):
            time.sleep(0.004)
            num_running.append(int(_LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]))
    others = min(num_running, default=1) - 1  # this process runs, too
    return (os.cpu_count() or 1) - others
