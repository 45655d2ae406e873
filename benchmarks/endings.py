"""Check how a job ends if a part of Ray dies or hangs, or if the job is killed or interrupted.

    python benchmarks/endings.py                          # 42 minutes on two cores
    python benchmarks/endings.py --runs 1                 # 16 minutes
    python benchmarks/endings.py --plain-ray --runs 1     # about 20 minutes

Guards the end of a job: no part of Ray can let it hang, its last line has the command to resume, and the resumed run
ends with the weights of an undisturbed one.

Each run trains on a local Ray. At a random moment, a process of Ray is killed or stopped, or the job is killed or
interrupted. Counts the runs that end within 90 s with one line that has the command to resume, and the runs that, once
resumed, end with the weights of an undisturbed run.
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

PARTS: dict[str, str | tuple[str, ...]] = {
    "GCS": "gcs_server",
    "raylet": "raylet",
    "agent of the dashboard, or what stands for it": ("agents.py", "ray::DashboardA"),
    "agent of runtime environments": "ray::RuntimeEn",
    "controller": "ray::TrainContr",
    "event queue": "ray::EventQueue",
}
MAX_S = 90.0


@dataclass(frozen=True)
class Ending:
    """How one run ended."""

    seconds: float
    """From the signal to the job's exit."""
    says_how_to_resume: bool
    """Whether it ended in time, with one line on how to resume."""
    is_same: bool
    """Whether the run, resumed if it was unfinished, has the weights of an undisturbed run."""


def send(number: signal.Signals, name: str | tuple[str, ...]) -> Callable[[Driver], None]:
    """Return a function that sends a signal to a job's first process whose name begins, or whose script is, so."""
    names = (name,) if isinstance(name, str) else name

    def act(driver: Driver) -> None:
        for process in psutil.Process(driver.process.pid).children(recursive=True):
            scripts = [Path(word).name for word in process.cmdline()[1:3]]
            if process.name().startswith(names) or not {*names}.isdisjoint(scripts):
                process.send_signal(number)
                return
        raise RuntimeError(f"the job has no process {names[0]}")

    return act


def to_job(number: signal.Signals) -> Callable[[Driver], None]:
    """Return a function that sends a signal to the job's own process, the child of its supervisor."""
    return lambda driver: psutil.Process(driver.process.pid).children()[0].send_signal(number)


def to_all(number: signal.Signals) -> Callable[[Driver], None]:
    """Return a function that sends a signal to a job's processes, without those that Ray has put elsewhere."""

    def act(driver: Driver) -> None:
        job = psutil.Process(driver.process.pid)
        processes = [job, *job.children(recursive=True)]
        for process in [one for one in processes if os.getsid(one.pid) == os.getsid(job.pid)]:
            process.send_signal(number)

    return act


ACTIONS: dict[str, Callable[[Driver], None]] = {
    **{f"{part} killed": send(signal.SIGKILL, name) for part, name in PARTS.items()},
    **{f"{part} stopped": send(signal.SIGSTOP, name) for part, name in PARTS.items() if "agent" not in part},
    "the job's process killed": to_job(signal.SIGKILL),
    "Ctrl-C": lambda driver: driver.process.send_signal(signal.SIGINT),
    "SIGTERM": lambda driver: driver.process.send_signal(signal.SIGTERM),
    "SIGTERM to all its processes": to_all(signal.SIGTERM),
    "SIGHUP": lambda driver: driver.process.send_signal(signal.SIGHUP),
}


def run_once(action: Callable[[Driver], None], folder: Path, rng: random.Random, expected: str) -> Ending:
    """Train one run, disturb it once, then resume it."""
    storage, nodes = Path(tempfile.mkdtemp(dir=folder)), Local()
    driver = Driver(storage, "run", nodes)
    driver.started.wait()
    time.sleep(rng.uniform(0, 6))
    start = time.monotonic()
    action(driver)
    driver.wait(nodes)
    seconds = time.monotonic() - start
    says_how_to_resume = seconds < MAX_S and "to resume: python jobs/train.py --resume" in driver.lines[-1]
    if not (storage / "run" / "result.json").exists():
        Driver(storage, "run", nodes, "--resume").wait(nodes)
    return Ending(seconds, says_how_to_resume, chaos.weights(storage / "run") == expected)


def main() -> None:
    """Do all runs, and print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind")
    parser.add_argument("--kinds", nargs="+", choices=ACTIONS, default=[*ACTIONS])
    parser.add_argument("--plain-ray", action="store_true", help="run the jobs with --plain-ray")
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and then by the jobs, too
    rng = random.Random(0)
    chaos.FLAGS.extend(["--num-epochs", "6", *(["--plain-ray"] if args.plain_ray else [])])
    print("| what happens | runs | seconds to exit: median, maximum | says how to resume | same weights if resumed |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(tempfile.mkdtemp(dir=folder))
        Driver(undisturbed, "run", Local()).wait(Local())
        expected = chaos.weights(undisturbed / "run")
        for kind in args.kinds:
            runs = [run_once(ACTIONS[kind], Path(folder), rng, expected) for _ in range(args.runs)]
            seconds = [run.seconds for run in runs]
            resumable, same = sum(run.says_how_to_resume for run in runs), sum(run.is_same for run in runs)
            spread = f"{statistics.median(seconds):.0f}, {max(seconds):.0f}"
            print(f"| {kind} | {len(runs)} | {spread} | {resumable} | {same} |", flush=True)


if __name__ == "__main__":
    main()
