"""The page of a comparison: curves over each other, and the examples that changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import JobError, UsageError
from mnist_ray.report.page import Table, page_of
from mnist_ray.report.plots import Curve, curves_of
from mnist_ray.report.run_files import METRICS_FILE, read_numbers, workload_of
from mnist_ray.settings import build
from mnist_ray.tools.compare import Comparison
from mnist_ray.tools.differences import as_dict
from mnist_ray.tools.sides import Side
from mnist_ray.workload.base import Picture
from mnist_ray.workload.calls import data_of, picture_of
from mnist_ray.workload.drawing import image_grid
from mnist_ray.workload.figures import Metric, formatted
from mnist_ray.workload.loading import Reference

_MAX_EXAMPLES = 32  # of those won, and of those lost
_MAX_MARKERS = 50  # of epochs; more would hide the curves


def page(comparison: Comparison, reference: Reference | None, storage_path: str) -> str:
    """Return the page as HTML. Examples are images if the first run's workload and data can be loaded, else rows.

    ``reference``: the workload's code, if it has moved. Raises JobError if a file is damaged.
    """
    header, *rows = comparison.table
    notes, pictures, tables = list[str](), _curves(comparison.sides), [Table("Runs", header, rows)]
    first, *others = comparison.sides
    against = zip(others, comparison.lines, strict=True)
    tables += [Table(f"{side.letter} against {first.letter}", ("", ""), lines) for side, lines in against]
    changed = [*_changed(comparison)]
    images = dict[int, np.ndarray]()
    try:
        wanted = dict.fromkeys(index for _, _, indices in changed for index in indices)
        images = _images(comparison.sides[0], wanted, reference, storage_path)
    except (UsageError, JobError) as error:
        notes.append(f"examples are rows, not images: {error}")
    for title, sides, indices in changed:
        rows = [_row(sides, index) for index in indices]
        if images:
            pictures.append(_grid(title, sides, [images[index] for index in indices], rows))
        else:
            headers = ["index", "target", *(f"{side.letter}{what}" for what in ("", ", loss") for side in sides)]
            tables.append(Table(title, headers, rows))
    return page_of(
        title=", ".join(f"{side.letter}: {side.run.name}" for side in comparison.sides),
        status="\n".join(verdict.sentence for verdict in comparison.verdicts),
        headlines={},
        notes=notes,
        pictures=pictures,
        tables=tables,
        refresh_s=0,
    )


def _curves(sides: Sequence[Side]) -> list[Picture]:
    """Draw each metric over the epochs, with a colour for each side and a curve for each member."""
    pictures = []
    for name in (name for name in sides[0].metrics if "." not in name):
        of_sides = (_curves_of(side, name, f"C{number}") for number, side in enumerate(sides))
        curves, form = [*itertools.chain(*of_sides)], sides[0].forms[f"test_{name}"]
        ends = "; ".join(f"{curve.label} ends at {formatted(curve.values[-1], form)}" for curve in curves)
        png = curves_of(Metric(name, "min", form == "fraction"), curves, steps_per_epoch=None)
        pictures.append(Picture(name, name, f"{name} over the epochs. {ends}", png))
    return pictures


def _curves_of(side: Side, name: str, colour: str) -> Iterator[Curve]:
    """Yield the curve of each member: of the validation or, if nothing was held out, of the training."""
    for number, member in enumerate(side.members):
        rows = read_numbers(member.folder, METRICS_FILE, "epoch")
        parts = {part: [row.get(f"{part}_{name}", math.nan) for row in rows] for part in ("val", "train")}
        part = "train" if all(map(math.isnan, parts["val"])) else "val"
        label = f"{side.letter}, {'training' if part == 'train' else 'validation'}"
        style = {"color": colour, "linewidth": 1, "marker": "o" if len(rows) <= _MAX_MARKERS else "", "markersize": 3}
        if rows:
            yield Curve(f"_{label}" if number else label, [row["epoch"] for row in rows], parts[part], style)


def _changed(comparison: Comparison) -> Iterator[tuple[str, tuple[Side, Side], list[int]]]:
    """Yield the first indices of the examples that each side has won and lost, with a title and the two sides."""
    first, *others = comparison.sides
    for side, verdict in zip(others, comparison.verdicts, strict=True):
        for title, indices in (("Better in {1} than in {0}", verdict.won), ("Worse in {1} than in {0}", verdict.lost)):
            if len(indices):
                said = f"{title.format(first.letter, side.letter)}: {len(indices):,}"
                yield said, (first, side), indices[:_MAX_EXAMPLES].tolist()


def _images(
    side: Side, indices: Collection[int], reference: Reference | None, storage_path: str
) -> dict[int, np.ndarray]:
    """Return test examples as images by their indices; none if they are not images. Raises UsageError and JobError."""
    member = side.members[0]
    workload = workload_of(member.folder, reference, storage_path, side.run)
    config = build(TrainConfig, member.config)
    is_train = side.has_folds or config.fold is not None or config.overfit_batches is not None
    data = data_of(workload)
    examples = Split(data.train if is_train else data.test)
    if strange := [index for index in indices if not 0 <= index < len(examples)]:
        raise UsageError(f"the data now have {len(examples):,} {workload.nouns}, and none with index {strange[0]:,}")
    images = {index: picture_of(workload, examples[index][0]) for index in indices}
    return {index: image for index, image in images.items() if image is not None}


def _grid(title: str, sides: tuple[Side, Side], images: Sequence[np.ndarray], rows: Sequence[Sequence[str]]) -> Picture:
    before, after = (side.letter for side in sides)
    captions = [f"{before}: {first}\n{after}: {second}\nis {target}" for _, target, first, second, *_ in rows]
    alt = "; ".join(caption.replace("\n", ", ") for caption in captions)
    caption = "The largest change of the loss first."
    return Picture(title, title, alt, image_grid(images, captions), caption, is_photo=True)


def _row(sides: tuple[Side, Side], index: int) -> list[str]:
    """Return an example's index, its label or target, what each side predicts, and the loss of each."""
    targets = _at(sides[0], "label", index) or _at(sides[0], "target", index)
    values = [targets, *(_at(side, "prediction", index) for side in sides)]
    names = [", ".join(dict.fromkeys(_named(sides[0], value) for value in each)) for each in values]
    return [str(index), *names, *(formatted(float(np.mean(_at(side, "loss", index))), "number") for side in sides)]


def _at(side: Side, column: str, index: int) -> list[float]:
    """Return a column's value for a test example, of each member that has it."""
    known = [member.columns for member in side.members if column in member.columns]
    return [value for columns in known for value in columns[column][columns["index"] == index].tolist()]


def _named(side: Side, value: float) -> str:
    """Return a class by its name, or a number."""
    names = as_dict(side.members[0].origin.get("metadata")).get("class_names")
    if not side.members[0].has_classes:
        return formatted(value, "number")
    return str(names[int(value)]) if isinstance(names, list) and 0 <= value < len(names) else str(value)
