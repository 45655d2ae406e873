"""The figures of a run: how each is named, aggregated and shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """A number that a run reports: in files, to trackers, in its report."""

    name: str  # of its column
    at: tuple[Literal["step", "epoch", "validation", "trial", "test"], ...]  # when it is reported; step: per window
    over: Literal["mean", "max", "root", "last", "sum"]  # joins steps: mean over examples, root of summed squares, …
    form: str = "number"  # "number", "fraction" (from 0 to 1, shown as a percentage), or a Python format
    label: str = ""  # in the report; "" to leave the figure out
    places: int | None = None  # decimals in metrics.csv; None: all
    needs: str = ""  # the setting of TrainConfig that the figure requires

    def join(self, values: Iterable[float]) -> float:
        """Join the values of several steps or ranks. Only finite values count, since fp16 may skip a step."""
        known = [value for value in values if math.isfinite(value)]
        if not known:
            return math.nan
        return {"max": max(known), "root": math.hypot(*known), "last": known[-1], "sum": math.fsum(known)}[self.over]


@dataclass(frozen=True)
class Metric:
    """A measure of a model. On each part of the data, it is a figure."""

    name: str  # in output, files and `summarize`
    mode: Literal["max", "min"]  # whether higher or lower values are better
    is_fraction: bool = False  # from 0 to 1, shown as a percentage

    def format(self, value: float, places: int = 2) -> str:
        """Return a value as text: a fraction as a percentage with ``places`` decimals, NaN as a dash."""
        return formatted(value, self.form, places)

    @property
    def form(self) -> str:
        """The form of its figures."""
        return "fraction" if self.is_fraction else "number"


def formatted(value: float, form: str, places: int = 2) -> str:
    """Return a value as text in a figure's form; a fraction with ``places`` decimals, NaN as a dash."""
    if math.isnan(value):
        return "-"
    if form == "fraction":
        return f"{value:.{places}%}"
    if form != "number":
        return format(value, form)
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def logged_figures(names: Iterable[str], known: Iterable[Figure]) -> list[Figure]:
    """Return the figures of the ``names`` of columns that are none of the ``known`` ones.

    These are of what steps have logged, and of metrics on further validation sets.
    """
    known = [*known]
    others = {"step", "epoch", *(figure.name for figure in known)}
    return [_logged(name, known) for name in dict.fromkeys(names) if name not in others]


def _logged(name: str, known: Iterable[Figure]) -> Figure:
    if not name.startswith("val_"):
        return Figure(name, ("step", "epoch"), "mean", label=name.replace("_", " "))
    first = of_first_set(name, known)
    label = name.replace("val", "validation", 1).replace("_", " ")
    return Figure(name, ("validation",), "mean", first.form if first else "number", label)


def of_first_set(name: str, known: Iterable[Figure]) -> Figure | None:
    """Return the same metric's figure on the first validation set, for a name such as ``val_shifted_accuracy``."""
    fitting = (one for one in known if "validation" in one.at and name.endswith(one.name.removeprefix("val")))
    return max(fitting, key=lambda one: len(one.name), default=None)


IN_WORDS = {"test": "test", "val": "validation"}  # the set that a trained model is evaluated on
DONE_ON = {"test": "tested", "val": "validated"}
NOT_PREDICTED = ("index", "fold", "loss", "weight")  # columns of predictions.parquet that a workload does not define
RATE = "examples_per_s"  # of training, over all ranks
LEARNING_RATE = Figure("learning_rate", ("step",), "last", "g", "learning rate")
GRADIENT_NORM = Figure("gradient_norm", ("step", "epoch"), "max", label="gradient norm", needs="clip_grad_norm")
EPOCH_S = Figure("epoch_s", ("epoch",), "last", ".2f", "seconds", places=3)
VALIDATION_S = Figure("val_s", ("validation",), "last", ".1f", places=3)
TRAIN_S = Figure("train_s", ("trial",), "last", ".1f", "seconds")
LOSS, ACCURACY = Metric("loss", "min"), Metric("accuracy", "max", is_fraction=True)
