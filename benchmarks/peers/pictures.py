"""What the programs that train on pictures have in common: the pictures, the network, and the recipe."""

from __future__ import annotations

import os
from pathlib import Path

import table
import torch
from measuring import Clock
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset
from torchvision import datasets, models, transforms

BATCH_SIZE, NUM_EPOCHS, LEARNING_RATE, LOADERS = 32, 3, 2e-3, 2
SIZES = {"train": 2400, "validation": 400, "test": 800}


class Pictures(Dataset):
    """The first digits of MNIST as coloured pictures of 64 × 64, (3, 64, 64) from 0 to 1, and their labels.

    ``split`` is one of SIZES. The pictures of the training set are augmented.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        digits = datasets.MNIST(folder, train=split != "test")
        first = SIZES["train"] if split == "validation" else 0
        chosen = slice(first, first + SIZES[split])
        self._pictures, self._labels = digits.data[chosen].numpy(), digits.targets[chosen].tolist()
        augmented = [transforms.Resize(72), transforms.RandomRotation(10), transforms.RandomCrop(64)]
        steps = augmented if split == "train" else [transforms.Resize(64)]
        self._transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pictures[index]).convert("RGB")), self._labels[index]


def new_network() -> nn.Module:
    """Return a ResNet-18 for ten classes."""
    network: nn.Module = models.resnet18(num_classes=10)
    return network


def adam(network: nn.Module) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    """Return the optimizer and the schedule."""
    return table.adam(network, LEARNING_RATE, NUM_EPOCHS * -(-SIZES["train"] // BATCH_SIZE))


def set_up() -> Clock:
    """Use all cores, and the same initial weights; return a clock."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return Clock()
