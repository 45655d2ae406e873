"""The notebook's network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CNN(nn.Module):
    """Three convolutions with ReLU and 2×2 max-pooling, then two dense layers; 49,770 parameters for ten classes.

    Pooling comes before ReLU. Max and ReLU commute, so the result does not change, but ReLU has a quarter of the work.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(64, 64)
        self.dense2 = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) in [0, 1] to logits (N, classes)."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))  # (N, 32, 12, 12)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 4, 4)
        x = F.relu(F.max_pool2d(self.conv3(x), 2))  # (N, 64, 1, 1)
        x = F.relu(self.dense1(x.flatten(1)))
        return self.dense2(x)
