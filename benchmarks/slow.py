"""Check whether a run reports what has slowed it, and measure how much work a kill costs.

    python benchmarks/slow.py --parts causes      # 5 minutes on two cores
    python benchmarks/slow.py --parts healthy     # about 10 minutes
    python benchmarks/slow.py --parts kills       # about 75 minutes

Guards a run's notes, which name what has slowed it and are silent otherwise; and the work lost by a killed worker, at
most a few minutes, with checkpoints that take about 1 % of the time.

``causes`` makes one part of a training slow at a time. Prints the share of the time that it took, the share that the
run has measured, and the run's notes. ``healthy`` counts the notes of runs in which nothing is slow. ``kills`` kills a
worker at random moments, and prints the work lost.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from before import busy, training_workers
from blocks import write_all

from mnist_ray.training.stopwatch import CALLBACKS, CHECKPOINTS, DATA, PARTS, STORAGE, WORKERS

HERE = Path(__file__).parent
TRAIN, SLOWED = HERE.parent / "jobs" / "train.py", HERE / "peers" / "slowed.py"
EXAMPLES = HERE.parent / "examples"
Meanwhile = Callable[[psutil.Popen], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Cause:
    """A part of a training that is made slow."""

    part: str
    """Which of stopwatch.PARTS takes the time; empty if none of the workers' does."""
    expected: str
    """How the right note begins."""
    flags: tuple[object, ...]
    meanwhile: Meanwhile = lambda job: contextlib.nullcontext()


@dataclass(frozen=True)
class Run:
    """What a run has printed and measured."""

    lines: list[str]
    steps: list[dict[str, float]]
    """The rows of steps.csv."""
    paused_s: float
    """Seconds of all pauses."""

    @property
    def notes(self) -> list[str]:
        """The notes about the time, after the first epoch or at the end."""
        texts = [line.split(maxsplit=1)[1] for line in self.lines if line.startswith("note ")]
        return [text for text in texts if text.startswith(tuple(cause.expected for cause in CAUSES.values()))]

    def seconds(self, part: str) -> float:
        """Return the mean seconds of a worker in a part."""
        return sum(row[f"{part}_s"] for row in self.steps)

    @property
    def total_s(self) -> float:
        """The mean seconds of a worker."""
        return sum(map(self.seconds, PARTS))


@contextlib.contextmanager
def half_speed(job: psutil.Popen) -> Iterator[None]:
    """Stop one of the training workers for half of the time, from its start to its end."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not (workers := training_workers(job)):
            time.sleep(0.1)
        worker = max(workers, key=lambda process: process.pid)
        with contextlib.suppress(psutil.Error):
            while not is_over.is_set():
                for action in (worker.suspend, worker.resume):
                    action()
                    time.sleep(0.02)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    yield
    is_over.set()
    thread.join()


CAUSES = {
    "each example takes 0.2 ms to read": Cause(
        DATA, "waiting for data", ("--workload", SLOWED, "--read-ms", 0.2, "--num-epochs", 4)
    ),
    "one worker of two stands still for half of the time": Cause(
        WORKERS, "the other workers wait", ("--num-workers", 2, "--num-epochs", 2), half_speed
    ),
    "the same, one of three, on two cores": Cause(
        "", "the other workers wait", ("--num-workers", 3, "--num-epochs", 2), half_speed
    ),
    "the storage takes 0.2 MB a second": Cause(
        STORAGE, "checkpoints took", ("--callback", f"{SLOWED}:SlowStorage", "--checkpoint-every", 40)
    ),
    "a callback takes 5 ms after each step": Cause(
        CALLBACKS, "callbacks took", ("--callback", f"{SLOWED}:SlowCallback", "--num-epochs", 4)
    ),
    "four workers have batches of 8": Cause(
        "", "all workers wait", ("--batch-size", 8, "--num-workers", 4, "--limit", 0.3)
    ),
}
HEALTHY: dict[str, Sequence[object]] = {
    "MNIST": (),
    "shapes": ("--workload", EXAMPLES / "shapes.py"),
    "diabetes": ("--workload", EXAMPLES / "diabetes.py"),
}


def train(flags: Sequence[object], meanwhile: Meanwhile = lambda job: contextlib.nullcontext()) -> Run:
    """Train a run until it ends or is interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        slowed = Path(folder) / "slowed"
        slowed.mkdir()
        command = [sys.executable, TRAIN, "--storage-path", folder, "--run-name", "run", *flags]
        job = psutil.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "local", "SLOWED": str(slowed)},
        )
        with meanwhile(job):
            printed, _ = job.communicate()
        if job.returncode not in (0, 130):
            raise RuntimeError(printed)
        with (Path(folder) / "run" / "steps.csv").open() as file:
            steps = [{name: float(value or 0) for name, value in row.items()} for row in csv.DictReader(file)]
        pauses = [float(line) for path in slowed.iterdir() for line in path.read_text().split()]
        return Run(printed.splitlines(), steps, sum(pauses))


def share_of(part: str, cause: Cause, run: Run) -> str:
    """Return what share of a run's time was made slow, and the share that the run has measured."""
    own_s, injected_s = run.seconds(part), run.paused_s
    if part == DATA:  # a loader without pauses takes some time, too
        as_ever = train((*cause.flags, "--read-ms", 0))
        injected_s += as_ever.seconds(DATA) - as_ever.paused_s
    if part == STORAGE:  # what training has not waited for anyway
        injected_s -= run.total_s - own_s
    if part == WORKERS:  # a worker that waits for the others itself keeps nobody waiting
        (noted,) = (int(found[1]) for note in run.notes if (found := re.search(r"wait (\d+)% of the time", note)))
        mean_s, own_s = own_s, noted / 100 * run.total_s  # of two workers, and how much longer one of them waits
        injected_s = (run.total_s - (mean_s - own_s / 2)) / 2
    return f"{injected_s / run.total_s:.0%} | {own_s / run.total_s:.0%}"


def compare_causes() -> None:
    """Print, for each cause, what it took and what the run says."""
    print("| what is slow | of the time | measured | note |\n|---|---|---|---|")
    for name, cause in CAUSES.items():
        run = train(cause.flags, cause.meanwhile)
        found = [note for note in run.notes if note.startswith(cause.expected)]
        verdict = found[0] if len(found) == len(run.notes) == 1 else f"**wrong**: {run.notes}"
        shares = share_of(cause.part, cause, run) if cause.part else " | "
        print(f"| {name} | {shares} | {verdict} |", flush=True)


def count_false_notes(num_rounds: int, folder: Path) -> None:
    """Print the notes of runs in which nothing is slow."""
    num_runs, healthy = 0, {**HEALTHY, "MNIST in Parquet files": write_all(folder)}
    for round_number in range(num_rounds):
        for name, flags in healthy.items():
            for workers in (1, 2):
                num_others = int(round_number == num_rounds - 1)
                with busy(num_others):
                    run = train([*flags, "--num-workers", workers])
                num_runs += 1
                line = next(line for line in run.lines if line.startswith("time "))
                where = f"{name}, {workers} workers{', under load' if num_others else ''}"
                print(f"{where}: {line.split(maxsplit=1)[1]}; notes: {run.notes}", flush=True)
    print(f"{num_runs} runs")


@contextlib.contextmanager
def killed(job: psutil.Popen, times: int, every_s: float, rng: random.Random) -> Iterator[None]:
    """Kill a training worker at random moments, then interrupt the job."""

    def kill() -> None:
        for _ in range(times):
            time.sleep(rng.uniform(0.5, 1.5) * every_s)
            with contextlib.suppress(psutil.Error, IndexError):
                training_workers(job)[-1].kill()
        time.sleep(every_s)
        job.send_signal(signal.SIGINT)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


GPT = ("--workload", EXAMPLES / "gpt.py", "--depth", 14, "--width", 768, "--batch-size", 2, "--num-steps", 100_000)
MNIST = ("--num-epochs", 10_000)
KILLS: dict[str, tuple[float, tuple[object, ...]]] = {
    "MNIST, local disk": (20.0, MNIST),
    "MNIST, 20 MB/s": (20.0, (*MNIST, "--callback", f"{SLOWED}:Storage20")),
    "a GPT of 99 million parameters, local disk": (90.0, (*GPT, "--validate-every", 2000)),
    "a GPT of 99 million parameters, 20 MB/s": (
        90.0,
        (*GPT, "--validate-every", 2000, "--callback", f"{SLOWED}:Storage20"),
    ),
}
_LOST = re.compile(r"; ([\d.]+) s of work lost")


def compare_kills(names: Sequence[str], num_kills: int) -> None:
    """Print how much work kills cost, and what share of the time the checkpoints took."""
    print("| run | kills | seconds of work lost: median, maximum | checkpoints took |\n|---|---|---|---|")
    rng = random.Random(0)
    for name in names:
        every_s, flags = KILLS[name]
        run = train(["--max-failures", 10_000, *flags], lambda job: killed(job, num_kills, every_s, rng))  # noqa: B023
        lost = [float(found[1]) for line in run.lines if (found := _LOST.search(line))]
        saving_s = run.seconds(STORAGE) + run.seconds(CHECKPOINTS)
        worst = f"{statistics.median(lost):.1f}, {max(lost):.1f}"
        print(f"| {name} | {len(lost)} | {worst} | {saving_s / run.total_s:.1%} of the time |", flush=True)


def main() -> None:
    """Measure the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("causes", "healthy", "kills")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3, help="of healthy runs, eight each; the last one is under load")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", nargs="+", choices=KILLS, default=[*KILLS], help="that are killed")
    args = parser.parse_args()
    if "causes" in args.parts:
        compare_causes()
    if "healthy" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            count_false_notes(args.rounds, Path(folder))
    if "kills" in args.parts:
        compare_kills(args.runs, args.kills)


if __name__ == "__main__":
    main()
