"""Losses that are means over tokens: sums over the examples, divided by the sum of the workload's weights."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.errors import TrainingStoppedError, UsageError
from mnist_ray.job.dry_run import try_batch
from mnist_ray.parallel.group import Group
from mnist_ray.training.evaluation import evaluate, evaluate_together
from mnist_ray.training.metrics import Evaluation
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Classification, Regression, Workload
from mnist_ray.workload.figures import Metric
from tests.ranks import WORLD_SIZES, Hooks, call_on_ranks, joined

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
    """Return texts whose lengths differ much: a mean of slices' means would be far off."""
    generator = np.random.default_rng(0)
    words = (generator.integers(0, NUM_WORDS, (number, 1)) + np.arange(LENGTH + 1) ** 2) % NUM_WORDS
    lengths = np.where(generator.random(number) < 0.5, 1, LENGTH)[:, np.newaxis]
    targets = np.where(np.arange(LENGTH) < lengths, words[:, 1:], -1)
    return Arrays(words[:, :-1].copy(), targets)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 3},
    "clipped": {"clip_grad_norm": 0.05, "micro_batch_size": 2},
    "reproducible": {"reproducible": True, "num_chunks": 3},
    "a batch without words": {},
    "reproducible, a batch without words": {"reproducible": True, "num_chunks": 3},
}


def words_of(case: str) -> Arrays:
    words = few_words()
    if "without words" in case:
        for number, request in enumerate(
            ShardedBatchSampler(len(words), CONFIG.batch_size, CONFIG.seed, pass_number=0)
        ):
            words.targets[request.indices] = np.where(number == 2, -1, words.targets[request.indices])
    return words


def trained(case: str, group: Group) -> tuple[TrainingState, dict[str, Tensor], list[float]]:
    """Return the state after training, the first step's gradients, and the losses of all steps."""
    first: dict[str, Tensor] = {}
    losses: list[float] = []

    def note(state: TrainingState) -> None:
        if state.step == 0:
            first.update({name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None})

    split, config = Split(words_of(case)), replace(CONFIG, **CASES[case])
    state = create_state(Words(), config, len(split), group)
    hooks = Hooks(on_gradients=note, on_progress=lambda state, progress: losses.extend(progress.losses))
    Trainer(Words(), state, split, config, group, [hooks]).train()
    return state, first, losses


def train_cases(rank: int, folder: Path) -> None:
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        with joined(rank, world_size, folder / f"store-{world_size}") as group:
            for case in CASES:
                state, gradients, losses = trained(case, group)
                split = Split(few_words(251))
                config = replace(CONFIG, micro_batch_size=30)
                evaluation = evaluate_together(Words(), state.model, split, config, group)
                alone = evaluate(Words(), state.model, split, config)
                assert evaluation.values(Words()) == alone.values(Words())
                if rank == 0:
                    name = f"{case}-{world_size}"
                    save_file(
                        gradients | {f"after {key}": v for key, v in state.model.state_dict().items()}, folder / name
                    )
                    (folder / f"{name}.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def runs(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    call_on_ranks(ranks, train_cases, folder)
    return folder


def train_plainly(words: Arrays) -> tuple[dict[str, Tensor], list[float]]:
    """Return the first step's gradients, and all losses, as means over the tokens of whole batches."""
    inputs, targets = torch.tensor(words.inputs), torch.tensor(words.targets)
    torch.manual_seed(CONFIG.seed)
    model = Words().create_model()
    optimizer = torch.optim.SGD(model.parameters(), CONFIG.learning_rate, momentum=CONFIG.momentum)
    losses, first = [], dict[str, Tensor]()
    for indices, *_ in ShardedBatchSampler(len(words), CONFIG.batch_size, seed=CONFIG.seed, pass_number=0):
        loss = F.cross_entropy(model(inputs[indices]).transpose(1, 2), targets[indices], ignore_index=-1)
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=False)
        if not loss.isnan():
            loss.backward()  # type: ignore[no-untyped-call]
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return first, losses


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_losses_are_those_of_the_mean_over_all_tokens(runs: Path, case: str, world_size: int) -> None:
    gradients, losses = train_plainly(words_of(case))
    found = load_file(runs / f"{case}-{world_size}")
    assert all(torch.allclose(found[name], value, atol=1e-6, rtol=1e-6) for name, value in gradients.items())
    if case != "clipped":
        found_losses = json.loads((runs / f"{case}-{world_size}.json").read_text())
        assert found_losses == pytest.approx(losses, rel=1e-5, nan_ok=True)


def test_a_batch_without_weight_has_a_gradient_of_zero() -> None:
    split, seen = Split(words_of("a batch without words")), list[float]()

    def note(state: TrainingState) -> None:
        seen.append(float(nn.utils.get_total_norm(p.grad for p in state.model.parameters() if p.grad is not None)))

    state = create_state(Words(), CONFIG, len(split), Group())
    Trainer(Words(), state, split, CONFIG, Group(), [Hooks(on_gradients=note)]).train()
    assert [number for number, norm in enumerate(seen) if norm == 0] == [2]
    assert len(seen) == 7


def test_chunks_give_the_same_bits_for_any_number_of_ranks(runs: Path) -> None:
    for case in ("reproducible", "reproducible, a batch without words"):
        one, *others = (load_file(runs / f"{case}-{world_size}") for world_size in WORLD_SIZES)
        for other in others:
            assert all(torch.equal(other[name], value) for name, value in one.items())


def test_a_mean_of_the_slices_means_would_be_another_loss() -> None:
    words = few_words()
    _, _, losses = trained("plain", Group())
    counts = Words().weights(torch.tensor(words.targets))
    assert counts.float().std() > 2
    first = next(iter(ShardedBatchSampler(len(words), CONFIG.batch_size, seed=CONFIG.seed, pass_number=0))).indices
    torch.manual_seed(CONFIG.seed)
    model, inputs, targets = Words().create_model(), torch.tensor(words.inputs), torch.tensor(words.targets)
    halves = [
        F.cross_entropy(model(inputs[half]).transpose(1, 2), targets[half], ignore_index=-1)
        for half in np.array_split(first, 2)
    ]
    assert abs(torch.stack(halves).mean().item() - losses[0]) > 1e-3


def test_an_evaluation_is_the_mean_over_all_tokens_however_it_is_cut() -> None:
    words, model = few_words(251), Words().create_model()
    whole = evaluate(Words(), model, Split(words), CONFIG)
    parts = [evaluate(Words(), model, Split(words).between(start, start + 100), CONFIG) for start in (0, 100, 200)]
    logits = model(torch.tensor(words.inputs))
    expected = F.cross_entropy(logits.transpose(1, 2), torch.tensor(words.targets), ignore_index=-1).item()
    right = (logits.argmax(2) == torch.tensor(words.targets)).sum() / (words.targets >= 0).sum()
    assert Evaluation.merge(parts).values(Words()) == whole.values(Words())
    assert whole.values(Words()) == pytest.approx({"loss": expected, "right": right.item()}, rel=1e-6)


class Classes(Classification):
    def create_model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def weights(self, targets: Tensor) -> Tensor:
        return torch.tensor([0.2, 3.0, 1.0])[targets.long()]


class WeightedClasses(Classes):
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


def test_weights_without_a_loss_that_multiplies_by_them_are_refused_before_the_start() -> None:
    split = Split(Arrays(np.ones((16, 4), np.float32), np.arange(16) % 3))
    workload = Classes(metadata={"class_names": [0, 1, 2]})
    with pytest.raises(UsageError, match=r"^Classes has weights, so it needs a loss that .*; return super\(\)"):
        try_batch(workload, split, CONFIG, [16], Fraction(1))


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_weights_that_cannot_be_divided_by_end_the_training(value: float) -> None:
    class Spoiled(Words):
        def weights(self, targets: Tensor) -> Tensor:
            return torch.full((len(targets),), value)

    split = Split(few_words())
    state = create_state(Spoiled(), CONFIG, len(split), Group())
    with pytest.raises(TrainingStoppedError, match=r"^Spoiled\.weights: one in step 1 of epoch 1 is negative"):
        Trainer(Spoiled(), state, split, CONFIG, Group()).train()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            lambda targets: torch.zeros(len(targets)),
            r"Spoiled\.weights must be finite numbers from 0, not all of them 0",
        ),
        (lambda targets: -torch.ones(len(targets)), r"Spoiled\.weights must be finite numbers from 0"),
        (lambda targets: torch.ones(len(targets), 2), r"Spoiled\.weights must be one number per example, \(16,\)"),
    ],
)
def test_wrong_weights_are_refused_before_the_start(weights: Any, message: str) -> None:
    class Spoiled(Words):
        def weights(self, targets: Tensor) -> Tensor:
            result: Tensor = weights(targets)
            return result

    with pytest.raises(UsageError, match=message):
        try_batch(Spoiled(), Split(few_words(16)), CONFIG, [16], Fraction(1))
