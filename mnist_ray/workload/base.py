"""The base class of workloads: everything that training, sweeps and reports know about a problem.

A workload must load the data and create the model; the rest has defaults. Torch is imported only when needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import SearchSpace, build, values_of
from mnist_ray.workload.figures import (
    EPOCH_S,
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    RATE,
    TRAIN_S,
    VALIDATION_S,
    Figure,
    Metric,
)
from mnist_ray.workload.user_code import SourceCode, UserClass, load

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer

    from mnist_ray.data.batches import MicroBatch
    from mnist_ray.data.data import Data, Split


@dataclass(frozen=True)
class Picture:
    """A plot or an image in the report."""

    name: str  # of the PNG file, without its suffix
    title: str  # above it
    alt: str  # describes it for those who cannot see it
    png: bytes
    caption: str = ""  # below it
    is_photo: bool = False  # shows images from the data, so dark mode must not invert it


@dataclass(frozen=True)
class NoSettings:
    """The settings of a workload that defines none."""


class Workload(UserClass):
    """One problem. Every process that trains or evaluates creates its own instance, so a workload keeps no state.

    Below, N is the number of examples computed at a time: those of a micro-batch, or of an evaluation batch.
    """

    Settings: ClassVar[type] = NoSettings  # a frozen dataclass; its fields become flags
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Measures reported with the loss. The first one selects the best checkpoint; without metrics, the loss does.

    To let the loss select it, name ``Metric("loss", "min")`` first; no method has to return it.
    """
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of settings, for ``--recipe``. ``default`` always applies; the chosen recipe overrides ``default``."""
    search: ClassVar[Mapping[str, SearchSpace | None]] = {}
    """Changed search spaces, like ``{"learning_rate": Range(1e-3, 1e-1, log=True)}``; None excludes a setting."""
    compares_examples: ClassVar[bool] = False
    """Whether the loss compares the examples of a batch: it then sees those of all workers."""
    has_unused_parameters: ClassVar[bool] = False
    """Whether some steps use only a part of the parameters, such as some of the experts."""
    callbacks: Sequence[UserClass] = ()
    """Its own ``Callback``s, called before those of ``--callback``. Each worker copies them."""
    noun: ClassVar[str] = "example"  # the word for an example in all output, such as ``image``

    def __init__(self, settings: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings
        self.metadata: dict[str, Any] = dict(metadata or {})  # about the data; kept in checkpoints

    # --- data

    def load_data(self) -> Data:
        """Return the data: the same examples on every call and on every node."""
        raise NotImplementedError

    def metadata_of(self, data: Data) -> dict[str, Any]:
        """Return the metadata that the model needs, as values that JSON can hold."""
        return dict(data.metadata)

    def strata(self, data: Data) -> np.ndarray | None:
        """Return a value per training example, (N,), e.g. its class: each fold of ``--folds`` has its share of each."""
        return None

    def check_data(self, data: Data) -> None:
        """Raise UsageError if the data do not fit this workload; called once, before Ray starts."""

    def find_fault(self, examples: Any) -> str:
        """Return what is wrong with a block's examples, as errors print it after the block's name; "" if nothing is."""
        return ""

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[Any, Any] | None:
        """Join a ``Dataset``'s examples (input, target) into a batch (inputs, targets), for sequences or graphs.

        None: torch's ``default_collate`` joins them. Not called for ``Arrays``. In predictions, every target is 0.
        """
        return None

    # --- training

    def create_model(self) -> nn.Module:
        """Return a new model for ``self.settings`` and ``self.metadata``; torch's generator is already seeded."""
        raise NotImplementedError

    def prepare(self, inputs: Any, generator: Generator | None) -> Any:
        """Turn a batch of inputs, already on the device, into the model's inputs.

        ``generator`` is for augmentation, and is None outside training. Its seed depends on seed, epoch, step and rank
        (with ``--reproducible``, chunk), so a run resumed with the same number of workers draws the same numbers. The
        global generators of torch, NumPy and Python have the same seed, also in ``loss`` and the model.
        """
        return inputs

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of each example, (N,). Outputs are in fp32, whatever the model's precision.

        For a loss that compares examples, see ``compares_examples``.
        """
        raise NotImplementedError

    def weights(self, targets: Any) -> Tensor | None:
        """Return each example's weight, (N,), such as its number of tokens; None if all examples count equally.

        With weights, ``loss`` and ``measure`` must return sums over an example's tokens, or values times weights; an
        inherited ``measure`` needs no change. Training minimizes the sum of the losses divided by the sum of the
        weights, over the whole batch and all workers. Reports show such ratios over all examples seen.
        """
        return None

    def training_step(self, step: Any) -> None:
        """Take an optimizer step on a global batch, with a ``mnist_ray.training.step.Step``.

        The default is a step of the only optimizer by ``batch_loss``. A step of your own may call ``step.backward`` and
        ``step.update`` several times, for several optimizers or in a closure, and ``step.log``; all ranks must make the
        same calls.
        """
        step.backward(self.batch_loss)
        step.update()

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Any) -> Tensor:
        """Return the losses to minimize, (N,), of a micro-batch of this rank's slice. The default returns ``loss``.

        ``model`` may be called as often as needed, and so may its parts; it computes in the run's precision.
        ``batch.inputs`` are not prepared yet. If you minimize something else than ``loss``, also call ``step.measure``,
        which reports ``loss`` and the metrics.
        """
        if step.config.label_smoothing:
            raise UsageError("label_smoothing is for a Classification that has no loss of its own")
        losses: Tensor = step.measure(step.forward(batch), batch.targets)
        return losses

    def measure(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return named values per example, (N,) each; ``summarize`` gets their means."""
        return {}

    def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
        """Compute the ``metrics`` from the means of ``measure``'s values over all examples of all ranks."""
        return dict(means)

    def summarize_predictions(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Compute the ``metrics`` that need all examples at once, such as AUC, from the columns of ``predictions``.

        Called for validation and test, not during training. Examples are in the data's order.
        """
        return {}

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> Optimizer | Any:
        """Return the optimizer that ``config`` names; or several by name, for a ``training_step`` of your own."""
        from mnist_ray.workload.optimizers import optimizer_of  # imports torch

        may_lack_gradients = bool(self.has_unused_parameters or self.callbacks or config.callback)
        return optimizer_of(config, model, may_lack_gradients=may_lack_gradients)

    def create_scheduler(self, optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
        """Return the learning rate's schedule, of each optimizer; training steps it ``total_steps`` times."""
        from mnist_ray.workload.optimizers import scheduler_of  # imports torch

        return scheduler_of(config, optimizer, total_steps)

    def shard_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the parts of the model that ``--strategy fsdp`` gathers one at a time; none is in two of them.

        The default is the elements of each ``nn.ModuleList``.
        """
        from torch.nn import ModuleList

        units: list[nn.Module] = []
        for part in model.children():
            units += list(part) if isinstance(part, ModuleList) else self.shard_units(part)
        return units

    # --- results

    def evaluation_batch_size(self, *, on_gpu: bool) -> int:
        """Return the batch size of evaluations. The default is an upper limit; a value of your own is always used."""
        return 256 if on_gpu else 100  # on CPUs, the activations of 100 examples stay in the cache

    def check_outputs(self, outputs: Any, targets: Any) -> None:
        """Raise UsageError if a model's outputs do not fit the targets; called once, before the training."""

    def predictions(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return named values per example, (N, ...) each: the columns of predictions.parquet."""
        return {}

    def details(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return entries about the evaluated set for result.json, as values that JSON can hold."""
        return {}

    def lines(self, columns: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
        """Return lines about the evaluated set for the console, as pairs (label, text)."""
        return []

    def pictures(
        self, result: Mapping[str, Any], test: Split | None, columns: Mapping[str, np.ndarray]
    ) -> list[Picture]:
        """Draw the report's plots from result.json, the evaluated set, and the columns of ``predictions``, (N, ...).

        Columns may be missing, or too large to be kept; ``test`` is None if its examples cannot be shown.
        """
        return []

    def as_picture(self, inputs: Any) -> np.ndarray | None:
        """Return one input as an image, (H, W) or (H, W, 3) uint8; None if inputs cannot be shown."""
        return None

    def read_picture(self, picture: Image) -> np.ndarray:
        """Turn a user's image into one input for ``mnist-ray predict``. Raises UsageError if that is not possible."""
        raise UsageError(f"{type(self).__name__} does not take images: it defines no read_picture()")

    def top_predictions(self, outputs: Any) -> list[list[tuple[Any, float]]]:
        """Return a few predictions per input with their probabilities, the most probable first."""
        raise UsageError(f"{type(self).__name__} defines no top_predictions(): it can only be evaluated and exported")

    def complete(self, model: nn.Module, prompt: str) -> str:
        """Return a language model's continuation of a text, for ``predict``. The model is in evaluation mode."""
        raise UsageError(f"{type(self).__name__} defines no complete(): it cannot continue a text")

    # --- derived

    @property
    def monitor(self) -> Metric:
        """The metric that chooses the best checkpoint."""
        return self.metrics[0] if self.metrics else LOSS

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """The loss, then the other metrics."""
        return (LOSS, *(metric for metric in self.metrics if metric != LOSS))

    @property
    def all_figures(self) -> tuple[Figure, ...]:
        """All figures that a run may report, in the order of its files' columns."""
        every = self.all_metrics
        train = [Figure(f"train_{m.name}", ("step", "epoch"), "mean", m.form, f"training {m.name}") for m in every]
        val = [Figure(f"val_{m.name}", ("validation",), "mean", m.form, f"validation {m.name}") for m in every]
        test = [Figure(f"test_{m.name}", ("test",), "mean", m.form, f"test {m.name}") for m in every]
        rate = Figure(RATE, ("epoch",), "last", ",.0f", f"{self.nouns}/s", places=1)
        return (*train, *val, *test, LEARNING_RATE, GRADIENT_NORM, EPOCH_S, rate, VALIDATION_S, TRAIN_S)

    @property
    def identity(self) -> dict[str, Any]:
        """The checkpoint's entry about the workload: enough to create the same model again."""
        code, settings = self.source, values_of(self.settings)
        return {"reference": code.reference, "sha256": code.sha256, "settings": settings, "metadata": self.metadata}

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of all settings, of training and of the workload."""
        return {**values_of(TrainConfig(), self.Settings()), **self.recipes.get("default", {})}

    @property
    def nouns(self) -> str:
        """The plural of ``noun``; a workload may set its own."""
        if self.noun.endswith("ies"):  # series, species
            return self.noun
        return f"{self.noun}es" if self.noun.endswith(("s", "x", "ch", "sh")) else f"{self.noun}s"

    def format(self, values: Mapping[str, float]) -> str:
        """Return metrics as text: ``loss 0.0371, accuracy 98.80%``."""
        known = [metric for metric in self.all_metrics if metric.name in values]
        return ", ".join(f"{metric.name} {metric.format(values[metric.name])}" for metric in known)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the source code and the settings, since other processes may be unable to import the class."""
        source = vars(type(self)).get("source")
        if source is None or not source.path:  # a class without a file, for example in a notebook
            return type(self), (self.settings, self.metadata)
        return create, (source, values_of(self.settings), self.metadata)


def create(source: SourceCode, settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> Workload:
    """Unpickle a workload."""
    workload_class = load(source, Workload)
    return workload_class(build(workload_class.Settings, settings), metadata)
