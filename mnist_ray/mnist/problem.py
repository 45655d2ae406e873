"""The workload that ships with the package, and an example for your own: digits and the notebook's network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_ray.data.data import Data
from mnist_ray.mnist import idx
from mnist_ray.settings import Choice, Range, setting
from mnist_ray.workload.classification import Classification

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The images to train on."""

    data_dir: Path | None = setting(
        None, "a folder with four IDX files, gzipped or not, instead of MNIST", decides_data=True
    )


class MNIST(Classification):
    """28×28 grey images of ten digits."""

    Settings = Settings
    noun = "image"
    recipes = {
        "default": {
            "num_epochs": 2,
            "batch_size": 128,
            "learning_rate": 5e-3,
            "lr_schedule": "one-cycle",
            "beta1": 0.7,  # short averages, since two epochs have few steps
            "beta2": 0.9,
        },
        "notebook": {
            "num_epochs": 2,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "beta1": 0.9,
            "beta2": 0.999,
            "precision": "fp32",
            "validation_size": 0,
        },
    }
    search = {"batch_size": Choice((32, 64, 128, 256, 512)), "learning_rate": Range(5e-4, 2e-2, log=True)}

    def load_data(self) -> Data:
        """Read the IDX files. Raises UsageError if they are missing, JobError if damaged."""
        data_dir = self.settings.data_dir
        return Data(idx.load("train", data_dir), idx.load("test", data_dir), name=str(data_dir or "mnist"))

    def create_model(self) -> nn.Module:
        """Return the notebook's network."""
        from mnist_ray.mnist.cnn import CNN

        return CNN(self.num_classes)

    def shard_units(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers. The network is too small for sharding to pay off, but shows that it works."""
        return list(model.children())

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn images (N, 28, 28) uint8 into (N, 1, 28, 28) in [0, 1], as ``ToTensor`` does."""
        return inputs.unsqueeze(1).float().div_(255)

    def as_picture(self, inputs: Any) -> np.ndarray:
        """Return the input, which is an image already."""
        return np.asarray(inputs)

    def read_picture(self, picture: Image) -> np.ndarray:
        """Scale a picture to 28×28 greys, bright on dark. ``examples/digits.py`` finds a digit in any picture."""
        grey = np.asarray(picture.convert("L").resize(idx.IMAGE_SHAPE))
        return 255 - grey if np.median(grey) > 127 else grey
