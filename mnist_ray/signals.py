"""What ends a job early: Ctrl-C, SIGTERM, SIGHUP, or an error that a thread has found. The main thread hears of all.

Ray ends a driver's process without any exception if its raylet or its GCS has gone, and the kernel does if memory runs
out. So ``supervise`` puts a process around the job that says so, and how to go on. Nothing heavy is imported here: the
two processes part before anything is.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from mnist_ray.errors import say

SAME_WITHIN_S = 0.5
"""Signals that come so soon after an interrupt belong to it: a terminal or a scheduler signals every process of a job,
``timeout`` one of them twice, and the supervisor passes on what it gets."""

_IMPORT_CALLBACK = ("<frozen importlib._bootstrap>", "cb")  # Python drops what is raised in it, as modules are imported


@dataclass
class Noted:
    """Whether an interrupt has come. No ``threading.Event``: a handler that sets one may wait for a lock of its own."""

    is_set: bool = False


@dataclass
class _Heard:
    """So far; there is one of it, as a process has one set of signal handlers."""

    last: float = -math.inf  # when an interrupt was acted upon: seconds of the monotonic clock
    first: Noted | None = None  # to be set by the first interrupt, if that is only to be noted
    error: Exception | None = None  # what a thread ends the job with
    to_supervisor: int | None = None  # the pipe by which this process says how to go on


_heard = _Heard()


def signals() -> set[signal.Signals]:
    """Return those that end a job: Ctrl-C, what ``ray job stop`` and schedulers send, and a closed terminal's.

    The last only if it is not ignored, as under ``nohup``.
    """
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
    hears_hangup = signal.getsignal(hangup) is not signal.SIG_IGN
    return {signal.SIGINT, signal.SIGTERM} | ({hangup} if hears_hangup else set())


def take_signals() -> None:
    """Let these signals raise KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        for number in signals():
            signal.signal(number, _hear)


def leave_closed_terminal() -> None:
    """Let what this process prints go nowhere if its terminal was closed: else each line would raise an OSError."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _hear(number: int, frame: FrameType | None) -> None:
    error, _heard.error = _heard.error, None
    if error is not None:
        is_ending = _heard.first is not None and _heard.first.is_set  # then Ray may have been sent SIGTERM, too
        raise KeyboardInterrupt if is_ending else error
    if frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) == _IMPORT_CALLBACK:
        signal.raise_signal(number)  # once more
        return
    leave_closed_terminal()
    now = time.monotonic()
    before, _heard.last = _heard.last, now  # in one step, as another signal may interrupt this handler
    if now - before < SAME_WITHIN_S:
        _heard.last = before
    elif _heard.first is not None and not _heard.first.is_set:
        _heard.first.is_set = True
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def first_only_noted() -> Iterator[Noted]:
    """Give what tells of the first interrupt meanwhile, where signals are taken; the second raises."""
    _heard.first = Noted()
    try:
        yield _heard.first
    finally:
        _heard.first = None


def end_with(error: Exception) -> None:
    """Raise an error in the main thread, where signals are taken; for other threads."""
    _heard.error = error
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


_DONE = "\0"


def if_ended(advice: str) -> None:
    """Let ``advice`` be what a person reads if this process is ended from outside, from here on."""
    if _heard.to_supervisor is not None:
        with contextlib.suppress(OSError):
            os.write(_heard.to_supervisor, f"{advice}\n".encode())


def supervise(work: Callable[[], int]) -> int:
    """Return the exit status of ``work``, done in a child of this process, which passes on the signals that it gets.

    The child ends with this process.
    """
    if not hasattr(os, "fork"):
        return work()
    from_job, to_supervisor = os.pipe()
    from_supervisor, alive = os.pipe()
    forwarded = signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # until each of the two does with them what it is to do
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        os.close(from_job)
        os.close(alive)
        _heard.to_supervisor = to_supervisor
        threading.Thread(target=_end_with_supervisor, args=[from_supervisor], daemon=True).start()
        try:
            return work()
        finally:
            if_ended(_DONE)
    os.close(to_supervisor)
    os.close(from_supervisor)
    for number in forwarded:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    with open(from_job, encoding="utf-8", errors="replace") as lines:
        advice = ["", *lines.read().splitlines()][-1]  # read until the child has gone: no program inherits its end
    _, state = os.waitpid(child, 0)
    leave_closed_terminal()
    if advice == _DONE:
        return os.waitstatus_to_exitcode(state)
    say(f"error: {_ending(state)}{advice}", file=sys.stderr)
    return 1


def _end_with_supervisor(from_supervisor: int) -> None:
    os.read(from_supervisor, 1)  # returns when the supervisor has gone
    os._exit(1)


def _ending(state: int) -> str:
    if not os.WIFSIGNALED(state):
        return "Ray has ended this job's process; what it said, if anything, stands above"
    name = signal.Signals(os.WTERMSIG(state)).name
    reason = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"this job's process was ended by {name}{reason}"
