"""Which shape is it? RGB images, a small residual network with batch normalization, and augmentation.

python jobs/train.py --workload examples/shapes.py                  # a minute on two cores, accuracy 95 % or more
python jobs/tune.py --workload examples/shapes.py --num-trials 8    # also searches --width
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mnist_ray.workload import Arrays, Choice, Classification, Data, at_least, setting

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZE = 32  # pixels
POINTS = {"square": 4, "triangle": 3, "star": 10, "cross": 12}  # corners of each polygon


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The shapes and the network."""

    num_images: int = setting(6000, "images to draw for training and validation", **at_least(10), decides_data=True)
    noise: float = setting(25.0, "standard deviation of each channel's noise", **at_least(0), decides_data=True)
    width: int = setting(16, "channels of the first convolution", search=Choice((8, 16, 24)), **at_least(1))


class Shapes(Classification):
    """Shapes of any colour, size and angle, on a background of a different colour."""

    Settings = Settings
    noun = "image"
    recipes = {
        "default": {
            "num_epochs": 8,
            "batch_size": 64,
            "learning_rate": 1e-2,
            "lr_schedule": "one-cycle",
            "beta1": 0.9,
            "beta2": 0.99,
        }
    }

    def load_data(self) -> Data:
        """Draw the images; the same settings give the same images."""
        rng = np.random.default_rng(0)
        train, test = (self.draw(number, rng) for number in (self.settings.num_images, self.settings.num_images // 5))
        return Data(train, test, name="shapes", metadata={"class_names": list(SHAPES)})

    def draw(self, number: int, rng: np.random.Generator) -> Arrays:
        """Return images (N, 32, 32, 3) uint8 and their labels (N,)."""
        labels = rng.integers(len(SHAPES), size=number)
        images = np.stack([draw_shape(SHAPES[label], rng) for label in labels])
        noisy = images + rng.normal(0, self.settings.noise, images.shape)
        return Arrays(np.uint8(np.clip(noisy, 0, 255)), labels)

    def create_model(self) -> nn.Module:
        """Return the network."""
        return ResidualNetwork(self.settings.width, self.num_classes)

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn (N, 32, 32, 3) uint8 into (N, 3, 32, 32) from -1 to 1; in training, mirror half of them at random."""
        images = inputs.permute(0, 3, 1, 2).float() / 128 - 1
        if generator is None:
            return images
        is_mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        return torch.where(is_mirrored[:, None, None, None], images.flip(3), images)

    def as_picture(self, inputs: np.ndarray) -> np.ndarray:
        """Return the image as it is."""
        return np.asarray(inputs)

    def read_picture(self, picture: Image.Image) -> np.ndarray:
        """Scale a user's picture to the size of the images."""
        return np.asarray(picture.convert("RGB").resize((SIZE, SIZE)))


class Block(nn.Module):
    """Two convolutions with batch normalization, and a shortcut (https://arxiv.org/abs/1512.03385)."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_outputs)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_outputs)
        # Pooling replaces the stride (https://arxiv.org/abs/1812.01187): see "Model" in docs/guides/workload.md.
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(num_inputs, num_outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Three blocks, the mean over the image, and a dense layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, width), Block(width, 2 * width), Block(2 * width, 4 * width))
        self.dense = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        return self.dense(self.blocks(images).mean((2, 3)))


def draw_shape(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image, (32, 32, 3) uint8, with a shape at a random position."""
    ground, colour = rng.integers(0, 256, (2, 3)).tolist()
    while np.abs(np.subtract(ground, colour)).sum() < 200:  # until they differ clearly
        colour = rng.integers(0, 256, 3).tolist()
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    radius = rng.uniform(6, 13)
    x, y = rng.uniform(radius, SIZE - radius, 2)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        fill, width = (tuple(colour), 1) if shape == "circle" else (None, round(radius / 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, tuple(colour), width)
    else:
        corners = outline(shape) @ rotation(rng.uniform(0, 2 * np.pi)) * radius + (x, y)
        draw.polygon([tuple(corner) for corner in corners.tolist()], tuple(colour))
    return np.asarray(image)


def outline(shape: str) -> np.ndarray:
    """Return the corners of a polygon, (corners, 2), within a circle of radius 1."""
    if shape == "cross":
        arm = 0.3
        first = np.array([(arm, 1), (arm, arm), (1, arm)])
        quarters = [first @ rotation(np.pi / 2 * turn) for turn in range(4)]
        return np.concatenate(quarters) / np.hypot(arm, 1)
    angles = np.linspace(0, 2 * np.pi, POINTS[shape], endpoint=False)
    radii = np.where(np.arange(POINTS[shape]) % 2, 0.4, 1.0) if shape == "star" else 1.0
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def rotation(angle: float) -> np.ndarray:
    """Return the matrix of a rotation by an angle."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
