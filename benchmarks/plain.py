"""Compare the start of ``--plain-ray`` with that of the script in Ray's guide.

    python benchmarks/plain.py                # about 6 minutes on two cores
    python benchmarks/plain.py --rounds 2     # about 3 minutes

Guards the plain form: with Ray's public API alone, a worker trains no later than that of Ray's own script.

Runs ``jobs/train.py --plain-ray --num-workers 1`` and ``peers/minimal_ray.py`` in turn, and measures the seconds from
the start of the command until the worker trains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from before import ROOT, watch
from bench import write_images

from mnist_ray.mnist import idx


def seconds_of_guide(data: Path) -> float:
    """Return the seconds until the worker of the guide's script trains."""
    start = time.time()
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "minimal_ray.py"), str(data), "1", "1"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    begun_at: float = json.loads(done.stdout.splitlines()[-1])["begun_at"]
    return begun_at - start


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args, ratios = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder), (idx.load("train"), idx.load("test")))
        flags = ("--num-workers", 1, "--num-epochs", 1, "--plain-ray", "--storage-path", folder)
        for number in range(args.rounds):
            plain = watch(ROOT, "jobs/train.py", *flags, num_epochs=1).at("started")
            guides = seconds_of_guide(data)
            ratios.append(plain / guides)
            print(f"round {number + 1}: {plain:.1f} s, guide {guides:.1f} s: {ratios[-1]:.2f}", flush=True)
    print(f"median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
