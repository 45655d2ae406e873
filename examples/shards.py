"""Which class does a picture show? Pictures in Parquet files, streamed from an object store or a folder.

python jobs/train.py --workload examples/shards.py --data s3://bucket/pictures --num-classes 10

The place has the folders train/ and test/; docs/guides/data.md describes how to write them.
"""

import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from mnist_ray.data.sources import Parquet, open_picture
from mnist_ray.workload import Choice, Classification, Data, at_least, setting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The pictures and the network."""

    data: str = setting("pictures", "folder or URI with train/ and test/, which hold Parquet files", decides_data=True)
    num_classes: int = setting(10, "number of classes; labels start at 0", decides_data=True, **at_least(2))
    size: int = setting(32, "pixels of a side, to which pictures are scaled", decides_data=True, **at_least(8))
    width: int = setting(16, "channels of the first convolution", search=Choice((8, 16, 32)), **at_least(1))


class Shards(Classification):
    """Pictures of any size in the column ``image``, and their classes in ``label``."""

    Settings = Settings
    noun = "picture"
    recipes = {
        "default": {
            "num_epochs": 4,
            "batch_size": 64,
            "learning_rate": 1e-2,
            "lr_schedule": "one-cycle",
            "beta1": 0.9,
            "beta2": 0.99,
        }
    }

    def load_data(self) -> Data:
        """Find the files; their pictures are read during training."""
        train, test = (
            Parquet(f"{self.settings.data}/{split}", columns=["image", "label"], decode=self.example)
            for split in ("train", "test")
        )
        return Data(train, test, metadata={"class_names": list(range(self.settings.num_classes))})

    def example(self, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Decode a row; return the picture, scaled, (3, size, size) uint8, and its class."""
        return self.read_picture(open_picture(io.BytesIO(row["image"]["bytes"]))), row["label"]

    def read_picture(self, picture: Image.Image) -> np.ndarray:
        """Scale a picture."""
        size = self.settings.size, self.settings.size
        return np.array(picture.convert("RGB").resize(size)).transpose(2, 0, 1)

    def as_picture(self, inputs: np.ndarray) -> np.ndarray:
        """Return a picture as (H, W, 3)."""
        return np.asarray(inputs).transpose(1, 2, 0)

    def create_model(self) -> nn.Module:
        """Return three convolutions with batch normalization, the mean over the picture, and a dense layer."""
        layers: list[nn.Module] = []
        channels = [3, *(self.settings.width * factor for factor in (1, 2, 4))]
        for before, after in itertools.pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], self.num_classes))

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn (N, 3, size, size) uint8 into floats from -1 to 1; in training, mirror half of the pictures."""
        pictures = inputs.float() / 128 - 1
        if generator is None:
            return pictures
        is_mirrored = torch.rand(len(pictures), generator=generator, device=pictures.device) < 0.5
        return torch.where(is_mirrored[:, None, None, None], pictures.flip(3), pictures)
