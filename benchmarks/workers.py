"""What workers cost besides their training, as they grow in number: python benchmarks/workers.py

Trains a model whose steps cost next to nothing on 1, 2, 4, … workers of one CPU each, on one raylet and on eight which
share this machine's cores. Prints seconds from the start of the job until the workers train, milliseconds of a
checkpoint, seconds from a worker's kill until the others train with a new one, and what comes through the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

TINY = Path(__file__).parent / "peers" / "tiny.py"
NUM_EPOCHS = 4
CHECKPOINT_EVERY = 5  # of 50 steps an epoch


def train(num_workers: int, storage: str) -> dict[str, float]:
    """Run a job but for its console, files and evaluation; return what came through the driver, and when."""
    begun = time.monotonic()
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
    sys.argv[1:] = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    from mnist_ray import environment
    from mnist_ray.forking.local import prepare_forking
    from mnist_ray.runs.job import load_data, read_job

    job = read_job()
    environment.prepare(verbose=False)
    forking = prepare_forking(job.workers, "mnist_ray.runs.fit")
    job, data = load_data(job)
    from mnist_ray.cluster.connection import connect

    with connect(job.workers, forking) as cluster:
        from mnist_ray.cluster.plan import plan_workers
        from mnist_ray.runs.fit import fit
        from mnist_ray.training.events import EpochFinished, Event, Started

        seen: list[tuple[float, Event]] = []
        killed: list[float] = []

        def on_event(event: Event) -> None:
            seen.append((time.monotonic(), event))
            if isinstance(event, EpochFinished) and event.last.epoch == 2 and not killed:
                workers = [process for process in psutil.process_iter() if process.name().startswith("ray::RayTrainWo")]
                workers[-1].kill()
                killed.append(time.monotonic())

        fit(job, data, plan_workers(job.workers, cluster), on_event)
    started = [when for when, event in seen if isinstance(event, Started)]
    first = next(event for when, event in seen if isinstance(event, EpochFinished))
    first_end = next(when for when, event in seen if isinstance(event, EpochFinished))
    trained = [(when, event) for when, event in seen if started[0] <= when <= first_end]
    num_checkpoints = first.last.num_steps // CHECKPOINT_EVERY - 1
    return {
        "start_s": started[0] - begun,
        "checkpoint_ms": (first_end - started[0] - first.last.epoch_s) / num_checkpoints * 1e3,
        "restart_s": started[1] - killed[0],
        "events_per_s": len(trained) / (first_end - started[0]),
        "bytes_per_s": sum(len(pickle.dumps(event)) for _, event in trained) / (first_end - started[0]),
    }


def measured(num_workers: int, num_raylets: int) -> dict[str, float]:
    """Train in a process of its own, on a cluster of its own."""
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
    """Read the flags, and print a row for each number of workers."""
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
