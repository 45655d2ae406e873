"""Evaluations that are means by weight, and weights that cannot be divided by. Steps with weights: ``test_step``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.parallel.group import Group
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.metrics import Evaluation
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Classification, Regression, Workload
from mnist_ray.workload.figures import Metric

NUM_WORDS, LENGTH = 9, 7
CONFIG = TrainConfig(
    precision="fp32", num_epochs=1, batch_size=10, optimizer="sgd", learning_rate=0.1, lr_schedule="constant"
)


class Words(Workload):
    """Which word is next? Texts have 1 to 7 words, padded by -1."""

    metrics = (Metric("right", "max", is_fraction=True),)

    def create_model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(NUM_WORDS, 8), nn.Linear(8, NUM_WORDS))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-1, reduction="none").sum(1)

    def weights(self, targets: Tensor) -> Tensor:
        return (targets >= 0).sum(1)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"right": (outputs.argmax(2) == targets).sum(1)}


def few_words(number: int = 63) -> Arrays:
    generator = np.random.default_rng(0)
    words = (generator.integers(0, NUM_WORDS, (number, 1)) + np.arange(LENGTH + 1) ** 2) % NUM_WORDS
    lengths = np.where(generator.random(number) < 0.5, 1, LENGTH)[:, np.newaxis]
    targets = np.where(np.arange(LENGTH) < lengths, words[:, 1:], -1)
    return Arrays(words[:, :-1].copy(), targets)


def test_an_evaluation_is_the_mean_over_all_tokens_however_it_is_cut() -> None:
    words, model = few_words(251), Words().create_model()
    whole = evaluate(Words(), model, Split(words), CONFIG)
    parts = [evaluate(Words(), model, Split(words).take(slice(start, start + 100)), CONFIG) for start in (0, 100, 200)]
    logits = model(torch.tensor(words.inputs))
    expected = F.cross_entropy(logits.transpose(1, 2), torch.tensor(words.targets), ignore_index=-1).item()
    right = (logits.argmax(2) == torch.tensor(words.targets)).sum() / (words.targets >= 0).sum()
    assert Evaluation.merge(parts).values(Words()) == whole.values(Words())
    assert whole.values(Words()) == pytest.approx({"loss": expected, "right": right.item()}, rel=1e-6)


class WeightedClasses(Classification):
    def create_model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def weights(self, targets: Tensor) -> Tensor:
        return torch.tensor([0.2, 3.0, 1.0])[targets.long()]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * self.weights(targets)


class WeightedNumbers(Regression):
    def create_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def weights(self, targets: Tensor) -> Tensor:
        return targets + 0.5

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * self.weights(targets)


def test_inherited_metrics_are_means_by_weight() -> None:
    generator = np.random.default_rng(0)
    examples = Arrays(generator.standard_normal((250, 4), np.float32), generator.integers(0, 3, 250))
    inputs, targets = torch.tensor(examples.inputs), torch.tensor(examples.targets)
    names = {"class_names": [0, 1, 2]}
    classes, numbers = WeightedClasses(metadata=names), WeightedNumbers()
    for workload in (classes, numbers):
        model, weights = workload.create_model(), workload.weights(targets).numpy()
        outputs = model(inputs).detach()
        if workload is classes:
            losses = F.cross_entropy(outputs, targets, reduction="none").numpy()
            expected = {"accuracy": np.average((outputs.argmax(1) == targets).numpy(), weights=weights)}
        else:
            errors = outputs[:, 0].double().numpy() - examples.targets
            losses, mean = errors**2, np.average(examples.targets, weights=weights)
            r2 = 1 - np.average(losses, weights=weights) / np.average((examples.targets - mean) ** 2, weights=weights)
            mae = np.average(abs(errors), weights=weights)
            expected = {"rmse": math.sqrt(np.average(losses, weights=weights)), "mae": mae, "r2": r2}
        expected["loss"] = np.average(losses, weights=weights)
        assert evaluate(workload, model, Split(examples), CONFIG).values(workload) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_weights_that_cannot_be_divided_by_end_the_training(value: float) -> None:
    class Spoiled(Words):
        def weights(self, targets: Tensor) -> Tensor:
            return torch.full((len(targets),), value)

    split = Split(few_words())
    state = create_state(Spoiled(), CONFIG, len(split), Group())
    with pytest.raises(TrainingStoppedError, match=r"^Spoiled\.weights: one in step 1 of epoch 1 is negative"):
        Trainer(Spoiled(), state, split, CONFIG, Group()).train()
