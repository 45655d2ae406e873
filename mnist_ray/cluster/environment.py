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

_LOAD = Path("/proc/loadavg")

IMPORTED_LATE = ("ray.tune", "torch._dynamo")  # by Ray Train and PyTorch's optimizers, in running workers
_SETTINGS = {
    # The interval at which Train's controller checks its workers. A run's end waits for a check; the default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Tasks without GPUs keep CUDA_VISIBLE_DEVICES, as later versions of Ray will do. This avoids a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The interval at which Train looks for nodes that will be preempted. A notice may be short; the default is 5 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Ray Train's own print would write each line to a worker's log twice, as it takes Ray's streams for a user's.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray's own handler of SIGTERM prints a stack and may end the process; the job's handler saves a checkpoint.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Under `uv run`, workers use the environment that uv has made, instead of making their own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_LOCAL_SETTINGS = {
    # A local Ray is never preempted; this saves the watcher's actor.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The dashboard's process, which --plain-ray leaves on, would report to Ray's authors.
    "RAY_USAGE_STATS_ENABLED": "0",
}
_QUIET_SETTINGS = {
    # Skip all lines: raylets' errors appear on the driver's console even without logs there; log files have them, too.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}


def prepare(*, verbose: bool, plain: bool = False, num_threads: int = 1) -> None:
    """Set defaults for variables that Ray and OpenMP read; variables that the user has set win.

    ``plain``: with Ray's public API alone. ``num_threads``: the most that will train on this machine.
    """
    if not verbose:  # in a notebook, Ray's import complains about missing widgets, which nothing here needs
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="IProgress not found")
    _set_defaults(_SETTINGS if verbose else _SETTINGS | _QUIET_SETTINGS)
    if "ray" not in sys.modules and os.environ.get("RAY_ADDRESS", "") in ("", "auto", "local"):
        _protect_local(plain=plain)
    spin_briefly_if_busy(num_threads)


def _protect_local(*, plain: bool) -> None:
    """Let a local Ray require a token and, if it is plain, listen on loopback only. Ray reads both when it is imported.

    Otherwise, an extra sees to that when the local Ray starts: the job may join a cluster of this machine instead.
    """
    if must_ask_for_tokens():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if plain:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as by default on macOS


def prepare_local() -> None:
    """Set defaults that are only for a local Ray, before it starts."""
    _set_defaults(_LOCAL_SETTINGS)
    has_own = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if has_own or os.environ.get("RAY_AUTH_MODE", "token") != "token":  # the user has decided on authentication
        return
    token = Path(os.path.expanduser("~/.ray/auth_token"))
    try:  # before Ray, which would let everybody read the token
        token.parent.mkdir(exist_ok=True)
        if token.exists() and token.stat().st_mode & 0o077:
            token.chmod(0o600)
        with contextlib.suppress(FileExistsError), open(token, "x", opener=_for_owner_only) as file:
            file.write(secrets.token_hex(32))
    except OSError:  # such as a home folder that cannot be written to
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _for_owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def for_workers() -> dict[str, str]:
    """Return the variables that Ray Train passes from the driver to its controller and workers.

    Processes with the same variables can take the place of each other; a usual start only gets slower by them.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


def spin_briefly_if_busy(num_threads: int) -> None:
    """Let ``num_threads`` not spin while they wait if they lack cores. OpenMP reads that when torch is imported."""
    if num_threads > 1 and "OMP_WAIT_POLICY" not in os.environ and _free_cores() < num_threads:
        # A worker's threads wait for each other in every operator. One that spins meanwhile, which is faster on a quiet
        # machine, keeps its core, perhaps from the thread that it waits for.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _free_cores() -> int:
    """Return how many of the machine's cores other programs leave free; those that pause do not count."""
    num_running = []
    with contextlib.suppress(OSError):  # only Linux has the file, and OpenMP of GNU, which PyTorch uses there
        for _ in range(3):
            time.sleep(0.004)
            num_running.append(int(_LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]))
    others = min(num_running, default=1) - 1  # this process runs, too
    return (os.cpu_count() or 1) - others
