"""Measure how the seconds of a long test fall with the number of CPUs.

    python benchmarks/testing.py --rounds 3     # 2 minutes on two cores

Guards the time of a test: as many tasks as there are workers share it, each with a thread on each of its CPUs.

The test set has 100,000 images: those of MNIST ten times. In each round, a job with one worker on one CPU, one on two
CPUs, one with two workers, and so on, as far as this machine has cores. Prints the seconds from the end of the training
to the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mnist_ray.mnist import MNIST, idx
from mnist_ray.workload import Arrays, Data

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"


class ManyTests(MNIST):
    """MNIST with few images to train on, and many to test."""

    def load_data(self) -> Data:
        """Return 2,000 images for the training, 10,000 for the validation, and 100,000 for the test."""
        train, test = idx.load("train"), idx.load("test")
        few = Arrays(train.inputs[:2000], train.targets[:2000])
        return Data(few, Arrays(np.tile(test.inputs, (10, 1, 1)), np.tile(test.targets, 10)), test)


def seconds_of_test(num_workers: int, cpus: int, folder: Path) -> float:
    """Run a job; return the seconds of its test."""
    job = [sys.executable, TRAIN, "--workload", f"{__file__}:ManyTests", "--storage-path", folder, "--run-name", "run"]
    flags = ["--num-workers", num_workers, "--cpus-per-worker", cpus, "--num-epochs", 1]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    subprocess.run([*map(str, job + flags)], check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds: float = json.loads((folder / "run" / "result.json").read_text())["seconds"]["evaluation"]
    return seconds


def main() -> None:
    """Run the rounds, and print each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    settings = [(1, cpus) for cpus in (1, 2, 4) if cpus <= cores] + [(n, 1) for n in (2, 4) if n <= cores]
    for number in range(args.rounds):
        for num_workers, cpus in settings:
            with tempfile.TemporaryDirectory() as folder:
                seconds = seconds_of_test(num_workers, cpus, Path(folder))
            print(f"round {number + 1}: {num_workers} × {cpus} CPUs: {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
