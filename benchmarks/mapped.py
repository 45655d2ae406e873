"""Training on memory-mapped data that do not fit into memory, beside the same in memory: python benchmarks/mapped.py

Makes a sparse file of --gib GiB of images in --folder, and trains on it with the default recipe's network for --steps
steps, in turns with data in memory whose examples have the same shape. Prints images a second, and what the training
process and the processes that read for it hold of their own, after a tenth of the steps and at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from loop import timed_steps

from mnist_ray.config import TrainConfig
from mnist_ray.training import engine
from mnist_ray.training.state import Group
from mnist_ray.workload import loading
from mnist_ray.workload.data import Arrays, Split

SHAPE = (28, 28)
NUM_IN_MEMORY = 60_000
BATCH_SIZE = 128


def make(folder: Path, gib: float, is_cold: bool) -> None:
    """Write images that take no room on the disk, and labels; read them into the page cache, unless it is cold."""
    number = int(gib * 2**30 / np.prod(SHAPE))
    np.lib.format.open_memmap(folder / "inputs.npy", "w+", np.uint8, (number, *SHAPE))
    with (folder / "inputs.npy").open("rb", buffering=0) as file:
        while not is_cold and file.read(2**24):
            pass
    np.save(folder / "targets.npy", np.random.default_rng(0).integers(10, size=number, dtype=np.uint8))


def own_mib() -> float:
    """Return what this process and its children hold that no file backs, in MiB."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        total += int(status.partition("RssAnon:")[2].split()[0])
    return total / 2**10


def train(folder: Path | None, num_steps: int, num_loaders: int) -> dict[str, float]:
    """Train on the mapped images of a folder, or on some in memory; return the rate and the memory."""
    workload, group = loading.load(loading.DEFAULT)(metadata={"class_names": [*range(10)]}), Group()
    config = TrainConfig(
        precision=engine.resolve_precision("auto", group),
        batch_size=BATCH_SIZE,
        schedule="constant",
        num_epochs=1000,
        checkpoint_every=10**9,
    )
    timed = timed_steps(workload, Split(arrays_of(folder)), config, group, num_steps, num_loaders, own_mib)
    return {"rate": BATCH_SIZE / timed.step_s, "mib_before": timed.early, "mib_after": timed.late}


def arrays_of(folder: Path | None) -> Arrays:
    """Return the mapped arrays of a folder, or some in memory."""
    if folder is not None:
        return Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("inputs", "targets")))
    labels = np.random.default_rng(0).integers(10, size=NUM_IN_MEMORY, dtype=np.uint8)
    return Arrays(np.zeros((NUM_IN_MEMORY, *SHAPE), np.uint8), labels)


def measured(folder: Path | None, args: argparse.Namespace) -> dict[str, float]:
    """Train in a process of its own."""
    which = [] if folder is None else ["--train-on", str(folder)]
    command = [sys.executable, __file__, "--steps", str(args.steps), "--loaders", str(args.loaders), *which]
    done = subprocess.run([*command, "--one"], check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Read the flags, train in turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="read nothing into the page cache before")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train-on", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(args.train_on, args.steps, args.loaders)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make(Path(folder), args.gib, args.cold)
        rounds = [(measured(Path(folder), args), measured(None, args)) for _ in range(args.rounds)]
    ratios = sorted(mapped["rate"] / memory["rate"] for mapped, memory in rounds)
    print(f"images/s mapped / in memory: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name, runs in zip(("mapped", "in memory"), zip(*rounds, strict=True), strict=True):
        rate, before, after = (
            statistics.median(run[key] for run in runs) for key in ("rate", "mib_before", "mib_after")
        )
        print(f"{name}: {rate:,.0f} images/s, {before:,.0f} MiB at a tenth of the steps, {after:,.0f} MiB at the end")


if __name__ == "__main__":
    main()
