"""The process that stands around a job: where the job's own is ended from outside, it says so, and how to go on.

Ray ends a driver's process without any exception where its raylet or its GCS has gone, and the kernel does where
memory runs out. Nothing heavy is imported here: the two processes part before anything is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

from mnist_ray.interrupts import leave_closed_terminal, signals
from mnist_ray.screen import say

_DONE = "\0"
_to_guard: int | None = None


def if_ended(advice: str) -> None:
    """Let ``advice`` be what a person is told where this process is ended from outside, from here on."""
    if _to_guard is not None:
        with contextlib.suppress(OSError):
            os.write(_to_guard, f"{advice}\n".encode())


def run(work: Callable[[], int]) -> int:
    """Return the exit status of ``work``, done in a child of this process, which passes on the signals that it gets.

    The child ends with this process.
    """
    if not hasattr(os, "fork"):
        return work()
    told, to_guard = os.pipe()
    from_guard, alive = os.pipe()
    forwarded = signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # until each of the two does with them what it is to do
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        os.close(told)
        os.close(alive)
        _be_guarded(to_guard, from_guard)
        try:
            return work()
        finally:
            if_ended(_DONE)
    os.close(to_guard)
    os.close(from_guard)
    for number in forwarded:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    with open(told, encoding="utf-8", errors="replace") as lines:
        advice = ["", *lines.read().splitlines()][-1]  # read until the child has gone: no program inherits its end
    _, state = os.waitpid(child, 0)
    leave_closed_terminal()
    if advice != _DONE:
        say(_said(state, advice), file=sys.stderr)
        return 1
    return os.waitstatus_to_exitcode(state)


def _be_guarded(to_guard: int, from_guard: int) -> None:
    global _to_guard
    _to_guard = to_guard

    def end_with_guard() -> None:
        os.read(from_guard, 1)  # returns when the guard has gone
        os._exit(1)

    threading.Thread(target=end_with_guard, daemon=True).start()


def _said(state: int, advice: str) -> str:
    if not os.WIFSIGNALED(state):
        return f"error: Ray has ended this job's process; what it said, if anything, stands above{advice}"
    name = signal.Signals(os.WTERMSIG(state)).name
    reason = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"error: this job's process was ended by {name}{reason}{advice}"
