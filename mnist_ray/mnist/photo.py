"""From a picture of a digit, drawn or photographed, to 28×28 as MNIST's own images are.

MNIST's digits were scaled into 20×20 pixels, their aspect ratio kept, then placed in 28×28 with their centre of mass
in the middle (http://yann.lecun.com/exdb/mnist/). What is done before that here finds the digit.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_ray.errors import UsageError
from mnist_ray.mnist.idx import IMAGE_SHAPE

_WORKING_SIZE = 256  # pixels of the longer side at which the digit is looked for
_LEAST_CONTRAST = 20.0  # grey levels by which ink differs from paper
_LEAST_PIXELS = 40  # of a digit, at the working size
_CLEAR_EDGE = 0.3  # less of the picture's edge than this is ink, unless the light is uneven
_WIDEST_STROKE = 0.3  # of the longer side
_LEAST_PART = 0.04  # of the largest piece's ink: smaller pieces are specks
# Of the picture's longer side: a piece of such a size inside it makes those at its edge no digits; the smaller size,
# those that take so much of its edge, as a shadow does.
_LEAST_INNER, _LEAST_BESIDE_SHADOW, _SHADOWS_EDGE = 0.3, 0.1, 0.2
_DIGIT_SIZE = 20  # pixels that MNIST's digits fill of 28
_LEAST_STROKE = 2.5  # pixels, in that size
# Of the threshold that parts ink from paper: faint strokes are ink too. And the percentile of a digit's ink from which
# on it is white, as most of a stroke is in MNIST. Both, like the numbers above, by trying: benchmarks/handwriting.py.
_FAINT_INK, _FULL_INK = 0.4, 25


def to_mnist(image: Image.Image) -> np.ndarray:
    """Return the digit in a picture as MNIST has it: (28, 28) uint8, bright on black; of several the largest.

    Raises UsageError if the picture is blank.
    """
    factor = _WORKING_SIZE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    ink = _ink(_to_grey(image, size))
    threshold = _FAINT_INK * _otsu(ink)
    largest = max(_grouped(_pieces(ink, threshold)), key=lambda mask: mask[_box(mask)].size)
    return _centred(_scaled(_alone(ink, threshold, largest)))


def as_it_is(image: Image.Image) -> np.ndarray:
    """Return a picture of anything as grey (28, 28) uint8, and do nothing else to it."""
    return np.uint8(np.round(np.clip(_to_grey(image, IMAGE_SHAPE), 0, 255)))


def _to_grey(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return a picture, scaled to a size (width, height), as (H, W) in 0 to 255; transparency becomes paper."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, of unknown range
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        image = Image.fromarray(np.uint8(255 * ((values - low) / max(high - low, 1e-6))))
    if image.has_transparency_data:
        grey, alpha = image.convert("RGBA").convert("LA").resize(size, Image.Resampling.LANCZOS).split()
        return _without_transparency(np.asarray(grey, np.float32), np.asarray(alpha, np.float32) / 255)
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)


def _without_transparency(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Put a picture on paper: of its own colour where most of it can be seen, else of one unlike the ink's."""
    visible = grey[alpha > 0.5]
    if visible.size == 0:
        return np.zeros_like(grey)
    typical = float(np.median(visible))
    paper = typical if visible.size > 0.5 * grey.size else 255.0 if typical < 128 else 0.0
    return grey * alpha + paper * (1 - alpha)


def _ink(grey: np.ndarray) -> np.ndarray:
    """Return how much darker or brighter than the paper around it each pixel is, in 0 to 1.

    The paper is what a closing by more than a stroke's width leaves, which keeps the edge of a shadow where it is.
    Raises UsageError where nothing stands out.
    """
    smooth = ndimage.gaussian_filter(grey, 0.7)
    if _is_bright_on_dark(smooth):
        smooth = 255 - smooth
    width = max(3, round(min(_WIDEST_STROKE * max(grey.shape), 0.75 * min(grey.shape))))
    ink = ndimage.grey_closing(smooth, size=(width, width), mode="nearest") - smooth
    strongest = float(np.sort(ink, axis=None)[-_LEAST_PIXELS:].mean())
    if strongest < _LEAST_CONTRAST:
        raise UsageError("shows no digit: nothing stands out from its background")
    return np.clip(ink / strongest, 0, 1)


def _is_bright_on_dark(grey: np.ndarray) -> bool:
    """Tell whether the ink is brighter than the paper.

    Most of the picture's edge is paper. Where a shadow or the light parts it, the light's slow changes are taken away:
    then ink is the rare extreme, and the distribution leans to its side.
    """
    bright = float((_edge(grey) > _otsu(grey)).mean())
    if not _CLEAR_EDGE < bright < 1 - _CLEAR_EDGE:
        return bright < 0.5
    return bool(((grey - _slow_changes(grey)) ** 3).sum() > 0)


def _slow_changes(grey: np.ndarray) -> np.ndarray:
    """Return the quadratic surface through most pixels: three rounds of least squares, outliers weighing less."""
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1).reshape(-1, 6)
    values, weights = grey.ravel(), np.ones(grey.size)
    for _ in range(3):
        weighted = terms * weights[:, None]
        surface = terms @ np.linalg.lstsq(weighted.T @ terms, weighted.T @ values, rcond=None)[0]
        off = np.abs(values - surface)
        weights = 1 / (1 + (off / max(float(np.median(off)), 1.0)) ** 2)
    return surface.reshape(grey.shape)


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that parts values best into two groups (https://doi.org/10.1109/TSMC.1979.4310076)."""
    counts, edges = np.histogram(values, bins=64)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above, rest = counts.sum() - below, (counts * centres).sum() - sums
    between = below * above * (sums / np.maximum(below, 1) - rest / np.maximum(above, 1)) ** 2
    return float(edges[1 + between.argmax()])


def _edge(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _pieces(ink: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Return a mask of each piece of ink that is not too small.

    What touches the picture's edge is the table beside the paper, a finger or a shadow, if there is something of some
    size that does not.
    """
    labels, num_pieces = ndimage.label(ink > threshold, np.ones((3, 3)))
    numbers = range(1, num_pieces + 1)
    amounts = np.asarray(ndimage.sum_labels(ink, labels, numbers))
    is_inner = ~np.isin(numbers, _edge(labels))
    sizes = np.array([max(side.stop - side.start for side in box) for box in ndimage.find_objects(labels)])
    largest_inner = (sizes * is_inner).max() / max(ink.shape)
    if largest_inner > _LEAST_INNER or amounts[is_inner].sum() > 0.2 * amounts.max():
        amounts = amounts * is_inner
    elif largest_inner > _LEAST_BESIDE_SHADOW:
        edge = _edge(labels)
        amounts = amounts * (np.bincount(edge, minlength=num_pieces + 1)[1:] < _SHADOWS_EDGE * len(edge))
    kept = 1 + np.flatnonzero(amounts > _LEAST_PART * amounts.max())
    return [labels == number for number in kept]


def _grouped(pieces: list[np.ndarray]) -> list[np.ndarray]:
    """Return the masks of whole digits: pieces that stand over each other, and not far apart, belong to one."""
    groups: list[np.ndarray] = []
    for piece in sorted(pieces, key=np.count_nonzero, reverse=True):
        for number, other in enumerate(groups):
            (rows, columns), (other_rows, other_columns) = _box(piece), _box(other)
            shared = min(columns.stop, other_columns.stop) - max(columns.start, other_columns.start)
            gap = max(rows.start, other_rows.start) - min(rows.stop, other_rows.stop)
            narrower = min(columns.stop - columns.start, other_columns.stop - other_columns.start)
            if shared > 0.3 * narrower and gap < 0.3 * (other_rows.stop - other_rows.start):
                groups[number] = other | piece
                break
        else:
            groups.append(piece)
    return groups


def _alone(ink: np.ndarray, threshold: float, mask: np.ndarray) -> np.ndarray:
    """Return the ink of one digit."""
    full = float(np.percentile(ink[mask], _FULL_INK))
    near = ndimage.binary_dilation(mask, iterations=2)
    return np.where(near, np.clip((ink - threshold / 2) / (full - threshold / 2), 0, 1), 0)


def _scaled(ink: np.ndarray) -> np.ndarray:
    """Crop a digit and scale it into 20×20, keeping its aspect ratio; thin strokes are first made wider."""
    mask = ink > 0.5
    factor = _DIGIT_SIZE / max(mask[_box(mask)].shape)
    # Across a stroke the distance to its edge goes from 0 to half its width: the mean is a quarter of the width.
    stroke = 4 * float(ndimage.distance_transform_edt(mask)[mask].mean()) * factor
    if stroke < _LEAST_STROKE:
        radius = max(1, round((_LEAST_STROKE - stroke) / factor / 2))
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        ink = ndimage.grey_dilation(ink, footprint=x * x + y * y <= radius * radius)
    cropped = ink[_box(ink > 0.3)]
    height, width = (max(1, round(side * _DIGIT_SIZE / max(cropped.shape))) for side in cropped.shape)
    return np.asarray(Image.fromarray(np.float32(cropped)).resize((width, height), Image.Resampling.BOX))


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    box: tuple[slice, slice] = ndimage.find_objects(mask.astype(int))[0]
    return box


def _centred(digit: np.ndarray) -> np.ndarray:
    """Place a digit in 28×28, its centre of mass in the middle."""
    canvas = np.zeros(IMAGE_SHAPE, np.float32)
    canvas[: digit.shape[0], : digit.shape[1]] = digit
    middle = np.array(IMAGE_SHAPE) / 2  # where MNIST's images have it, as a mean over them shows: 14.0, not 13.5
    moved = ndimage.shift(canvas, middle - ndimage.center_of_mass(canvas), order=1)
    return np.uint8(np.round(255 * np.clip(moved, 0, 1)))
