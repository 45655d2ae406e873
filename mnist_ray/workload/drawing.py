"""Plots of a test: confusion matrices, predictions against targets, predicted examples; and what all plots share."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mnist_ray.data.data import Split
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.figures import IN_WORDS

_FONT = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
_SIZE = (4.8, 4.0)  # inches: fits on a phone; plots side by side on a page have the same height
_RIGHT, _WRONG, _CAPTION = "#2e8b57", "#e0483f", "#777777"  # readable on white and on black
_MIN_SIDE = 336  # pixels of the longer side of an image that is drawn alone
_MIN_TILE, _MIN_GRID = 134, 402  # pixels: the width of an image in a grid, and of the grid
_MAX_FONT, _CHARACTER = 26, 0.62  # pixels; a character's width as a fraction of the font size
_NUM_SHOWN = 32  # fill rows of eight
_MAX_COUNTED = 20  # with more classes, a confusion matrix has no counts


def plain(text: object) -> str:
    """Return a text for matplotlib, with ``$`` escaped: text between two of them would be a formula."""
    return str(text).replace("$", r"\$")


def new_plot(xlabel: str, ylabel: str = "") -> tuple[Figure, Axes]:
    """Return a figure with one plot."""
    figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def png_of(drawn: Figure | Image.Image) -> bytes:
    """Return a figure or an image as the bytes of a PNG."""
    content = io.BytesIO()
    (drawn.savefig if isinstance(drawn, Figure) else drawn.save)(content, format="png")
    return content.getvalue()


def of_classification(
    workload: Workload,
    classes: Sequence[Any],
    result: Mapping[str, Any],
    test: Split | None,
    columns: Mapping[str, np.ndarray],
) -> list[Picture]:
    """Return the confusion matrix, if there is one, and some examples, if they are images."""
    pictures = [_confusion(classes, result)] if "confusion_matrix" in result else []
    if test is not None and {"label", "prediction", "probability"} <= columns.keys():
        pictures += _examples(workload, classes, test, columns)
    return pictures


def _confusion(classes: Sequence[Any], result: Mapping[str, Any]) -> Picture:
    names, counts = list(map(str, classes)), np.array(result["confusion_matrix"])
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    label, prediction = map(int, np.unravel_index(mistakes.argmax(), mistakes.shape))
    worst = f"most often {names[label]} was taken for {names[prediction]} ({mistakes.max():,})"
    alt = f"Confusion matrix: {mistakes.sum()} mistakes among {counts.sum():,}"
    alt += f"; {worst}" if mistakes.any() else ""
    caption = "Shade: the fraction of the label's examples with this prediction. Right predictions are not shaded."
    return Picture(
        "confusion", f"Confusion matrix of the {_set_of(result)} set", alt, confusion_matrix(counts, names), caption
    )


def _set_of(result: Mapping[str, Any]) -> str:
    return IN_WORDS[result.get("evaluated", "test")]


def _examples(
    workload: Workload, classes: Sequence[Any], test: Split, columns: Mapping[str, np.ndarray]
) -> list[Picture]:
    """Return test examples with their predictions, and the most confident mistakes; [] if examples are not images."""
    if workload.as_picture(test[0][0]) is None:
        return []
    names = np.array([*map(str, classes)])
    labels, predicted = names[columns["label"].astype(int)], names[columns["prediction"].astype(int)]
    probabilities, is_right = columns["probability"], columns["label"] == columns["prediction"]
    chosen = np.random.default_rng(0).choice(len(labels), min(_NUM_SHOWN, len(labels)), replace=False)
    wrong = np.flatnonzero(~is_right)
    surest = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_NUM_SHOWN]

    def draw(name: str, title: str, alt: str, indices: np.ndarray, caption: str) -> Picture:
        images = [workload.as_picture(test[int(i)][0]) for i in indices]
        captions = [predicted[i] if is_right[i] else f"{predicted[i]}\nis {labels[i]}" for i in indices]
        png = image_grid(images, captions, is_right[indices])  # type: ignore[arg-type]
        return Picture(name, title, alt, png, caption, is_photo=True)

    said = "; ".join(labels[i] if is_right[i] else f"{labels[i]} taken for {predicted[i]}" for i in chosen)
    alt = f"{len(chosen)} {workload.nouns} with their predictions: {said}"
    caption = f"{len(chosen)} {workload.nouns} drawn at random. ✓ right, ✗ wrong."
    pictures = [draw("predictions", "Predictions", alt, chosen, caption)]
    if len(surest):
        said = "; ".join(f"{labels[i]} taken for {predicted[i]} at {probabilities[i]:.0%}" for i in surest)
        caption = f"From {probabilities[surest[0]]:.1%} sure down to {probabilities[surest[-1]]:.1%}."
        alt = f"The most confident mistakes: {said}"
        pictures.append(draw("mistakes", "The most confident mistakes", alt, surest, caption))
    return pictures


def of_regression(result: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> list[Picture]:
    """Plot predictions against targets."""
    if not {"target", "prediction"} <= columns.keys():
        return []
    pairs = np.stack([columns["target"], columns["prediction"]], 1).astype(float)
    targets, predictions = pairs[np.isfinite(pairs).all(1)].T
    if not len(targets):
        return []
    figure, axes = new_plot("target", "prediction")
    ends = [min(targets.min(), predictions.min()), max(targets.max(), predictions.max())]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.plot(targets, predictions, ".", color="C0", alpha=max(0.1, min(1.0, 30 / math.sqrt(len(targets)))))
    axes.grid(alpha=0.3)
    title, caption = (
        f"Predictions against targets on the {_set_of(result)} set",
        "Points on the line are right predictions.",
    )
    alt = f"{len(targets):,} predictions against their targets, from {targets.min():g} to {targets.max():g}"
    return [Picture("predictions", title, alt, png_of(figure), caption)]


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix with counts. Its shade is the fraction of the label's examples."""
    figure, axes = new_plot("prediction", "label")
    mistakes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(mistakes, 0)
    darkest = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=darkest)
    if len(counts) <= _MAX_COUNTED:
        for (label, prediction), count in np.ndenumerate(counts):
            is_dark = mistakes[label, prediction] > 0.6 * darkest
            style: dict[str, Any] = {"color": "white" if is_dark else "black", "fontsize": min(8, 110 / len(counts))}
            if label == prediction:
                style |= {"color": _RIGHT, "fontweight": "bold"}
            axes.text(prediction, label, f"{count}" if count else "·", ha="center", va="center", **style)
    _name_ticks(axes.xaxis, names)
    _name_ticks(axes.yaxis, names)
    if max(map(len, names)) > 2:
        axes.tick_params(axis="x", labelrotation=90)
    return png_of(figure)


def _name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Label an axis with at most 40 of the names."""
    step = math.ceil(len(names) / 40)
    axis.set_ticks(range(0, len(names), step), list(map(plain, names[::step])), fontsize=10 if len(names) <= 12 else 7)


def single_image(image: np.ndarray) -> bytes:
    """Enlarge one image, (H, W) or (H, W, 3) uint8, without a margin, so that other programs can read it."""
    return png_of(_resized(image, max(1, _MIN_SIDE // max(image.shape[:2]))))


def image_grid(
    images: Sequence[np.ndarray], captions: Sequence[str], is_right: Sequence[bool] | None = None, num_columns: int = 8
) -> bytes:
    """Draw images, (H, W) or (H, W, 3) uint8, each with a caption below.

    With ``is_right``, right predictions get a tick, wrong ones a cross and a thick frame: colours are not needed.
    """
    num_columns = min(num_columns, len(images))
    tile = max(_MIN_TILE, _MIN_GRID // num_columns)
    margin = tile // 12
    longest = max(len(line) for caption in captions for line in caption.split("\n"))
    font_size = max(1, min(_MAX_FONT, round(tile / (_CHARACTER * (2 + longest)))))
    font = ImageFont.truetype(_FONT, font_size)
    drawn = [_resized(image, (tile - 2 * margin) / max(image.shape[:2])) for image in images]
    height, num_lines = max(image.height for image in drawn), max(caption.count("\n") + 1 for caption in captions)
    tile_height = height + 3 * margin + round(1.4 * num_lines * font_size)
    grid = Image.new("RGBA", (num_columns * tile, math.ceil(len(images) / num_columns) * tile_height))
    draw = ImageDraw.Draw(grid)
    for number, (image, caption) in enumerate(zip(drawn, captions, strict=True)):
        middle, top = number % num_columns * tile + tile // 2, number // num_columns * tile_height + margin
        left, colour = middle - image.width // 2, _CAPTION
        if is_right is not None:
            colour, mark, width = (_RIGHT, "✓", 2) if is_right[number] else (_WRONG, "✗", 8)
            caption = f"{mark} {caption}"
            frame = (left - width, top - width, left + image.width + width - 1, top + image.height + width - 1)
            draw.rectangle(frame, outline=colour, width=width)
        grid.paste(image, (left, top))
        draw.multiline_text((middle, top + height + margin), caption, colour, font, anchor="ma", align="center")
    return png_of(grid)


def _resized(image: np.ndarray, factor: float) -> Image.Image:
    """Scale an image; if it grows, each pixel becomes a square."""
    height, width = (max(1, round(factor * side)) for side in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
