import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mnist_ray import signals

PREPARED = """
import os, signal, sys, time
from mnist_ray import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which may be ignored where these tests run, as under nohup
signals.take_signals()
"""
SAVING = """
def work():
    try:
        with signals.first_only_noted() as first:
            print("here", flush=True)
            while not first.is_set:
                time.sleep(0.01)
            print("saving", flush=True)
            while True:  # and not one long sleep: a signal that comes just before it would not end it
                time.sleep(0.01)
    except KeyboardInterrupt:
        return 130
os._exit(signals.supervise(work))  # as jobs end: Python itself would first give signals their defaults back
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator["Starter"]:
    starter = Starter(tmp_path / "script.py")
    yield starter
    for process in starter.processes:
        process.kill()
        process.wait()


class Starter:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, code: str) -> subprocess.Popen[str]:
        self._path.write_text(PREPARED + code)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, str(self._path)], stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self.processes.append(process)
        return process


def said(process: subprocess.Popen[str]) -> tuple[int, str]:
    """What a process that ends says of errors, with its exit status."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_the_status_is_that_of_the_work(start: Starter) -> None:
    assert said(start("sys.exit(signals.supervise(lambda: 3))")) == (3, "")


def test_an_error_in_the_work_keeps_its_traceback_and_nothing_is_added(start: Starter) -> None:
    status, errors = said(start("sys.exit(signals.supervise(lambda: 1 / 0))"))
    assert (status, errors.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL, as the system does where memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("os._exit(1)", "Ray has ended this job's process; what it said, if anything, stands above"),
    ],
)
def test_where_the_process_is_ended_one_line_says_so_and_how_to_go_on(start: Starter, end: str, message: str) -> None:
    code = f"signals.work = lambda: (signals.if_ended('; early'), signals.if_ended('; to resume: this'), {end})"
    status, errors = said(start(f"{code}\nsys.exit(signals.supervise(signals.work))"))
    assert status == 1
    assert errors.count("\n") == 1
    assert message in errors
    assert errors.endswith("; to resume: this\n")


@pytest.mark.parametrize(
    ("number", "sends"),
    [
        (signal.SIGINT, [os.killpg]),  # as a terminal
        (signal.SIGTERM, [os.kill]),
        (signal.SIGTERM, [os.kill, os.killpg]),  # as timeout
        (signal.SIGHUP, [os.killpg]),
    ],
)
def test_a_signal_counts_once_whoever_gets_it(
    start: Starter, number: signal.Signals, sends: list[Callable[[int, int], None]]
) -> None:
    """The first is noted, the second ends."""
    process = start(SAVING)
    assert process.stdout
    for expected in ("here\n", "saving\n"):
        assert process.stdout.readline() == expected
        assert process.poll() is None
        for send in sends:
            send(process.pid, number)
        time.sleep(signals.SAME_WITHIN_S + 0.1 if expected == "here\n" else 0)
    assert said(process) == (130, "")


def test_a_closed_terminal_counts_for_nothing_under_nohup(start: Starter) -> None:
    process = start(f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\nsignals.take_signals()\n{SAVING}")
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(signals.SAME_WITHIN_S + 0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    assert process.poll() is None


def test_where_the_supervisor_is_killed_the_work_ends_with_it(start: Starter) -> None:
    process = start(SAVING)
    assert process.stdout
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # whom nobody has waited for yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
