"""What ends a job before its time: Ctrl-C, SIGTERM, or what a thread has found out. The main thread hears of all."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

FORWARDED: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""What ``guard`` sends for a signal that it was sent: that may have reached this process as well."""


@dataclass
class Noted:
    """Whether an interrupt has come. No ``threading.Event``: a handler that sets one may wait for a lock of its own."""

    is_set: bool = False


@dataclass
class _Heard:
    """So far; there is one of it, as a process has one set of signal handlers.

    A handler may be interrupted by another one between any two of its steps, so each of its steps on these is atomic.
    """

    directly: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    forwarded: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    taken: dict[int, object] = field(default_factory=dict)
    """By number, the interrupts that have been acted upon, whichever way they were heard on first."""
    first: Noted | None = None
    """To be set by the first interrupt, where it is only to be noted."""
    error: Exception | None = None
    """What a thread ends the job with."""


_heard = _Heard()


def take_signals() -> None:
    """Let Ctrl-C and SIGTERM, which ``ray job stop`` and schedulers send, raise KeyboardInterrupt.

    To be called again after ``ray.init``, which sets a handler of its own.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, FORWARDED):
            if number is not None:
                signal.signal(number, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    if (error := _heard.error) is not None:
        _heard.error = None
        is_ending = _heard.first is not None and _heard.first.is_set  # then Ray may have been sent SIGTERM, too
        raise KeyboardInterrupt if is_ending else error
    this, interrupt = object(), next(_heard.forwarded if number == FORWARDED else _heard.directly)
    if _heard.taken.setdefault(interrupt, this) is not this:
        return  # the same one, heard on the other way
    if _heard.first is not None and not _heard.first.is_set:
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
