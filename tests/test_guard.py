import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PREPARED = """
import os, signal, sys, time
from mnist_ray import guard, interrupts
interrupts.take_signals()
"""
SAVING = """
def work():
    try:
        with interrupts.first_only_noted() as first:
            print("here", flush=True)
            while not first.is_set:
                time.sleep(0.01)
            print("saving", flush=True)
            while True:  # and not one long sleep: a signal that comes just before it would not end it
                time.sleep(0.01)
    except KeyboardInterrupt:
        return 130
sys.exit(guard.run(work))
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
    assert said(start("sys.exit(guard.run(lambda: 3))")) == (3, "")


def test_an_error_in_the_work_keeps_its_traceback_and_nothing_is_added(start: Starter) -> None:
    status, errors = said(start("sys.exit(guard.run(lambda: 1 / 0))"))
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
    code = f"guard.run_ = lambda: (guard.if_ended('; early'), guard.if_ended('; to go on: this'), {end})"
    status, errors = said(start(f"{code}\nsys.exit(guard.run(guard.run_))"))
    assert status == 1
    assert errors.count("\n") == 1
    assert message in errors
    assert errors.endswith("; to go on: this\n")


@pytest.mark.parametrize("to_all", [False, True], ids=["to the guard", "to the whole group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_counts_once_whether_the_guard_or_all_get_it(
    start: Starter, number: signal.Signals, to_all: bool
) -> None:
    """The first is noted, the second ends."""
    process = start(SAVING)
    assert process.stdout
    send = os.killpg if to_all else os.kill
    for expected in ("here\n", "saving\n"):
        assert process.stdout.readline() == expected
        assert process.poll() is None
        send(process.pid, number)
    assert said(process) == (130, "")


def test_where_the_guard_is_killed_the_work_ends_with_it(start: Starter) -> None:
    process = start(SAVING)
    assert process.stdout
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # whom nobody has waited for yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
