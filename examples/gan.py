"""Draw new digits: two networks compete (https://arxiv.org/abs/1406.2661). The report shows what the maker draws.

python jobs/train.py --workload examples/gan.py --num-workers 2    # six minutes on two cores

A judge learns to tell MNIST's images from made ones, and the maker learns to mislead it. The best checkpoint is the one
whose images, as a whole, are the most like MNIST's.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.mnist import MNIST
from mnist_ray.workload import Arrays, Data, Metric, Picture, Workload

NOISE, ROWS = 64, 8  # numbers from which an image is made; rows of images in the report


class Rivals(nn.Module):
    """The maker and the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(
            *(nn.Linear(NOISE, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)),
            nn.Sigmoid(),
        )
        self.judge = nn.Sequential(
            *(nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 1), nn.Flatten(0)),
        )

    def forward(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Make an image (N, 1, 28, 28) from each row of noise; return it and the judge's logit (N,)."""
        made = self.maker(inputs[1])
        return {"made": made, "judged": self.judge(made)}


class Drawing(Workload):
    """Can a network draw digits that another one takes for MNIST's?"""

    metrics = (Metric("distance", "min"), Metric("fooled", "max", is_fraction=True))
    noun = "image"
    recipes = {"default": {"num_epochs": 8, "batch_size": 128, "learning_rate": 5e-4, "ema_decay": 0.99}}

    def load_data(self) -> Data:
        """Return MNIST, with the images as targets, too: what is made is compared with them."""
        data = MNIST().load_data()
        train, test = (Arrays(images, images) for images in (data.train.inputs, data.test.inputs))
        return Data(train, test, name=data.name)

    def create_model(self) -> nn.Module:
        """Return both networks."""
        return Rivals()

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
        judge = torch.optim.Adam(model.judge.parameters(), **options)
        return {"judge": judge, "maker": torch.optim.Adam(model.maker.parameters(), **options)}

    def losses(self, model: Any, inputs: tuple[Tensor, Tensor], targets: Tensor, part: str) -> Tensor:
        """Return the losses of the judge, who knows which images are made, or of the maker."""
        images, made = inputs[0], model.maker(inputs[1])
        if part == "maker":
            return F.softplus(-model.judge(made))
        return F.softplus(-model.judge(images)) + F.softplus(model.judge(made.detach()))

    def loss(self, outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return the maker's losses."""
        return F.softplus(-outputs["judged"])

    def measure(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return whether the judge takes each image for one of MNIST's."""
        return {"fooled": (outputs["judged"] > 0).float()}

    def predictions(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the made images, and as many of MNIST's, (N, 28, 28)."""
        return {"made": (outputs["made"][:, 0] * 255).round().to(torch.uint8), "real": targets}

    def readable(self, columns: Mapping[str, np.ndarray]) -> dict[str, Sequence[Any]]:
        """Write no table: predictions.parquet has the images."""
        return {}

    def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the Fréchet distance of coarse images (7×7): of their means and covariances, as FID has it."""
        (mean, spread), (own_mean, own_spread) = (_moments(columns[name]) for name in ("real", "made"))
        common = np.sqrt(np.linalg.eigvals(spread @ own_spread).real.clip(0)).sum()
        return {"distance": float(((mean - own_mean) ** 2).sum() + np.trace(spread + own_spread) - 2 * common)}

    def pictures(self, result: Any, rows: Any, test: Any, columns: Mapping[str, np.ndarray]) -> list[Picture]:
        """Return the first made images."""
        if len(made := columns.get("made", np.empty(0))[: ROWS**2]) < ROWS**2:
            return []
        grid, png = made.reshape(ROWS, ROWS, 28, 28).swapaxes(1, 2).reshape(ROWS * 28, -1), io.BytesIO()
        Image.fromarray(grid).resize((672, 672), 0).save(png, "PNG")
        return [Picture("made", "Made images", f"{ROWS**2} images of the maker", png.getvalue(), is_photo=True)]


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    coarse = images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(len(images), -1) / 255
    return coarse.mean(0), np.cov(coarse.T)
