"""A page of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from mnist_ray.report import curves
from mnist_ray.report.curves import Curve
from mnist_ray.report.page import Page, RunRecord, headlines, value_text
from mnist_ray.workload.figures import MARKERS, Picture, Table


def compare(records: Sequence[RunRecord]) -> str:
    """Return a page that shows several runs side by side."""
    names, all_headlines = [record.run.name for record in records], [headlines(record) for record in records]
    columns = list(dict.fromkeys(name for some in all_headlines for name in some))
    rows = [
        (name, *(some.get(column, "-") for column in columns)) for name, some in zip(names, all_headlines, strict=True)
    ]
    tables = [Table("Runs", ("run", *columns), rows)]
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    differing = [key for key in keys if len({value_text(record.config.get(key)) for record in records}) > 1]
    if differing:
        rows = [(key, *(value_text(record.config.get(key)) for record in records)) for key in differing]
        tables.append(Table("Settings that differ", ("setting", *names), rows))
    notes = [f"{record.run.name}: {note}" for record in records for note in record.notes]
    common = [m for m in records[0].workload.all_metrics if all(m in record.workload.all_metrics for record in records)]
    pages = [Picture("loss", "Loss in training", f"Training loss of {', '.join(names)}; the table has the ends",
                     curves.curves_of(common[0], _curves_over(records, "train_loss"), None))]  # fmt: skip
    for metric in common[1:]:
        title = f"Validation {metric.name}"
        png = curves.curves_of(metric, _curves_over(records, f"val_{metric.name}"), None)
        pages.append(Picture(metric.name, title, f"{title} of {', '.join(names)}; the table has the best", png))
    return Page(f"{len(records)} runs", "side by side", {}, notes, pages, tables).to_html()


def _curves_over(records: Sequence[RunRecord], name: str) -> list[Curve]:
    curves = []
    for number, record in enumerate(records):
        style = {
            "color": f"C{number % 10}",
            "marker": MARKERS[number % 8],
            "linestyle": ("-", "--", ":")[number % 3],
        }
        curves.append(Curve(record.run.name, record.column("epoch"), record.column(name), style))
    return curves
