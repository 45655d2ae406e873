"""Measure checkpoints with and without a frozen base: bytes, and seconds of copying, writing and restoring.

    python benchmarks/frozen.py    # 3 minutes on two cores, with 4 GiB of memory

A base of 100 million parameters comes from a file; beside each of its layers, matrices of low rank are trained, as by
LoRA. Guards that with ``keeps_frozen = False`` the cost of a checkpoint is that of what is trained. Both kinds take
turns; prints medians of the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from mnist_ray.checkpoints import checkpoint
from mnist_ray.config import TrainConfig
from mnist_ray.parallel.group import Group
from mnist_ray.storage import RunFolder, locate
from mnist_ray.training import engine
from mnist_ray.training.state import TrainingState
from mnist_ray.workload import Regression

WIDTH, DEPTH, RANK = 2048, 24, 8  # 100.7 million frozen parameters, 0.8 million trained
CONFIG = TrainConfig(optimizer="adamw", precision="fp32", batch_size=4)
COLUMNS = ("MB", "s to copy", "s to write", "s to restore", "s to create")


class LowRank(nn.Module):
    """A frozen layer, and a trained matrix of low rank that is added to it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both, after a non-linearity."""
        outputs: Tensor = torch.tanh(inputs @ self.weight + self.up(self.down(inputs)))
        return outputs


class Adapted(Regression):
    """Learns with adapters beside a base from a file."""

    file = Path()

    def create_model(self) -> nn.Module:
        """Return the base with adapters."""
        return nn.Sequential(*(LowRank(weight) for weight in load_file(self.file).values()))


def workload_of(file: Path, *, keeps_frozen: bool) -> Regression:
    """Return the workload."""
    return type("Adapted", (Adapted,), {"file": file, "keeps_frozen": keeps_frozen})()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def step(state: TrainingState) -> None:
    """Give the optimizer its state."""
    state.model(torch.ones(CONFIG.batch_size, WIDTH)).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def measure(workload: Regression, config: TrainConfig, folder: RunFolder) -> list[float]:
    """Create, train, save and restore; return the COLUMNS."""

    def create() -> TrainingState:
        return engine.create_state(workload, config, 4 * config.batch_size, Group())

    create_s, state = seconds(create)
    step(state)
    copy_s, taken = seconds(lambda: checkpoint.snapshot(state, {"workload": {}}))
    write_s, _ = seconds(lambda: taken.write(folder))
    num_bytes = sum(file.stat().st_size for file in Path(folder.path).iterdir())
    restored = create()
    restore_s, _ = seconds(lambda: checkpoint.restore(folder, restored))
    return [num_bytes / 1e6, copy_s, write_s, restore_s, create_s]


def main(num_rounds: int) -> None:
    """Measure all kinds in turn, and print a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {num_rounds} rounds, medians\n")
    print(f"| `--ema-decay` | `keeps_frozen` | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    kinds = [(decay, keeps) for decay in (None, 0.99) for keeps in (True, False)]
    found: dict[Any, list[list[float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base.safetensors"
        save_file({f"{number:02d}": torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for number in range(DEPTH)}, base)
        for number in range(num_rounds + 1):
            for decay, keeps in kinds:
                workload = workload_of(base, keeps_frozen=keeps)
                folder = locate(name, f"{number}-{decay}-{keeps}")
                row = measure(workload, replace(CONFIG, ema_decay=decay), folder)
                folder.filesystem.delete_dir(folder.path)
                if number:  # the first round warms up
                    found[decay, keeps].append(row)
    for (decay, keeps), rows in found.items():
        cells = [f"{statistics.median(values):,.3g}" for values in zip(*rows, strict=True)]
        print(f"| {decay or '–'} | {keeps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    main(parser.parse_args().rounds)
