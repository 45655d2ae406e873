"""Pictures drawn with matplotlib: curves, confusion, predictions over targets, examples with their predictions."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mnist_ray.workload.base import Metric, Picture, Rows, Workload
from mnist_ray.workload.data import Split

_WIDTH = 4.8  # inches: narrow enough to be read on a phone
_LEAST_ERROR = 0.01  # percent: stands for none on a logarithmic axis
_LINEAR_ABOVE = 10.0  # percent of mistakes: if the best has more, there are no tenths to be told apart
_RIGHT, _WRONG = "#2e8b57", "#e0483f"  # can be read on white and on black
_CAPTION = "#777777"
_ENLARGED = 336  # pixels, at the least, of the longer side of an image that is drawn alone
_MARGIN = 3  # pixels of room around an image of 28 pixels in a grid
_NUM_RANDOM, _NUM_WRONG, _NUM_MISTAKES = 24, 6, 30
_MOST_COUNTED = 20  # classes whose counts are written into the confusion matrix


@dataclass(frozen=True)
class Table:
    """A table of texts; without columns it has no head."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Curve:
    """One line of a plot; points where it is NaN are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Mapping[str, Any]


def style_of(number: int) -> dict[str, Any]:
    """Return colour and marker of the ``number``-th of several runs or choices."""
    return {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8]}


def new_plot(height: float, xlabel: str, ylabel: str = "") -> tuple[Figure, Axes]:
    """Return a figure of ``height`` inches with one plot."""
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def png_of(figure: Figure, *, is_transparent: bool = False) -> bytes:
    """Return a figure as the bytes of a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", transparent=is_transparent)
    return content.getvalue()


def curves_of(metric: Metric, curves: Sequence[Curve], steps_per_epoch: float | None = None) -> bytes:
    """Draw a metric over steps, with epochs along the top; over epochs alone without ``steps_per_epoch``."""
    figure, axes = new_plot(3.4, "step" if steps_per_epoch else "epoch")
    for curve in curves:
        values = [on_axis(metric, value) for value in curve.values]
        points = [point for point in zip(curve.steps, values, strict=True) if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve.label, **curve.style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if steps_per_epoch:
        to_epochs, to_steps = (functools.partial(np.multiply, by) for by in (1 / steps_per_epoch, steps_per_epoch))
        epochs = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
        epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        epochs.set_xlabel("epoch")
    scale_axis(axes, metric)
    return png_of(figure)


def on_axis(metric: Metric, value: float) -> float:
    """Return where a value is drawn on a metric's axis: of a fraction, the percentage that it lacks to 1."""
    return max(100 * (1 - value), _LEAST_ERROR) if metric.is_fraction else value


def scale_axis(axes: Axes, metric: Metric, name: str = "") -> None:
    """Make a vertical axis that of a metric.

    The axis of a loss is logarithmic, and that of a fraction is so in what it lacks to 1, if that is little: good
    values, which differ by tenths of a percent, can be told apart.
    """
    axes.set_ylabel((name or metric.name) + (" (%)" if metric.is_fraction else ""))
    drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    if metric.is_fraction:
        is_log = min(drawn, default=100.0) <= _LINEAR_ABOVE
    else:
        is_log = metric.name == "loss" and min(drawn, default=1.0) > 0
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    if metric.is_fraction:
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}" if error > _LEAST_ERROR else "100")


def seconds(parts: Mapping[str, float]) -> bytes:
    """Draw where the seconds went, a bar each."""
    figure, axes = new_plot(0.8 + 0.35 * len(parts), "seconds")
    bars = axes.barh(list(parts), list(parts.values()), color="C0")
    axes.bar_label(bars, [f"{value:.1f} s" for value in parts.values()], fontsize="small", padding=2)
    axes.set_xlim(0, 1.2 * (max(parts.values(), default=0.0) or 1.0))
    axes.invert_yaxis()
    return png_of(figure)


def of_classification(
    workload: Workload, classes: Sequence[Any], result: Mapping[str, Any], rows: Rows, test: Split | None
) -> list[Picture]:
    """Return the confusion matrix, the accuracy of each class and, if examples are pictures, some of them."""
    names, counts = [str(name) for name in classes], np.array(result["confusion_matrix"])
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    label, prediction = map(int, np.unravel_index(mistakes.argmax(), mistakes.shape))
    most = f"most often {names[label]} was taken for {names[prediction]} ({mistakes.max():,})"
    confusion = f"{mistakes.sum()} mistakes among {counts.sum():,}; {most if mistakes.any() else 'no mistakes'}"
    accuracies = [math.nan if a is None else a for a in result["test_accuracy_per_class"]]
    of_each = zip(names, accuracies, strict=True)
    by_class = ", ".join(f"{name}: {'-' if math.isnan(a) else f'{a:.2%}'}" for name, a in of_each)
    pictures = [
        Picture(
            "confusion",
            "Confusion matrix of the test set",
            f"Confusion matrix: {confusion}",
            confusion_matrix(counts, names),
            "The stronger the shade, the larger a part of the label's examples; right ones have none.",
        ),
        Picture(
            "classes",
            "Accuracy per class on the test set",
            f"Accuracy per class: {by_class}",
            accuracy_per_class(accuracies, names),
        ),
    ]
    if rows and test is not None and len(test) == len(rows):
        pictures += _examples(workload, rows, test)
    return pictures


def _examples(workload: Workload, rows: Rows, test: Split) -> list[Picture]:
    """Return test examples with their predictions, and the surest mistakes; none if examples have no picture."""
    if workload.as_picture(test[0][0]) is None:
        return []
    labels, predicted = (np.array([row[name] for row in rows]) for name in ("label", "prediction"))
    probabilities, is_right = np.array([float(row["probability"]) for row in rows]), labels == predicted
    rng = np.random.default_rng(0)
    some = rng.choice(len(labels), min(_NUM_RANDOM, len(labels)), replace=False)
    wrong = np.flatnonzero(~is_right)
    chosen = np.concatenate([some, rng.permutation(np.setdiff1d(wrong, some))[:_NUM_WRONG]])
    surest = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_NUM_MISTAKES]

    def draw(name: str, title: str, alt: str, indices: np.ndarray, caption: str) -> Picture:
        images = [workload.as_picture(test[int(i)][0]) for i in indices]
        captions = [predicted[i] if is_right[i] else f"{predicted[i]}\nis {labels[i]}" for i in indices]
        png = image_grid(images, captions, is_right[indices])  # type: ignore[arg-type]
        return Picture(name, title, alt, png, caption, is_photo=True)

    said = "; ".join(labels[i] if is_right[i] else f"{labels[i]} taken for {predicted[i]}" for i in chosen)
    alt = f"{len(chosen)} test {workload.nouns} with their predictions: {said}"
    caption = f"{len(some)} test {workload.nouns} drawn at random, then mistakes. ✓ right, ✗ wrong."
    pictures = [draw("predictions", "Predictions", alt, chosen, caption)]
    if len(surest):
        said = "; ".join(f"{labels[i]} taken for {predicted[i]} at {probabilities[i]:.0%}" for i in surest)
        caption = f"From {probabilities[surest[0]]:.1%} sure down to {probabilities[surest[-1]]:.1%}."
        alt = f"The surest wrong predictions: {said}"
        pictures.append(draw("mistakes", "The most confident mistakes", alt, surest, caption))
    return pictures


def of_regression(rows: Rows) -> list[Picture]:
    """Return predictions over targets, and how the errors are distributed."""
    if not rows:
        return []
    targets, predictions = (np.array([float(row[name]) for row in rows]) for name in ("target", "prediction"))
    errors = predictions - targets
    scatter, axes = new_plot(4.6, "target", "prediction")
    ends = [min(targets.min(), predictions.min()), max(targets.max(), predictions.max())]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.plot(targets, predictions, ".", color="C0", alpha=max(0.1, min(1.0, 30 / math.sqrt(len(targets)))))
    axes.grid(alpha=0.3)
    histogram, axes = new_plot(3.4, "error", "examples")
    axes.hist(errors, bins=min(50, max(5, len(errors) // 10)), color="C0")
    axes.axvline(0, color="grey", linewidth=1)
    return [
        Picture(
            "predictions",
            "Predictions over targets of the test set",
            f"{len(rows):,} predictions over their targets, which reach from {targets.min():g} to {targets.max():g}",
            png_of(scatter),
            "On the line, a prediction is right.",
        ),
        Picture(
            "errors",
            "Errors on the test set",
            f"Errors: half of them lie between {np.quantile(errors, 0.25):.4g} and {np.quantile(errors, 0.75):.4g}",
            png_of(histogram),
            "Prediction minus target.",
        ),
    ]


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix: shades by the fraction of a label's examples, mistakes alone; counts in figures."""
    figure, axes = new_plot(4.6, "prediction", "label")
    mistakes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(mistakes, 0)
    most = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=most)
    if len(counts) <= _MOST_COUNTED:
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
    """Name an axis's places, as many as can be read."""
    step = math.ceil(len(names) / 40)
    axis.set_ticks(range(0, len(names), step), names[::step], fontsize=10 if len(names) <= 12 else 7)


def accuracy_per_class(accuracies: Sequence[float], names: Sequence[str]) -> bytes:
    """Draw a dot for each class's accuracy (a fraction; NaN if the class has no examples)."""
    figure, axes = new_plot(max(4.6, min(0.25 * len(names), 12)), "accuracy (%)", "class")
    known = {label: 100 * accuracy for label, accuracy in enumerate(accuracies) if not math.isnan(accuracy)}
    axes.plot(list(known.values()), list(known), "o", color="C0")
    if len(names) <= 2 * _MOST_COUNTED:
        place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        for label, accuracy in known.items():
            axes.annotate(f"{accuracy:.2f} %", (accuracy, label), fontsize="small", **place)
    low = min(known.values(), default=0.0)
    axes.set_xlim(low - 0.05 * (100 - low) - 0.1, 100 + 0.3 * (100 - low) + 0.1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}" if tick <= 100 else "")
    _name_ticks(axes.yaxis, names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return png_of(figure)


def single_image(image: np.ndarray) -> bytes:
    """Enlarge one image (H, W) or (H, W, 3) uint8, nothing around it, so that other programs can read it."""
    content = io.BytesIO()
    factor = max(1, _ENLARGED // max(image.shape[:2]))
    size = (factor * image.shape[1], factor * image.shape[0])
    Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(content, format="png")
    return content.getvalue()


def image_grid(
    images: Sequence[np.ndarray], captions: Sequence[str], is_right: Sequence[bool] | None = None, num_columns: int = 6
) -> bytes:
    """Draw images (H, W) or (H, W, 3) uint8 with a caption below each.

    With ``is_right`` a cross and a thick frame tell the wrong ones from the right ones, which have a tick: no colour
    needs to be told.
    """
    num_columns = min(num_columns, len(images))
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    unit = max(height, width) / 28
    margin = max(1, round(_MARGIN * unit))
    tile_width = width + 2 * margin
    inches = max(0.8, 2.4 / num_columns) / tile_width  # of a pixel; one image alone is drawn larger
    longest = max(len(line) for caption in captions for line in caption.split("\n"))
    fontsize = min(9.0, 72 * inches * tile_width / (0.62 * (2 + longest)))  # points; a character is some 0.6 of it wide
    num_lines = max(caption.count("\n") + 1 for caption in captions)
    text_height = round(4 * unit) + math.ceil(num_lines * 1.45 * fontsize / 72 / inches)  # pixels
    tile_height = height + 2 * margin + text_height
    canvas = np.zeros((math.ceil(len(images) / num_columns) * tile_height, num_columns * tile_width, 4), np.uint8)
    figure = Figure(figsize=(canvas.shape[1] * inches, canvas.shape[0] * inches), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        top, left = row * tile_height + margin, column * tile_width + margin
        size_y, size_x = image.shape[:2]
        canvas[top : top + size_y, left : left + size_x, :3] = image if image.ndim == 3 else image[..., None]
        canvas[top : top + size_y, left : left + size_x, 3] = 255
        colour = _CAPTION
        if is_right is not None:
            colour, mark, linewidth = (_RIGHT, "✓", 1) if is_right[number] else (_WRONG, "✗", 4)
            caption = f"{mark} {caption}"
            half = linewidth / 72 / inches / 2  # of the frame, in pixels: it stands around the image, not on it
            corner, size = (left - 0.5 - half, top - 0.5 - half), (size_x + 2 * half, size_y + 2 * half)
            axes.add_patch(Rectangle(corner, *size, linewidth=linewidth, fill=False, edgecolor=colour))
        place = (left + size_x / 2, top + height + 2 * unit)
        axes.text(*place, caption, ha="center", va="top", fontsize=fontsize, color=colour)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    return png_of(figure, is_transparent=True)
