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
import socket
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
DONE, _ADVICE_BYTES = "\0", 2**16
_IMPORT_CALLBACK = ("<frozen importlib._bootstrap>", "cb")  # Python drops exceptions raised in it
_REASONS = {
    "SIGKILL": ", which the system sends if memory runs out",
    "SIGABRT": ", perhaps because a library could start no more threads (ulimit -u)",
}


@dataclass
class InterruptFlag:
    """Whether an interrupt has come; not a ``threading.Event``, whose lock could block a signal handler forever."""

    is_set: bool = False


@dataclass
class _State:
    """The interrupts of this process. There is one instance, as a process has one set of signal handlers."""

    last: float = -math.inf  # the last interrupt's time.monotonic()
    deferred: InterruptFlag | None = None  # if not None, the first interrupt only sets this flag
    error: Exception | None = None  # from `end_with`
    supervisor: socket.socket | None = None  # takes the advice on how to resume; closed when the supervisor is gone
    advice: str = ""  # the last advice that was sent
    restores_in_forks: bool = False  # whether forked processes get Python's own handlers back


_state = _State()


def _ending_signals() -> set[signal.Signals]:
    """Return the signals that end a job: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under ``nohup``."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return {signal.SIGINT, signal.SIGTERM}
    return {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def take_signals() -> None:
    """Let the signals that end a job raise KeyboardInterrupt in the main thread."""
    _state.error = None  # an earlier call in another thread may have left it
    if threading.current_thread() is threading.main_thread():
        for number in _ending_signals():
            signal.signal(number, _handle)
    if not _state.restores_in_forks:
        _state.restores_in_forks = True
        os.register_at_fork(after_in_child=_restore_handlers)


def _restore_handlers() -> None:
    """Restore Python's own handlers in a process that the user's code forks: a Pool stops its processes by SIGTERM."""
    for number in _ending_signals():
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _discard_output_of_closed_terminal() -> None:
    """Discard this process's output if its terminal was closed, since every print would raise OSError."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _handle(number: int, frame: FrameType | None) -> None:
    error, _state.error = _state.error, None
    if error is not None:
        is_ending = _state.deferred is not None and _state.deferred.is_set  # the signal may have ended Ray too
        raise KeyboardInterrupt if is_ending else error
    if frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) == _IMPORT_CALLBACK:
        signal.raise_signal(number)  # try again after the callback
        return
    _discard_output_of_closed_terminal()
    now = time.monotonic()
    before, _state.last = _state.last, now  # in one step, as another signal may interrupt this handler
    if now - before < SAME_WITHIN_S:
        _state.last = before
    elif _state.deferred is not None and not _state.deferred.is_set:
        _state.deferred.is_set = True
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def defer_first_interrupt() -> Iterator[InterruptFlag]:
    """Within this context, the first interrupt only sets the flag; the second raises KeyboardInterrupt."""
    _state.deferred = InterruptFlag()
    try:
        yield _state.deferred
    finally:
        _state.deferred = None


def end_with(error: Exception) -> None:
    """Raise an error in the main thread, from any other thread. Needs ``take_signals`` first.

    If the main thread is stuck in Ray's C++, it never takes the error. Then this process exits, provided that it has a
    supervisor.
    """
    _state.error = error
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    end = time.monotonic() + TAKEN_WITHIN_S
    while _state.error is error and is_supervised():
        if time.monotonic() > end:
            _exit(str(error))
        time.sleep(0.01)


def _exit(reason: str) -> None:
    """End this process with an error, on behalf of its main thread."""
    with contextlib.suppress(OSError, JobError):
        say(f"error: {reason}{_state.advice}", file=sys.stderr)
    if_ended(DONE)
    os._exit(1)


def if_ended(advice: str) -> None:
    """From now on, let the supervisor print ``advice`` if this process is killed from outside."""
    if _state.supervisor is not None:
        _state.advice = advice
        with contextlib.suppress(OSError):
            _state.supervisor.sendall(f"{advice}\n".encode())


def is_supervised() -> bool:
    """Return whether this is the child process of ``supervise``."""
    return _state.supervisor is not None


def supervise() -> int:
    """Fork: in the child, which exits with this process, return at once; here, forward signals until it has exited.

    Returns the child's exit status. At its end, the child calls ``if_ended(DONE)``; otherwise, it was killed.
    """
    supervisor, job = socket.socketpair()
    awaited = {*_ending_signals(), signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler, macOS drops the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        job.close()
        _state.supervisor = supervisor
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        take_signals()  # again, after the fork
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        threading.Thread(target=_end_with_supervisor, args=[supervisor], daemon=True).start()
        return 0
    supervisor.close()
    ended = state = 0
    while not ended:  # a handler would run late if its signal came just before a blocking system call
        if (number := signal.sigwait(awaited)) != signal.SIGCHLD:
            os.kill(child, number)
        ended, state = os.waitpid(child, os.WNOHANG)
    return _report_exit(state, job)


def _report_exit(state: int, job: socket.socket) -> int:
    """Print why the child was killed, if it was, with its last advice; return the exit status."""
    job.setblocking(False)  # processes that the job has forked may hold its socket open
    sent = b""
    with contextlib.suppress(OSError):  # nothing was sent
        sent = job.recv(_ADVICE_BYTES)
    advice = ["", *sent.decode(errors="replace").splitlines()][-1]
    _discard_output_of_closed_terminal()
    if advice == DONE:
        return os.waitstatus_to_exitcode(state)
    if sys.stdout.isatty():
        sys.stdout.write("\r\x1b[K\x1b[?25h")  # removes the live line, and shows the cursor again
        sys.stdout.flush()
    reason = (
        f"exited with status {os.waitstatus_to_exitcode(state)}: ended by Ray (see above), or by os._exit in your code"
    )
    if os.WIFSIGNALED(state):
        name = signal.Signals(os.WTERMSIG(state)).name
        reason = f"was killed by {name}{_REASONS.get(name, '')}"
    say(f"error: this job's process {reason}{advice}", file=sys.stderr)
    return 1


def _end_with_supervisor(supervisor: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):  # the supervisor has not read the advice
        supervisor.recv(1)  # returns when the supervisor is gone
    _exit("the command's own process, which watches over this job, was killed")
