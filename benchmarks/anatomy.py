"""Where the time goes: python benchmarks/anatomy.py step, or: python benchmarks/anatomy.py start

`step` profiles training steps in this process with torch.profiler. `start` runs the training job and prints its output
and its processes: when each started, and how much CPU time it had used when it was first seen under its name.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from mnist_ray.cluster.environment import keep_freed_memory
from mnist_ray.config import TrainConfig
from mnist_ray.training import engine
from mnist_ray.training.batches import batch_loader, batches_of
from mnist_ray.training.sampler import ShardedBatchSampler
from mnist_ray.training.state import Group
from mnist_ray.workload import loading
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"


def profile_steps(batch_size: int, precision: str, num_threads: int, num_steps: int) -> None:
    """Print the time of each operator over ``num_steps`` steps, after ten warm-up steps."""
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    workload = loading.load(loading.DEFAULT)()
    split = Split(load_data(workload).train)
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


def name_of(process: psutil.Process) -> str:
    """Return the names of a process's scripts, or of its program if it has none."""
    words = process.cmdline() or [process.name()]
    scripts = [Path(word).name for word in words if word.endswith(".py")]
    return (" ".join(scripts) or Path(words[0]).name).split("(")[0].strip()


def main() -> None:
    """Profile steps, or watch a start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "start"], help="profile training steps, or watch the start of a job")
    parser.add_argument("--batch-size", type=int, default=128, help="for `step`, like all that follow")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.what == "step":
        profile_steps(args.batch_size, args.precision, args.threads, args.steps)
    else:
        watch_start()


if __name__ == "__main__":
    main()
