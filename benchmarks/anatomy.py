"""Where the time goes: python benchmarks/anatomy.py step, or: start, or: sweep

`step` profiles training steps in this process with torch.profiler. `start` runs the training job and prints its output
and its processes: when each started, and how much CPU time it had used when it was first seen under its name. `sweep`
runs one-epoch trials and prints a timeline of each process that trains them, and what its time was used for.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray.tune
import torch
from torch.profiler import ProfilerActivity, profile

from mnist_ray.cluster.environment import keep_freed_memory
from mnist_ray.cluster.remote_data import RemoteSplit
from mnist_ray.config import TrainConfig
from mnist_ray.sweep import search, trial, tuner
from mnist_ray.sweep.tune import read_sweep, tune
from mnist_ray.training import checkpoint, engine
from mnist_ray.training.batches import batch_loader, batches_of
from mnist_ray.training.sampler import ShardedBatchSampler
from mnist_ray.training.state import Group
from mnist_ray.workload import loading
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import data_of

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"


def profile_steps(batch_size: int, precision: str, num_threads: int, num_steps: int) -> None:
    """Print the time of each operator over ``num_steps`` steps, after ten warm-up steps."""
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    workload = loading.load(loading.DEFAULT)()
    split = Split(data_of(workload).train)
    group = Group()
    config = TrainConfig(batch_size=batch_size, precision="bf16" if precision == "bf16" else "fp32")
    state = engine.create_state(workload, config, len(split), group.device)
    dataset = batches_of(split, group.device)
    samplers = (ShardedBatchSampler(len(split), batch_size, seed=0, epoch=epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(batch_loader(dataset, sampler, group.device) for sampler in samplers)

    def train(steps: int) -> None:
        for _ in range(steps):
            engine.backward(workload, state.model, next(batches), config, 1 / batch_size)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.scheduler.step()

    train(10)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(num_steps)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


def watch_start() -> None:
    """Run the training job; print its output and its processes as they appear."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, str(TRAIN), "--storage-path", storage]
        start = time.time()
        job = psutil.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines = threading.Thread(target=print_lines, args=(job, start))
        lines.start()
        names: dict[int, str] = {}
        while job.poll() is None:
            for process in job.children(recursive=True):
                try:
                    name, times = name_of(process), process.cpu_times()
                    if names.get(process.pid) != name:
                        names[process.pid] = name
                        started, used = process.create_time() - start, times.user + times.system
                        print(f"{time.time() - start:6.2f}  {name:<34} started {started:5.2f}, CPU {used:.2f} s")
                except psutil.Error:  # it has just exited
                    continue
            time.sleep(0.05)
        lines.join()
        print(f"{time.time() - start:6.2f}  exit")


def print_lines(job: psutil.Popen, start: float) -> None:
    """Print each line of a job with its time."""
    for line in job.stdout:
        print(f"{time.time() - start:6.2f}  | {line.rstrip()}", flush=True)


def watch_sweep(num_trials: int) -> None:
    """Run trials of one worker and one epoch; print when each process did what, and the sum of each."""
    with tempfile.TemporaryDirectory() as storage:
        times = Path(storage) / "times"
        settings = {"num_trials": num_trials, "scheduler": "none", "num_confirmed": 0, "num_epochs": 1}
        sweep = read_sweep({**settings, "storage_path": storage, "run_name": "sweep", "quiet": True})
        with contextlib.ExitStack() as patched:
            patched.enter_context(patch.object(tuner, "run_trial", functools.partial(timed_trial, times=str(times))))
            patched.enter_context(patch.object(search, "run_sweep", timed(tuner.run_sweep, times)))
            patched.enter_context(patch.object(search, "train_chosen"))
            tune(sweep)
        print_times([tuple(json.loads(line)) for line in times.read_text().splitlines()])


def timed_trial(tune_config: dict[str, Any], spec: trial.TrialSpec, times: str) -> None:
    """Run a trial, and note when it did what."""
    parts = {
        "data": (RemoteSplit, "open"),
        "model": (engine, "create_state"),
        "restore": (checkpoint, "restore_newest"),
        "train": (engine, "train"),
        "validate": (engine, "evaluate_together"),
        "save": (checkpoint.Snapshot, "write"),
        "report": (ray.tune, "report"),
    }
    with contextlib.ExitStack() as patched:
        for name, (owner, attribute) in parts.items():
            patched.enter_context(patch.object(owner, attribute, timed(getattr(owner, attribute), Path(times), name)))
        timed(trial.run_trial, Path(times), "trial")(tune_config, spec)


def timed(function: Callable[..., Any], times: Path, name: str = "sweep") -> Callable[..., Any]:
    """Return the function, which appends its name, its process, and when it started and ended to a file."""

    def call(*args: Any, **options: Any) -> Any:
        start = time.time()
        try:
            return function(*args, **options)
        finally:
            with times.open("a") as file:
                file.write(json.dumps([name, os.getpid(), start, time.time()]) + "\n")

    return call


def print_times(calls: list[tuple[str, int, float, float]]) -> None:
    """Print a line for each trial in the order of its process, and the sums."""
    ((_, _, begin, end),) = (call for call in calls if call[0] == "sweep")
    sums: defaultdict[str, float] = defaultdict(float)
    processes = {process for name, process, *_ in calls if name == "trial"}
    for process in sorted(processes):
        print(f"process {process}")
        own, before = [call for call in calls if call[1] == process], begin
        for _, _, start, stop in (call for call in own if call[0] == "trial"):
            parts: defaultdict[str, float] = defaultdict(float)
            for name, _, first, last in own:
                if start <= first and last <= stop:
                    parts[name] += last - first
            parts["train"] -= parts["validate"] + parts["save"] + parts["report"]
            parts["other"] = 2 * parts.pop("trial") - sum(parts.values()) - (stop - start)
            parts["between"] = start - before
            print(f"{start - begin:7.2f} to {stop - begin:6.2f} s: {as_text(parts)}")
            for name, seconds in parts.items():
                sums[name] += seconds
            before = stop
        sums["after"] += end - before
    ratio = (end - begin) * len(processes) / sums["train"]
    print(f"all {len(processes)} processes: {as_text(sums)}")
    print(f"{end - begin:.2f} s, {ratio:.3f} of what the training alone would take")


def as_text(parts: dict[str, float]) -> str:
    """Return the seconds of each part."""
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def name_of(process: psutil.Process) -> str:
    """Return the names of a process's scripts, or of its program if it has none."""
    words = process.cmdline() or [process.name()]
    scripts = [Path(word).name for word in words if word.endswith(".py")]
    return (" ".join(scripts) or Path(words[0]).name).split("(")[0].strip()


def main() -> None:
    """Profile steps, or watch a start or a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "start", "sweep"], help="profile steps, or watch a start or a sweep")
    parser.add_argument("--batch-size", type=int, default=128, help="for `step`, like all that follow")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.what == "step":
        profile_steps(args.batch_size, args.precision, args.threads, args.steps)
    elif args.what == "start":
        watch_start()
    else:
        watch_sweep(num_trials=16)


if __name__ == "__main__":
    main()
