"""Ends a job early: Ctrl-C, SIGTERM, SIGHUP or an error in a thread raises an exception in the main thread.

Ray ends a driver without an exception if its raylet or GCS is gone; so does the kernel if memory runs out. Therefore
``supervise`` lets a child process run the job, and prints why the child exited and how to resume. This module imports
nothing heavy, since the fork must come before all heavy imports.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from mnist_ray.errors import JobError
from mnist_ray.output import say

SAME_WITHIN_S = 0.5
"""Signals this soon after an interrupt count as the same interrupt: a terminal or a scheduler signals every process of
a job, ``timeout`` signals one process twice, and the supervisor forwards the signals that it receives."""

TAKEN_WITHIN_S = 5.0  # for the main thread to take another thread's error, unless it is stuck
_IMPORT_CALLBACK = ("<frozen importlib._bootstrap>", "cb")  # Python drops exceptions raised in it


@dataclass
class Noted:
    """Whether an interrupt has come; not a ``threading.Event``, whose lock could block a signal handler forever."""

    is_set: bool = False


@dataclass
class _State:
    """The interrupts of this process. There is one instance, as a process has one set of signal handlers."""

    last: float = -math.inf  # the last interrupt's time.monotonic()
    first: Noted | None = None  # if not None, the first interrupt is only noted here
    error: Exception | None = None  # from `end_with`
    to_supervisor: int | None = None  # a pipe for the advice on how to resume
    advice: str = ""  # the last advice in the pipe
    gives_back: bool = False  # whether forked processes get back Python's own handlers


_state, _held = _State(), threading.local()


def signals() -> set[signal.Signals]:
    """Return the signals that end a job: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under ``nohup``."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return {signal.SIGINT, signal.SIGTERM}
    return {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def take_signals() -> None:
    """Let the signals that end a job raise KeyboardInterrupt in the main thread."""
    _state.error = None  # an earlier call in another thread may have left it
    if threading.current_thread() is threading.main_thread():
        for number in signals():
            signal.signal(number, _handle)
    if not _state.gives_back:
        _state.gives_back = True
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_give_back)


def _hold() -> None:
    """Block the signals during a fork: Python drops signals that reach the new process before its first step."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals())


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _give_back() -> None:
    """Restore Python's own handlers in a process that the user's code forks: a Pool stops its processes by SIGTERM."""
    for number in signals():
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _release()


def leave_closed_terminal() -> None:
    """Discard this process's output if its terminal was closed, since every print would raise OSError."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _handle(number: int, frame: FrameType | None) -> None:
    error, _state.error = _state.error, None
    if error is not None:
        is_ending = _state.first is not None and _state.first.is_set  # the signal may have ended Ray too
        raise KeyboardInterrupt if is_ending else error
    if frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) == _IMPORT_CALLBACK:
        signal.raise_signal(number)  # try again after the callback
        return
    leave_closed_terminal()
    now = time.monotonic()
    before, _state.last = _state.last, now  # in one step, as another signal may interrupt this handler
    if now - before < SAME_WITHIN_S:
        _state.last = before
    elif _state.first is not None and not _state.first.is_set:
        _state.first.is_set = True
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def first_only_noted() -> Iterator[Noted]:
    """Within this context, the first interrupt is only noted; the second raises KeyboardInterrupt."""
    _state.first = Noted()
    try:
        yield _state.first
    finally:
        _state.first = None


def end_with(error: Exception) -> None:
    """Raise an error in the main thread, from any other thread. Needs ``take_signals`` first.

    If the main thread is stuck in Ray's C++, it never takes the error. Then this process exits, provided that it has a
    supervisor.
    """
    _state.error = error
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    end = time.monotonic() + TAKEN_WITHIN_S
    while _state.error is error and _state.to_supervisor is not None:
        if time.monotonic() > end:
            _exit(str(error))
        time.sleep(0.01)


def _exit(reason: str) -> None:
    """End this process with an error, on behalf of its main thread."""
    with contextlib.suppress(OSError, JobError):
        say(f"error: {reason}{_state.advice}", file=sys.stderr)
    if_ended(DONE)
    os._exit(1)


DONE, _PIPE_BYTES = "\0", 2**16


def if_ended(advice: str) -> None:
    """From now on, let the supervisor print ``advice`` if this process is killed from outside."""
    if _state.to_supervisor is not None:
        _state.advice = advice
        with contextlib.suppress(OSError):
            os.write(_state.to_supervisor, f"{advice}\n".encode())


def is_supervised() -> bool:
    """Return whether this is the child process of ``supervise``."""
    return _state.to_supervisor is not None


def supervise() -> int:
    """Fork: in the child, which exits with this process, return at once; here, forward signals until it has exited.

    Returns the child's exit status. At its end, the child calls ``if_ended(DONE)``; otherwise, it was killed.
    """
    from_job, to_supervisor = os.pipe()
    from_supervisor, alive = os.pipe()
    awaited = {*signals(), signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler, macOS drops the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        take_signals()  # again, after the fork
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        os.close(from_job)
        os.close(alive)
        _state.to_supervisor = to_supervisor
        threading.Thread(target=_end_with_supervisor, args=[from_supervisor], daemon=True).start()
        return 0
    os.close(to_supervisor)
    os.close(from_supervisor)
    ended, written = 0, b""
    while not ended:  # a handler would run late if its signal came just before a blocking system call
        if (number := signal.sigwait(awaited)) != signal.SIGCHLD:
            os.kill(child, number)
        ended, state = os.waitpid(child, os.WNOHANG)
    os.set_blocking(from_job, False)  # processes that the job has forked may hold the pipe too
    with contextlib.suppress(BlockingIOError):  # the pipe is empty
        written = os.read(from_job, _PIPE_BYTES)
    advice = ["", *written.decode(errors="replace").splitlines()][-1]
    leave_closed_terminal()
    if advice == DONE:
        return os.waitstatus_to_exitcode(state)
    if sys.stdout.isatty():
        sys.stdout.write("\r\x1b[K\x1b[?25h")  # removes the live line, and shows the cursor again
        sys.stdout.flush()
    say(f"error: {_ending(state)}{advice}", file=sys.stderr)
    return 1


def _end_with_supervisor(from_supervisor: int) -> None:
    os.read(from_supervisor, 1)  # returns when the supervisor is gone
    _exit("the command's own process, which watches over this job, was killed")


def _ending(state: int) -> str:
    if not os.WIFSIGNALED(state):
        status = os.waitstatus_to_exitcode(state)
        return f"this job's process exited with status {status}: ended by Ray (see above), or by os._exit in your code"
    name = signal.Signals(os.WTERMSIG(state)).name
    reasons = {
        "SIGKILL": ", which the system sends if memory runs out",
        "SIGABRT": ", perhaps because a library could start no more threads (ulimit -u)",
    }
    return f"this job's process was killed by {name}{reasons.get(name, '')}"
