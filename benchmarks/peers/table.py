"""What the programs that train on a table have in common: its rows, its network, and its recipe."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

BATCH_SIZE, NUM_EPOCHS, LEARNING_RATE = 32, 5, 1e-3
SIZES = {"train": 100_000, "validation": 10_000, "test": 20_000}
STEPS_PER_EPOCH = -(-SIZES["train"] // BATCH_SIZE)


def rows_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs (N, 20) and targets (N,): a function that the network can learn, and noise."""
    of_all, own = np.random.default_rng(0), np.random.default_rng([*SIZES].index(split) + 1)
    inputs = own.standard_normal((SIZES[split], 20), dtype=np.float32)
    targets = np.tanh(inputs @ of_all.standard_normal(20)) + 0.1 * own.standard_normal(SIZES[split])
    return inputs, targets.astype(np.float32)


def tensors_of(split: str) -> TensorDataset:
    """Return the same rows as tensors."""
    return TensorDataset(*map(torch.from_numpy, rows_of(split)))


def new_network() -> nn.Module:
    """Return the network, which returns (N, 1)."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))


def adam(
    network: nn.Module, learning_rate: float = LEARNING_RATE, num_steps: int = NUM_EPOCHS * STEPS_PER_EPOCH
) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    """Return the optimizer and the schedule."""
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    return optimizer, OneCycleLR(optimizer, learning_rate, num_steps, cycle_momentum=False)


def squared(network: nn.Module, rows: TensorDataset) -> Tensor:
    """Return the mean squared error of all rows."""
    inputs, targets = rows.tensors
    return nn.functional.mse_loss(network(inputs).squeeze(1), targets)
