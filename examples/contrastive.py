"""Learn what digits look like without their labels: SimCLR (https://arxiv.org/abs/2002.05709) on MNIST.

python jobs/train.py --workload examples/contrastive.py --num-workers 2    # pip install scipy

Two views of an image, turned and moved at random, should have similar projections, and those of other images in the
batch different ones: the loss compares the examples of the global batch, on any number of workers. A linear probe then
shows what the representation knows: it is fitted to half of the test images with their labels, and tested on the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from digits import augmented
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mnist_ray.mnist import MNIST
from mnist_ray.workload import Data, Metric, Workload, at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The network and its loss."""

    width: int = setting(64, "size of a representation", **at_least(1))
    temperature: float = setting(
        0.2, "scale of the similarities; lower values look at the nearest examples", **positive()
    )


class Encoder(nn.Module):
    """Represents images; the loss sees projections of the representations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Conv2d(1, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
            ),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, width)),
        )
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32))

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """Map two views (N, 2, 1, H, W) to the first one's representation (N, width) and projections (N, 2, 32)."""
        features = self.layers(views.flatten(0, 1))
        return {"feature": features[::2], "projection": self.projection(features).unflatten(0, (-1, 2))}


class SimCLR(Workload):
    """Which two images are views of the same?"""

    Settings = Settings
    compares_examples = True
    metrics = (Metric("probe", "max", is_fraction=True),)
    noun = "image"
    recipes = {"default": {"num_epochs": 4, "batch_size": 256, "learning_rate": 2e-3, "lr_schedule": "one-cycle"}}

    def load_data(self) -> Data:
        """Return MNIST."""
        return MNIST().load_data()

    def create_model(self) -> nn.Module:
        """Return an encoder of a few layers."""
        return Encoder(self.settings.width)

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Return two views of each image, (N, 2, 1, H, W). In evaluations, the first one is the image itself."""
        images = inputs.unsqueeze(1).float() / 255
        if generator is not None:
            return torch.stack([augmented(images, generator), augmented(images, generator)], 1)
        fixed = torch.Generator(images.device).manual_seed(0)
        return torch.stack([images, augmented(images, fixed)], 1)

    def loss(self, outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of finding each of the image's views by the other one."""
        views = (
            F.normalize(outputs["projection"], dim=2).transpose(0, 1).flatten(0, 1)
        )  # all first ones, all second ones
        similar = views @ views.T / self.settings.temperature
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        partners = torch.arange(len(views), device=views.device).roll(len(targets))
        losses = F.cross_entropy(similar.masked_fill(itself, -torch.inf), partners, reduction="none")
        return losses.unflatten(0, (2, -1)).mean(0)

    def predictions(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return each image's representation, for the probe, and its label, which the loss never sees."""
        return {"feature": outputs["feature"], "label": targets}

    def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Fit a linear probe to the first half of the images by least squares; return its accuracy on the others."""
        features, labels = columns["feature"].astype(float), columns["label"]
        inputs, half = np.column_stack([features, np.ones(len(features))]), len(labels) // 2
        known = inputs[:half]
        weights = np.linalg.solve(known.T @ known + np.eye(inputs.shape[1]), known.T @ np.eye(10)[labels[:half]])
        return {"probe": float(np.mean((inputs[half:] @ weights).argmax(1) == labels[half:]))}
