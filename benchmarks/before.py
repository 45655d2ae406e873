"""Compare a job of this version with the same job of an earlier version.

    python benchmarks/before.py --before COMMIT                              # over an hour on two cores
    python benchmarks/before.py --before COMMIT --parts one four restart     # 12 minutes

Guards the start of a job, the restart after a killed worker, memory, and the time of a sweep: none gets worse from one
version to the next.

Each round runs both versions, one after the other; every second round begins with the earlier one. Measures seconds to
the first line, until a worker trains, from a worker's kill until training continues, and to the exit; seconds of a
sweep; CPU time; memory. Prints a row for each. With ``--busy 2``, two other processes compute meanwhile.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
BEFORE = "8619d03"
"""The last commit in which Ray starts the workers itself."""
PARTS = ("one", "four", "restart", "sweep")
"""Runs of one worker, of four, and of two with one killed; a sweep whose trials have two workers."""
_INTERVAL_S = 0.05


@dataclass
class Watched:
    """The output of a job with its times, and the resources that its processes used."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    """Each with the seconds since the start."""
    seconds: float = 0.0
    cpu_s: dict[int, float] = field(default_factory=dict)
    """CPU time of each process by its PID, as last measured."""
    training_cpu_s: float = 0.0
    """CPU time of the training workers, from the first step to the end of the last epoch."""
    pss_mib: float = 0.0
    """Peak memory of all training workers together; shared pages are divided among their processes (PSS)."""

    def at(self, start: str) -> float:
        """Return the seconds at which the first line came that begins with ``start``."""
        return next(seconds for seconds, line in self.lines if line.startswith(start))

    def rate(self) -> float:
        """Return the images/s of the first epoch."""
        line = next(line for _, line in self.lines if "finished in" in line)
        return float(re.search(r"\(([\d,]+) images/s", line)[1].replace(",", ""))  # type: ignore[index]


def watch(
    root: Path,
    *command: object,
    num_epochs: int = 2,
    address: str = "local",
    on_line: Callable[[psutil.Process, str], object] = lambda job, line: None,
) -> Watched:
    """Run a job of the version in ``root`` and measure its processes. Raises RuntimeError if it fails."""
    seen, start = Watched(), time.perf_counter()
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    job = psutil.Popen(
        [sys.executable, *map(str, command)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def read() -> None:
        for line in job.stdout:
            seen.lines.append((time.perf_counter() - start, line))
            on_line(job, line)

    reader = threading.Thread(target=read)
    reader.start()
    before_training = None
    while job.poll() is None:
        workers = _look(job, seen)
        if any(line.startswith("started") for _, line in seen.lines):
            before_training = workers if before_training is None else before_training
            if sum("finished in" in line for _, line in seen.lines) < num_epochs:
                seen.training_cpu_s = workers - before_training
        time.sleep(_INTERVAL_S)
    reader.join()
    seen.seconds = time.perf_counter() - start
    if job.returncode != 0:
        raise RuntimeError(f"{command} failed: {seen.lines[-5:]}")
    return seen


def _look(job: psutil.Process, seen: Watched) -> float:
    """Record the CPU time and memory of a job's processes; return the CPU time of its training workers."""
    for process in [job, *_below(job)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seen.cpu_s[process.pid] = times.user + times.system
    workers, pss_mib = training_workers(job), 0.0
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            pss_mib += worker.memory_full_info().pss / 2**20
    seen.pss_mib = max(seen.pss_mib, pss_mib)
    return sum(seen.cpu_s.get(worker.pid, 0.0) for worker in workers)


def training_workers(job: psutil.Process) -> list[psutil.Process]:
    """Return the processes of a job's training workers; some may have exited by now."""
    found = []
    for process in _below(job):
        with contextlib.suppress(psutil.Error):
            if "TrainWo" in process.name():
                found.append(process)
    return found


def _below(job: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        found: list[psutil.Process] = job.children(recursive=True)
        return found
    return []


def kill_a_worker(job: psutil.Process, line: str) -> float | None:
    """Kill a training worker if ``line`` reports the end of the first epoch; return the time."""
    if "epoch 1/" not in line or "finished" not in line:
        return None
    training_workers(job)[0].kill()
    return time.perf_counter()


def seconds_to_restart(root: Path, storage: Path, flags: Sequence[object]) -> float:
    """Return the seconds from the kill of one of two workers until training continues."""
    moments: list[float] = []

    def on_line(job: psutil.Process, line: str) -> None:
        if line.startswith("restarted"):
            moments.append(time.perf_counter())
        elif not moments and (when := kill_a_worker(job, line)) is not None:
            moments.append(when)

    watch(root, "jobs/train.py", "--num-workers", 2, "--storage-path", storage, *flags, on_line=on_line)
    return moments[1] - moments[0]


def seconds_to_sweep(root: Path, storage: Path, flags: Sequence[object]) -> float:
    """Return the seconds of a sweep whose trials have two workers, including the training of the best.

    Starts a cluster: on a local Ray the earlier version never starts a second trial of several workers.
    """
    with cluster() as address:
        trials = ("--num-trials", 16, "--num-epochs", 1, "--num-workers", 2)
        return watch(root, "jobs/tune.py", *trials, "--storage-path", storage, *flags, address=address).seconds


@contextlib.contextmanager
def cluster(num_cpus: int = 2) -> Iterator[str]:
    """Run ``ray start --head``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--head", "--block", f"--num-cpus={num_cpus}", f"--port={port}", "--disable-usage-stats")
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    process = subprocess.Popen(
        ray_start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        if not any("will now block" in line for line in process.stdout):
            raise RuntimeError("ray start --head exited before it was ready")
        yield f"127.0.0.1:{port}"
    finally:
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()


def one_version(root: Path, storage: Path, flags: Sequence[object], parts: Sequence[str]) -> dict[str, float]:
    """Run the jobs of one version; return the measurements by name."""
    where = ["--storage-path", storage, *flags]
    figures: dict[str, float] = {}
    if "one" in parts:
        one = watch(root, "jobs/train.py", *where)
        figures |= {"first_line_s": one.lines[0][0], "start_s": one.at("started"), "exit_s": one.seconds}
        figures |= {"cpu_outside_s": sum(one.cpu_s.values()) - one.training_cpu_s, "rate": one.rate()}
    if "four" in parts:
        four = watch(root, "jobs/train.py", "--num-workers", 4, "--num-epochs", 1, *where, num_epochs=1)
        figures |= {"start_four_s": four.at("started"), "pss_four_mib": four.pss_mib}
    if "restart" in parts:
        figures["restart_s"] = seconds_to_restart(root, storage, flags)
    if "sweep" in parts:
        figures["sweep_s"] = seconds_to_sweep(root, storage, flags)
    return figures


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """Let other processes compute meanwhile, each in a session of its own: Linux first divides cores among sessions."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path | None]:
    """Extract and compile a version, in a temporary folder. None if a shallow clone's history lacks it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True, check=False)
        if archive.returncode != 0:
            yield None
            return
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        compileall.compile_dir(folder, quiet=2)  # else each process would compile
        yield Path(folder)


def this_version() -> str:
    """Return a commit with the tracked files as they are now."""
    made = subprocess.run(["git", "-C", ROOT, "stash", "create"], capture_output=True, text=True, check=True)
    return made.stdout.strip() or "HEAD"


def one_round(
    storage: Path,
    flags: Sequence[object] = (),
    parts: Sequence[str] = PARTS,
    before: str = BEFORE,
    *,
    is_before_first: bool = False,
) -> dict[str, float]:
    """Run both versions; return their measurements, with the prefix ``before_`` for the earlier version."""
    figures: dict[str, float] = {}
    with checked_out(before) as earlier, checked_out(this_version()) as now:  # both in the same kind of folder
        versions = {"now": now, "before": earlier}
        for name in sorted(versions, reverse=not is_before_first):
            if (root := versions[name]) is not None:
                measured = one_version(root, storage / name, flags, parts)
                figures |= {key if name == "now" else f"before_{key}": value for key, value in measured.items()}
    return figures


def main() -> None:
    """Run the rounds and print the ratios of each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile")
    parser.add_argument("--before", default=BEFORE, help="commit of the earlier version")
    args = parser.parse_args()
    with checked_out(args.before) as root:
        if root is None:
            parser.error(f"this clone has no commit {args.before}")
    rounds = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder, busy(args.busy):
            is_before_first = number % 2 == 1
            rounds.append(one_round(Path(folder), (), args.parts, args.before, is_before_first=is_before_first))
            print(f"round {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)
    for name in rounds[0]:
        if f"before_{name}" in rounds[0]:
            pairs = [(figures[name], figures[f"before_{name}"]) for figures in rounds]
            ratios = sorted(now / before for now, before in pairs)
            now, before = (statistics.median(values) for values in zip(*pairs, strict=True))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"{name:<14} {now:10,.2f} / {before:10,.2f}  {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
