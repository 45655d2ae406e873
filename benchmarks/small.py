"""Small workloads, and a callback that kills its process, for the set-ups of ``same.py``.

Two versions of the project read this file, so it uses only what both have.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

from mnist_ray.data.sources import Parquet
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Arrays, Data, Regression, setting

COLUMNS = [*"abcdef"]
NUM_TRAIN, NUM_TEST = 600, 200
RUN = "SAME_RUN"
"""The environment variable with the folder of the run that ``Dies`` kills."""

DEAD = "killed-once"
"""The file beside that folder that says that ``Dies`` has killed a process."""


def rows(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random inputs, (number, 6), and targets, (number,), a noisy function of them."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((number, len(COLUMNS))).astype(np.float32)
    targets = np.sin(inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] + 0.1 * rng.standard_normal(number)
    return inputs, targets.astype(np.float32)


class Network(nn.Module):
    """Blocks that FSDP can shard, with what must be alike on all ranks: running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(len(COLUMNS), 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1)) for _ in range(2)
        )
        self.last = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a prediction for each example, (N, 1)."""
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        prediction: Tensor = self.last(hidden)
        return prediction


class Table(Regression):
    """A table in memory."""

    recipes = {"default": {"num_epochs": 2, "batch_size": 20, "learning_rate": 1e-2, "precision": "fp32"}}

    def load_data(self) -> Data:
        """Return the table."""
        return Data(Arrays(*rows(NUM_TRAIN, 0)), Arrays(*rows(NUM_TEST, 1)))

    def create_model(self) -> nn.Module:
        """Return the network."""
        return Network()

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Return the inputs; in training with noise."""
        if generator is None:
            return inputs
        return inputs + 0.01 * torch.randn(inputs.shape, generator=generator, device=inputs.device)


class Noisy(Dataset):
    """A ``Dataset`` whose examples have random numbers of their own."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.float32]:
        noise = 0.01 * np.random.standard_normal(len(COLUMNS)) + 0.01 * torch.rand(1).item()
        return self._inputs[index] + noise.astype(np.float32), self._targets[index]


class Listed(Table):
    """A ``Dataset``."""

    def load_data(self) -> Data:
        """Return the table, to be read example by example."""
        return Data(Noisy(*rows(NUM_TRAIN, 0)), Arrays(*rows(NUM_TEST, 1)))


class Weighted(Table):
    """Examples that are drawn by weight."""

    def load_data(self) -> Data:
        """Return the table with weights."""
        weights = np.random.default_rng(2).random(NUM_TRAIN)
        return Data(Arrays(*rows(NUM_TRAIN, 0)), Arrays(*rows(NUM_TEST, 1)), weights=weights)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the Parquet files are."""

    table: str = setting("", "folder with train/ and test/", decides_data=True)


class Stored(Table):
    """Parquet files, in blocks."""

    Settings = Settings

    def load_data(self) -> Data:
        """Return the files' rows."""
        columns = [*COLUMNS, "target"]
        train, test = (Parquet(f"{self.settings.table}/{name}", columns=columns) for name in ("train", "test"))
        return Data(train, test)


class Dies(Callback):
    """Kills its process once: after the fifth step of the second epoch, when the first one's checkpoint is saved."""

    def on_step(self, state: Any) -> None:
        """Kill this process if none has been killed."""
        run = Path(os.environ[RUN])
        dead = run.with_name(DEAD)
        if (state.epoch, state.step) != (1, 5) or dead.exists():
            return
        while not (run / "checkpoint_epoch-001_step-000000" / "state.json").exists():
            time.sleep(0.02)
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
