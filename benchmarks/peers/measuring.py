"""What the peers need to be measured. The lines that use it are not counted as lines that a user writes."""

import json
import time

from torch.utils.data import TensorDataset
from torchvision import datasets


def as_tensors(mnist: datasets.MNIST) -> TensorDataset:
    """Convert all images in advance, as an expert would for data that fit into memory."""
    return TensorDataset(mnist.data.unsqueeze(1) / 255, mnist.targets)


class Clock:
    """Adds up the seconds of the epochs."""

    def __init__(self) -> None:
        self._seconds, self._num_images = 0.0, 0
        self._started: float | None = None

    def start(self) -> None:
        """Start an epoch."""
        self._started = time.perf_counter()

    def stop(self, num_images: int) -> None:
        """End an epoch, if one has started."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._num_images += num_images
        self._started = None

    def report(self, accuracy: float) -> None:
        """Print the rate and the accuracy on the test set as JSON."""
        print(json.dumps({"images_per_s": self._num_images / self._seconds, "accuracy": accuracy}))
