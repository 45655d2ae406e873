"""Prints a trained model's predictions for the user's own images: ``jobs/predict.py`` after flag parsing."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from mnist_ray import process
from mnist_ray.config import Precision, PredictionConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.images import as_displayed, open_picture
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job import find
from mnist_ray.output import say
from mnist_ray.process import usable_cores
from mnist_ray.settings import is_no_file, path_of
from mnist_ray.storage import write_file
from mnist_ray.training.step import forward
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})  # of the files taken from folders
_BATCH_SIZE = 64
_MAX_DRAWN = 240
_MAX_NAME = 14


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one file, image or input."""

    file: str  # the image's path; empty for an image or an input that has none
    inputs: Any = None  # in the format of the workload's data
    top: tuple[tuple[Any, float], ...] = ()  # the best few predictions with their probabilities (or NaN), best first
    error: str | None = None  # why there is no prediction

    @property
    def best(self) -> str:
        """The best prediction as text."""
        prediction = self.top[0][0]
        return f"{prediction:g}" if isinstance(prediction, float) else str(prediction)

    def is_sure(self, threshold: float) -> bool:
        """Whether the best prediction has at least this probability, or none, as in a regression."""
        return bool(self.top) and not self.top[0][1] < threshold

    def to_dict(self, noun: str, threshold: float) -> dict[str, Any]:
        """Return the object that ``--json`` prints; ``noun`` is the workload's ``prediction_noun``."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        best, *others = (
            {noun: prediction} | ({} if math.isnan(p) else {"probability": round(p, 6)}) for prediction, p in self.top
        )
        return {"file": self.file, **best, "unsure": not self.is_sure(threshold), "next": others}

    def to_line(self, threshold: float) -> str:
        """Return the line that is printed without ``--json``."""
        if self.error is not None:
            return f"{self.file}: {self.error}"
        (_, probability), *others = self.top
        if math.isnan(probability):
            return f"{self.file}: {self.best}"
        then = ", ".join(f"{other} {p:.1%}" for other, p in others)
        unsure = "" if self.is_sure(threshold) else "  unsure"
        return f"{self.file}: {self.best}  {probability:.1%}" + (f" (then {then})" if then else "") + unsure


def predict(places: Sequence[str], found: find.Found, config: PredictionConfig) -> None:
    """Print the prediction for each image or, with a language model, the continuation of each text.

    Raises JobError at the end if a file has no prediction.
    """
    workload, model = found.workload, found.load_model()
    if not config.json:
        for note in found.notes:
            say(f"note {note}")
        say(f"checkpoint {found.checkpoint.path} ({type(workload).__name__})")
    if type(workload).complete is not Workload.complete:
        for prompt in places:
            with placed(workload, "complete"), torch.no_grad():
                text = workload.complete(model, prompt)
            if config.json:
                sys.stdout.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
            else:
                say(text)
        return
    torch.set_num_threads(usable_cores())
    predictions = []
    for prediction in predict_files(workload, model, find_files(places), found.precision):
        predictions.append(prediction if config.grid else replace(prediction, inputs=None))  # to save memory
        if config.json:
            sys.stdout.write(json.dumps(prediction.to_dict(workload.prediction_noun, config.threshold)) + "\n")
        else:
            say(prediction.to_line(config.threshold))
    if config.grid is not None:
        write_file(path_of(config.grid, "--grid"), _grid(predictions, workload, config))
    failed = sum(prediction.error is not None for prediction in predictions)
    if failed:
        raise JobError(f"no prediction for {failed:,} of {len(predictions):,} files")


def find_files(places: Iterable[Any]) -> Iterator[Path | Image.Image]:
    """Yield the files and Pillow images in ``places``, and the images in its folders, sorted. Raises UsageError."""
    for place in places:
        if not isinstance(place, (str, Path, Image.Image)):
            kind = type(place).__name__
            raise UsageError(f"pictures must be paths, Pillow images or a NumPy array of inputs, not {kind}")
        path = place if isinstance(place, Image.Image) else Path(os.path.expanduser(place))
        if isinstance(path, Path) and os.path.isdir(path):  # is_dir() raises if the name is too long or unreadable
            found = sorted(file for file in path.rglob("*") if os.path.isfile(file))
            # A folder without images is reported as a file that cannot be read.
            yield from [file for file in found if file.suffix.lower() in _SUFFIXES] or [path]
        else:
            yield path


def predict_files(
    workload: Workload, model: nn.Module, files: Iterable[Path | Image.Image], precision: Precision = "fp32"
) -> Iterator[Prediction]:
    """Yield a prediction for each file or image, in their order. Raises UsageError."""
    if type(workload).read_picture is Workload.read_picture:
        name = type(workload).__name__
        raise UsageError(f"{name} does not take images: it has no read_picture; choose another run with --run")
    files = iter(files)
    while batch := [_read(workload, file) for file in itertools.islice(files, _BATCH_SIZE)]:
        inputs = [read.inputs for read in batch if read.inputs is not None]
        predicted = iter(predict_inputs(workload, model, inputs, precision))
        for read in batch:
            yield read if read.inputs is None else replace(read, top=next(predicted).top)


def predict_inputs(
    workload: Workload, model: nn.Module, inputs: Iterable[Any], precision: Precision = "fp32"
) -> list[Prediction]:
    """Return the predictions for N inputs in the format of the workload's data. Raises UsageError."""
    inputs, predictions = iter(inputs), list[Prediction]()
    writable = functools.partial(np.require, requirements="W")  # else torch would warn
    while batch := [*itertools.islice(inputs, _BATCH_SIZE)]:
        examples = [(pytree.tree_map_only(np.ndarray, writable, taken), 0) for taken in batch]
        with placed(workload, "a prediction"), torch.inference_mode():
            joined, targets = workload.collate(examples) or default_collate(examples)
            outputs, _ = forward(workload, model, MicroBatch(joined, targets, len(batch)), precision)
            tops = workload.top_predictions(outputs)
        predictions += [Prediction("", taken, tuple(top)) for taken, top in zip(batch, tops, strict=True)]
    return predictions


def _read(workload: Workload, file: Path | Image.Image) -> Prediction:
    """Read one file or image as an input of the model, or return the reason why it has no prediction."""
    name = str(file) if isinstance(file, Path) else ""
    try:
        picture = read_image(file) if isinstance(file, Path) else as_displayed(file)
        with placed(workload, "read_picture"):
            return Prediction(name, workload.read_picture(picture))
    except UsageError as error:
        return Prediction(name, error=str(error))


def read_image(file: Path | io.BytesIO) -> Image.Image:
    """Decode an image, as it is displayed. Raises UsageError."""
    if isinstance(file, Path) and is_no_file(file):
        raise UsageError("not a file")
    try:
        with process.filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and harmless damage
            return open_picture(file)
    except UnidentifiedImageError as error:
        raise UsageError("not an image in a known format") from error
    except Exception as error:  # a damaged file may raise anything
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _grid(predictions: Sequence[Prediction], workload: Workload, config: PredictionConfig) -> bytes:
    """Draw the model's inputs and predictions. Raises JobError if there is nothing to draw."""
    from mnist_ray.workload.drawing import image_grid  # imports matplotlib, which only a grid needs

    images, captions = [], []
    for prediction in predictions[:_MAX_DRAWN]:
        image = None if prediction.inputs is None else workload.as_picture(prediction.inputs)
        if image is not None:
            (_, probability), name = prediction.top[0], Path(prediction.file).name
            short = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 5]}…{name[-4:]}"
            images.append(image)
            percent = "" if math.isnan(probability) else f" {probability:.0%}"
            captions.append(f"{prediction.best}{'' if prediction.is_sure(config.threshold) else '?'}{percent}\n{short}")
    if not images:
        reason = f"no file has a prediction, or {type(workload).__name__} has no as_picture"
        raise JobError(f"no image to draw in {config.grid}: {reason}")
    return image_grid(images, captions)
