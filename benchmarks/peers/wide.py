"""A workload whose checkpoints are large: 34 million parameters, 400 MB with the optimizer's state."""

import numpy as np
from torch import nn

from mnist_ray.workload import Arrays, Classification, Data


class Wide(Classification):
    """Tell the sign of the first of many numbers."""

    def load_data(self) -> Data:
        """Return random numbers."""
        inputs = np.random.default_rng(0).normal(size=(12800, 4096)).astype(np.float32)
        arrays = Arrays(inputs, (inputs[:, 0] > 0).astype(np.int64))
        return Data(arrays, arrays, name="signs")

    def create_model(self) -> nn.Module:
        """Return two large layers and a small one."""
        return nn.Sequential(
            nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, self.num_classes)
        )
