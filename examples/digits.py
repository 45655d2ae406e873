"""MNIST for digits of your own: finds the digit in a drawing or a photo, and trains on turned and moved digits.

mnist-ray predict photo.jpg --workload examples/digits.py            # with the newest run; pip install scipy
python jobs/train.py --workload examples/digits.py --recipe robust    # better on handwriting, 99.3 % on the test set

MNIST's digits were scaled to fit into 20×20 pixels, keeping the aspect ratio, then placed in 28×28 with their centre
of mass in the middle (http://yann.lecun.com/exdb/mnist/). Experiments chose all constants (benchmarks/README.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Generator, Tensor
from torch.nn import functional as F

from mnist_ray.errors import UsageError
from mnist_ray.mnist import MNIST, problem
from mnist_ray.workload import setting

IMAGE_SHAPE = (28, 28)
_WORKING_SIZE = 256  # pixels of the picture's longer side during the search for the digit
_MIN_CONTRAST = 20.0  # grey levels between ink and paper
_MIN_PIXELS = 40  # of a digit, at the working size
_WIDEST_STROKE = 0.3  # of the picture's longer side
_FAINT_INK = 0.4  # times Otsu's threshold, so that faint strokes are ink, too
_FULL_INK = 25  # percentile of a digit's ink; stronger ink becomes white, like most of a stroke in MNIST
_MUCH_INK, _MIN_PART = 0.2, 0.04  # of the largest piece's ink: enough off the edge; less is a speck
_MAX_GAP = 15  # pixels between pieces of a digit, at the working size
_DIGIT_SIZE = 20  # pixels of a digit's longer side in MNIST's 28×28
_MIN_STROKE = 2.5  # pixels, at that size
_TURN, _SHEAR = math.radians(15), 0.3
_LOG_SCALE = 0.2  # natural logarithm of the largest scale of an axis
_SHIFT = 0.15  # as a fraction of half the image's width
_BLURRED, _THICKENED = 1 / 4, 1 / 6  # fractions of the batches


@dataclass(frozen=True, kw_only=True)
class Settings(problem.Settings):
    """The images to train on."""

    augment: bool = setting(False, "train on turned, scaled, sheared and moved digits")


class Digits(MNIST):
    """MNIST, with any picture of a digit as input of predictions."""

    Settings = Settings
    recipes = {**MNIST.recipes, "robust": {"num_epochs": 6, "augment": True, "ema_decay": 0.99}}

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Augment the images in training, with ``--augment``."""
        images = super().prepare(inputs, generator)
        return images if generator is None or not self.settings.augment else augmented(images, generator)

    def read_picture(self, picture: Image.Image) -> np.ndarray:
        """Find the digit."""
        return to_mnist(picture)


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Turn, scale, shear and move each image, (N, 1, H, W) in [0, 1]; blur or thicken all images of some batches."""
    if len(images) == 0:  # affine_grid rejects an empty batch
        return images

    def within(limit: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=images.device)
        return (2 * drawn - 1) * limit

    turn, shear = within(_TURN), within(_SHEAR)
    wide, high = within(_LOG_SCALE).exp(), within(_LOG_SCALE).exp()
    right, down = within(_SHIFT), within(_SHIFT)
    cos, sin = turn.cos(), turn.sin()
    # affine_grid takes the inverse map, from each new pixel to its source.
    rows = [torch.stack([cos / wide, (shear - sin) / wide, right], 1), torch.stack([sin / high, cos / high, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    # item() waits for a GPU. Without it, all three results would be computed, in twice the time on a CPU.
    drawn = torch.rand(1, generator=generator, device=images.device).item()
    if drawn < _BLURRED:
        return (F.avg_pool2d(moved, 3, stride=1, padding=1) * 1.5).clamp(max=1)
    if drawn < _BLURRED + _THICKENED:
        return F.max_pool2d(F.pad(moved, (0, 1, 0, 1)), 2, stride=1)
    return moved


def to_mnist(image: Image.Image) -> np.ndarray:
    """Return the largest digit in a picture, bright on black, (28, 28) uint8. Raises UsageError without a digit."""
    factor = _WORKING_SIZE / max(image.size)
    ink = _ink(_to_grey(image, (max(1, round(image.width * factor)), max(1, round(image.height * factor)))))
    threshold = _FAINT_INK * _otsu(ink)
    mask = _largest_digit(ink, threshold)
    full = float(np.percentile(ink[mask], _FULL_INK))
    near = ndimage.binary_dilation(mask, iterations=2)
    return _centred(_scaled(np.where(near, np.clip((ink - threshold / 2) / (full - threshold / 2), 0, 1), 0)))


def _to_grey(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return a picture in grey, scaled to (width, height), as (H, W) from 0 to 255."""
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)


def _ink(grey: np.ndarray) -> np.ndarray:
    """Return how much each pixel differs from the paper around it, from 0 to 1. Raises UsageError if none differs.

    A grey closing that is wider than a stroke removes the ink, and keeps the paper with the edges of shadows.
    """
    smooth = ndimage.gaussian_filter(grey, 0.7)
    if _is_bright_on_dark(smooth):
        smooth = 255 - smooth
    width = max(3, round(min(_WIDEST_STROKE * max(grey.shape), 0.75 * min(grey.shape))))
    ink = ndimage.grey_closing(smooth, size=(width, width), mode="nearest") - smooth
    strongest = float(np.sort(ink, axis=None)[-_MIN_PIXELS:].mean())
    if strongest < _MIN_CONTRAST:
        raise UsageError("shows no digit: nothing stands out from its background")
    return np.clip(ink / strongest, 0, 1)


def _is_bright_on_dark(grey: np.ndarray) -> bool:
    """Return whether the ink is brighter than the paper, judged by the picture's edge, which is mostly paper.

    If a shadow divides the edge, subtract slow changes: then the rarer of bright and dark is ink.
    """
    bright = float((_edge(grey) > _otsu(grey)).mean())
    if not 0.3 < bright < 0.7:
        return bright < 0.5
    return bool(((grey - ndimage.gaussian_filter(grey, 64, mode="nearest")) ** 3).sum() > 0)


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that best divides values into two groups (https://doi.org/10.1109/TSMC.1979.4310076)."""
    counts, edges = np.histogram(values, bins=64)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above, rest = counts.sum() - below, (counts * centres).sum() - sums
    between = below * above * (sums / np.maximum(below, 1) - rest / np.maximum(above, 1)) ** 2
    return float(edges[1 + between.argmax()])


def _edge(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _largest_digit(ink: np.ndarray, threshold: float) -> np.ndarray:
    """Return the mask of the largest digit. Pieces that are close together, like a 5 and its bar, are joined.

    Pieces that touch the picture's edge count as shadows, a finger or the table, if there is enough ink elsewhere.
    """
    labels, number = ndimage.label(ink > threshold, np.ones((3, 3)))
    amounts = np.asarray(ndimage.sum_labels(ink, labels, range(1, number + 1)))
    is_inner = ~np.isin(range(1, number + 1), _edge(labels))
    if amounts[is_inner].sum() > _MUCH_INK * amounts.max():
        amounts *= is_inner
    mask = np.isin(labels, 1 + np.flatnonzero(amounts > _MIN_PART * amounts.max()))
    labels, _ = ndimage.label(ndimage.binary_dilation(mask, np.ones((_MAX_GAP, _MAX_GAP))))
    labels *= mask
    return labels == 1 + np.argmax([labels[box].size for box in ndimage.find_objects(labels)])


def _scaled(ink: np.ndarray) -> np.ndarray:
    """Crop a digit and scale it into 20×20, keeping its aspect ratio; thin strokes are first made wider."""
    mask = ink > 0.5
    factor = _DIGIT_SIZE / max(mask[_box(mask)].shape)
    # Across a stroke, the distance to the edge goes from 0 to half the width: its mean is a quarter of the width.
    stroke = 4 * float(ndimage.distance_transform_edt(mask)[mask].mean()) * factor
    if stroke < _MIN_STROKE:
        radius = max(1, round((_MIN_STROKE - stroke) / factor / 2))
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        ink = ndimage.grey_dilation(ink, footprint=x * x + y * y <= radius * radius)
    cropped = ink[_box(ink > 0.3)]
    height, width = (max(1, round(side * _DIGIT_SIZE / max(cropped.shape))) for side in cropped.shape)
    return np.asarray(Image.fromarray(np.float32(cropped)).resize((width, height), Image.Resampling.BOX))


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    box: tuple[slice, slice] = ndimage.find_objects(mask.astype(int))[0]
    return box


def _centred(digit: np.ndarray) -> np.ndarray:
    """Place a digit in 28×28 with its centre of mass in the middle."""
    canvas = np.zeros(IMAGE_SHAPE, np.float32)
    canvas[: digit.shape[0], : digit.shape[1]] = digit
    middle = np.array(IMAGE_SHAPE) / 2  # 14.0, not 13.5: the mean of MNIST's centres of mass
    moved = ndimage.shift(canvas, middle - ndimage.center_of_mass(canvas), order=1)
    return np.round(255 * np.clip(moved, 0, 1)).astype(np.uint8)
