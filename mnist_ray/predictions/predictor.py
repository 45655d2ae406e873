"""Prepares inputs and reads outputs of a trained model: for ``predict``, for data at scale, and for servers."""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from mnist_ray import process
from mnist_ray.checkpoints.find import Found
from mnist_ray.data.batches import MicroBatch, to_device
from mnist_ray.data.images import as_displayed, open_picture
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.errors import JobError, UsageError
from mnist_ray.settings import is_no_file
from mnist_ray.training.step import forward
from mnist_ray.workload import Classification, Regression
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import placed

Kind = Literal["pictures", "texts", "arrays"]
BATCH_SIZE = 64
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # the files that folders are searched for
_TILE = 16
"""Batches are filled up to a multiple of this number: for fewer rows, or a rest of rows, matrix products use other
kernels, whose sums differ in the last bit."""


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

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        best, *others = (
            {"prediction": prediction} | ({} if math.isnan(p) else {"probability": round(p, 6)})
            for prediction, p in self.top
        )
        return {"file": self.file, **best, "unsure": not self.is_sure(threshold), "next": others}

    def to_line(self, threshold: float) -> str:
        """Return the line that is printed without ``--json``."""
        if self.error is not None:
            return self.error
        (_, probability), *others = self.top
        if math.isnan(probability):
            return f"{self.file}: {self.best}"
        then = ", ".join(f"{other} {p:.1%}" for other, p in others)
        unsure = "" if self.is_sure(threshold) else "  unsure"
        return f"{self.file}: {self.best}  {probability:.1%}" + (f" (then {then})" if then else "") + unsure


@dataclass(frozen=True)
class Predictor:
    """A trained model with its workload, which turns pictures, texts or arrays into predictions.

    On CPUs, a row of ``predict`` and ``columns`` has the same bits whatever other rows are computed with it, unless the
    workload's ``collate`` or model lets them depend on each other, as texts padded to the longest of a batch do.
    """

    workload: Workload
    model: nn.Module  # on the device, in evaluation mode
    checkpoint: str = ""  # path or URI
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, found: Found, device: str | torch.device = "auto") -> Predictor:
        """Load a checkpoint's model; ``auto``: onto the GPU, if PyTorch can use one. Raises UsageError and JobError."""
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = found.load_model()
        try:
            device = torch.device(device)
            model = with_fast_layout(model.to(device))
        except (AssertionError, RuntimeError) as error:  # the first if PyTorch was built without CUDA
            raise UsageError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
        return cls(found.workload, model, found.checkpoint.uri, device)

    @property
    def takes(self) -> Kind:
        """The kind of inputs beside arrays: pictures, texts to continue, or none."""
        return kind_of(self.workload)

    def decode(self, content: Any) -> Any:
        """Turn a value into an input of ``predict``.

        ``content``: a picture of any size, as bytes, a path, a Pillow image, or a dict with ``bytes``; numbers, or
        lists of them, which become float32: JSON does not tell 3 from 3.0; an array of any type; for a language model,
        a text. Raises JobError, in one line, for what is of another kind, is damaged, has too many pixels, or shows
        nothing that the workload can use.
        """
        if isinstance(content, dict) and isinstance(content.get("bytes"), bytes):
            content = content["bytes"]
        if isinstance(content, np.ndarray) or (isinstance(content, str) and self.takes == "texts"):
            return content
        if isinstance(content, (list, tuple, int, float)):
            try:
                return np.asarray(content, np.float32)
            except (TypeError, ValueError, OverflowError) as error:
                raise JobError(f"{content!r:.40} is no number, and no list of numbers") from error
        if self.takes != "pictures" or not isinstance(content, (bytes, Path, Image.Image)):
            kind = "a null" if content is None else f"a {type(content).__name__}"
            raise JobError(f"{kind} is no input of {type(self.workload).__name__}, which takes {self.takes}")
        try:
            if isinstance(content, Image.Image):
                picture = as_displayed(content)
            else:
                picture = read_image(io.BytesIO(content) if isinstance(content, bytes) else content)
            with placed(self.workload, "read_picture"):
                return self.workload.read_picture(picture)
        except UsageError as error:
            raise JobError(f"{content}: {error}" if isinstance(content, Path) else str(error)) from error

    def opened(self, item: Any) -> Any:
        """Decode the path of an image, or a Pillow image; return any other input as it is. Raises JobError."""
        if isinstance(item, str) and self.takes == "pictures":
            item = Path(os.path.expanduser(item))
        return self.decode(item) if isinstance(item, (Path, Image.Image)) else item

    def predict(self, inputs: Iterable[Any]) -> list[Prediction]:
        """Return the predictions for N inputs as ``decode`` returns them: arrays, dicts of these, or texts.

        A text's only prediction is its continuation. Raises UsageError.
        """
        predictions = list[Prediction]()
        for batch, tops, _ in self._computed(inputs):
            predictions += [Prediction("", taken, tuple(top)) for taken, top in zip(batch, tops, strict=True)]
        return predictions

    def columns(self, inputs: Iterable[Any]) -> dict[str, np.ndarray]:
        """Return the same predictions as columns, (N,): ``prediction`` and its ``probability``.

        A ``Classification`` adds ``probabilities``, (N, classes) in the order of its classes. A ``Regression`` and a
        language model have only ``prediction``. Raises UsageError.
        """
        has_classes = type(self.workload).top_predictions is Classification.top_predictions
        classes = getattr(self.workload, "class_names", []) if has_classes else []
        best, probabilities = list[tuple[Any, float]](), [np.empty((0, len(classes)), np.float32)]
        for batch, tops, outputs in self._computed(inputs):
            best += [top[0] for top in tops]
            if has_classes:
                probabilities.append(outputs.softmax(1)[: len(batch)].cpu().numpy())
        alike = classes or ([""] if self.takes == "texts" else [0.0])
        columns = {"prediction": _column([prediction for prediction, _ in best], alike)}
        if self.takes != "texts" and not isinstance(self.workload, Regression):
            columns["probability"] = np.array([probability for _, probability in best], np.float32)
        if has_classes:
            columns["probabilities"] = np.concatenate(probabilities)
        return columns

    def read(self, file: Path) -> Prediction:
        """Return a file as an input without a prediction yet, or with the reason why there is none."""
        try:
            return Prediction(str(file), self.decode(file))
        except JobError as error:
            return Prediction(str(file), error=str(error))

    def _computed(self, inputs: Iterable[Any]) -> Iterator[tuple[list[Any], list[Any], Any]]:
        """Yield batches of inputs with the top predictions for each input, and the model's outputs in fp32."""
        inputs = iter(inputs)
        while batch := [*islice(inputs, BATCH_SIZE)]:
            if self.takes == "texts":
                yield batch, [[(self._continued(text), math.nan)] for text in batch], None
                continue
            padded = batch + batch[-1:] * (-len(batch) % _TILE)
            with placed(self.workload, "a prediction"), torch.inference_mode():
                joined, targets = self._collated(padded)
                loaded = to_device(MicroBatch(joined, targets, len(padded), len(padded)), self.device)
                outputs = forward(self.workload, self.model, loaded)
            with placed(self.workload, "top_predictions"):
                yield batch, self.workload.top_predictions(outputs)[: len(batch)], outputs

    def _collated(self, batch: Sequence[Any]) -> tuple[Any, Any]:
        if type(self.workload).collate is Workload.collate and all(isinstance(taken, np.ndarray) for taken in batch):
            return torch.from_numpy(np.stack(batch)), torch.zeros(len(batch), dtype=torch.int64)  # three times as fast
        writable = functools.partial(np.require, requirements="W")  # else torch would warn
        examples = [(pytree.tree_map_only(np.ndarray, writable, taken), 0) for taken in batch]
        return self.workload.collate(examples) or default_collate(examples)

    def _continued(self, text: str) -> str:
        with placed(self.workload, "complete"), torch.no_grad():
            return self.workload.complete(self.model, text)


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


def kind_of(workload: Workload) -> Kind:
    """Return the kind of inputs that a workload takes."""
    if type(workload).complete is not Workload.complete:
        return "texts"
    return "arrays" if type(workload).read_picture is Workload.read_picture else "pictures"


def _column(values: list[Any], alike: list[Any]) -> np.ndarray:
    """Return predictions as an array: of numbers or texts or, if they are lists or dicts, of objects.

    ``alike``: values that have the array's type if there are no predictions.
    """
    if all(isinstance(value, (bool, int, float, str)) for value in values):
        return np.array(values or alike)[: len(values)]
    column = np.empty(len(values), object)
    column[:] = values
    return column
