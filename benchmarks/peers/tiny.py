"""A workload whose steps take almost no time, to measure everything around them."""

from typing import ClassVar

import numpy as np
from torch import nn

from mnist_ray.workload import Arrays, Classification, Data


class Tiny(Classification):
    """Classify vectors by the sign of their first number."""

    shape: ClassVar[tuple[int, int]] = (6400, 8)
    """Shape of the inputs."""

    def load_data(self) -> Data:
        """Return random numbers."""
        inputs = np.random.default_rng(0).normal(size=self.shape).astype(np.float32)
        arrays = Arrays(inputs, (inputs[:, 0] > 0).astype(np.int64))
        return Data(arrays, arrays, name="signs")

    def create_model(self) -> nn.Module:
        """Return a model of 18 parameters."""
        return nn.Linear(8, self.num_classes)
