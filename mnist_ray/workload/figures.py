"""Pictures drawn with matplotlib: what all that draw need; confusion, predictions over targets, examples with both."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

if TYPE_CHECKING:
    from mnist_ray.workload.base import Rows, Workload
    from mnist_ray.workload.data import Split


MARKERS = "osD^vP*X"
_WIDTH = 4.8  # inches: narrow enough to be read on a phone


@dataclass(frozen=True)
class Picture:
    """A picture with what stands around it."""

    name: str  # its file, without the suffix
    title: str
    alt: str
    png: bytes
    caption: str = ""
    is_photo: bool = False  # shows images of the data, which dark mode is not to invert

    @property
    def base64(self) -> str:
        """The content as a ``data:`` URL takes it."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table of texts; without columns it has no head."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of ``height`` inches with one plot."""
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def png_of(figure: Figure, *, is_transparent: bool = False) -> bytes:
    """Return a figure as the bytes of a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", transparent=is_transparent)
    return content.getvalue()


_RIGHT, _WRONG = "#2e8b57", "#e0483f"  # which can be read on white and on black
_CAPTION = "#777777"
_ENLARGED = 336  # pixels, at the least, of the longer side of an image that is drawn alone
_MARGIN = 3  # pixels of room around an image of 28 pixels in a grid
_NUM_RANDOM, _NUM_WRONG, _NUM_MISTAKES = 24, 6, 30
_MOST_COUNTED = 20  # classes whose counts are written into the confusion matrix


def of_classification(
    workload: Workload, classes: Sequence[Any], result: Mapping[str, Any], rows: Rows, test: Split | None
) -> list[Picture]:
    """Return the confusion matrix, the accuracy of each class and, where examples are pictures, some of them."""
    names = [str(name) for name in classes]
    shown = _figures_of(result, names)
    if not rows or test is None or len(test) != len(rows):
        return shown
    return shown + _examples(workload, rows, test)


def _figures_of(result: Mapping[str, Any], names: Sequence[str]) -> list[Picture]:
    counts = np.array(result["confusion_matrix"])
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    label, prediction = map(int, np.unravel_index(mistakes.argmax(), mistakes.shape))
    most = f"most often {names[label]} was taken for {names[prediction]} ({mistakes.max():,})"
    accuracies = [math.nan if a is None else a for a in result["test_accuracy_per_class"]]
    by_class = ", ".join(
        f"{name}: {'-' if math.isnan(accuracy) else f'{accuracy:.2%}'}"
        for name, accuracy in zip(names, accuracies, strict=True)
    )
    return [
        Picture(
            "confusion",
            "Confusion matrix of the test set",
            f"Confusion matrix: {mistakes.sum()} mistakes among {counts.sum():,}; "
            + (most if mistakes.any() else "no mistakes"),
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


def _examples(workload: Workload, rows: Rows, test: Split) -> list[Picture]:
    """Return test examples with their predictions, and the surest mistakes; none where examples have no picture."""
    labels, predicted = (np.array([row[name] for row in rows]) for name in ("label", "prediction"))
    probabilities, is_right = np.array([float(row["probability"]) for row in rows]), labels == predicted
    if workload.as_picture(test[0][0]) is None:
        return []
    rng = np.random.default_rng(0)
    some = rng.choice(len(labels), min(_NUM_RANDOM, len(labels)), replace=False)
    wrong = np.flatnonzero(~is_right)
    chosen = np.concatenate([some, rng.permutation(np.setdiff1d(wrong, some))[:_NUM_WRONG]])
    surest = wrong[np.argsort(-probabilities[wrong], kind="stable")][:_NUM_MISTAKES]

    def draw(indices: np.ndarray) -> bytes:
        images = [workload.as_picture(test[int(i)][0]) for i in indices]
        captions = [predicted[i] if is_right[i] else f"{predicted[i]}\nis {labels[i]}" for i in indices]
        return image_grid(images, captions, is_right[indices])  # type: ignore[arg-type]

    shown = [
        Picture(
            "predictions",
            "Predictions",
            f"{len(chosen)} test {workload.nouns} with their predictions: "
            + "; ".join(labels[i] if is_right[i] else f"{labels[i]} taken for {predicted[i]}" for i in chosen),
            draw(chosen),
            f"{len(some)} test {workload.nouns} drawn at random, then mistakes. ✓ right, ✗ wrong.",
            is_photo=True,
        )
    ]
    if len(surest):
        shown.append(
            Picture(
                "mistakes",
                "The most confident mistakes",
                "The surest wrong predictions: "
                + "; ".join(f"{labels[i]} taken for {predicted[i]} at {probabilities[i]:.0%}" for i in surest),
                draw(surest),
                f"From {probabilities[surest[0]]:.1%} sure down to {probabilities[surest[-1]]:.1%}.",
                is_photo=True,
            )
        )
    return shown


def of_regression(rows: Rows) -> list[Picture]:
    """Return predictions over targets, and how the errors are distributed."""
    if not rows:
        return []
    targets, predictions = (np.array([float(row[name]) for row in rows]) for name in ("target", "prediction"))
    errors = predictions - targets
    return [
        Picture(
            "predictions",
            "Predictions over targets of the test set",
            f"{len(rows):,} predictions over their targets, which reach from {targets.min():g} to {targets.max():g}",
            _scatter(targets, predictions),
            "On the line, a prediction is right.",
        ),
        Picture(
            "errors",
            "Errors on the test set",
            f"Errors: half of them lie between {np.quantile(errors, 0.25):.4g} and {np.quantile(errors, 0.75):.4g}",
            _histogram(errors),
            "Prediction minus target.",
        ),
    ]


def _scatter(targets: np.ndarray, predictions: np.ndarray) -> bytes:
    figure, axes = new_figure(4.6)
    both = np.concatenate([targets, predictions])
    ends = [both.min(), both.max()]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.plot(targets, predictions, ".", color="C0", alpha=max(0.1, min(1.0, 30 / math.sqrt(len(targets)))))
    axes.set_xlabel("target")
    axes.set_ylabel("prediction")
    axes.grid(alpha=0.3)
    return png_of(figure)


def _histogram(errors: np.ndarray) -> bytes:
    figure, axes = new_figure(3.4)
    axes.hist(errors, bins=min(50, max(5, len(errors) // 10)), color="C0")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_xlabel("error")
    axes.set_ylabel("examples")
    return png_of(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix: shades by the fraction of a label's examples, mistakes alone; counts in figures."""
    figure, axes = new_figure(4.6)
    mistakes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(mistakes, 0)
    most = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=most)
    if len(counts) <= _MOST_COUNTED:
        for (label, prediction), count in np.ndenumerate(counts):
            is_right, is_dark = label == prediction, mistakes[label, prediction] > 0.6 * most
            axes.text(
                prediction,
                label,
                f"{count}" if count else "·",
                ha="center",
                va="center",
                fontsize=min(8, 110 / len(counts)),
                color="white" if is_dark else _RIGHT if is_right else "black",
                fontweight="bold" if is_right else "normal",
            )
    _name_ticks(axes.xaxis, names)
    _name_ticks(axes.yaxis, names)
    if max(map(len, names)) > 2:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    return png_of(figure)


def _name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Name an axis's places, as many as can be read."""
    step = math.ceil(len(names) / 40)
    axis.set_ticks(range(0, len(names), step), names[::step], fontsize=10 if len(names) <= 12 else 7)


def accuracy_per_class(accuracies: Sequence[float], names: Sequence[str]) -> bytes:
    """Draw a dot for each class's accuracy (a fraction; NaN where the class has no examples)."""
    figure, axes = new_figure(max(4.6, min(0.25 * len(names), 12)))
    known = {label: 100 * accuracy for label, accuracy in enumerate(accuracies) if not math.isnan(accuracy)}
    axes.plot(list(known.values()), list(known), "o", color="C0")
    if len(names) <= 2 * _MOST_COUNTED:
        for label, accuracy in known.items():
            place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{accuracy:.2f} %", (accuracy, label), fontsize="small", **place)
    low = min(known.values(), default=0.0)
    axes.set_xlim(low - 0.05 * (100 - low) - 0.1, 100 + 0.3 * (100 - low) + 0.1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda tick, _: f"{tick:g}" if tick <= 100 else ""))
    _name_ticks(axes.yaxis, names)
    axes.invert_yaxis()
    axes.set_ylabel("class")
    axes.set_xlabel("accuracy (%)")
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
    num_columns = max(1, min(num_columns, len(images)))
    num_rows = max(1, math.ceil(len(images) / num_columns))
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    unit = max(height, width) / 28
    margin = max(1, round(_MARGIN * unit))
    tile_width = width + 2 * margin
    inches = max(0.8, 2.4 / num_columns) / tile_width  # of a pixel; one image alone is drawn larger
    lines = [line for caption in captions for line in caption.split("\n")]
    # In points; a character is some 0.6 of that wide, and two of them tell right from wrong.
    fontsize = min(9.0, 72 * inches * tile_width / (0.62 * (2 + max(map(len, lines)))))
    line_height = 1.45 * fontsize / 72 / inches  # pixels
    num_lines = max(caption.count("\n") + 1 for caption in captions)
    tile = (height + 2 * margin + round(4 * unit) + math.ceil(num_lines * line_height), tile_width)
    canvas = np.zeros((num_rows * tile[0], num_columns * tile[1], 4), np.uint8)
    figure = Figure(figsize=(canvas.shape[1] * inches, canvas.shape[0] * inches), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        top, left = row * tile[0] + margin, column * tile[1] + margin
        size_y, size_x = image.shape[:2]
        canvas[top : top + size_y, left : left + size_x, :3] = image if image.ndim == 3 else image[..., None]
        canvas[top : top + size_y, left : left + size_x, 3] = 255
        style: dict[str, Any] = {"color": _CAPTION}
        if is_right is not None:
            style = {"color": _RIGHT if is_right[number] else _WRONG}
            caption = f"{'✓' if is_right[number] else '✗'} {caption}"
            linewidth = 1 if is_right[number] else 4
            half = linewidth / 72 / inches / 2  # of the frame, in pixels: it stands around the image, not on it
            corner, edge = (left - 0.5 - half, top - 0.5 - half), {"fill": False, "edgecolor": style["color"]}
            axes.add_patch(Rectangle(corner, size_x + 2 * half, size_y + 2 * half, linewidth=linewidth, **edge))
        place = (left + size_x / 2, top + height + 2 * unit)
        axes.text(*place, caption, ha="center", va="top", fontsize=fontsize, **style)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    return png_of(figure, is_transparent=True)
