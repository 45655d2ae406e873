"""Figures and pictures, drawn with matplotlib: what all that draws needs, whatever it draws."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
