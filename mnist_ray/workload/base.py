"""What a workload says: everything about one problem that the training, the sweep and the report need to know.

A workload is a class in a file of its own. It says how the data are loaded and how the model is made; all else has a
default. Torch is imported where it is used: what only needs settings need not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import SearchSpace, build, values_of
from mnist_ray.workload.user_code import Source, UserClass, load

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer

    from mnist_ray.workload.data import Data, Split


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is."""

    name: str
    mode: Literal["max", "min"]  # whether more is better, or less
    is_fraction: bool = False  # it lies between 0 and 1 and is shown in percent

    def format(self, value: float, places: int = 2) -> str:
        """Return a value as people read it, a fraction in percent with some decimal places; a dash for NaN."""
        if math.isnan(value):
            return "-"
        if self.is_fraction:
            return f"{value:.{places}%}"
        if 0 < abs(value) < 1e-3:
            return f"{value:.2e}"
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


LOSS = Metric("loss", "min")
Rows = Sequence[Mapping[str, str]]  # of a CSV file, each by its columns


@dataclass(frozen=True)
class Picture:
    """A picture with what stands around it."""

    name: str  # its file, without the suffix
    title: str
    alt: str
    png: bytes
    caption: str = ""
    is_photo: bool = False  # shows images of the data, which dark mode is not to invert


@dataclass(frozen=True)
class NoSettings:
    """A workload without settings of its own."""


class Workload(UserClass):
    """One problem. Subclasses are made in every process that trains or evaluates; they keep no state.

    N is the number of examples of a batch on one rank; it may be 0.
    """

    Settings: ClassVar[type] = NoSettings  # a frozen dataclass of the workload's own settings; they become flags
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Reported beside the loss. The first metric picks the best checkpoint; without any, the loss does."""
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named values of settings, for ``--recipe``. ``default`` always applies; another recipe overrides it."""
    search: ClassVar[Mapping[str, SearchSpace | None]] = {}
    """Other search spaces, as ``{"learning_rate": Range(1e-3, 1e-1, log=True)}``; None: do not search the setting."""
    noun: ClassVar[str] = "example"  # the word for an example,
    prediction_noun: ClassVar[str] = "prediction"  # for the prediction of a picture,
    output_noun: ClassVar[str] = "outputs"  # and for the model's outputs

    def __init__(self, settings: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings
        self.metadata: dict[str, Any] = dict(metadata or {})  # what the model must know of the data

    # --- what is learned from

    def load_data(self) -> Data:
        """Return the data."""
        raise NotImplementedError

    def metadata_of(self, data: Data) -> dict[str, Any]:
        """Return what the model must know of the data."""
        return dict(data.metadata)

    def check_data(self, data: Data) -> None:
        """Raise UsageError if the data are not what the workload takes; called once, before Ray starts."""

    # --- what learns

    def create_model(self) -> nn.Module:
        """Return a new model, as ``self.settings`` and ``self.metadata`` say; torch's generator is seeded before."""
        raise NotImplementedError

    def prepare(self, inputs: Any, generator: Generator | None) -> Any:
        """Turn a batch of inputs, on the device, into what the model takes.

        ``generator`` is there in training only, for augmentation: it is seeded by seed, epoch, step and rank (with
        ``--reproducible``, chunk), so a run resumed with as many workers draws what it would have drawn.
        """
        return inputs

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of each example, (N,). Outputs are fp32, whatever the model has computed in."""
        raise NotImplementedError

    def training_loss(self, outputs: Any, targets: Any, config: TrainConfig) -> Tensor | None:
        """Return the loss of each example, (N,), to minimize in place of the reported one. None: minimize ``loss``."""
        if config.label_smoothing:
            raise UsageError("--label-smoothing is for a Classification that has no loss of its own")
        return None

    def measure(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return values per example, (N,) each; ``summarize`` makes the metrics from their means."""
        return {}

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the ``metrics``, made of the means of what ``measure`` returns over all examples of all ranks."""
        return dict(means)

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> Optimizer:
        """Return the optimizer that ``config`` names."""
        from torch import optim

        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        if config.optimizer == "sgd":
            return optim.SGD(model.parameters(), momentum=config.momentum, **options)
        kind = optim.AdamW if config.optimizer == "adamw" else optim.Adam
        return kind(model.parameters(), betas=(config.beta1, config.beta2), **options)

    def create_scheduler(self, optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
        """Return the schedule of the learning rate, stepped after each of ``total_steps`` steps."""
        from torch.optim import lr_scheduler

        if config.schedule == "constant":
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)
        # One-cycle: https://arxiv.org/abs/1708.07120. Betas and momentum stay as configured.
        return lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps, cycle_momentum=False)

    # --- what is shown

    def check_outputs(self, outputs: Any, targets: Any) -> None:
        """Raise UsageError if a model's outputs cannot be what the data need; called once, before Ray starts."""

    def predictions(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return columns of predictions.csv, (N,) each."""
        return {}

    def readable(self, columns: Mapping[str, np.ndarray]) -> dict[str, Sequence[Any]]:
        """Return the columns of predictions.csv as they are written."""
        return {name: values.tolist() for name, values in columns.items()}

    def details(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return what result.json holds of the test set beside the metrics."""
        return {}

    def lines(self, columns: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
        """Return what the console shows of the test set before the metrics: (label, text) of each line."""
        return []

    def pictures(self, result: Mapping[str, Any], rows: Rows, test: Split | None) -> list[Picture]:
        """Return the report's pictures of the test set, ``test`` (None if it cannot be read).

        ``result`` is what result.json holds; ``rows`` are those of predictions.csv, if it is there.
        """
        return []

    def as_picture(self, inputs: Any) -> np.ndarray | None:
        """Return what one input looks like, (H, W) or (H, W, 3) uint8; None if it looks like nothing."""
        return None

    def read_picture(self, picture: Image, *, as_is: bool) -> np.ndarray:
        """Make one input of a user's own picture; ``as_is``: scale it and no more. Raises UsageError.

        Workloads that define it take pictures in ``jobs/predict.py``.
        """
        raise UsageError(f"{type(self).__name__} does not take pictures: it defines no read_picture()")

    def top_predictions(self, outputs: Any) -> list[list[tuple[Any, float]]]:
        """Return the best few predictions for each input with their probabilities, the best first."""
        raise UsageError(f"{type(self).__name__} defines no top_predictions(): it can only be evaluated and exported")

    # --- derived

    @property
    def monitor(self) -> Metric:
        """The metric that chooses the checkpoint."""
        return self.all_metrics[min(1, len(self.metrics))]

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """All that is reported: the loss, then the metrics."""
        return (LOSS, *self.metrics)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of its workload: enough to make the same model again."""
        code, settings = self.source, values_of(self.settings)
        return {"reference": code.reference, "sha256": code.sha256, "settings": settings, "metadata": self.metadata}

    @property
    def defaults(self) -> dict[str, Any]:
        """The training's settings and its own, if nobody sets them."""
        return {**values_of(TrainConfig(), self.Settings()), **self.recipes.get("default", {})}

    @property
    def nouns(self) -> str:
        """What examples are called."""
        return f"{self.noun}s"

    @property
    def rate(self) -> str:
        """The name of the training's speed: ``images_per_s`` if an example is an image."""
        return f"{self.nouns}_per_s"

    def format(self, values: Mapping[str, float]) -> str:
        """Return metrics' values as people read them: ``loss 0.0371, accuracy 98.80%``."""
        return ", ".join(f"{metric.name} {metric.format(values[metric.name])}" for metric in self.all_metrics)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as source code and settings: other processes need not be able to import the class."""
        source = vars(type(self)).get("source")
        if source is None or not source.path:  # a class that only this process has, as of a notebook's cell
            return type(self), (self.settings, self.metadata)
        return create, (source, values_of(self.settings), self.metadata)


def create(source: Source, settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> Workload:
    """Return a workload as another process had it."""
    workload_class = load(source, Workload)
    return workload_class(build(workload_class.Settings, settings), metadata)
