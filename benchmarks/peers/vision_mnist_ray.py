"""The training on pictures as a workload, for frameworks.py.

    python jobs/train.py --workload benchmarks/peers/vision_mnist_ray.py --images FOLDER --loader-workers 2

FOLDER has torchvision's layout. It takes a minute on two cores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mnist_ray.workload import Classification, Data, setting

sys.path.insert(0, str(Path(__file__).parent))
from pictures import BATCH_SIZE, LEARNING_RATE, NUM_EPOCHS, Pictures, new_network


@dataclass(frozen=True)
class Settings:
    """The pictures to train on."""

    images: Path = setting(Path("/data"), "a folder in torchvision's layout")


class Digits(Classification):
    """Digits as coloured pictures."""

    Settings = Settings
    noun = "image"
    recipes = {
        "default": {
            "batch_size": BATCH_SIZE,
            "num_epochs": NUM_EPOCHS,
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "one-cycle",
            "precision": "bf16",
        }
    }

    def load_data(self) -> Data:
        """Return the pictures."""
        train, validation, test = (Pictures(self.settings.images, split) for split in ("train", "validation", "test"))
        return Data(train, test, validation, metadata={"class_names": [*range(10)]})

    def create_model(self) -> nn.Module:
        """Return the network."""
        return new_network()
