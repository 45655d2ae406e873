"""Prints a trained model's predictions for the user's own images: ``mnist-ray predict`` after flag parsing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnist_ray.checkpoints.find import Found
from mnist_ray.config import PredictionConfig
from mnist_ray.errors import UsageError
from mnist_ray.output import say
from mnist_ray.predictions.predictor import BATCH_SIZE, PICTURES, Prediction, Predictor
from mnist_ray.process import usable_cores


def predict(found: Found, config: PredictionConfig) -> dict[str, Any]:
    """Print and return the prediction for each image or, with a language model, the continuation of each text.

    If an image has no prediction, there is also an ``error``.
    """
    predictor = Predictor.of(found, "cpu")
    for note in found.notes:
        say(f"note {note}")
    say(f"checkpoint {found.checkpoint.path} ({type(found.workload).__name__})")
    if predictor.takes == "texts":
        continued = predictor.predict(config.files)
        for prediction in continued:
            say(prediction.best)
        return {"predictions": [{"prompt": each.inputs, "text": each.best} for each in continued]}
    torch.set_num_threads(usable_cores())
    listed = []
    for prediction in predict_files(predictor, find_files(config.files)):
        say(prediction.to_line(config.threshold))
        listed.append(prediction.to_dict(config.threshold))
    failed = sum("error" in each for each in listed)
    error = {"error": f"no prediction for {failed:,} of {len(listed):,} files"} if failed else {}
    return {"predictions": listed, **error}


def find_files(places: Iterable[str]) -> Iterator[Path]:
    """Yield the files in ``places``, and the images in its folders, sorted."""
    for path in map(Path, map(os.path.expanduser, places)):
        # A folder without images is reported as a file that cannot be read.
        found = sorted(file for file in path.rglob("*") if os.path.isfile(file)) if os.path.isdir(path) else []
        yield from [file for file in found if file.suffix.lower() in PICTURES] or [path]


def predict_files(predictor: Predictor, files: Iterable[Path]) -> Iterator[Prediction]:
    """Yield a prediction for each file, in their order. Raises UsageError."""
    if predictor.takes != "pictures":
        name = type(predictor.workload).__name__
        raise UsageError(f"{name} does not take images: it has no read_picture; choose another run with --run")
    files = iter(files)
    while batch := [predictor.read(file) for file in itertools.islice(files, BATCH_SIZE)]:
        predicted = iter(predictor.predict(read.inputs for read in batch if read.error is None))
        for read in batch:
            yield read if read.error is not None else replace(read, top=next(predicted).top)
