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
from tests.conftest import wait_for

PREPARED = """
import os, signal, sys, time
from mnist_ray import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored here, as under nohup
signals.take_signals()
def supervised(work):  # as cli.run does
    status = signals.supervise()
    if not signals.is_supervised():
        return status
    try:
        return work()
    finally:
        signals.if_ended(signals.DONE)
"""
SAVING = """
def work():
    try:
        with signals.defer_first_interrupt() as first:
            signals.if_ended("; to resume: this")
            print("here", flush=True)
            while not first.is_set:
                time.sleep(0.01)
            print("saving", flush=True)
            while True:  # not one long sleep: a signal that comes just before it would not end it
                time.sleep(0.01)
    except KeyboardInterrupt:
        return 130
os._exit(supervised(work))  # like jobs: Python's own exit would first reset the handlers
"""
Starter = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        path, pipe = tmp_path / "script.py", subprocess.PIPE
        path.write_text(PREPARED + code)
        started.append(
            subprocess.Popen([sys.executable, path], stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def ending(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit status and the standard error of a process that ends."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_the_works_status_and_traceback_are_passed_on(start: Starter) -> None:
    assert ending(start("sys.exit(supervised(lambda: 3))")) == (3, "")
    status, errors = ending(start("sys.exit(supervised(lambda: 1 / 0))"))
    assert (status, errors.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL, which the system sends if memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("os.abort()", "was killed by SIGABRT, perhaps because a library could start no more threads (ulimit -u)"),
        (
            "os._exit(1)",
            "exited with status 1: ended by Ray (see above), or by os._exit in your code",
        ),
    ],
)
def test_if_the_process_is_killed_one_line_says_so_and_how_to_resume(start: Starter, end: str, message: str) -> None:
    code = f"signals.work = lambda: (signals.if_ended('; early'), signals.if_ended('; to resume: this'), {end})"
    status, errors = ending(start(f"{code}\nsys.exit(supervised(signals.work))"))
    assert (status, errors.count("\n")) == (1, 1)
    assert message in errors
    assert errors.endswith("; to resume: this\n")


@pytest.mark.parametrize(
    ("number", "sends"),
    [
        (signal.SIGINT, [os.killpg]),  # like a terminal
        (signal.SIGTERM, [os.kill]),
        (signal.SIGTERM, [os.kill, os.killpg]),  # like timeout
        (signal.SIGHUP, [os.killpg]),
    ],
)
def test_a_signal_to_several_processes_counts_once_the_first_is_noted_the_second_ends(
    start: Starter, number: signal.Signals, sends: list[Callable[[int, int], None]]
) -> None:
    process = start(SAVING)
    for expected in ("here\n", "saving\n"):
        assert next_line(process) == expected
        time.sleep(signals.SAME_WITHIN_S + 0.1 if expected == "saving\n" else 0)  # since the first one was handled
        assert process.poll() is None
        for send in sends:
            send(process.pid, number)
    assert ending(process) == (130, "")


STUCK = """
import threading
signals.TAKEN_WITHIN_S = 0.1

def work():
    signals.if_ended("; to resume: this")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as long as Ray's C++ does not return
    threading.Thread(target=signals.end_with, args=[RuntimeError("Ray is silent")]).start()
    threading.Event().wait()
os._exit(supervised(work))
"""


def test_an_error_ends_a_job_whose_main_thread_waits_outside_of_python(start: Starter) -> None:
    assert ending(start(STUCK)) == (1, "error: Ray is silent; to resume: this\n")


def test_a_closed_terminal_is_ignored_under_nohup(start: Starter) -> None:
    process = start(f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\nsignals.take_signals()\n{SAVING}")
    assert next_line(process) == "here\n"
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(signals.SAME_WITHIN_S + 0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert next_line(process) == "saving\n"
    assert process.poll() is None


def test_if_the_supervisor_is_killed_the_work_ends_and_says_how_to_resume(start: Starter) -> None:
    process = start(SAVING)
    next_line(process)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    assert ending(process) == (
        -signal.SIGKILL,
        "error: the command's own process, which watches over this job, was killed; to resume: this\n",
    )
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


FORKING = """
import multiprocessing
from mnist_ray import cli

def begin(telling):
    telling.send("begun")
    time.sleep(60)

def main():
    context = multiprocessing.get_context("fork")
    with signals.defer_first_interrupt():
        ready, telling = context.Pipe()
        ended, left = (context.Process(target=begin, args=[telling], daemon=True) for _ in range(2))
        ended.start(), left.start()
        ready.recv(), ready.recv()
        ended.terminate()
        ended.join()
    print(ended.exitcode, left.pid, flush=True)

cli.run(main)
"""


def test_processes_that_the_users_code_forks_can_be_ended_and_end_with_the_job(start: Starter) -> None:
    process = start(FORKING)
    exit_code, left = map(int, next_line(process).split())
    assert exit_code == -signal.SIGTERM
    assert ending(process) == (0, "")
    wait_for(lambda: not psutil.pid_exists(left))
