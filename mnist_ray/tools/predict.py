"""A trained model's predictions for the user's own pictures: ``jobs/predict.py`` once its flags are read."""

from __future__ import annotations

import io
import itertools
import json
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from mnist_ray.cluster.plan import usable_cores
from mnist_ray.config import PredictionConfig
from mnist_ray.errors import JobError, UsageError, say, with_place
from mnist_ray.run import find
from mnist_ray.run.lookup import class_of
from mnist_ray.settings import path_of
from mnist_ray.storage import RunFolder, write_file
from mnist_ray.workload.base import Workload

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, as Pillow names it. For others it would start programs, as Ghostscript for PostScript."""
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})  # of files taken from folders
_BATCH_SIZE = 64
_MOST_DRAWN = 240
_LONGEST_NAME = 14
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Prediction:
    """What the model says about one file, or one input."""

    file: str
    inputs: np.ndarray | None = None  # what the model saw, as the workload's data have it
    top: tuple[tuple[Any, float], ...] = ()  # the best few with their probabilities, the best first
    error: str | None = None  # why there is no prediction

    def is_sure(self, threshold: float) -> bool:
        """Whether the best is at least that probable."""
        return bool(self.top) and self.top[0][1] >= threshold

    def to_dict(self, noun: str, threshold: float) -> dict[str, Any]:
        """Return what ``--json`` prints; ``noun`` is what a prediction is called."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        best, *others = ({noun: prediction, "probability": round(p, 6)} for prediction, p in self.top)
        return {"file": self.file, **best, "unsure": not self.is_sure(threshold), "next": others}

    def to_line(self, threshold: float) -> str:
        """Return what people read."""
        if self.error is not None:
            return f"{self.file}: {self.error}"
        (best, probability), *others = self.top
        then = ", ".join(f"{other} {p:.1%}" for other, p in others)
        unsure = "" if self.is_sure(threshold) else "  unsure"
        return f"{self.file}: {best}  {probability:.1%}" + (f" (then {then})" if then else "") + unsure


def predict(given: Sequence[str], found: find.Found, config: PredictionConfig) -> None:
    """Print the prediction for each picture. Raises JobError at the end if there were files without one."""
    workload = found.workload
    if type(workload).read_picture is Workload.read_picture:
        raise UsageError(f"{type(workload).__name__} does not take pictures: it has no read_picture")
    model = found.load_model()
    if not config.json:
        for note in found.notes:
            say(f"note {note}")
        say(f"checkpoint {found.checkpoint.path} ({found.description})")
    predictions = []
    for prediction in predict_files(workload, model, find_files(given), as_is=config.as_is):
        predictions.append(prediction)
        if config.json:
            sys.stdout.write(json.dumps(prediction.to_dict(workload.prediction_noun, config.threshold)) + "\n")
        else:
            say(prediction.to_line(config.threshold))
    if config.grid is not None:
        write_file(path_of(config.grid, "--grid"), _grid(predictions, workload, config))
    failed = sum(prediction.error is not None for prediction in predictions)
    if failed:
        raise JobError(f"no prediction for {failed:,} of {len(predictions):,} files")


def takes_pictures(run: RunFolder) -> bool:
    """Tell whether a run's workload takes pictures; not if its code cannot be had."""
    try:
        return class_of(run, run.storage_path).read_picture is not Workload.read_picture
    except UsageError:
        return False


def find_files(given: Iterable[str]) -> Iterator[Path]:
    """Yield the files that were given, and of folders the pictures in them at any depth, sorted."""
    for name in given:
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):  # not Path.is_dir(), which raises if a name is too long or a folder is closed
            found = sorted(file for file in path.rglob("*") if os.path.isfile(file))
            # A folder without pictures is reported as a file that cannot be read.
            yield from [file for file in found if file.suffix.lower() in _SUFFIXES] or [path]
        else:
            yield path


def predict_files(
    workload: Workload, model: nn.Module, files: Iterable[Path], *, as_is: bool = False
) -> Iterator[Prediction]:
    """Yield the prediction for each file, in their order."""
    torch.set_num_threads(usable_cores())
    files = iter(files)
    while batch := [_see(workload, file, as_is) for file in itertools.islice(files, _BATCH_SIZE)]:
        inputs = [seen.inputs for seen in batch if seen.inputs is not None]
        predicted = iter(predict_inputs(workload, model, np.stack(inputs)) if inputs else ())
        for seen in batch:
            yield seen if seen.inputs is None else Prediction(seen.file, seen.inputs, next(predicted).top)


def predict_inputs(workload: Workload, model: nn.Module, inputs: np.ndarray) -> list[Prediction]:
    """Return the predictions for inputs (N, ...) as the workload's data have them."""
    prepared = workload.prepare(torch.tensor(inputs), None)
    wanted = workload.metadata.get("model_input")
    if wanted is not None and list(prepared.shape[1:]) != wanted["shape"]:
        got = f"{tuple(prepared.shape[1:])}, not {tuple(wanted['shape'])}"
        raise UsageError(f"{type(workload).__name__}.read_picture gives what becomes {got}, as the model takes it")
    with torch.inference_mode():
        each = workload.top_predictions(model(prepared))
    return [Prediction("", one, tuple(top)) for one, top in zip(inputs, each, strict=True)]


def _see(workload: Workload, file: Path, as_is: bool) -> Prediction:
    """Return what the model is to see of a file, or why it cannot."""
    try:
        return Prediction(str(file), workload.read_picture(read_image(_read(file)), as_is=as_is))
    except UsageError as error:
        return Prediction(str(file), error=str(error))
    except Exception as error:
        place = with_place(error, workload.source.folder)
        raise UsageError(f"{type(workload).__name__}.read_picture: {place}") from error


def _read(file: Path) -> bytes:
    """Return a file's content. Raises UsageError."""
    if os.path.isdir(file):
        raise UsageError("is a folder without pictures")
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):  # else reading may wait for ever, or never end
            raise UsageError("is no regular file")
        if about.st_size > _MOST_BYTES:
            raise UsageError(f"is too large: {about.st_size / 1e6:,.0f} MB, and at most {_MOST_BYTES / 1e6:.0f}")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', error)}") from error


def read_image(content: bytes) -> Image.Image:
    """Decode a picture and turn it as its EXIF data say. Raises UsageError if it is none, or a huge one."""
    if not content:
        raise UsageError("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of damage that does no harm
            return ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=FORMATS))
    except Image.DecompressionBombError as error:
        raise UsageError("is too large: it would unpack to a huge picture") from error
    except UnidentifiedImageError as error:
        raise UsageError("is no picture of a known format") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise
        raise UsageError(f"is damaged: {error}") from error


def _grid(predictions: Sequence[Prediction], workload: Workload, config: PredictionConfig) -> bytes:
    """Draw what the network saw, with its predictions. Raises JobError if there is nothing to draw."""
    from mnist_ray.workload.figures import image_grid  # imports matplotlib, which predictions need not wait for

    images, captions = [], []
    for prediction in predictions:
        image = None if prediction.inputs is None else workload.as_picture(prediction.inputs)
        if image is not None:
            (best, probability), name = prediction.top[0], Path(prediction.file).name
            short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 5]}…{name[-4:]}"
            images.append(image)
            captions.append(f"{best}{'' if prediction.is_sure(config.threshold) else '?'} {probability:.0%}\n{short}")
    if not images:
        has_none = any(prediction.inputs is not None for prediction in predictions)
        reason = f": {type(workload).__name__} has no as_picture" if has_none else ""
        raise JobError(f"no picture to draw in {config.grid}{reason}")
    return image_grid(images[:_MOST_DRAWN], captions[:_MOST_DRAWN])
