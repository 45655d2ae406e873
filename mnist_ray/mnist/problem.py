"""The workload that ships with the package, and an example for your own: digits, and the notebook's network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_ray.mnist import idx
from mnist_ray.settings import setting
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.data import Data

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The images to train on."""

    data_dir: Path | None = setting(
        None, "a folder with four IDX files, gzipped or not, instead of MNIST", decides_data=True
    )
    augment: bool = setting(False, "train on turned, scaled, sheared and moved digits")


class MNIST(Classification):
    """28×28 grey images of ten digits."""

    Settings = Settings
    noun, prediction_noun = "image", "digit"
    recipes = {
        "default": {"beta1": 0.7, "beta2": 0.9},  # short averages, since two epochs have few steps
        "notebook": {
            "num_epochs": 2,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "beta1": 0.9,
            "beta2": 0.999,
            "precision": "fp32",
            "validation_size": 0,
        },
        "robust": {"num_epochs": 6, "augment": True, "ema_decay": 0.99},
    }

    def load_data(self) -> Data:
        """Read the IDX files. Raises UsageError if they are missing, JobError if damaged."""
        data_dir = self.settings.data_dir
        return Data(idx.load("train", data_dir), idx.load("test", data_dir), name=str(data_dir or "mnist"))

    def create_model(self) -> nn.Module:
        """Return the notebook's network."""
        from mnist_ray.mnist.cnn import CNN

        return CNN(self.num_classes)

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn images (N, 28, 28) uint8 into (N, 1, 28, 28) in [0, 1], as ``ToTensor`` does."""
        images = inputs.unsqueeze(1).float().div_(255)
        if generator is None or not self.settings.augment:
            return images
        from mnist_ray.mnist.cnn import augmented

        return augmented(images, generator)

    def as_picture(self, inputs: Any) -> np.ndarray:
        """Return the input, which is an image already."""
        return np.asarray(inputs)

    def read_picture(self, picture: Image, *, as_is: bool) -> np.ndarray:
        """Find the digit in a drawing or a photo; ``as_is``: only scale the picture."""
        from mnist_ray.mnist import photo

        return photo.as_it_is(picture) if as_is else photo.to_mnist(picture)
