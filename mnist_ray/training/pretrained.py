"""Pretrained networks of torchvision: their weights, the images that they expect, and a first phase that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional as F

from mnist_ray.errors import UsageError
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import TrainingState


class Pretrained:
    """Weights by torchvision's name, such as ``ResNet18_Weights.DEFAULT``, or a file with a state_dict of ResNet-18.

    Nothing is downloaded: torchvision's cache must have the weights of a name. Raises UsageError for a wrong name.
    """

    def __init__(self, weights: str) -> None:
        is_file = weights.endswith((".pt", ".pth"))
        try:
            known: Any = models.get_weight("ResNet18_Weights.DEFAULT" if is_file else weights)
        except (ValueError, AttributeError, KeyError) as error:
            problem = f"{weights} is neither a .pt or .pth file nor the name of weights"
            raise UsageError(problem, fix="write a name such as ResNet18_Weights.DEFAULT") from error
        self.network = type(known).__name__.removesuffix("_Weights").lower()
        self.file = Path(weights if is_file else f"{torch.hub.get_dir()}/checkpoints/{Path(known.url).name}")
        self.preset = known.transforms()  # its crop_size, mean, std and so on

    def crop(self, picture: Image.Image) -> Tensor:
        """Return an image as the weights expect it, (3, size, size) uint8."""
        size, how = self.preset.resize_size, self.preset.interpolation
        resized = F.resize(picture.convert("RGB"), size, how, antialias=self.preset.antialias)
        return F.pil_to_tensor(F.center_crop(resized, self.preset.crop_size))

    def create_model(self, num_classes: int) -> nn.Module:
        """Return the network with the weights, but with a new last layer. Raises UsageError."""
        model = models.get_model(self.network)
        try:
            model.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))
        except Exception as error:  # the file is missing, or anything
            reason = str(error).splitlines()[-1].strip()  # the first line of PyTorch's is only a title
            problem = f"{self.file} cannot be read as weights of {self.network}: {reason}"
            raise UsageError(problem, fix="get_weight(NAME).get_state_dict() of torchvision downloads them") from error
        name, last = _last_layer(model)
        model.set_submodule(name, nn.Linear(last.in_features, num_classes))
        return model


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


class Freeze(Callback):
    """Trains only the last linear layer in the first ``epochs``; the others also keep their running statistics."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Freeze, unless a resumed run has passed the first epochs."""
        is_trained = state.epoch >= self.epochs
        state.model.train(is_trained).requires_grad_(is_trained)
        _last_layer(state.model)[1].train().requires_grad_()

    def on_epoch(self, state: TrainingState, progress: Progress) -> None:
        """Unfreeze after the first epochs."""
        if state.epoch == self.epochs:
            self.on_start(state, Group())
