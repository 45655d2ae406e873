"""Workloads define what is learned. Import everything that a workload's file needs from here."""

import importlib
from typing import TYPE_CHECKING, Any

from mnist_ray.data.data import Arrays, Blocks, Data, Streamed
from mnist_ray.settings import Choice, Range, at_least, fraction, positive, setting, within
from mnist_ray.workload.base import Picture, Workload
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.figures import ACCURACY, Metric
from mnist_ray.workload.regression import Regression

if TYPE_CHECKING:
    from mnist_ray.data import sources

__all__ = [
    "ACCURACY",
    "Arrays",
    "Blocks",
    "Choice",
    "Classification",
    "Data",
    "Metric",
    "Picture",
    "Range",
    "Regression",
    "Streamed",
    "Workload",
    "at_least",
    "fraction",
    "positive",
    "setting",
    "sources",
    "within",
]


def __getattr__(name: str) -> Any:
    """Import ``sources`` on first use: it needs pyarrow.parquet, unlike most workloads."""
    if name == "sources":
        return importlib.import_module("mnist_ray.data.sources")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
