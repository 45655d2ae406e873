"""A workload whose checkpoints are large: 34 million parameters, 400 MB with the optimizer's state."""

from tiny import Tiny
from torch import nn


class Wide(Tiny):
    """The same with longer vectors and more parameters."""

    shape = (12_800, 4096)

    def create_model(self) -> nn.Module:
        """Return two large layers and a small one."""
        return nn.Sequential(
            nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, self.num_classes)
        )
