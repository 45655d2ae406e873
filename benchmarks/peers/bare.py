"""The project's engine and recipe without Ray: one process with all cores, or several under DDP that share them.

    python benchmarks/peers/bare.py NUM_WORKERS NUM_EPOCHS     # one epoch: about 10 s on two cores

Guards, in bench.py, the speed of training under Ray: beside this engine, and beside plain DDP.

With --plain, DDP sums the gradients through gloo instead of shared memory. --data-dir DIR names other images. The last
line of the output is JSON.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Splits
from mnist_ray.data.splits import splits_of
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.process import keep_freed_memory
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of


class _Rates(Callback):
    """Records the images/s of each epoch."""

    def __init__(self) -> None:
        self.of_epochs: list[float] = []

    def on_epoch(self, state: TrainingState, progress: Progress) -> None:
        self.of_epochs.append(progress.examples_per_s)


def work(rank: int, args: argparse.Namespace, folder: str, workload: Workload, data: Splits) -> None:
    """Train as one rank; rank 0 writes the images/s of the first epoch to a file."""
    keep_freed_memory()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.num_workers))
    group = Group(rank, args.num_workers)
    if args.num_workers > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=args.num_workers)
    if args.plain:
        shared_memory.use_if_possible = lambda model: False
    settings = {**workload.recipes["default"], "num_epochs": args.num_epochs}
    config = TrainConfig(**settings, precision=resolve_precision("auto", group))
    state = create_state(workload, config, len(data.train), group)
    rates = _Rates()
    Trainer(workload, state, data.train, config, group, [rates]).train()
    if rank == 0:
        (Path(folder) / "rate").write_text(str(rates.of_epochs[0]))
    os._exit(0)


def main() -> None:
    """Train in ``num_workers`` processes, and print the images/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_workers", type=int)
    parser.add_argument("num_epochs", type=int)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    workload_class = loading.load(loading.DEFAULT)
    workload = workload_class(workload_class.Settings(data_dir=args.data_dir and Path(args.data_dir)))
    data = splits_of(data_of(workload), None)
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (args, folder, workload, data), nprocs=args.num_workers)
        print(json.dumps({"images_per_s": float((Path(folder) / "rate").read_text())}))


if __name__ == "__main__":
    main()
