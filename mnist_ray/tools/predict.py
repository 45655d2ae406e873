"""Prints a trained model's predictions for the user's own images: ``mnist-ray predict`` after flag parsing."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mnist_ray.checkpoints.find import Found
from mnist_ray.config import PredictionConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.output import say
from mnist_ray.predictions.predictor import BATCH_SIZE, PICTURES, Prediction, Predictor
from mnist_ray.process import usable_cores
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.workload.base import Workload

_MAX_DRAWN = 240


def predict(found: Found, config: PredictionConfig) -> dict[str, Any]:
    """Print and return the prediction for each image or, with a language model, the continuation of each text.

    If an image has no prediction, there is also an ``error``.
    """
    workload, predictor = found.workload, Predictor.of(found, "cpu")
    for note in found.notes:
        say(f"note {note}")
    say(f"checkpoint {found.checkpoint.path} ({predictor.name})")
    if predictor.takes == "texts":
        continued = predictor.predict(config.files)
        for prediction in continued:
            say(prediction.best)
        return {"predictions": [{"prompt": each.inputs, "text": each.best} for each in continued]}
    torch.set_num_threads(usable_cores())
    predictions = []
    for prediction in predict_files(predictor, find_files(config.files)):
        predictions.append(prediction if config.grid else replace(prediction, inputs=None))  # to save memory
        say(prediction.to_line(config.threshold))
    if config.grid is not None:
        write_file(path_of(config.grid, "--grid"), _grid(predictions, workload, config))
    listed = [prediction.to_dict(workload.prediction_noun, config.threshold) for prediction in predictions]
    failed = sum(prediction.error is not None for prediction in predictions)
    error = {"error": f"no prediction for {failed:,} of {len(predictions):,} files"} if failed else {}
    return {"predictions": listed, **error}


def is_image(item: Any) -> bool:
    """Return whether this may be an image, or the path of a file or a folder."""
    return isinstance(item, (str, Path, Image.Image))


def find_files(places: Iterable[str | Path | Image.Image]) -> Iterator[Path | Image.Image]:
    """Yield the files and Pillow images in ``places``, and the images in its folders, sorted."""
    for place in places:
        path = place if isinstance(place, Image.Image) else Path(os.path.expanduser(place))
        if isinstance(path, Path) and os.path.isdir(path):  # is_dir() raises if the name is too long or unreadable
            found = sorted(file for file in path.rglob("*") if os.path.isfile(file))
            # A folder without images is reported as a file that cannot be read.
            yield from [file for file in found if file.suffix.lower() in PICTURES] or [path]
        else:
            yield path


def predict_files(predictor: Predictor, files: Iterable[Path | Image.Image]) -> Iterator[Prediction]:
    """Yield a prediction for each file or image, in their order. Raises UsageError."""
    if predictor.takes != "pictures":
        raise UsageError(
            f"{predictor.name} does not take images: it has no read_picture; choose another run with --run"
        )
    files = iter(files)
    while batch := [predictor.read(file) for file in itertools.islice(files, BATCH_SIZE)]:
        predicted = iter(predictor.predict(read.inputs for read in batch if read.error is None))
        for read in batch:
            yield read if read.error is not None else replace(read, top=next(predicted).top)


def _grid(predictions: Sequence[Prediction], workload: Workload, config: PredictionConfig) -> bytes:
    """Draw the model's inputs and predictions. Raises JobError if there is nothing to draw."""
    from mnist_ray.workload.drawing import image_grid  # imports matplotlib, which only a grid needs

    images, captions = [], []
    for prediction in predictions[:_MAX_DRAWN]:
        image = None if prediction.inputs is None else workload.as_picture(prediction.inputs)
        if image is not None:
            (_, probability), doubt = prediction.top[0], "" if prediction.is_sure(config.threshold) else "?"
            percent = "" if math.isnan(probability) else f" {probability:.0%}"
            images.append(image)
            captions.append(f"{prediction.best}{doubt}{percent}\n{Path(prediction.file).name[-14:]}")
    if not images:
        reason = f"no file has a prediction, or {type(workload).__name__} has no as_picture"
        raise JobError(f"no image to draw in {config.grid}: {reason}")
    return image_grid(images, captions)
