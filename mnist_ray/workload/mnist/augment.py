"""Digits as other hands would have drawn them: turned, scaled, sheared, moved, with thinner and thicker strokes."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_TURN, _SHEAR = math.radians(15), 0.25
_SCALE = (0.75, 1.15)
_SHIFT = 0.12  # of the image's width
_STROKES = 0.25  # of the images are drawn thinner, as many thicker, and as many softer


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Return images (N, 1, H, W) in [0, 1], each changed by chance, as ``generator`` draws it."""
    if len(images) == 0:  # which PyTorch makes no grid for
        return images

    def between(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=images.device)
        return low + (high - low) * drawn

    turn, shear = between(-_TURN, _TURN), between(-_SHEAR, _SHEAR)
    wide, high = between(*_SCALE), between(*_SCALE)
    right, down = between(-2 * _SHIFT, 2 * _SHIFT), between(-2 * _SHIFT, 2 * _SHIFT)  # an image is 2 wide there
    cos, sin = turn.cos(), turn.sin()
    # Where each pixel comes from: the inverse of what is done to the image.
    rows = [torch.stack([cos / wide, (shear - sin) / wide, right], 1), torch.stack([sin / high, cos / high, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return _with_other_strokes(F.grid_sample(images, grid, align_corners=False), between(0, 1))


def _with_other_strokes(images: Tensor, drawn: Tensor) -> Tensor:
    """Thin the strokes of some images, thicken or soften those of others, by half of what a pixel around would do."""
    thick = (images + F.max_pool2d(images, 3, stride=1, padding=1)) / 2
    thin = (images - F.max_pool2d(-images, 3, stride=1, padding=1)) / 2
    soft = F.avg_pool2d(images, 3, stride=1, padding=1)
    kind = (drawn[:, None, None, None] / _STROKES).int()
    return torch.where(kind == 0, thin, torch.where(kind == 1, thick, torch.where(kind == 2, soft, images)))
