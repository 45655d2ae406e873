"""Measure the overhead of workers as their number grows: python benchmarks/workers.py

Trains a model whose steps take almost no time on 1, 2, 4, … workers of one CPU each, on one raylet and on eight that
share this machine's cores. Prints the seconds until the workers train, the milliseconds of a checkpoint, the seconds
from a worker's kill until training continues with a new one, and the events and bytes/s that reach the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from events import run_job
from hosts import training_pids

from mnist_ray.training.events import EpochFinished, Event, Started

TINY = Path(__file__).parent / "peers" / "tiny.py"
NUM_EPOCHS = 4
CHECKPOINT_EVERY = 5  # of 50 steps an epoch


def train(num_workers: int, storage: str) -> dict[str, float]:
    """Train, and kill a worker after the second epoch; return the measurements."""
    flags = {
        "workload": TINY,
        "num_workers": num_workers,
        "cpus_per_worker": 1,
        "num_epochs": NUM_EPOCHS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "validation_size": 0,
        "precision": "fp32",
        "storage_path": storage,
        "run_name": "run",
    }
    begun, killed = time.monotonic(), list[float]()

    def kill_once(event: Event) -> None:
        if isinstance(event, EpochFinished) and event.last.epoch == 2 and not killed:
            started_this = psutil.Process(os.getppid())
            raylets = [child.pid for child in started_this.children() if child.name().startswith("raylet")]
            os.kill(training_pids(raylets)[-1], signal.SIGKILL)
            killed.append(time.monotonic() - begun)

    heard = run_job(flags, kill_once)
    first, started, first_end = heard.epochs[0].last, heard.times(Started), heard.times(EpochFinished)[0]
    trained = [event for when, event in heard.events if started[0] <= when <= first_end]
    num_checkpoints = first.num_steps // CHECKPOINT_EVERY - 1
    return {
        "start_s": started[0],
        "checkpoint_ms": (first_end - started[0] - first.epoch_s) / num_checkpoints * 1e3,
        "restart_s": started[1] - killed[0],
        "events_per_s": len(trained) / (first_end - started[0]),
        "bytes_per_s": sum(len(pickle.dumps(event)) for event in trained) / (first_end - started[0]),
    }


def measured(num_workers: int, num_raylets: int) -> dict[str, float]:
    """Train in a new process, on a new cluster."""
    from ray.cluster_utils import Cluster

    cpus = max(num_workers, 2) if num_raylets == 1 else 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    for _ in range(num_raylets if num_raylets > 1 else 0):
        cluster.add_node(num_cpus=-(-num_workers // num_raylets))
    try:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        with tempfile.TemporaryDirectory() as storage:
            command = [sys.executable, __file__, "--one", str(num_workers), storage]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures
    finally:
        cluster.shutdown()


def main() -> None:
    """Print a row for each number of raylets and workers."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(train(int(sys.argv[2]), sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--raylets", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    print("| raylets | workers | start, s | checkpoint, ms | restart, s | events/s | bytes/s |")
    print("|---|---|---|---|---|---|---|")
    for num_raylets in args.raylets:
        for num_workers in args.workers:
            row = measured(num_workers, num_raylets)
            print(
                f"| {num_raylets} | {num_workers} | {row['start_s']:.1f} | {row['checkpoint_ms']:.0f} | "
                f"{row['restart_s']:.1f} | {row['events_per_s']:.1f} | {row['bytes_per_s']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
