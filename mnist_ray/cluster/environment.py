"""Environment variables that Ray reads when it is imported or started; and other state of a process."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnist_ray.cluster.plan import usable_cores
from mnist_ray.errors import JobError
from mnist_ray.ray_versions import must_ask_for_tokens
from mnist_ray.signals import take_signals

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
_CHANGED = re.compile(r"(MNIST_)?RAY_(?!AUTH_TOKEN)|TUNE_|PYTHONBREAKPOINT|GOMP_")  # Ray keeps the token that it reads
_busy = threading.RLock()  # a workload may itself load a run
filters = threading.Lock()  # of warnings, which belong to the process
_LOAD = Path("/proc/loadavg")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Turn the garbage collector off in the block, which imports large packages: it would take a fifth of the time."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """Take the signals that end a job; at the end, give the process back what a job, Ray or Tune has changed.

    Raises JobError if another thread is in such a block: both would seed the same generators, and start one Ray.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    variables = {name: value for name, value in os.environ.items() if _CHANGED.match(name)}
    levels = {logger: logger.level for logger in map(logging.getLogger, ("ray", "ray.widgets.util", "optuna"))}
    torch: Any = sys.modules.get("torch")  # which another thread may be importing
    threads = torch.get_num_threads() if hasattr(torch, "get_num_threads") else usable_cores()
    if not _busy.acquire(blocking=False):
        raise JobError("this process is busy with another call; wait for its end, or make this call in a new process")
    try:
        take_signals()
        with contextlib.ExitStack() as at_the_end:
            with filters:
                at_the_end.enter_context(warnings.catch_warnings())
            yield
    finally:
        _busy.release()
        for name in [*filter(_CHANGED.match, os.environ)]:
            del os.environ[name]
        os.environ.update(variables)
        for logger, level in levels.items():
            logger.setLevel(level)
        torch = sys.modules.get("torch")
        if hasattr(torch, "set_num_threads"):
            torch.set_num_threads(threads)
        with contextlib.suppress(ValueError):  # in another thread than the main one, which has changed no handler
            for number in [number for number, handler in handlers.items() if signal.getsignal(number) is not handler]:
                signal.signal(number, handlers[number])


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


def keep_freed_memory(*, is_sharded: bool = False) -> None:
    """Let this process keep freed memory instead of returning it to the kernel. This needs glibc's allocator.

    Each step allocates memory for activations and frees it. In a worker of Ray Train, glibc returned it to the kernel
    each time, and a third of the training's time went into page faults.

    ``is_sharded``: return large blocks all the same. FSDP and gloo need buffers of many sizes, and a freed one rarely
    fits the next: kept, they were a fifth of a worker's memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    largest_kept = 2**22 if is_sharded else 2**30
    # Older versions of glibc accept at most 32 MiB. Setting only one threshold is worse than setting neither.
    if mallopt and (mallopt(_M_MMAP_THRESHOLD, largest_kept) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def end_if_hung(timeout_s: float) -> None:
    """End this process, with all stacks in its log, unless called again or cancelled by ``faulthandler`` first."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
