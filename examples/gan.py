"""Draw new digits with a GAN (https://arxiv.org/abs/1406.2661). The report shows fake images and both losses.

python jobs/train.py --workload examples/gan.py --num-workers 2    # six minutes on two cores

A discriminator learns to tell MNIST's images from fake ones, and a generator learns to fool it. The best checkpoint is
the one whose images, as a whole, are the most like MNIST's.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.mnist import MNIST
from mnist_ray.training.step import Step
from mnist_ray.workload import Arrays, Data, Metric, Picture, Workload

NOISE, ROWS = 64, 8  # numbers from which an image is generated; rows of images in the report


class Networks(nn.Module):
    """The generator and the discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            *(nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 1), nn.Flatten(0)),
        )

    def forward(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Generate an image (N, 1, 28, 28) from each row of noise; return it and the discriminator's logit (N,)."""
        fake = self.generator(inputs[1])
        return {"fake": fake, "logit": self.discriminator(fake)}


class GAN(Workload):
    """Can a network draw digits that another one takes for MNIST's?"""

    metrics = (Metric("distance", "min"), Metric("fooled", "max", is_fraction=True))
    noun = "image"
    recipes = {"default": {"num_epochs": 8, "batch_size": 128, "learning_rate": 5e-4, "ema_decay": 0.99}}

    def load_data(self) -> Data:
        """Return MNIST, with the images as targets, too: fake images are compared with them."""
        data = MNIST().load_data()
        train, test = (Arrays(images, images) for images in (data.train.inputs, data.test.inputs))
        return Data(train, test, name=data.name)

    def create_model(self) -> nn.Module:
        """Return both networks."""
        return Networks()

    def prepare(self, inputs: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return images and noise; in evaluations, where nothing may depend on the batch, noise seeded by the image."""
        images, own = inputs.unsqueeze(1).float() / 255, torch.Generator()
        if generator is not None:
            return images, torch.randn(len(images), NOISE, generator=generator, device=images.device)
        seeds = (inputs.flatten(1).long() * torch.arange(1, 28 * 28 + 1, device=inputs.device)).sum(1).tolist()
        noise = [torch.randn(NOISE, generator=own.manual_seed(seed)) for seed in seeds]
        return images, torch.stack(noise).to(images.device)

    def create_optimizer(self, model: Any, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
        """Return an optimizer for each network."""
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.5, 0.999)}
        return {
            "discriminator": torch.optim.Adam(model.discriminator.parameters(), **options),
            "generator": torch.optim.Adam(model.generator.parameters(), **options),
        }

    def training_step(self, step: Step) -> None:
        """Let the discriminator take a step, then the generator."""
        step.backward(self.discriminator_loss, "discriminator_loss", optimizer="discriminator")
        step.update("discriminator")
        step.backward(self.batch_loss, "generator_loss", optimizer="generator")
        step.update("generator")

    def discriminator_loss(self, model: Any, batch: MicroBatch, step: Step) -> Tensor:
        """Return the discriminator's losses on real and on fake images."""
        images, noise = self.prepare(batch.inputs, step.generator)
        fake = model.generator(noise).detach()
        return F.softplus(-model.discriminator(images)) + F.softplus(model.discriminator(fake))

    def loss(self, outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return the generator's losses: low if the discriminator takes an image for one of MNIST's."""
        return F.softplus(-outputs["logit"])

    def measure(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return whether the discriminator takes each image for one of MNIST's."""
        return {"fooled": (outputs["logit"] > 0).float()}

    def predictions(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the fake images, and as many of MNIST's, (N, 28, 28)."""
        return {"fake": (outputs["fake"][:, 0] * 255).round().to(torch.uint8), "real": targets}

    def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the Fréchet distance of coarse images (7×7): of their means and covariances, as FID has it."""
        (mean, spread), (own_mean, own_spread) = (_moments(columns[name]) for name in ("real", "fake"))
        common = np.sqrt(np.linalg.eigvals(spread @ own_spread).real.clip(0)).sum()
        return {"distance": float(((mean - own_mean) ** 2).sum() + np.trace(spread + own_spread) - 2 * common)}

    def pictures(self, result: Any, test: Any, columns: Mapping[str, np.ndarray]) -> list[Picture]:
        """Return the first fake images."""
        if len(fake := columns.get("fake", np.empty(0))[: ROWS**2]) < ROWS**2:
            return []
        grid, png = fake.reshape(ROWS, ROWS, 28, 28).swapaxes(1, 2).reshape(ROWS * 28, -1), io.BytesIO()
        Image.fromarray(grid).resize((672, 672), 0).save(png, "PNG")
        return [Picture("fake", "Fake images", f"{ROWS**2} images of the generator", png.getvalue(), is_photo=True)]


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    coarse = images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(len(images), -1) / 255
    return coarse.mean(0), np.cov(coarse.T)
