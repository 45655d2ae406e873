"""How a job ends where Ray does: python benchmarks/endings.py

Each run trains on a local Ray. At a random moment a part of that Ray, or the job itself, is sent SIGKILL or SIGSTOP, or
is interrupted. Counts the runs that ended within a minute and a half with one line that has the command to go on, and
those that, gone on with, ended with the weights of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import chaos
import psutil
from bits import Local
from chaos import Driver

PARTS = {
    "GCS": "gcs_server",
    "raylet": "raylet",
    "agent of the node": "ray::DashboardA",
    "controller": "ray::TrainContr",
    "event queue": "ray::EventQueue",
}
LONGEST_S = 90.0


@dataclass(frozen=True)
class Ending:
    """What came of one run."""

    seconds: float
    """From what happened to the end."""
    is_told: bool
    """Whether it ended in time, with one line on how to go on."""
    is_same: bool
    """Whether it ended with the same weights when it was gone on with."""


def send(number: signal.Signals, name: str) -> Callable[[Driver], None]:
    """Return what sends a signal to a process of a job, by the start of its name."""

    def act(driver: Driver) -> None:
        for process in psutil.Process(driver.process.pid).children(recursive=True):
            if process.name().startswith(name):
                process.send_signal(number)
                return
        raise RuntimeError(f"there is no process {name}")

    return act


def to_job(number: signal.Signals) -> Callable[[Driver], None]:
    """Return what sends a signal to the process that does a job's work."""
    return lambda driver: psutil.Process(driver.process.pid).children()[0].send_signal(number)


ACTIONS: dict[str, Callable[[Driver], None]] = {
    **{f"{part} killed": send(signal.SIGKILL, name) for part, name in PARTS.items()},
    **{f"{part} stopped": send(signal.SIGSTOP, name) for part, name in PARTS.items() if part != "agent of the node"},
    "the job's process killed": to_job(signal.SIGKILL),
    "Ctrl-C": lambda driver: driver.process.send_signal(signal.SIGINT),
    "SIGTERM": lambda driver: driver.process.send_signal(signal.SIGTERM),
}


def run_once(action: Callable[[Driver], None], folder: Path, rng: random.Random, expected: str) -> Ending:
    """Let one thing happen to one run, then go on with it."""
    storage, nodes = Path(tempfile.mkdtemp(dir=folder)), Local()
    driver = Driver(storage, "run", nodes)
    driver.started.wait()
    time.sleep(rng.uniform(0, 6))
    start = time.monotonic()
    action(driver)
    driver.wait(nodes)
    seconds = time.monotonic() - start
    is_told = seconds < LONGEST_S and "to resume: python jobs/train.py --resume" in driver.lines[-1]
    if not (storage / "run" / "result.json").exists():
        Driver(storage, "run", nodes, "--resume").wait(nodes)
    return Ending(seconds, is_told, chaos.weights(storage / "run") == expected)


def main() -> None:
    """Let all of it happen, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=ACTIONS, default=[*ACTIONS])
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    rng = random.Random(0)
    chaos.FLAGS.extend(["--num-epochs", "6"])
    print("| what happens | runs | seconds to the end: median, most | told how to go on | then the same weights |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(tempfile.mkdtemp(dir=folder))
        Driver(undisturbed, "run", Local()).wait(Local())
        expected = chaos.weights(undisturbed / "run")
        for kind in args.kinds:
            runs = [run_once(ACTIONS[kind], Path(folder), rng, expected) for _ in range(args.runs)]
            seconds = [run.seconds for run in runs]
            told, same = sum(run.is_told for run in runs), sum(run.is_same for run in runs)
            spread = f"{statistics.median(seconds):.0f}, {max(seconds):.0f}"
            print(f"| {kind} | {len(runs)} | {spread} | {told} | {same} |", flush=True)


if __name__ == "__main__":
    main()
