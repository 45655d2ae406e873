"""Distributed training on Ray, as a base for your own: train, tune and evaluate any PyTorch model."""

import importlib
from typing import TYPE_CHECKING, Any

from mnist_ray.text import VERSION as __version__  # noqa: F401, N811

__all__ = ["Run", "compare", "evaluate", "load_predictor", "load_run", "predict", "train", "tune"]

if TYPE_CHECKING:
    from mnist_ray.api import compare, evaluate, load_predictor, load_run, predict, train, tune
    from mnist_ray.report.run_files import Run


def __getattr__(name: str) -> Any:
    """Import the API on first use, since the commands start faster without it."""
    if name in __all__:
        return getattr(importlib.import_module("mnist_ray.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
