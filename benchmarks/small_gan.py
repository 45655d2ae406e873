"""Two networks that compete, with an optimizer each: a set-up of ``same.py`` for versions with both kinds of steps.

Nothing is random, so the order of the calls within a step does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from small import COLUMNS, Table
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig


class Pair(nn.Module):
    """A generator predicts a number from a row; a discriminator judges both."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(len(COLUMNS), 16), nn.Tanh(), nn.Linear(16, 1))
        self.discriminator = nn.Sequential(nn.Linear(1 + len(COLUMNS), 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a prediction for each example, (N, 1)."""
        prediction: Tensor = self.generator(inputs)
        return prediction

    def judge(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return a logit for each example, (N,)."""
        return self.discriminator(torch.cat([inputs, targets[:, None]], 1))[:, 0]  # type: ignore[no-any-return]


class GAN(Table):
    """The generator also minimizes the squared error."""

    def create_model(self) -> nn.Module:
        """Return both networks."""
        return Pair()

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Return the inputs."""
        return inputs

    def create_optimizer(self, model: Any, config: TrainConfig) -> Any:
        """Return an optimizer for each network."""
        return {name: torch.optim.Adam(getattr(model, name).parameters(), 1e-3) for name in NAMES}

    def training_step(self, step: Any) -> None:
        """Take a step of the discriminator, then one of the generator."""
        step.backward(self.discriminator_loss, "discriminator_loss", optimizer="discriminator")
        step.update("discriminator")
        step.backward(self.generator_loss, "generator_loss", optimizer="generator")
        step.update("generator")

    def discriminator_loss(self, model: Any, batch: Any, step: Any) -> Tensor:
        """Return the discriminator's losses."""
        return losses(self, model, batch.inputs, batch.targets, "discriminator")

    def generator_loss(self, model: Any, batch: Any, step: Any) -> Tensor:
        """Return the generator's losses."""
        step.measure(step.forward(batch), batch.targets)
        return losses(self, model, batch.inputs, batch.targets, "generator")


def losses(self: GAN, model: Any, inputs: Tensor, targets: Tensor, part: str) -> Tensor:
    """Return the losses for one of the optimizers."""
    fake = model(inputs)[:, 0]
    if part == "generator":
        return F.softplus(-model.judge(inputs, fake)) + (fake - targets).square()
    return F.softplus(-model.judge(inputs, targets)) + F.softplus(model.judge(inputs, fake.detach()))


NAMES = "discriminator", "generator"
if hasattr(Table, "losses"):  # an earlier version
    GAN.losses = losses  # type: ignore[attr-defined]
