"""Draws pictures with matplotlib: curves, confusion matrices, predictions against targets, predicted examples."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from mnist_ray.errors import escaped
from mnist_ray.workload.base import Metric, Picture, Rows, Workload
from mnist_ray.workload.data import Split

_FONT = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
_SIZE = (4.8, 4.0)  # inches: fits on a phone; side by side on a page, pictures have one height
_MIN_ERROR = 0.01  # percent: stands for 0 on a logarithmic axis
_LINEAR_ABOVE = 10.0  # percent of mistakes: the axis is linear if all values have more
_RIGHT, _WRONG, _CAPTION = "#2e8b57", "#e0483f", "#777777"  # readable on white and on black
_MIN_SIDE = 336  # pixels of the longer side of an image that is drawn alone
_MIN_TILE, _MIN_GRID = 134, 402  # pixels: the width of an image in a grid, and of the grid
_MAX_FONT, _CHARACTER = 26, 0.62  # pixels; a character's width as a fraction of the font size
_NUM_RANDOM, _NUM_WRONG, _NUM_MISTAKES = 24, 8, 32  # fill rows of eight
_MAX_COUNTED = 20  # with more classes, pictures are drawn without counts and percentages


@dataclass(frozen=True)
class Table:
    """A table of strings; without ``columns``, it has pairs of a name and a value, and no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    num_bold: int = 0  # of the first rows
    is_wide: bool = True  # takes the page's whole width


@dataclass(frozen=True)
class Curve:
    """One line of a plot; NaNs are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Mapping[str, Any]


def smoothed(curve: Curve, least: float) -> Curve:
    """Join points, each the mean over the steps since the one before, until each stands for ``least`` steps or more."""
    points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
    ends = [0.0]
    for step, _ in points:
        if step == points[-1][0] or min(step - ends[-1], points[-1][0] - step) >= least:
            ends.append(step)
    steps, values = np.array([(0, 0), *points]).T
    sums = np.interp(ends, steps, np.cumsum(values * np.diff(steps, prepend=0)))
    return replace(curve, steps=ends[1:], values=(np.diff(sums) / np.diff(ends)).tolist())


@functools.cache
def _characters() -> frozenset[str]:
    return frozenset(map(chr, FT2Font(_FONT).get_charmap()))


def drawable(text: object) -> str:
    """Return a text with escapes for characters that the pictures' font lacks, or that nobody would see."""
    known = _characters()
    return escaped(str(text), lambda letter: letter == "\n" or (letter in known and letter.isprintable()))


def plain(text: object) -> str:
    """Return a drawable text for matplotlib, which would take what is between two ``$`` for a formula."""
    return drawable(text).replace("$", r"\$")


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


def curves_of(metric: Metric, curves: Sequence[Curve], steps_per_epoch: float) -> bytes:
    """Draw a metric over steps, with epochs along the top."""
    figure, axes = new_plot("step")
    for curve in curves:
        values = [on_axis(metric, value) for value in curve.values]
        points = [point for point in zip(curve.steps, values, strict=True) if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve.label, **curve.style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    to_epochs, to_steps = (functools.partial(np.multiply, by) for by in (1 / steps_per_epoch, steps_per_epoch))
    epochs = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
    epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    epochs.set_xlabel("epoch")
    scale_axis(axes, metric)
    return png_of(figure)


def stacked_bars(labels: Sequence[str], parts: Mapping[str, Sequence[float]], xlabel: str) -> bytes:
    """Draw a bar for each label, of a piece for each part."""
    figure, axes = new_plot(xlabel)
    starts = np.zeros(len(labels))
    for number, (part, values) in enumerate(parts.items()):
        axes.barh(labels, values, left=starts, label=part, color=f"C{number}")
        starts += values
    axes.invert_yaxis()  # the first label is at the top
    axes.tick_params(labelsize="small")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return png_of(figure)


def on_axis(metric: Metric, value: float) -> float:
    """Return a value's position on a metric's axis: for a fraction, the distance to 1 in percent."""
    return max(100 * (1 - value), _MIN_ERROR) if metric.is_fraction else value


def scale_axis(axes: Axes, metric: Metric, name: str = "") -> None:
    """Label and scale the vertical axis for a metric.

    A loss gets a logarithmic axis. For a fraction near 1, the logarithmic axis shows the distance to 1, since good
    values differ by tenths of a percent.
    """
    axes.set_ylabel(plain(name or metric.name) + (" (%)" if metric.is_fraction else ""))
    drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    least, most = min(drawn, default=1.0), max(drawn, default=1.0)
    if least <= _LINEAR_ABOVE if metric.is_fraction else metric.name == "loss" and least > 0:
        axes.set_yscale("log")
        label_log_axis(axes.yaxis, least, most)
    if metric.is_fraction:
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}" if error > _MIN_ERROR else "100")


def label_log_axis(axis: Axis, least: float, most: float) -> None:
    """Label 1, 2 and 5 of each power of ten between ``least`` and ``most``; of many powers, only 1."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))


def of_classification(
    workload: Workload, classes: Sequence[Any], result: Mapping[str, Any], rows: Rows, test: Split | None
) -> list[Picture]:
    """Return the confusion matrix, if there is one, and some of the examples, if they are pictures."""
    examples = _examples(workload, rows, test) if rows and test is not None else []
    return [*([_confusion(classes, result)] if "confusion_matrix" in result else []), *examples]


def _confusion(classes: Sequence[Any], result: Mapping[str, Any]) -> Picture:
    names, counts = list(map(drawable, classes)), np.array(result["confusion_matrix"])
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    label, prediction = map(int, np.unravel_index(mistakes.argmax(), mistakes.shape))
    most = f"most often {names[label]} was taken for {names[prediction]} ({mistakes.max():,})"
    alt = f"Confusion matrix: {mistakes.sum()} mistakes among {counts.sum():,}"
    alt += f"; {most}" if mistakes.any() else ""
    caption = "Shade: the fraction of the label's examples that were predicted so. Right predictions have none."
    if names != [*map(str, classes)]:
        caption += " Names have escapes for characters that the font lacks."
    return Picture("confusion", "Confusion matrix of the test set", alt, confusion_matrix(counts, names), caption)


def _examples(workload: Workload, rows: Rows, test: Split) -> list[Picture]:
    """Return test examples with their predictions, and the most confident mistakes; [] if examples are not pictures."""
    if workload.as_picture(test[0][0]) is None:
        return []
    labels, predicted = (np.array([row[name] for row in rows]) for name in ("label", "prediction"))
    probabilities, is_right = np.array([float(row["probability"]) for row in rows]), labels == predicted
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(labels), min(_NUM_RANDOM, len(labels)), replace=False)
    wrong = np.flatnonzero(~is_right)
    chosen = np.concatenate([drawn, rng.permutation(np.setdiff1d(wrong, drawn))[:_NUM_WRONG]])
    surest = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_NUM_MISTAKES]

    def draw(name: str, title: str, alt: str, indices: np.ndarray, caption: str) -> Picture:
        images = [workload.as_picture(test[int(i)][0]) for i in indices]
        captions = [predicted[i] if is_right[i] else f"{predicted[i]}\nis {labels[i]}" for i in indices]
        png = image_grid(images, captions, is_right[indices])  # type: ignore[arg-type]
        return Picture(name, title, alt, png, caption, is_photo=True)

    said = "; ".join(labels[i] if is_right[i] else f"{labels[i]} taken for {predicted[i]}" for i in chosen)
    alt = f"{len(chosen)} test {workload.nouns} with their predictions: {said}"
    caption = f"{len(drawn)} test {workload.nouns} drawn at random, then mistakes. ✓ right, ✗ wrong."
    pictures = [draw("predictions", "Predictions", alt, chosen, caption)]
    if len(surest):
        said = "; ".join(f"{labels[i]} taken for {predicted[i]} at {probabilities[i]:.0%}" for i in surest)
        caption = f"From {probabilities[surest[0]]:.1%} sure down to {probabilities[surest[-1]]:.1%}."
        alt = f"The most confident mistakes: {said}"
        pictures.append(draw("mistakes", "The most confident mistakes", alt, surest, caption))
    return pictures


def of_regression(rows: Rows) -> list[Picture]:
    """Plot predictions against targets, and the distribution of the errors."""
    if not rows:
        return []
    targets, predictions = (np.array([float(row[name]) for row in rows]) for name in ("target", "prediction"))
    errors = predictions - targets
    scatter, axes = new_plot("target", "prediction")
    ends = [min(targets.min(), predictions.min()), max(targets.max(), predictions.max())]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.plot(targets, predictions, ".", color="C0", alpha=max(0.1, min(1.0, 30 / math.sqrt(len(targets)))))
    axes.grid(alpha=0.3)
    histogram, axes = new_plot("error", "examples")
    axes.hist(errors, bins=min(50, max(5, len(errors) // 10)), color="C0")
    axes.axvline(0, color="grey", linewidth=1)
    title, caption = "Predictions against targets on the test set", "Points on the line are right predictions."
    alt = f"{len(rows):,} predictions against their targets, from {targets.min():g} to {targets.max():g}"
    low, high = np.quantile(errors, (0.25, 0.75))
    about_errors = f"Errors: half of them lie between {low:.4g} and {high:.4g}"
    return [
        Picture("predictions", title, alt, png_of(scatter), caption),
        Picture("errors", "Errors on the test set", about_errors, png_of(histogram), "Prediction minus target."),
    ]


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix with counts. Its shade is the fraction of the label's examples."""
    figure, axes = new_plot("prediction", "label")
    mistakes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(mistakes, 0)
    most = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=most)
    if len(counts) <= _MAX_COUNTED:
        for (label, prediction), count in np.ndenumerate(counts):
            is_dark = mistakes[label, prediction] > 0.6 * most
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
    captions = list(map(drawable, captions))
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
    """Scale an image; if the image grows, each pixel becomes a square."""
    height, width = (max(1, round(factor * side)) for side in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
