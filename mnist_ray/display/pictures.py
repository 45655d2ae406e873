"""Pictures, drawn with matplotlib: each function returns the bytes of a PNG, narrow enough to be read on a phone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mnist_ray.sweeps.search import RUNNING, STOPPED, TrialRecord, TrialTable

_WIDTH = 4.8  # inches
_RIGHT, _WRONG = "#2a6f3c", "#c62828"
_ENLARGED = 12 * 28  # pixels of an image that is drawn alone
_TILE = 34  # pixels from one image of a grid to the next
_CAPTION = 12  # pixels of room below an image
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Curve:
    """One line of a plot; points where it is NaN are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Mapping[str, Any]


def loss_curves(curves: Sequence[Curve], steps_per_epoch: float | None) -> bytes:
    """Draw losses over steps, with epochs along the top; over epochs alone where ``steps_per_epoch`` is None."""
    figure, axes = _figure(3.4)
    _draw_curves(axes, curves, steps_per_epoch)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylabel("loss")
    return _png(figure)


def accuracy_curves(curves: Sequence[Curve], steps_per_epoch: float | None) -> bytes:
    """Draw accuracies (fractions) as ``loss_curves`` does losses; the axis is logarithmic in the error."""
    figure, axes = _figure(3.4)
    errors = [Curve(c.label, c.steps, [_error(value) for value in c.values], c.style) for c in curves]
    _draw_curves(axes, errors, steps_per_epoch)
    _make_accuracy_axis(axes)
    axes.set_ylabel("accuracy (%)")
    return _png(figure)


def _draw_curves(axes: Axes, curves: Sequence[Curve], steps_per_epoch: float | None) -> None:
    for curve in curves:
        points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve.label, **curve.style)
    axes.set_xlabel("step" if steps_per_epoch else "epoch")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    if steps_per_epoch:
        scale = steps_per_epoch
        epochs = axes.secondary_xaxis("top", functions=(_times(1 / scale), _times(scale)))
        epochs.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        epochs.set_xlabel("epoch")


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def _error(accuracy: float) -> float:
    """Return the percentage that was wrong; not quite 0, for the logarithm."""
    return max(100 * (1 - accuracy), 1e-2)


def _make_accuracy_axis(axes: Axes) -> None:
    """Let an axis of errors in percent read as accuracy: good ones, which differ by tenths, can be told apart."""
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda error, _: f"{100 - error:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def confusion_matrix(counts: np.ndarray) -> bytes:
    """Draw a confusion matrix: shades by the fraction of a label's images, mistakes alone; counts in figures."""
    figure, axes = _figure(4.6)
    mistakes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(mistakes, 0)
    most = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=most)
    for (label, prediction), count in np.ndenumerate(counts):
        is_right, is_dark = label == prediction, mistakes[label, prediction] > 0.6 * most
        axes.text(
            prediction,
            label,
            f"{count}" if count else "·",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark else _RIGHT if is_right else "black",
            fontweight="bold" if is_right else "normal",
        )
    axes.set_xticks(range(len(counts)))
    axes.set_yticks(range(len(counts)))
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    return _png(figure)


def accuracy_per_class(accuracies: Sequence[float]) -> bytes:
    """Draw a bar of each class's accuracy (a fraction; NaN where the class has no images)."""
    figure, axes = _figure(4.6)
    known = {label: 100 * accuracy for label, accuracy in enumerate(accuracies) if not math.isnan(accuracy)}
    low = min(known.values(), default=0.0)
    floor = max(0.0, low - max(1.0, 0.3 * (100 - low)))
    bars = axes.barh(list(known), [accuracy - floor for accuracy in known.values()], left=floor, color="C0")
    axes.bar_label(bars, [f"{accuracy:.2f} %" for accuracy in known.values()], fontsize="small", padding=2)
    axes.set_xlim(floor, floor + (100 - floor) * 1.18)
    axes.xaxis.set_major_locator(ticker.FixedLocator([tick for tick in axes.get_xticks() if floor <= tick <= 100]))
    axes.set_yticks(range(len(accuracies)))
    axes.invert_yaxis()
    axes.set_ylabel("class")
    axes.set_xlabel("accuracy (%)")
    return _png(figure)


def seconds(parts: Mapping[str, float]) -> bytes:
    """Draw where the seconds went, a bar each."""
    figure, axes = _figure(0.8 + 0.35 * len(parts))
    bars = axes.barh(list(parts), list(parts.values()), color="C0")
    axes.bar_label(bars, [f"{value:.1f} s" for value in parts.values()], fontsize="small", padding=2)
    axes.set_xlim(0, 1.2 * (max(parts.values(), default=0.0) or 1.0))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return _png(figure)


def digit(image: np.ndarray) -> bytes:
    """Enlarge one image (28, 28) uint8, nothing around it, so that other programs and predict.py can read it."""
    content = io.BytesIO()
    Image.fromarray(image).resize((_ENLARGED, _ENLARGED), Image.Resampling.NEAREST).save(content, format="png")
    return content.getvalue()


def digits(
    images: np.ndarray, captions: Sequence[str], is_right: Sequence[bool] | None = None, num_columns: int = 6
) -> bytes:
    """Draw images (N, 28, 28) uint8 with a caption below each.

    With ``is_right`` a cross and a thick frame tell the wrong ones from the right ones, which have a tick: no colour
    needs to be told.
    """
    num_columns = max(1, min(num_columns, len(images)))
    num_rows = max(1, math.ceil(len(images) / num_columns))
    canvas = np.full((num_rows * (_TILE + _CAPTION), num_columns * _TILE), 255, np.uint8)
    inches = max(0.8, 2.4 / num_columns) * num_columns / canvas.shape[1]  # one image alone is drawn larger
    figure = Figure(figsize=(canvas.shape[1] * inches, canvas.shape[0] * inches), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    size, margin = images.shape[1], (_TILE - images.shape[1]) // 2
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        top, left = row * (_TILE + _CAPTION) + margin, column * _TILE + margin
        canvas[top : top + size, left : left + size] = image
        style: dict[str, Any] = {"color": "black"}
        if is_right is not None:
            style = {"color": _RIGHT if is_right[number] else _WRONG}
            caption = f"{'✓' if is_right[number] else '✗'} {caption}"
            width = 1 if is_right[number] else 4
            edge = {"fill": False, "linewidth": width, "edgecolor": style["color"]}
            axes.add_patch(Rectangle((left - 1, top - 1), size + 1, size + 1, **edge))
        axes.text(left + size / 2, top + size + 2, caption, ha="center", va="top", fontsize=9, **style)
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    return _png(figure)


def sweep(table: TrialTable, num_epochs: int) -> bytes:
    """Draw validation accuracy over learning rate, a colour and marker a batch size.

    Trials that were stopped early are hollow, the best configuration's are ringed, failed ones are left out.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [record for record in table.by_point.values() if record.score[0] >= 0 and record.state != RUNNING]
    for number, size in enumerate(sorted({record.batch_size for record in shown})):
        style: dict[str, Any] = {"color": f"C{number}", "marker": MARKERS[number % 8], "linestyle": "none"}
        for record in shown:
            if record.batch_size == size:
                fill: dict[str, Any] = {"markerfacecolor": "none"} if record.state == STOPPED else {}
                axes.plot(*_point(record), markersize=8, **style, **fill)
        axes.plot([], [], label=f"batch size {size}", **style)
    axes.plot([], [], "o", color="grey", markerfacecolor="none", label="stopped early")
    title = f"{len(shown)} trials of at most {num_epochs} epochs"
    best = table.best
    if best is not None:
        for record in best.records:
            axes.plot(*_point(record), "o", color="black", markerfacecolor="none", markersize=15)
        axes.plot([], [], "o", color="black", markerfacecolor="none", markersize=12, label="best configuration")
        first = best.records[0]
        seeds = f", mean of {len(best.records)} seeds" if len(best.records) > 1 else ""
        title += f"\nbest: batch size {first.batch_size}, learning rate {first.learning_rate:g}"
        title += f" ({best.val_accuracy:.2%}{seeds})"
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    _make_accuracy_axis(axes)
    axes.set_xlabel("learning rate (peak of the schedule)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return _png(figure)


def _point(record: TrialRecord) -> tuple[float, float]:
    return record.learning_rate, _error(record.val_accuracy)


def _figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of ``height`` inches with one plot."""
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
