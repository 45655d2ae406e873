"""The default recipe as a workload, for frameworks.py.

    python jobs/train.py --workload benchmarks/peers/with_mnist_ray.py --images FOLDER     # 22 s on two cores

FOLDER has torchvision's layout. The checkpoints, the restarts and --resume need no code.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Generator, Tensor, nn
from torchvision import datasets

from mnist_ray.mnist.cnn import CNN
from mnist_ray.workload import Arrays, Classification, Data, setting


@dataclass(frozen=True)
class Settings:
    """The images to train on."""

    images: Path = setting(Path("/data"), "a folder in torchvision's layout")


class Digits(Classification):
    """The digits of MNIST."""

    Settings = Settings
    noun = "image"
    recipes = {
        "default": {
            "num_epochs": 2,
            "batch_size": 128,
            "learning_rate": 5e-3,
            "lr_schedule": "one-cycle",
            "beta1": 0.7,
            "beta2": 0.9,
        }
    }

    def load_data(self) -> Data:
        """Read torchvision's files."""
        parts = (datasets.MNIST(self.settings.images, train=is_train) for is_train in (True, False))
        train, test = (Arrays(part.data.numpy(), part.targets.numpy()) for part in parts)
        return Data(train, test)

    def create_model(self) -> nn.Module:
        """Return the notebook's network."""
        return CNN(self.num_classes)

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn bytes into numbers from 0 to 1, as ``ToTensor`` does."""
        return inputs.unsqueeze(1).float() / 255
