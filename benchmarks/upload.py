"""How long large checkpoints stop the training if storage is slow: python benchmarks/upload.py

Trains a model of 34 million parameters for three epochs, with two checkpoints of 400 MB in each. The storage is first
this machine's disk, then an S3 server behind a slow link. Prints for how many seconds checkpoints stopped the training.
Needs root, iproute2 and pip install 'moto[server]'; takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from events import run_job
from scaling import ADDRESSES, HOSTS, Link, linked

from mnist_ray.training.events import EpochFinished

WIDE = Path(__file__).parent / "peers" / "wide.py"
S3_PORT = 5555
BUCKET = f"http://{ADDRESSES[1]}:{S3_PORT}/bucket"
STORAGE = f"s3://bucket/runs?endpoint_override={ADDRESSES[1]}:{S3_PORT}&scheme=http&region=us-east-1"


def train(storage: str) -> dict[str, float]:
    """Train; return the seconds trained, stopped, and after the last step."""
    heard = run_job(
        {
            "workload": WIDE,
            "num_workers": 2,
            "cpus_per_worker": 1,
            "num_epochs": 3,
            "batch_size": 64,
            "checkpoint_every": 100,
            "validation_size": 0,
            "precision": "fp32",
            "storage_path": storage,
            "run_name": "run",
        }
    )
    after_s = heard.end_s - heard.times(EpochFinished)[-1]
    return {"trained_s": heard.trained_s, "stopped_s": heard.stopped_s, "after_s": after_s}


def measured(storage: str, prefix: list[str]) -> None:
    """Train in a new process; print a row."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    command = [*prefix, sys.executable, __file__, "--one", storage]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['trained_s']:.1f} | {row['stopped_s']:.1f} | {row['after_s']:.1f} |", flush=True)


def main() -> None:
    """Print a row for each storage."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(train(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabit-s", type=float, default=400, help="speed of the link")
    parser.add_argument("--moto-server", default=shutil.which("moto_server"), help="path of the program")
    args = parser.parse_args()
    print("| storage | training, s | stopped by checkpoints, s | from the last step to the end, s |\n|---|---|---|---|")
    for name in ("disk", "S3"):
        with linked(Link(args.megabit_s)), tempfile.TemporaryDirectory() as folder:
            serve = ["ip", "netns", "exec", HOSTS[1], args.moto_server, "-H", ADDRESSES[1], "-p", str(S3_PORT)]
            server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                inside = ["ip", "netns", "exec", HOSTS[0]]
                make = [*inside, sys.executable, "-c", f"import upload; upload.make_bucket({BUCKET!r})"]
                subprocess.run(make, cwd=Path(__file__).parent, check=True)
                print(f"| {name} | ", end="", flush=True)
                measured(STORAGE if name == "S3" else folder, inside)
            finally:
                server.kill()


def make_bucket(url: str, within_s: float = 30.0) -> None:
    """Create a bucket as soon as the server answers."""
    end = time.monotonic() + within_s
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
