"""Digits as other hands would have drawn them: turned, scaled, sheared, moved, with softer and thicker strokes."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_TURN, _SHEAR = math.radians(15), 0.3
_LOG_SCALE = 0.2  # of each axis
_SHIFT = 0.15  # of half the image's width
_BLURRED, _THICKENED = 1 / 4, 1 / 6  # of the batches


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Return images (N, 1, H, W) in [0, 1], each changed by chance, as ``generator`` draws it."""
    if len(images) == 0:  # which PyTorch makes no grid for
        return images

    def within(limit: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=images.device)
        return (2 * drawn - 1) * limit

    turn, shear = within(_TURN), within(_SHEAR)
    wide, high = within(_LOG_SCALE).exp(), within(_LOG_SCALE).exp()
    right, down = within(_SHIFT), within(_SHIFT)
    cos, sin = turn.cos(), turn.sin()
    # Where each pixel comes from: the inverse of what is done to the image.
    rows = [torch.stack([cos / wide, (shear - sin) / wide, right], 1), torch.stack([sin / high, cos / high, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    drawn = torch.rand(1, generator=generator, device=images.device).item()
    if drawn < _BLURRED:
        return (F.avg_pool2d(moved, 3, stride=1, padding=1) * 1.5).clamp(max=1)
    if drawn < _BLURRED + _THICKENED:
        return F.max_pool2d(F.pad(moved, (0, 1, 0, 1)), 2, stride=1)
    return moved
