import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.order import part_of
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.reproducible import Chunks, Subtree, added_up, check_arithmetic
from mnist_ray.training.step import Step
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Regression, Workload
from tests.conftest import mnist
from tests.ranks import WORLD_SIZES, Hooks, call_on_ranks, joined


class Noisy(MNIST):
    """Has everything that could differ between ranks: dropout, augmentation, batch norm, a constant buffer."""

    def create_model(self) -> nn.Module:
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.3), nn.Linear(30, 10)
        )
        model.register_buffer("constant", torch.rand(7, dtype=torch.float64))
        return model

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        prepared = super().prepare(inputs, generator)
        return prepared if generator is None else prepared + 0.1 * torch.rand(prepared.shape, generator=generator)


class LargeTargets(Regression):
    """Which number does the image show, far from 0? The explained variance is a difference of large numbers."""

    def create_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 1))

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return inputs / 255

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets + 1e4)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return super().measure(outputs, targets + 1e4)


class Weighted(Noisy):
    """Some examples have no weight."""

    def weights(self, targets: Tensor) -> Tensor:
        return targets % 3

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * self.weights(targets)


CONFIG = TrainConfig(
    precision="fp32",
    num_epochs=2,
    batch_size=50,
    learning_rate=2e-3,
    lr_schedule="one-cycle",
    validation_size=0,
    reproducible=True,
)
# 120 examples: the last batch of each epoch has 20, in chunks of 2 and 3, or of 3 and 4.
CASES: dict[str, tuple[Callable[[], Workload], TrainConfig]] = {
    "cnn": (mnist, CONFIG),
    "bf16": (mnist, replace(CONFIG, precision="bf16")),
    "noisy": (Noisy, CONFIG),
    "six chunks": (mnist, replace(CONFIG, num_chunks=6)),
    "fewer examples than chunks": (mnist, replace(CONFIG, batch_size=7)),
    "large targets": (LargeTargets, CONFIG),
    "weights": (Weighted, CONFIG),
}


def train_here(case: str, split: Arrays, group: Group) -> tuple[dict[str, Tensor], list[float]]:
    """Return a case's trained weights and buffers, and the losses of its steps with the metrics of its epochs."""
    create, config = CASES[case]
    state = create_state(create(), config, len(split), Group())
    figures: list[float] = []
    hooks = Hooks(
        on_progress=lambda state, progress: figures.extend(progress.losses),
        on_epoch=lambda state, progress: figures.extend(progress.so_far.values()),
    )
    Trainer(create(), state, Split(split), config, group, [hooks]).train()
    return {name: value.contiguous() for name, value in state.model.state_dict().items()}, figures


def train_cases(rank: int, split: Arrays, folder: Path) -> None:
    for world_size in WORLD_SIZES:
        if rank < world_size:
            with joined(rank, world_size, folder / f"store-{world_size}") as group:
                for case in CASES:
                    weights, figures = train_here(case, split, group)
                    kept = {**weights, "figures": torch.tensor(figures, dtype=torch.float64)}
                    save_file(kept, folder / f"{case}-{world_size}-{rank}")


@pytest.fixture(scope="module")
def trained(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory, few_images: Arrays) -> Path:
    folder = tmp_path_factory.mktemp("chunks")
    call_on_ranks(ranks, train_cases, Arrays(few_images.inputs[:120], few_images.targets[:120]), folder)
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("case", CASES)
def test_weights_buffers_and_metrics_have_the_same_bits_on_any_number_of_ranks(
    trained: Path, case: str, world_size: int
) -> None:
    alone = load_file(trained / f"{case}-1-0")
    for rank in range(world_size):
        together = load_file(trained / f"{case}-{world_size}-{rank}")
        for name, value in alone.items():
            assert torch.equal(together[name], value), (rank, name)


def test_measures_are_added_up_in_double(few_images: Arrays) -> None:
    """Variances of a few units, of targets around 10⁴, would otherwise be rounding errors."""
    split, of_epochs = Arrays(few_images.inputs[:120], few_images.targets[:120]), list[float]()
    create, config = CASES["large targets"]
    for is_reproducible in (True, False):
        config = replace(config, learning_rate=1e-30, num_epochs=1, reproducible=is_reproducible)
        state = create_state(create(), config, len(split), Group())
        hooks = Hooks(on_epoch=lambda state, progress: of_epochs.append(1 - progress.so_far["r2"]))
        Trainer(create(), state, Split(split), config, Group(), [hooks]).train()
    assert of_epochs[0] == pytest.approx(of_epochs[1], rel=1e-6)


def test_buffers_change_by_the_mean_of_the_chunks_changes(few_images: Arrays) -> None:
    create, config = CASES["noisy"]
    split = Arrays(few_images.inputs[:50], few_images.targets[:50])
    state = create_state(create(), replace(config, num_epochs=1), 50, Group())
    unchanged = {
        "mask": torch.tensor([-math.inf, 0.0]),
        "rotary": torch.polar(torch.ones(3), torch.arange(3.0)),
        "large": torch.tensor(2**60 + 1),
    }
    for name, value in unchanged.items():
        state.model.register_buffer(name, value.clone())
    before = {name: value.clone() for name, value in state.model.named_buffers()}
    Trainer(create(), state, Split(split), replace(config, num_epochs=1), Group()).train()
    after = dict(state.model.named_buffers())
    assert after["2.num_batches_tracked"] == 1
    for name in ("constant", *unchanged):
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["2.running_mean"], before["2.running_mean"])


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_step_begins_with_the_buffers_that_a_callback_has_set(is_in_place: bool) -> None:
    model: Any = nn.BatchNorm1d(1)
    chunks = Chunks(model, Group(), 4, lambda: None)
    micro_batches = [MicroBatch(torch.zeros(1), torch.zeros(1), 1, 4)] * 4
    for mean in (3.0, 5.0):
        model.running_mean.fill_(mean)
        seen = []
        for chunk, micro_batch in chunks.plan(micro_batches):
            seen.append(float(model.running_mean))
            with chunks.accumulate(micro_batch):
                moved = model.running_mean + chunk
                if is_in_place:
                    model.running_mean.copy_(moved)
                else:
                    model.running_mean = moved
        chunks.finish()
        assert (seen, float(model.running_mean)) == ([mean] * 4, mean + 1.5)


class Normalized(Regression):
    def create_model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 1))


@pytest.mark.parametrize("num_chunks", [3, 8])
def test_fillers_do_not_count_in_running_statistics(num_chunks: int) -> None:
    inputs = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)
    config = TrainConfig(precision="fp32", num_epochs=1, batch_size=3, reproducible=True, num_chunks=num_chunks)
    state = create_state(Normalized(), config, 3, Group())
    Trainer(Normalized(), state, Split(Arrays(inputs, np.zeros(3))), config, Group()).train()
    normalization: Any = state.model.get_submodule("0")
    assert normalization.running_mean.item() == pytest.approx(0.1 * inputs.mean())
    step = Step(Normalized(), state, replace(config, reproducible=False), Group())
    filler = MicroBatch(torch.tensor(inputs[:1]), torch.zeros(1), 1, 3, is_filler=True)
    before = normalization.running_mean.item()
    with step.on([filler]):
        Normalized().training_step(step)
    assert normalization.running_mean.item() == before


def test_machines_with_other_arithmetic_are_refused_and_the_difference_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [("first", {"processor": ["x86_64", "avx2"]}), ("second", {"processor": ["x86_64", "avx2", "avx512f"]})]

    monkeypatch.setattr(Group, "gathered", lambda group, own: others)
    with pytest.raises(TrainingStoppedError, match="first and second differ in processor"):
        check_arithmetic(Group(0, 2))
    others[1] = others[0]
    check_arithmetic(Group(0, 2))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 6, 8, 12, 16])
def test_partial_sums_of_any_ranks_add_up_to_the_same_bits(num_chunks: int) -> None:
    vectors = torch.from_numpy(np.random.default_rng(num_chunks).standard_normal((num_chunks, 1000), np.float32))

    def of(chunks: Sequence[int]) -> list[Subtree]:
        return added_up(Subtree(0, chunk, vectors[chunk]) for chunk in chunks)

    whole = of(range(num_chunks))
    for world_size in range(1, num_chunks + 1):
        ranks = [of(part_of(num_chunks, rank, world_size)) for rank in range(world_size)]
        together = added_up(node for nodes in ranks for node in nodes)
        assert [node[:2] for node in together] == [node[:2] for node in whole]
        for node, other in zip(together, whole, strict=True):
            assert torch.equal(node.vector, other.vector)
    assert len(whole) == num_chunks.bit_count()
    torch.testing.assert_close(sum(node.vector for node in whole), vectors.sum(0))
