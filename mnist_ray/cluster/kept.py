"""Keeps a local Ray and its fork server for the next call from Python, which then starts in a third of the time.

They end MNIST_RAY_KEEP_S seconds (by default 60) after the last call, when the process exits, when a call fails, or for
a call with other variables. Once the caller's own code uses the Ray, the Ray lives until the process exits. Only Ray's
private API reports such uses, so no Ray is kept if the extra "uses" or "processes" is off.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from mnist_ray import extras
from mnist_ray.cluster.plan import local_cpus
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError

_VARIABLE, _DEFAULT_S = "MNIST_RAY_KEEP_S", "60"


@dataclass(frozen=True)
class _Kept:
    """A local Ray that waits for the next call."""

    resources: contextlib.ExitStack  # closing them ends the Ray
    purpose: tuple[object, ...]  # a call with another purpose needs another Ray
    node_id: str
    uses: set[bytes]  # of Ray by the jobs so far: later ones are the caller's
    timer: threading.Timer


_kept: _Kept | None = None
_seconds = 0.0  # how long to keep a Ray
_left_with: dict[str, str] = {}  # the environment after the last call; Ray's processes keep the one from before it
_lock = threading.RLock()  # the timer's thread may end what a call wants to use


@contextlib.contextmanager
def for_next_call() -> Iterator[None]:
    """Let jobs in the block keep the local Ray that they start. Raises UsageError if the variable is not a number.

    If the caller has changed environment variables since the last call, end the Ray that was kept.
    """
    global _seconds, _left_with
    if _left_with != os.environ:
        _end_unless_used()
    given = os.environ.get(_VARIABLE, _DEFAULT_S)
    try:
        before, _seconds = _seconds, min(float(given), threading.TIMEOUT_MAX)
    except ValueError:
        raise UsageError(f"{_VARIABLE}={given} must be a number of seconds") from None
    try:
        yield
    finally:
        _seconds, _left_with = before, dict(os.environ)


def is_call() -> bool:
    """Return whether a call from Python runs this job."""
    return _seconds > 0


def is_wanted(*, plain: bool = False) -> bool:
    """Return whether to keep a local Ray after this job."""
    return is_call() and extras.is_on("uses", plain=plain) and extras.is_on("processes", plain=plain)


def keep(resources: contextlib.ExitStack, config: WorkerConfig, *, verbose: bool) -> None:
    """Keep the local Ray of a successful job; closing ``resources`` ends it."""
    global _kept
    import ray

    from mnist_ray.extras.uses import uses_of_ray

    timer = threading.Timer(_seconds, _end_unless_used)
    timer.daemon = True
    node_id = ray.get_runtime_context().get_node_id()
    with _lock:
        _kept = _Kept(resources, _purpose(config, verbose=verbose), node_id, uses_of_ray(), timer)
        timer.start()
    atexit.unregister(end)
    atexit.register(end)


def take(config: WorkerConfig, *, verbose: bool) -> contextlib.ExitStack | None:
    """Return the kept Ray's resources if it fits a job's settings. Else return None, and end it unless it is in use."""
    global _kept
    with _lock:
        if _kept is None or _is_used(_kept):
            return None
        if not _is_there(_kept) or _kept.purpose != _purpose(config, verbose=verbose):
            end()
            return None
        kept, _kept = _kept, None
        kept.timer.cancel()
        return kept.resources


def _is_there(kept: _Kept) -> bool:
    from mnist_ray.cluster.nodes import is_connected_to  # a job's first lines come before Ray is imported
    from mnist_ray.extras.processes import dead_processes

    return is_connected_to(kept.node_id) and not dead_processes()


def _is_used(kept: _Kept) -> bool:
    """Return whether the caller's own code has used the kept Ray."""
    from mnist_ray.extras.uses import uses_of_ray

    return _is_there(kept) and not uses_of_ray() <= kept.uses


def _end_unless_used() -> None:
    with _lock:
        if _kept is not None and not _is_used(_kept):
            end()


def end_unless_fit(config: WorkerConfig, *, verbose: bool) -> None:
    """End the kept Ray unless it fits a job's settings; otherwise keep it for that job."""
    if (resources := take(config, verbose=verbose)) is not None:
        keep(resources, config, verbose=verbose)


def end() -> None:
    """End the kept Ray, if there is one."""
    global _kept
    with _lock:
        kept, _kept = _kept, None
        if kept is None:
            return
        from mnist_ray.cluster.nodes import is_connected_to
        from mnist_ray.cluster.watch import RaySilentError
        from mnist_ray.extras.processes import dead_processes

        kept.timer.cancel()
        with contextlib.suppress(RaySilentError), kept.resources:
            if is_connected_to(kept.node_id) and (dead := dead_processes()):
                raise RaySilentError.of(dead[0], has_died=True)


def _purpose(config: WorkerConfig, *, verbose: bool) -> tuple[object, ...]:
    return local_cpus(config), config.fork_workers, config.plain_ray, verbose
