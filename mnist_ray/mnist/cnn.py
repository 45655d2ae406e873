"""The notebook's network, and the augmentation of its images."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

_TURN, _SHEAR = math.radians(15), 0.3
_LOG_SCALE = 0.2  # natural logarithm of the largest scale of an axis
_SHIFT = 0.15  # as a fraction of half the image's width
_BLURRED, _THICKENED = 1 / 4, 1 / 6  # fractions of the batches


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


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Turn, scale, shear and move each image, (N, 1, H, W) in [0, 1]; blur or thicken all images of some batches."""
    if len(images) == 0:  # affine_grid refuses an empty batch
        return images

    def within(limit: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=images.device)
        return (2 * drawn - 1) * limit

    turn, shear = within(_TURN), within(_SHEAR)
    wide, high = within(_LOG_SCALE).exp(), within(_LOG_SCALE).exp()
    right, down = within(_SHIFT), within(_SHIFT)
    cos, sin = turn.cos(), turn.sin()
    # affine_grid takes the inverse map, from each new pixel to where it comes from.
    rows = [torch.stack([cos / wide, (shear - sin) / wide, right], 1), torch.stack([sin / high, cos / high, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    drawn = torch.rand(1, generator=generator, device=images.device).item()
    if drawn < _BLURRED:
        return (F.avg_pool2d(moved, 3, stride=1, padding=1) * 1.5).clamp(max=1)
    if drawn < _BLURRED + _THICKENED:
        return F.max_pool2d(F.pad(moved, (0, 1, 0, 1)), 2, stride=1)
    return moved
